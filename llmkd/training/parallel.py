"""How the processes of a run hold its models: whole, exchanging gradients by DDP, or sharded, by FSDP2 (torch's `fully_shard`).

All that depends on it is here: where a model is wrapped, when gradients are exchanged, what is gathered for a checkpoint and for the
finished student. The loop, the losses and the teachers do not ask.

Every layer is a unit, whose weights are gathered while it computes. The rest (embeddings, last norm, head) is the root's unit: gathered
when the body is called, and whole until the backward pass is over, so that the fused head finds a plain weight, and tied weights are one.
FSDP2 is called directly: Accelerate's preparation wants one model with its optimizer and a GPU, and has no place for a frozen teacher, nor
for a body that is called without its head.
"""

import contextlib
import copy
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..console import info
from ..errors import UserError
from ..models.families import BODY, decoder_of, layers_of
from ..models.language_model import LanguageModel
from .checkpoint import Snapshot, snapshot
from .parts import local, whole

if TYPE_CHECKING:
    from .loop import StudentState


class Replicated:
    """Every process holds the whole student: one process, or DDP."""

    #: Whether a process can take a snapshot without the others.
    alone = True

    def hold(self, students: Iterable[LanguageModel]) -> None:
        """Take the students as they were loaded. To be called before their parameters are asked for."""

    def hold_terms(self, terms: Iterable[nn.Module]) -> None:
        """Take a student's loss terms, some of which have parameters. To be called before these are asked for."""

    def wrap(self, distiller: nn.Module, accelerator) -> nn.Module:
        return accelerator.prepare_model(distiller)

    def exchanging(self, distiller: nn.Module, accelerator, now: bool) -> contextlib.AbstractContextManager:
        """For one forward and backward pass: the processes exchange gradients in it, with those of the passes before, or not `now`."""
        return contextlib.nullcontext() if now else accelerator.no_sync(distiller)

    def snapshot(self, state: "StudentState", first: bool) -> Snapshot | None:
        """What a checkpoint holds, whole, for the first process; None for the others."""
        return snapshot(state.kept, state.optimizer) if first else None

    def is_finite(self, state: "StudentState", accelerator) -> bool:
        """Whether what trains and the optimizer's state hold no inf or NaN."""
        return snapshot(state.kept, state.optimizer).is_finite()

    def to_write(self, student: LanguageModel, first: bool) -> LanguageModel | None:
        """The whole student for the first process, to be saved; None for the others."""
        return student if first else None


REPLICATED = Replicated()


class Sharded(Replicated):
    """Every process holds a part of each weight, of its gradient and of the optimizer's state. All processes make each call together."""

    alone = False

    def __init__(self, mesh):
        self.mesh = mesh
        self._outlines: dict[int, LanguageModel] = {}

    def hold(self, students: Iterable[LanguageModel]) -> None:
        for student in students:
            _refuse(student)
            self._outlines[id(student)] = _outline(student)
            shard(student, self.mesh, "train.shard")

    def hold_terms(self, terms: Iterable[nn.Module]) -> None:
        from torch.distributed.fsdp import fully_shard

        for term in terms:
            for module in term.modules():
                if list(module.parameters(recurse=False)):
                    fully_shard(module, mesh=self.mesh, reshard_after_forward=True)

    def wrap(self, distiller: nn.Module, accelerator) -> nn.Module:
        return distiller

    def exchanging(self, distiller: nn.Module, accelerator, now: bool) -> contextlib.AbstractContextManager:
        from torch.distributed.fsdp import FSDPModule

        for one in (_resharded(distiller.student), *distiller.terms.modules()):
            if isinstance(one, FSDPModule):
                one.set_requires_gradient_sync(now)
        return contextlib.nullcontext()

    def snapshot(self, state: "StudentState", first: bool) -> Snapshot | None:
        _resharded(state.distiller.student)
        gathered = snapshot(state.kept, state.optimizer).each(lambda part: whole(part).cpu() if first else whole(part).new_empty(0))
        return gathered if first else None

    def is_finite(self, state: "StudentState", accelerator) -> bool:
        _resharded(state.distiller.student)
        here = snapshot(state.kept, state.optimizer).each(local).is_finite()
        return int(accelerator.reduce(torch.tensor(int(here), device=accelerator.device), "sum")) == accelerator.num_processes

    def to_write(self, student: LanguageModel, first: bool) -> LanguageModel | None:
        _resharded(student)
        student.set_active_adapter()
        outline, filled = self._outlines[id(student)], {}
        adapted = hasattr(student.model, "peft_config")  # of which the base is not saved
        for (name, part), (own, empty) in zip(student.model.named_parameters(), outline.model.named_parameters(), strict=True):
            assert name == own
            if part.requires_grad or not adapted:
                value = whole(part.detach())
                filled[id(empty)] = nn.Parameter(value.cpu(), requires_grad=part.requires_grad) if first else None
        for module in outline.model.modules() if first else ():
            for name, p in module._parameters.items():
                module._parameters[name] = filled.get(id(p), p)
        return outline if first else None


