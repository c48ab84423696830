"""How the processes of a run hold its models: each the whole model, with DDP, or sharded, with FSDP2 (torch's `fully_shard`).

This file decides when gradients are exchanged and what is gathered for checkpoints and the finished student; `models/sharding.py` decides
where a model is cut. The loop, the losses and the teachers do not depend on either.
"""

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..console import info
from ..errors import UserError
from ..models.language_model import LanguageModel
from ..models.parts import local, whole
from ..models.sharding import outline_of, reshard
from .checkpoint import Snapshot, snapshot

if TYPE_CHECKING:
    from .loop import StudentState


class Replicated:
    """Every process holds the whole student: a single process, or DDP."""

    #: Whether a process can take a snapshot without the others.
    alone = True

    mesh = None  # of a sharded student

    def hold(self, students: Iterable[LanguageModel]) -> None:
        """Check the loaded students. UserError for one that cannot be held in this way."""

    def hold_terms(self, terms: Iterable[nn.Module]) -> None:
        """Prepare a student's loss terms, some of which have parameters. Call it before an optimizer takes those."""

    def wrap(self, distiller: nn.Module, accelerator) -> nn.Module:
        """The module to call in training: with several processes, `distiller` in DDP."""
        return accelerator.prepare_model(distiller)

    def exchanging(self, distiller: nn.Module, accelerator, now: bool) -> contextlib.AbstractContextManager:
        """A context for one forward and backward pass. With `now`, the processes exchange the gradients of this pass and those before it."""
        return contextlib.nullcontext() if now else accelerator.no_sync(distiller)

    def snapshot(self, state: "StudentState", first: bool) -> Snapshot | None:
        """The whole tensors of a checkpoint on the first process; None on the others."""
        return snapshot(state.kept, state.optimizer) if first else None

    def is_finite(self, state: "StudentState", accelerator) -> bool:
        """Whether the weights that train and the optimizer's state hold no inf or NaN."""
        return snapshot(state.kept, state.optimizer).is_finite()

    def to_write(self, student: LanguageModel, first: bool) -> LanguageModel | None:
        """The whole student, to be saved, on the first process; None on the others."""
        return student if first else None


REPLICATED = Replicated()


class Sharded(Replicated):
    """Every process holds a part of each weight, of its gradient and of the optimizer's state. All processes make each call together."""

    alone = False

    def __init__(self, mesh):
        self.mesh = mesh

    def hold(self, students: Iterable[LanguageModel]) -> None:
        for student in students:
            _refuse(student)

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

        # Until they are exchanged, every process holds whole gradients: those of a full student would not fit.
        now = now or distiller.student.adapter is None
        for one in (reshard(distiller.student.model), *distiller.terms.modules()):
            if isinstance(one, FSDPModule):
                one.set_requires_gradient_sync(now)
        return contextlib.nullcontext()

    def snapshot(self, state: "StudentState", first: bool) -> Snapshot | None:
        gathered = snapshot(state.kept, state.optimizer).each(lambda part: whole(part).cpu() if first else whole(part).new_empty(0))
        return gathered if first else None

    def is_finite(self, state: "StudentState", accelerator) -> bool:
        here = snapshot(state.kept, state.optimizer).each(local).is_finite()
        return int(accelerator.reduce(torch.tensor(int(here), device=accelerator.device), "sum")) == accelerator.num_processes

    def to_write(self, student: LanguageModel, first: bool) -> LanguageModel | None:
        reshard(student.model)
        student.set_active_adapter()
        empty_model, filled = outline_of(student.model), {}
        adapted = hasattr(student.model, "peft_config")  # then the base is not saved
        for (name, part), (own, empty) in zip(student.model.named_parameters(), empty_model.named_parameters(), strict=True):
            assert name == own
            if part.requires_grad or not adapted:
                value = whole(part.detach())
                filled[id(empty)] = nn.Parameter(value.cpu(), requires_grad=part.requires_grad) if first else None
        for module in empty_model.modules() if first else ():
            for name, p in module._parameters.items():
                module._parameters[name] = filled.get(id(p), p)
        return LanguageModel(empty_model, student.head.vocab, student.adapter, capabilities=student.capabilities) if first else None


def strategy_of(shard: str, accelerator) -> Replicated:
    """The strategy of `train.shard`: none or full."""
    if shard == "none":
        return REPLICATED
    if accelerator.num_processes == 1:
        info("train.shard: found full, with one process, which holds the whole student: nothing is sharded")
        return REPLICATED
    return Sharded(mesh_of(accelerator))


def sharded_models(strategy: Replicated, teachers: dict[str, bool], accelerator) -> dict[str, object]:
    """The mesh of each sharded model, by setting, for `LoadContext.sharded`. `teachers`: by setting, whether the recipe shards it."""
    asked = [setting for setting, wanted in teachers.items() if wanted and accelerator.num_processes > 1]
    mesh = strategy.mesh or (mesh_of(accelerator) if asked else None)
    return dict.fromkeys([*(["student"] if strategy.mesh else []), *asked], mesh)


def mesh_of(accelerator):
    """The device mesh of all processes, in one dimension."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def _refuse(student: LanguageModel) -> None:
    """UserError for a student with parameters that may get no gradient, on which the processes would wait for each other."""
    if unused := student.capabilities.parameters_without_gradient:
        raise UserError(
            f"train.shard: found full, but {len(unused)} trainable tensors, such as {unused[0]}, get no gradient from some batches, and the "
            "processes would wait for each other; set it to none"
        )
