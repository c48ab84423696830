"""Reads recipes, pipelines and sweeps from YAML and the command line, and writes them back. All problems are reported at once."""

import dataclasses
import json
import os
import re
import typing
from pathlib import Path

import yaml

from ..errors import UserError, fix_of
from ..files import NotAFile, read_file
from . import paths
from .dotted import flatten
from .fields import as_tuple, with_setting_names
from .overrides import override
from .recipe import MICRO_BATCH_SIZE, Lora, Recipe, Teacher, uses_teacher
from .schema import describe
from .served import key_problem
from .sweep import Pipeline, Stage, Sweep
from .validation import check, locator, renamed
from .yaml_loader import Dumper, parse_yaml

_MAX_BYTES = 1 << 20


def parse_overrides(words: list[str], options: tuple[str, ...] = ("config",)) -> dict[str, typing.Any]:
    """`--optim.lr 1e-4 --train.epochs=2` as {dotted path: value}. Values are read as YAML, except those of text settings and of `options`."""
    literal = {*options} | {path for path, type_, *_ in describe() if type_ in ("text", "text or null")}
    out, rest = {}, list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word}: not understood; settings are given as --section.name value (see --help)")
        path, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{path}: no value given; write --{path} VALUE")
            text = rest.pop(0)
        if path in out:
            raise UserError(f"--{path}: given twice; keep one")
        if not path:
            raise UserError(f"{word}: names no setting; settings are given as --section.name value (see --help)")
        if path in literal:
            out[path] = None if text == "null" else text
            continue
        value, _, problems = parse_yaml(text, f"--{path}")
        if problems:
            raise UserError(*problems)
        out[path] = None if value == {} and text.strip() != "{}" else value
    return out


def read(path: str | Path) -> tuple[dict, dict[tuple, int], list[str]]:
    """The data of a file, the line of each setting, and the problems found. UserError if it cannot be read or is not a mapping."""
    try:
        raw = read_file(path)
    except NotAFile:
        raise UserError(f"--config {path}: is a pipe or a device, and a recipe is read more than once; write it to a file") from None
    except OSError as error:
        raise UserError(
            f"--config {path}: {error.strerror or error}; {fix_of(error, 'name a recipe, such as recipes/quickstart.yaml')}"
        ) from error
    if len(raw) > _MAX_BYTES:
        raise UserError(f"{path}: {len(raw)} bytes; a recipe is at most {_MAX_BYTES}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{raw[: error.start].count(10) + 1}: not UTF-8; save the file as UTF-8") from None
    data, lines, problems = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        found = {str: "a text", list: "a list"}.get(type(data), "one value")
        raise UserError(f"{path}: holds {found}; a recipe is a mapping of settings, one a line, such as output_dir: runs/first")
    return data, lines, problems


def file_kind(path: str | Path) -> str:
    """The kind of a file: "recipe", "pipeline", "sweep" or "make"."""
    return _kind_of(read(path)[0])


def _kind_of(data: dict) -> str:
    if isinstance(data.get("stages"), list) and "recipe" not in data:
        return "make"
    return "sweep" if data.keys() & {"grid", "arms"} else "pipeline" if "stages" in data else "recipe"


def load_recipe(
    path: str | Path,
    overrides: dict[str, typing.Any] | None = None,
    *,
    check_inputs: bool = False,
    check_data: bool = False,
    written_later: str | None = None,
) -> Recipe:
    """The recipe of a file, checked and with its defaults written out. Raises UserError with every problem, one line each.

    overrides       {dotted path: value}, as the command line gives them
    check_inputs    refuse local models and data that do not exist, and a server's key that is not set
    check_data      of these the data alone
    written_later   a folder that earlier stages will write: paths in it may be missing

    What a recipe reads is relative to its own file; what it writes (`output_dir`, `teacher.cache.path`, `data.cache_dir`) and what
    `overrides` names are relative to the working folder, and so is a path that begins with `{cwd}`. See `paths`.
    """
    data, lines, problems = read(path)
    if _kind_of(data) == "make":
        raise UserError(
            f"{path}: is a file of llmkd make, and no recipe; run it by llmkd make, and train on the train.jsonl that it writes"
        )
    changed = override(data, overrides or {}, problems)
    place_paths(Recipe, data, path, locator(str(path), lines, changed), changed, problems)
    recipe = resolve(check(Recipe, data, str(path), lines, problems, changed))
    where, problems = locator(str(path), lines, changed), []
    if check_inputs or check_data:
        problems += _missing_files(recipe, path, where, written_later, None if check_inputs else "data")
    if check_inputs:
        problems += _missing_keys(recipe, where)
    if problems:
        raise UserError(*problems)
    return recipe


