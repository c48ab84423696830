"""How the processes of a run hold its models: whole, exchanging gradients by DDP, or sharded, by FSDP2 (torch's `fully_shard`).

When gradients are exchanged, what is gathered for a checkpoint and for the finished student is said here; where a model is cut, in
`models/sharding.py`. The loop, the losses and the teachers do not ask.
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
    """Every process holds the whole student: one process, or DDP."""

    #: Whether a process can take a snapshot without the others.
    alone = True

    mesh = None  # of a sharded student

    def hold(self, students: Iterable[LanguageModel]) -> None:
        """Take the students as they were loaded. UserError for one that cannot be held so."""

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

        now = now or distiller.student.adapter is None  # until they are exchanged gradients are whole: those of all weights would not fit
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
        adapted = hasattr(student.model, "peft_config")  # of which the base is not saved
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
    """How the students are held, by `train.shard`."""
    if shard == "none":
        return REPLICATED
    if accelerator.num_processes == 1:
        info("train.shard: full on one process, which holds everything itself")
        return REPLICATED
    return Sharded(mesh_of(accelerator))


def sharded_models(strategy: Replicated, teachers: dict[str, bool], accelerator) -> dict[str, object]:
    """`LoadContext.sharded`. `teachers`: whether each is to be sharded, by its setting."""
    asked = [setting for setting, wanted in teachers.items() if wanted and accelerator.num_processes > 1]
    mesh = strategy.mesh or (mesh_of(accelerator) if asked else None)
    return dict.fromkeys([*(["student"] if strategy.mesh else []), *asked], mesh)


def mesh_of(accelerator):
    """All processes in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def _refuse(student: LanguageModel) -> None:
    """UserError for a student whose gradients the processes could not exchange."""
    if unused := student.capabilities.parameters_without_gradient:
        raise UserError(
            f"train.shard: found full, and {len(unused)} trainable tensors, such as {unused[0]}, get no gradient from some batches, so that the "
            "processes would wait for each other; set it to none"
        )
