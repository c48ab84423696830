"""Builds students and teacher without values, as the training loop takes them, for a step on fake tensors."""

import dataclasses
from collections.abc import Sequence

from ..config.recipe import Recipe, distils, divergences_of
from ..losses.terms import Term
from ..models.encoder_states import keep_states
from ..models.model import Model
from ..models.shared_weights import deduplicate_weights
from ..signals import NO_TAPS
from ..teachers.cache.records import HiddenFormat
from ..teachers.live import LiveTeacher
from ..teachers.mixture import combine_teachers
from ..training.attention import enable_attention
from ..training.auto_batch import chunk_rows
from ..training.build import longest_row, teacher_taps
from ..training.build_student import build_student, layer_terms
from .cache_records import RecordsWithoutValues, format_of
from .devices import CONTEXT
from .find import Found
from .live_memory import local
from .models import Depth, build_students, build_teacher
from .quantized import share_scales
from .step import ON_CPU, OneProcess, Ready


def build(
    recipes: Sequence[Recipe],
    found: Found,
    depth: Depth,
    of_teachers: list[int | None],
    memory: float | None,
    gpu: bool,
    accelerator: OneProcess = ON_CPU,
) -> Ready:
    """Students and teacher without values, in a fake mode, like those of `training.build.build_setup`.

    depth        layers of the students
    of_teachers  layers of each live teacher; None for all
    memory       bytes of the device, for the head's chunks; None: enough
    gpu          whether the head has a GPU's chunks
    accelerator  has the device of the fake tensors, and the other ranks
    """
    recipe, device = recipes[0], accelerator.device
    packing = recipe.data.packing * longest_row(recipe.train, recipe.data)
    teachers, models, live, elsewhere = {}, [], {}, set()
    learn = any(map(distils, recipes))
    for setting, one, config in found.teachers:
        if one.cache is not None or one.server:
            format = format_of(one, setting, found.vocab, config, found.kind())
            if isinstance(format, HiddenFormat):
                models.append(format.head.on(device).project)
            teachers[setting] = RecordsWithoutValues(format, device)
            continue
        if one.ema is not None:
            continue
        live[setting] = build_teacher(one, config, setting, found.vocab, of_teachers.pop(0), packing, found.kind(f"{setting}.model"))
        if one.device:
            elsewhere.add(id(live[setting]))
    as_student = [one.student for one in recipes], found.students, found.vocab, depth, packing, found.kind()
    students = build_students(*as_student)
    for setting in found.averages:
        live[setting] = build_students(*as_student)[0].requires_grad_(False).eval()
    for setting, model in [*live.items(), *(("student", one) for one in students)]:
        accelerator.shard(recipe, setting, model)
    _share_bases(found, students[0], live)
    if recipe.student.keep_encoded:
        keep_states(students, live.items(), recipe.student.keep_encoded)
    models += live.values()
    strategy = accelerator.strategy(recipe)
    strategy.hold(students)
    chunk = None
    if gpu:
        held = sum(local(p).nbytes for model in (*students, *models) if id(model) not in elsewhere for p in model.parameters())
        chunk = chunk_rows(found.vocab, 0.9 * (memory - CONTEXT - held) if memory else 1e15)
    optim = dataclasses.replace(recipe.optim, name="adamw")
    states = []
    for one, student in zip(recipes, students, strict=True):
        terms, divergences = _terms(one, student, live), divergences_of(one.loss, one.data)
        states.append(build_student(one.loss, optim, student, work_steps(recipe), accelerator, chunk, terms, divergences, strategy))
    taps = teacher_taps(recipes, states)
    teachers |= {setting: LiveTeacher(model, taps.get(setting, NO_TAPS)) for setting, model in live.items()}
    settings = {setting: one for setting, one, _ in found.teachers}
    opened = [teachers[setting] for setting in settings]
    teacher = combine_teachers(opened, list(settings.values()), recipe.mixture) if opened and learn else None
    return Ready(states, teacher, students, models, frozenset(elsewhere))


def _terms(recipe: Recipe, student: Model, live: dict[str, Model]) -> list[Term]:
    """The terms that compare layers of the models, whose attention is made readable as in a run."""
    if recipe.loss.attention:
        ((setting, teacher),) = live.items()  # loss.attention allows one teacher only
        enable_attention(recipe.loss.attention, student, teacher, setting, recipe.data.packing)
    return layer_terms(recipe, student, live)


def work_steps(recipe: Recipe) -> int:
    """A number of steps that is enough for every schedule; shapes do not depend on it."""
    return recipe.train.max_steps or 1_000_000


def _share_bases(found: Found, student: Model, live: dict[str, Model]) -> None:
    """Keep equal weights of models of the same base once, as a run does, quantised ones with their scales. A teacher with a merged adapter has
    other weights than its base, and is counted as a whole."""
    base = found.student.cut_from or found.student.base
    on: dict[str, list[Model]] = {base: [student, *(live[setting] for setting in found.averages)]}
    for setting, one, config in found.live:
        if one.share_base and not one.device and not (config.adapter and one.merge_adapter):
            on.setdefault(config.base, []).append(live[setting])
    for models in on.values():
        bases = [model.base_model for model in models]
        deduplicate_weights(bases, without_values=True, named=found.student.has_as_its_base)
        share_scales(bases)