def read_placed(path: str | Path) -> dict:
    """The unchecked data of a recipe's file, with paths that can be opened from the working folder."""
    data, _, problems = read(path)
    place_paths(Recipe, data, path, locator(str(path), {}, set()), set(), problems)
    return data


def place_paths(kind: type, data: dict, path: str | Path, where: typing.Callable, changed: set[tuple], problems: list[str]) -> None:
    """Replace every path in `data` by one that can be opened from the working folder."""
    for mapping, key, keys, what in paths.paths_in(kind, data):
        given = any(keys[: len(one)] == one for one in changed)  # on the command line
        try:
            mapping[key] = paths.place(mapping[key], what, "" if given else str(Path(path).parent))
        except ValueError as error:
            problems.append(f"{where(keys)}: {error}")


def _missing_files(recipe: Recipe, path: str | Path, where: typing.Callable, written_later: str | None, only: str | None) -> list[str]:
    """The problems with paths (of the kind `only`, or of all) that do not exist."""
    problems = []
    data = dataclasses.asdict(recipe if uses_teacher(recipe) else dataclasses.replace(recipe, teacher=None))
    for mapping, key, keys, what in paths.paths_in(Recipe, json.loads(json.dumps(data))):
        later = written_later and Path(os.path.abspath(mapping[key])).is_relative_to(os.path.abspath(written_later))
        if only in (None, what) and not later and (problem := paths.missing(mapping[key], what, str(Path(path).parent))):
            problems.append(f"{where(keys)}: {problem}")
    return problems


def _missing_keys(recipe: Recipe, where: typing.Callable) -> list[str]:
    """The problems with the variables that hold the keys of servers."""
    problems = []
    for setting, one in with_setting_names(recipe.teacher, "teacher") if uses_teacher(recipe) else ():
        if one.api_key_env and not (one.cache and one.cache.is_written) and (problem := key_problem(one.api_key_env)):
            keys = [int(key) if key.isdigit() else key for key in setting.split(".")]
            problems.append(f"{where((*keys, 'api_key_env'))}: {problem}")
    return problems


def load_pipeline(path: str | Path, output_dir: str | None = None) -> Pipeline:
    """A pipeline's file. Its recipes, and the paths in `set:`, are relative to it."""
    data, lines, problems = read(path)
    changed = override(data, {"output_dir": output_dir} if output_dir else {}, problems)
    place_paths(Pipeline, data, path, locator(str(path), lines, changed), changed, problems)
    pipeline = check(Pipeline, data, str(path), lines, problems, changed)
    where, named = locator(str(path), lines, changed), [("teacher", pipeline.teacher), *(("students", name) for name in pipeline.students)]
    problems = [
        f"{where((setting,))}: found {name}, which is no stage; the stages are {', '.join(pipeline.stages)}"
        for setting, name in named
        if name not in pipeline.stages
    ]
    untrained = {name: kind for name, one in pipeline.stages.items() for kind in ("make", "cache", "roll") if getattr(one, kind)}
    problems += [
        f"{where((setting,))}: found {name}, which is a stage of llmkd {untrained[name]}, and trains no model"
        for setting, name in named
        if name in untrained
    ]
    if problems := problems + _bad_stages(pipeline, path, lines):
        raise UserError(*problems)
    _refuse_missing_recipes(pipeline, where)
    return pipeline


#: The kinds of files, for messages.
_KINDS = {"recipe": "a recipe", "pipeline": "a pipeline", "sweep": "a sweep", "make": "a file of llmkd make"}


def _refuse_missing_recipes(loaded: Pipeline | Sweep, where: typing.Callable) -> None:
    """UserError for every file of a pipeline or a sweep that is not there, or of another kind than its stage's, with its line."""
    named = [
        (keys, key, mapping[key])
        for mapping, key, keys, _ in paths.paths_in(type(loaded), dataclasses.asdict(loaded))
        if key in ("recipe", "make", "cache", "roll")
    ]
    problems = []
    for keys, key, recipe in named:
        problem = paths.missing(recipe, "file", "") or (f"{recipe} is a folder; name a file in it" if Path(recipe).is_dir() else "")
        wanted = "make" if key == "make" else "recipe"
        if not problem and (kind := file_kind(recipe)) != wanted:
            problem = f"{recipe} is {_KINDS[kind]}, expected {_KINDS[wanted]}; name one"
        problems += [f"{where(keys)}: {problem}"] if problem else []
    if problems:
        raise UserError(*problems)


