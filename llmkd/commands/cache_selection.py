"""The teachers and examples that `llmkd cache` works on. Mistakes in them are found before a model is loaded."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..config.fields import with_setting_names
from ..config.recipe import Recipe, Teacher
from ..config.teacher import CACHE_KINDS, Cache
from ..data.examples import Examples, concat
from ..errors import UserError
from ..output.run_folder import refuse_unwritable
from ..teachers import resolve
from ..teachers.cache.import_lines import refuse_unreadable
from ..teachers.resolve import TeacherSource
from ..training.prepare import Prepared, check_early, prepare

#: The problem with a recipe that names no cache.
MISSING = "teacher.cache.path: not given; name the folder of the cache, such as --teacher.cache.path runs/cache"


def refuse_without_cache(recipe: Recipe) -> None:
    """UserError if a recipe names no cache, or uses no teacher. Reads the settings only."""
    if not any(teacher.cache for _, teacher in with_setting_names(recipe.teacher, "teacher")):
        raise UserError(MISSING)
    _refuse_without_teacher(recipe)


def _refuse_without_teacher(recipe: Recipe) -> None:
    if not recipe.loss.kd_ratio:
        raise UserError("loss.kd_ratio: found 0, with which no teacher is used; leave it out here")


def check_stage_caches(recipe: Recipe, stages: dict[str, Recipe]) -> None:
    """UserError if a recipe expects a cache to have another kind or other options than those with which an earlier stage writes it.

    stages   the recipes of the stages that write caches, by the stage's name
    """
    written: dict[str, tuple[str, dict[str, object]]] = {}  # by path: the stage, and what its cache will hold
    for name, stage in stages.items():
        for _, by in with_setting_names(stage.teacher, "teacher"):
            if by.cache:
                kind = by.cache.kind or ("hidden" if stage.task == "classification" else "topk")
                written[by.cache.path] = name, {"kind": kind} | by.cache.options(kind)
    problems = []
    for setting, teacher in with_setting_names(recipe.teacher, "teacher"):
        if teacher.cache and teacher.cache.path in written:
            name, form = written[teacher.cache.path]
            for key, value in vars(teacher.cache).items():
                then = form.get(key, f"kind {form['kind']}")
                if key != "path" and value not in (None, "auto", then) and then != "auto":
                    problems.append(
                        f"{setting}.cache.{key}: found {value}, and stage {name} writes {teacher.cache.path} with {then}; leave it out, or change one of them"
                    )
    if problems:
        raise UserError(*problems)


def select_teachers(
    recipe: Recipe, wanted: Callable[[Teacher], object], missing: str, import_file: str | None = None
) -> tuple[Prepared, list[TeacherSource]]:
    """The recipe's data, and the teachers for which `wanted` is true. UserError, with the text `missing`, if there is none.

    All mistakes are found here, before a model is loaded.
    """
    named = with_setting_names(recipe.teacher, "teacher")
    if not any(wanted(teacher) for _, teacher in named):
        raise UserError(missing)
    for setting, teacher in named:
        if wanted(teacher) and not teacher.model and not teacher.server and not import_file:
            raise UserError(f"{setting}.model: not given; name the teacher whose outputs {teacher.cache.path} is to hold")
    if recipe.data.streaming:
        raise UserError("data.streaming: found true, and a teacher cache needs all rows beforehand; set it to false")
    _refuse_without_teacher(recipe)
    for setting, teacher in named:
        if teacher.cache and wanted(teacher):
            check_cache_settings(teacher.cache, f"{setting}.cache")
    if import_file and not Path(import_file).exists():
        raise UserError(f"--import: {import_file}: no such file; name the file of log-probabilities, or a folder of Parquet files")
    if import_file:
        check_import([(f"{setting}.cache", teacher.cache) for setting, teacher in named if wanted(teacher)], Path(import_file))
    check_early(recipe)
    prepared = prepare(recipe, open_caches=False)
    sources = [source for source in prepared.teachers if wanted(source.settings)]
    for source in sources:
        if source.settings.cache and not len(teacher_examples(prepared, source, recipe.data.validation_fraction)):
            raise UserError(f"{source.setting}: no data source uses this teacher, so its cache would be empty; leave its cache out")
    return prepared, sources


def check_import(caches: list[tuple[str, Cache]], file: Path) -> None:
    """UserError if a file of log-probabilities cannot become the recipe's one cache. Reads every line of it."""
    if len(caches) > 1:
        raise UserError(f"--import: writes the cache of one teacher, and {len(caches)} have one; leave the others out")
    ((setting, cache),) = caches
    if cache.kind not in (None, "topk"):
        raise UserError(f"{setting}.kind: found {cache.kind}, and imported log-probabilities are of kind topk; use topk, or leave it out")
    refuse_unreadable(file)


def check_cache_settings(cache: Cache, setting: str) -> None:
    """UserError for an option that needs another `kind` than the default where none is given, and for a path that cannot be written."""
    if cache.kind is None:
        for kind, options in CACHE_KINDS.items():
            for name in options:
                if name not in CACHE_KINDS["topk"] and getattr(cache, name) is not None:
                    raise UserError(
                        f"{setting}.{name}: is of kind {kind}, and kind is not given, which is topk; set {setting}.kind: {kind}"
                    )
    refuse_unwritable(Path(cache.path).expanduser(), f"{setting}.path")


def teacher_examples(prepared: Prepared, source: TeacherSource, validation_fraction: float) -> Examples:
    """All examples, training and held-out, for which a run needs this teacher, in the order of the rows: first data.train, then
    data.validation."""
    parts = [examples for examples in (prepared.train, prepared.validation) if examples is not None]
    first_row = [0, 0 if validation_fraction else sum(origin["rows"] for origin in prepared.origins["data.train"])]
    whole = concat(parts, first_row[: len(parts)], {})
    mine = resolve.examples_of(whole, prepared.teachers.index(source))
    return whole.take(mine[np.argsort(whole.row[mine], kind="stable")])


def shard_plan(examples: Examples, bytes_per_target: int):
    from ..teachers.cache.shards import ShardPlan

    return ShardPlan.of([examples.content_hash(i) for i in range(len(examples))], examples.num_targets.tolist(), bytes_per_target)
