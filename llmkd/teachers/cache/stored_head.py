"""The teacher's head in a cache of its hidden states: taken from a live model, written to the folder, and rebuilt from it."""

import copy
import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ...errors import UserError
from ...head import Head, Passed

FILE = "head.safetensors"


@dataclass(frozen=True)
class StoredHead:
    """`weights`: "weight" [V, H] and, if there is one, "bias" [V], cut to the real vocabulary. scale and softcap as in `Head`."""

    weights: dict[str, Tensor]
    scale: float
    softcap: float | None
    _made: dict = field(default_factory=dict, compare=False)  # a Head for each device

    @staticmethod
    def of(head: Head) -> "StoredHead":
        return StoredHead(effective(head), head.scale, head.softcap)

    @staticmethod
    def read(folder: Path, options: dict) -> "StoredHead":
        # copies, since the file is memory-mapped: a later change of it would change the weights
        weights = {name: value.clone() for name, value in load_file(Path(folder) / options["file"]).items()}
        return StoredHead(weights, options["scale"], options["softcap"])

    def content(self) -> bytes:
        """The bytes of the file in the cache's folder."""
        return save(self.weights)

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content()).hexdigest()

    def options(self) -> dict:
        return {"file": FILE, "sha256": self.sha256, "scale": self.scale, "softcap": self.softcap}

    def on(self, device) -> Head:
        """A frozen head on that device."""
        device = torch.device(device)
        if device not in self._made:
            weight, bias = self.weights["weight"], self.weights.get("bias")
            with torch.device("meta"):
                project = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            project.weight = nn.Parameter(weight.to(device), requires_grad=False)
            if bias is not None:
                project.bias = nn.Parameter(bias.to(device), requires_grad=False)
            self._made[device] = Head(project, weight.shape[0], self.scale, self.softcap)
        return self._made[device]


@torch.no_grad()
def effective(head: Head, block: int = 256) -> dict[str, Tensor]:
    """The weight [V, H] and, if it is not 0, the bias [V] that a head applies, on the CPU.

    For a plain Linear its own, in its dtype. For a head with an adapter or quantised weights, its outputs for the unit vectors, in at
    least float32: these are exact, while the live model rounds its product to its dtype.
    """
    project = head.project
    if isinstance(project, Passed):
        return {"weight": torch.eye(head.vocab)}  # the product with it is exact
    if isinstance(project, nn.Identity):
        raise UserError(
            "teacher.cache.kind: found hidden, and this teacher's head is not a matrix that could be stored; use topk or sampled"
        )
    if type(project) is nn.Linear:
        found = {"weight": project.weight, "bias": project.bias}
        return {name: x.detach()[: head.vocab].cpu().contiguous() for name, x in found.items() if x is not None}
    held, width = project.weight, getattr(project, "in_features", None) or project.weight.shape[1]
    dtype = torch.promote_types(held.dtype, torch.float32) if held.is_floating_point() else torch.float32
    if held.is_floating_point():
        project = copy.deepcopy(project).to(dtype)
    zero_1H = torch.zeros(1, width, dtype=dtype, device=held.device)
    bias_V = project(zero_1H)[0, : head.vocab].to(dtype)
    weight_VH = torch.empty(len(bias_V), width, dtype=dtype)
    for start in range(0, width, block):
        unit_bH = torch.zeros(min(block, width - start), width, dtype=dtype, device=held.device)
        unit_bH[:, start:].fill_diagonal_(1)
        weight_VH[:, start : start + len(unit_bH)] = (project(unit_bH)[:, : head.vocab].to(dtype) - bias_V).T.cpu()
    return {"weight": weight_VH} | ({"bias": bias_V.cpu()} if bias_V.any() else {})
