"""The exponential moving average of a student's trainable weights, as a model: the mean teacher (Tarvainen and Valpola 2017, arXiv
1703.01780), for self-distillation.
"""

import torch
from torch import Tensor

from ..errors import UserError
from .model import Model
from .parts import local
from .sharding import is_sharded, reshard, sharded_copy
from .shared_weights import copy_sharing_weights


def copy_of(student: Model, setting: str) -> Model:
    """A frozen copy of the student in eval mode. Weights that train are copied; everything else is the same tensors.

    UserError for weights that train in 16 bit, where an average would lose small steps. `setting`: its name, for messages.
    """
    narrow = [name for name, p in student.trainable().items() if p.dtype in (torch.bfloat16, torch.float16)]
    if narrow:
        raise UserError(
            f"{setting}: {len(narrow)} tensors, such as {narrow[0]}, train in 16 bit, where an average loses small steps; set student.dtype: float32, with "
            "student.mixed_precision: bf16 for speed"
        )
    if is_sharded(student.model):
        model = sharded_copy(student.model, setting.removesuffix(".ema"))
    else:
        model = copy_sharing_weights(student.model, trained=False)
    return type(student)(model, student.head.vocab, student.adapter, autocast=student.autocast).requires_grad_(False).eval()


class Average:
    """Updates a copy of the student after each optimizer step: average <- decay average + (1 - decay) student."""

    def __init__(self, student: Model, copy: Model, decay: float):
        reshard(copy.model)  # the startup checks left it gathered
        theirs = dict(copy.model.named_parameters())
        self.pairs = {name: (p, theirs[name]) for name, p in student.trainable().items()}
        self.copy, self.decay = copy, decay

    @property
    def weights(self) -> dict[str, Tensor]:
        """The averaged weights, by the names of the student's."""
        return {name: average for name, (_, average) in self.pairs.items()}

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Update after every step of `optimizer` from now on, except steps that are skipped because they are not finite."""
        optimizer.register_step_post_hook(lambda stepped, *_: self._update(getattr(stepped, "found_inf", None)))

    @torch.no_grad()
    def _update(self, found_inf: Tensor | None) -> None:
        """`found_inf`: a scalar on the device, 1 if a fused optimizer skipped its step."""
        reshard(self.copy.model)
        for own, average in ((local(p), local(q)) for p, q in self.pairs.values()):
            new = 1 - self.decay if found_inf is None else ((1 - self.decay) * (1 - found_inf.double())).to(average.device, average.dtype)
            average.lerp_(own, new)