def _bad_stages(pipeline: Pipeline | Sweep, path: str | Path, lines: dict) -> list[str]:
    found = {name: _bad_stage(name, stage) for name, stage in pipeline.stages.items()}
    return [f"{path}:{lines['stages', name]}: stages.{name}: {problem}" for name, problem in found.items() if problem]


def _bad_stage(name: str, stage: Stage) -> str | None:
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", name):
        return "a stage's name has letters, digits, '.', '_' and '-' only"
    given = sum(one is not None for one in (stage.recipe, stage.make, stage.cache, stage.roll))
    if given == 1:
        return None
    others = "in its place a file of llmkd make (make:), or a recipe whose caches (cache:) or answers (roll:) are written"
    return f"a stage has a recipe, or {others}; {'keep one' if given else 'give one'}"


def load_sweep(path: str | Path, overrides: dict[str, typing.Any] | None = None) -> Sweep:
    """A sweep's file. An override that is not a setting of the sweep itself applies to every arm."""
    data, lines, problems = read(path)
    own = {field.name for field in dataclasses.fields(Sweep)}
    mine = {dotted: value for dotted, value in (overrides or {}).items() if dotted.partition(".")[0] in own or renamed(Sweep, (dotted,))}
    changed = override(data, mine, problems)
    place_paths(Sweep, data, path, locator(str(path), lines, changed), changed, problems)
    for_arms: dict[str, typing.Any] = {}
    for dotted, value in (overrides or {}).items():
        if dotted not in mine:
            try:
                for_arms |= paths.place_changes({dotted: value}, os.getcwd())
            except UserError as error:
                problems += error.problems
    if isinstance(data.get("set", {}), dict):
        data["set"] = (data.get("set") or {}) | for_arms
    sweep = check(Sweep, data, str(path), lines, problems, changed)
    if bad := _bad_stages(sweep, path, lines):
        raise UserError(*bad)
    _refuse_missing_recipes(sweep, locator(str(path), lines, changed))
    sweep.set.update(for_arms)  # again, since checking has made `Placed` paths plain text, which is relative to the file
    return sweep


def resolve(recipe: Recipe) -> Recipe:
    """Fill in the defaults that depend on other settings. An adapter that is trained further keeps its own settings."""
    student, loss, train, teacher = recipe.student, recipe.loss, recipe.train, recipe.teacher
    if isinstance(teacher, Teacher) and teacher.ema is not None:
        teacher = dataclasses.replace(teacher, model=student.model, revision=student.revision, base=student.base)
    if student.method == "lora" and student.lora is None and student.model and not Path(student.model, "adapter_config.json").exists():
        student = dataclasses.replace(student, lora=Lora())
    if loss.kd_ratio is None:
        loss = dataclasses.replace(loss, kd_ratio=0.5 if as_tuple(recipe.teacher) else 0.0)
    if train.epochs is None and train.max_steps is None:
        train = dataclasses.replace(train, epochs=1)
    if train.micro_batch_size is None and train.micro_batch_tokens is None:
        train = dataclasses.replace(train, micro_batch_size=MICRO_BATCH_SIZE)
    return dataclasses.replace(recipe, student=student, teacher=teacher, loss=loss, train=train)


def dump(recipe, folder: str | Path | None = None) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal object.

    Paths in it are relative to `folder`, where the file will be, or else begin with `{cwd}`.
    """
    data = json.loads(json.dumps(dataclasses.asdict(recipe)))
    for mapping, key, _, what in paths.paths_in(type(recipe), data):
        mapping[key] = paths.relative_to(mapping[key], what, folder)
    return yaml.dump(data, Dumper=Dumper, sort_keys=False)


def comparable(recipe: Recipe) -> dict[str, typing.Any]:
    """A recipe as {dotted path: value} with absolute local paths, so that recipes read in different folders can be compared."""
    flat = flatten(recipe, lists=True)
    for mapping, key, _, what in paths.paths_in(Recipe, flat):
        if paths.is_local(mapping[key], what):
            mapping[key] = os.path.abspath(mapping[key])
    return flat
