"""Students and teacher as the training loop has them, without values: for a step on fake tensors."""

import dataclasses
from collections.abc import Sequence

from ..config.features import feature_teacher
from ..config.recipe import Recipe, Teacher, distils, divergences_of
from ..losses.terms import Term
from ..model_folder.files import loaded_dtype
from ..models.language_model import LanguageModel
from ..models.shared_weights import copy_sharing_weights
from ..signals import NO_TAPS
from ..teachers.cache.records import HiddenFormat
from ..teachers.live import LiveTeacher
from ..teachers.mixture import combine_teachers
from ..training.attention import attention_terms, enable_attention
from ..training.auto_batch import chunk_rows
from ..training.build import build_student, longest_row, teacher_taps
from ..training.features import feature_terms
from .cache_records import RecordsWithoutValues, format_of
from .devices import CONTEXT
from .find import Found
from .live_memory import local
from .model_configs import ModelConfig
from .models import Depth, build_students, build_teacher, empty_model
from .step import ON_CPU, OneProcess, Ready


def build(
    recipes: Sequence[Recipe],
    found: Found,
    depth: Depth,
    of_teachers: list[int],
    memory: float | None,
    gpu: bool,
    accelerator: OneProcess = ON_CPU,
) -> Ready:
    """Students and teacher without values, in a fake mode: as `training.build.build_setup` makes them.

    gpu          with a GPU's chunks of the head
    accelerator  with the device of the fake tensors, and the other ranks
    """
    recipe, device = recipes[0], accelerator.device
    packing = recipe.data.packing * longest_row(recipe.train, recipe.data)
    teachers, models, live, elsewhere, base = {}, [], {}, set(), None
    learn = any(map(distils, recipes))
    for setting, one, config in found.teachers:
        if one.cache is not None or one.server:
            format = format_of(one, setting, found.vocab, config)
            if isinstance(format, HiddenFormat):
                models.append(format.head.on(device).project)
            teachers[setting] = RecordsWithoutValues(format, device)
            continue
        layers, shared = of_teachers.pop(0), None
        if base is None and _shares(recipe, found.student, one, config) and layers == depth.layers:
            base = empty_model(found.student.config, "student.model", one.dtype, one.attention, layers)
            shared = copy_sharing_weights(base)
        model = build_teacher(one, config, setting, found.vocab, layers, packing, shared)
        if one.device:
            elsewhere.add(id(model))
        models.append(model)
        live[setting] = model
    students = build_students([one.student for one in recipes], found.students, found.vocab, depth, packing, base)
    for setting, model in [*live.items(), *(("student", one) for one in students)]:
        accelerator.shard(recipe, setting, model)
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


def _terms(recipe: Recipe, student: LanguageModel, live: dict[str, LanguageModel]) -> list[Term]:
    """The terms that need the models; as a run looks for what it reads inside them."""
    features, attention = recipe.loss.features, recipe.loss.attention
    if attention:
        ((setting, teacher),) = live.items()  # there is one only
        enable_attention(attention, student, teacher, setting, recipe.data.packing)
    terms = feature_terms(features, feature_teacher(features, recipe.teacher), student, live, recipe.seed)
    return [*terms, *attention_terms(attention, student, list(live.values()))]


def work_steps(recipe: Recipe) -> int:
    """Steps enough for every schedule: which step it is changes no shape."""
    return recipe.train.max_steps or 1_000_000


def _shares(recipe: Recipe, student: ModelConfig, teacher: Teacher, config: ModelConfig) -> bool:
    """Whether teacher and student hold one base in memory once: in the same form. Of two forms a run also shares the tensors that are equal."""
    mine, same = recipe.student, student.base == config.base
    form = (loaded_dtype(student.config, mine.dtype), mine.attention, mine.quantization)
    theirs = (loaded_dtype(config.config, teacher.dtype), teacher.attention, teacher.quantization)
    return same and form == theirs and mine.method == "lora" and teacher.share_base and not teacher.device and not teacher.is_transformed
