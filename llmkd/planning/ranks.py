"""Simulates one of several ranks in a single process: its collectives have the right sizes, but move no data."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from ..config.recipe import Recipe, used_teachers
from ..config.sharding import sharded_student, sharded_teacher
from ..errors import UserError
from ..models import sharding
from ..models.language_model import LanguageModel
from ..training import parallel
from . import live_memory
from .step import OneProcess


class Ranks(OneProcess):
    """The first of `num_processes` ranks."""

    def __init__(self, device: torch.device | str, count: int, mesh=None):
        super().__init__(device)
        self.num_processes, self.mesh = count, mesh

    def reduce(self, tensor: Tensor, how: str) -> Tensor:
        return tensor

    def strategy(self, recipe: Recipe) -> parallel.Replicated:
        """The strategy with which the ranks hold the students."""
        return parallel.Sharded(self.mesh) if self.mesh and sharded_student(recipe.train) else parallel.REPLICATED

    def shard(self, recipe: Recipe, setting: str, model: LanguageModel) -> None:
        one = dict(used_teachers(recipe)).get(setting)
        asked = sharded_teacher(recipe.train, one) if one else sharded_student(recipe.train)
        if self.mesh and asked and not sharding.is_sharded(model.model):
            sharding.shard(model.model, self.mesh, setting)


@contextlib.contextmanager
def fake_ranks(count: int) -> Iterator[Ranks]:
    """The first of `count` ranks. To be entered before a fake mode."""
    if count == 1:
        yield Ranks("cpu", 1)
        return
    import torch.distributed as dist
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

    # Oddity: this process group is for torch's own tests; no other one works without other processes.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("--processes: a plan runs in one process, but this is one of several; start it without a launcher")
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    changes = [(sharding, "info", lambda text: None)]
    for name in ("alloc_storage", "free_storage"):  # FSDP2 resizes storages with them, without an operation
        changes += [(owner, name, _told(getattr(_fsdp_param, name))) for owner in (_fsdp_param, _fsdp_param_group) if hasattr(owner, name)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        stack.callback(dist.destroy_process_group)
        ranks = Ranks("cpu", count)
        ranks.mesh = parallel.mesh_of(ranks)
        for owner, name, new in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, new)
        yield ranks


def _told(own):
    def resize(tensor: Tensor) -> None:
        own(tensor)
        live_memory.resized(tensor)

    return resize


def strategies(recipe: Recipe) -> Iterator[dict[str, str]]:
    """The ways to shard the models, as settings; with those of teachers if any is loaded."""
    loaded = [setting for setting, one in used_teachers(recipe) if one.cache is None and not one.server]
    for student in ("none", "full"):
        for teacher in ("none", "full") if loaded else (None,):
            yield {"train.shard": student} | ({f"{setting}.shard": teacher for setting in loaded} if teacher else {})
