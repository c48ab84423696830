"""A few real steps on this machine, with which `llmkd plan --measure` compares a plan."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..batch import Batch
from ..config.recipe import Recipe, distils, divergences_of, used_teachers
from ..data.batch_source import Step
from ..errors import UserError
from ..models.load import LoadContext
from ..training.auto_batch import head_chunk_size
from ..training.build import load, longest_row, open_teacher, teacher_taps
from ..training.build_student import build_student, layer_terms
from ..training.loop import StepHooks, train
from ..training.prepare import Prepared, prepare
from .step import OneProcess, OneStep, Ready, watched_step
from .work import Work

STEPS = 3


@dataclass(frozen=True)
class RealSteps:
    """Measurements of steps with the largest micro-batch.

    peak      the peak of allocated bytes in a step: on a GPU those of its allocator, on a CPU the results of operations that are not yet freed
    seconds   the time of a step, the fastest of `STEPS`
    """

    peak: int
    seconds: float


def ready_here(recipes: Sequence[Recipe], prepared: Prepared, device: torch.device) -> Ready:
    """Students and teacher with their weights, like those of `training.build.build_setup`, but without servers."""
    recipe, accelerator = recipes[0], OneProcess(device)
    live = [(source.setting, source.settings) for source in prepared.teachers if source.needs_model]
    packing = recipe.data.packing * longest_row(recipe.train, recipe.data)
    context = LoadContext(prepared.vocab, device, recipe.seed, packing, kind=prepared.kind, find=prepared.files_of)
    own, attention = [prepared.resolved(one.student) for one in recipes], [one.loss.attention for one in recipes]
    students, models = load(own, live, context, recipe.data.share_prefixes, recipe.train.compile, attention)
    by_setting, states = {setting: model for (setting, _), model in zip(live, models, strict=True)}, []
    chunk = head_chunk_size(prepared.vocab, device, lambda said: None)
    for one, student in zip(recipes, students, strict=True):
        terms, divergences = layer_terms(one, student, by_setting), divergences_of(one.loss, one.data)
        states.append(build_student(one.loss, one.optim, student, prepared.source.total_steps, accelerator, chunk, terms, divergences))
    teacher = open_teacher(prepared.teachers, recipe.mixture, models, teacher_taps(recipes, states), device, {})
    elsewhere = frozenset(id(model) for (_, one), model in zip(live, models, strict=True) if one.device)
    return Ready(states, teacher if any(map(distils, recipes)) else None, students, models, elsewhere)


def real_steps(recipes: Sequence[Recipe], work: Work) -> RealSteps:
    """Memory and time of steps of the largest micro-batch on this machine's GPU, or else its CPU."""
    for setting, one in used_teachers(recipes[0]):
        if one.server and one.cache is None:
            raise UserError(
                f"--measure: the teacher is on a server ({setting}.server), to which a plan makes no requests; leave --measure out"
            )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ready = ready_here(recipes, prepare(recipes[0], others=recipes[1:]), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watched = [watched_step(ready, batch.to(device), gradients, OneProcess(device)) for batch, gradients in work.cases]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else max(one.peak for phases in watched for one in phases.values())
    return RealSteps(peak, min(times(ready, work.batch.to(device), device)))


def times(ready: Ready, batch: Batch, device: torch.device) -> Iterator[float]:
    """The seconds of some steps of one micro-batch."""
    hooks = StepHooks(wants_metrics=lambda step: True)  # so that the host waits for each step
    with contextlib.closing(train(_Again(batch), ready.students, ready.teacher, OneProcess(device), hooks=hooks)) as steps:
        before = time.perf_counter()
        for _ in steps:
            now = time.perf_counter()
            yield now - before
            before = now


class _Again(OneStep):
    """The same step several times."""

    total_steps = STEPS

    def __init__(self, batch: Batch):
        super().__init__([batch])

    def steps(self, done: int = 0) -> Iterator[tuple[Step, list[Batch]]]:
        for _ in range(STEPS):
            yield from super().steps(done)