def strategy_of(shard: str, accelerator) -> Replicated:
    """How the students are held, by `train.shard`."""
    if shard == "none":
        return REPLICATED
    if accelerator.num_processes == 1:
        info("train.shard: full on one process, which holds everything itself")
        return REPLICATED
    return Sharded(mesh_of(accelerator))


def mesh_of(accelerator):
    """All processes in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def shard_teachers(teachers: list[tuple[str, LanguageModel]], accelerator) -> None:
    """Shard frozen teachers, given with the names of their settings."""
    for setting, teacher in teachers if accelerator.num_processes > 1 else ():
        shard(teacher, mesh_of(accelerator), f"{setting}.shard")


def shard(model: LanguageModel, mesh, setting: str) -> None:
    """Shard a loaded model: from now on each process holds its part of every weight. Once for several students on one base."""
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    base, layers = model.base_model, layers_of(model.base_model)
    if isinstance(base, FSDPModule):
        return
    if layers is None:
        raise UserError(f"{setting}: found full, and {base.config.model_type} does not keep its layers in a list; set it to none")
    each = [{id(p) for p in layer.parameters()} for layer in layers]
    if sum(map(len, each)) > len(set().union(*each)):
        raise UserError(f"{setting}: found full, and layers of {base.config.model_type} have weights in common; set it to none")
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(base, mesh=mesh, reshard_after_forward=False)
    setattr(base, BODY, types.MethodType(lambda base, **inputs: decoder_of(base)(**inputs), base))
    register_fsdp_forward_method(base, BODY)
    parameters = list(model.parameters())
    held, every = (sum(size(p).nbytes for p in parameters) / 1e6 for size in (local, Tensor.detach))
    of = "student" if setting == "train.shard" else setting.removesuffix(".shard")
    info(f"{of}: sharded over {mesh.size()} processes, of which each holds {held:,.1f} of {every:,.1f} MB of weights")


def _resharded(student: LanguageModel) -> nn.Module:
    """The transformers model, all of it sharded again: a pass without a backward pass has left the root's weights whole."""
    student.base_model.reshard()
    return student.base_model


def _refuse(student: LanguageModel) -> None:
    """UserError for a student whose gradients the processes could not exchange."""
    if unused := student.capabilities.parameters_without_gradient:
        raise UserError(
            f"train.shard: found full, and {len(unused)} trainable tensors, such as {unused[0]}, get no gradient from some batches, so that the "
            "processes would wait for each other; set it to none"
        )
    if len(types_ := {p.dtype for p in student.trainable().values()}) > 1:
        found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types_))
        raise UserError(
            f"train.shard: found full, and the student trains tensors in {found}; set student.dtype: float32, or train.shard: none"
        )


def _outline(student: LanguageModel) -> LanguageModel:
    """A copy of a whole student without the values of its parameters (on torch's meta device)."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in student.parameters()}
    return copy.deepcopy(student, empty)
