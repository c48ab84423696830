"""From YAML and the command line to a checked recipe, and back. Every problem is found at once."""

import dataclasses
import difflib
import json
import re
import typing
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from .errors import UserError
from .recipe import Lora, Recipe, contradictions
from .recipe_study import Study, Sweep, sweep_contradictions
from .recipe_teacher import teachers
from .yaml_lines import Dumper, parse_yaml

_MAX_BYTES = 1 << 20

#: What other trainers call some of our settings, for the hint at an unknown name.
_ELSEWHERE = {
    "learning_rate": "optim.lr",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "total_epochs": "train.epochs",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup_share",
    "clip_grad_norm": "optim.max_grad_norm",
    "lora_rank": "student.lora.rank",
    "lora_r": "student.lora.rank",
    "lora_alpha": "student.lora.alpha",
    "lora_dropout": "student.lora.dropout",
    "bf16": "student.mixed_precision",
    "save_steps": "checkpoint.every",
    "eval_steps": "validation.every",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "train.log_every",
    "alpha": "loss.kd_ratio",
}


def split_overrides(words: list[str], options: tuple[str, ...] = ("config",)) -> dict[str, typing.Any]:
    """`--optim.lr 1e-4 --train.epochs=2` as {dotted path: value}; values are read as YAML, those of text settings and `options` as they are."""
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
    """A recipe file's data, lines and problems; refused when it is no mapping or cannot be read."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}; name a recipe, such as recipes/quickstart.yaml") from None
    if len(raw) > _MAX_BYTES:
        raise UserError(f"{path}: {len(raw)} bytes; a recipe is at most {_MAX_BYTES}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{raw[: error.start].count(10) + 1}: not UTF-8; save the file as UTF-8") from None
    data, lines, problems = parse_yaml(text, str(path))
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}; a recipe is a mapping of settings")
    return data, lines, problems


def kind(path: str | Path) -> str:
    """What a file holds: a recipe, a study or a sweep."""
    data = read(path)[0]
    return "sweep" if data.keys() & {"grid", "arms"} else "study" if "stages" in data else "recipe"


def load_recipe(path: str | Path, overrides: dict[str, typing.Any] | None = None) -> Recipe:
    """Read, override, check and resolve. Raises UserError with every problem, one line each."""
    data, lines, problems = read(path)
    changed = _override(data, overrides or {}, problems)
    recipe = _check(Recipe, data, str(path), lines, problems, changed)
    return resolve(recipe)


def load_study(path: str | Path, output_dir: str | None = None) -> Study:
    data, lines, problems = read(path)
    changed = _override(data, {"output_dir": output_dir} if output_dir else {}, problems)
    study = _check(Study, data, str(path), lines, problems, changed)
    missing = [s for s in (study.teacher, *study.students) if s not in study.stages]
    if problems := [f"{path}: {s}: not a stage; the stages are {', '.join(study.stages)}" for s in missing] + _bad_stages(
        study, path, lines
    ):
        raise UserError(*problems)
    return study


def _bad_stages(study: Study | Sweep, path: str | Path, lines: dict) -> list[str]:
    return [
        f"{path}:{lines['stages', s]}: stages.{s}: a stage's name has letters, digits, '.', '_' and '-' only"
        for s in study.stages
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", s)
    ]


def load_sweep(path: str | Path, overrides: dict[str, typing.Any] | None = None) -> Sweep:
    """A sweep's file. An override that is none of the sweep's own settings is one for every arm."""
    data, lines, problems = read(path)
    own = {field.name for field in dataclasses.fields(Sweep)}
    mine = {dotted: value for dotted, value in (overrides or {}).items() if dotted.partition(".")[0] in own}
    changed = _override(data, mine, problems)
    if isinstance(data.get("set", {}), dict):
        data["set"] = (data.get("set") or {}) | {dotted: value for dotted, value in (overrides or {}).items() if dotted not in mine}
    sweep = _check(Sweep, data, str(path), lines, problems, changed)
    if bad := _bad_stages(sweep, path, lines):
        raise UserError(*bad)
    return sweep


def resolve(recipe: Recipe) -> Recipe:
    """Write out the defaults that depend on other settings. An adapter that is gone on with keeps its own."""
    student, loss, train = recipe.student, recipe.loss, recipe.train
    if student.method == "lora" and student.lora is None and student.model and not Path(student.model, "adapter_config.json").exists():
        student = dataclasses.replace(student, lora=Lora())
    if loss.kd_ratio is None:
        loss = dataclasses.replace(loss, kd_ratio=0.5 if teachers(recipe.teacher) else 0.0)
    if train.epochs is None and train.max_steps is None:
        train = dataclasses.replace(train, epochs=1)
    if train.micro_batch_size is None and train.micro_batch_tokens is None:
        train = dataclasses.replace(train, micro_batch_size=4)
    return dataclasses.replace(recipe, student=student, loss=loss, train=train)


def dump(recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal object."""
    return yaml.dump(json.loads(json.dumps(dataclasses.asdict(recipe))), Dumper=Dumper, sort_keys=False)


def flatten(value, path="", lists: bool = False) -> dict[str, typing.Any]:
    """A recipe (or a part of it) as {dotted path: value}, for comparing two; `lists`: those of sources and teachers too, by number."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif lists and isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        out = {}
        for key, inner in value.items():
            out |= flatten(inner, f"{path}.{key}" if path else str(key), lists)
        return out
    return {path: value}


def _override(data: dict, overrides: dict, problems: list[str]) -> set[tuple]:
    changed = set()
    for dotted, value in overrides.items():
        place: typing.Any = data
        *parents, last = dotted.split(".")
        keys: list = []
        for key in parents:
            key = _index(place, key)
            if isinstance(place, dict) and place.get(key) is None:
                place[key] = {}
            keys.append(key)
            if isinstance(place, list) and not isinstance(key, int):
                problems.append(
                    f"--{dotted}: {'.'.join(map(str, keys[:-1]))} is a list of {len(place)}; it has no {key}, but {_items(place)}"
                )
                break
            place = place[key]
            if not isinstance(place, dict | list):
                problems.append(f"--{dotted}: {key} is not a section")
                break
        else:
            last = _index(place, last)
            if isinstance(place, list) and not isinstance(last, int):
                which = f"it has no {last}, but {_items(place)}" if last.isdigit() else f"say which, such as --{'.'.join(parents)}.0.{last}"
                problems.append(f"--{dotted}: {'.'.join(parents)} is a list of {len(place)}; {which}")
                continue
            place[last] = value
            changed.add((*keys, last))
    return changed


def _items(place: list) -> str:
    return _or([str(n) for n in range(len(place))]).replace(" or ", " and ")


def _index(place, key: str) -> str | int:
    """A list's items go by their numbers."""
    return int(key) if isinstance(place, list) and key.isdigit() and int(key) < len(place) else key


def _check(kind, data: dict, name: str, lines: dict, problems: list[str], changed: set[tuple]):
    """Validate; leave out what failed and validate the rest, until it holds; then look for contradictions in it."""
    adapter = TypeAdapter(kind)

    def where(path: tuple) -> str:
        dotted = ".".join(map(str, path))
        if any(path[: len(keys)] == keys or (keys[: len(path)] == path and path not in lines) for keys in changed):
            return f"--{dotted}"
        found = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
        return f"{name}:{found}: {dotted}" if found else f"{name}: {dotted}"

    broken: list[tuple] = []
    result = None
    while result is None:
        try:
            result = adapter.validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            remove = []
            for item in error.errors():
                path = _real_path(item["loc"], data)
                remove.append(path[:-1] if item["type"] == "missing" else path)
                known = any(b == path[: len(b)] for b in broken) or any(p.startswith(f"{where(path)}: ") for p in problems)
                broken.append(path)
                if not known:
                    problems.append(f"{where(path)}: {_explain(kind, path, item)}")
            before = json.dumps(data)
            for path in remove:
                _remove(data, path)
                broken.append(path)
            if json.dumps(data) == before:  # nothing more can be left out
                break
    together = {Recipe: contradictions, Sweep: sweep_contradictions}.get(kind)
    if together and result is not None:
        for paths, problem in together(result):
            keys = [tuple(int(key) if key.isdigit() else key for key in path.split(".")) for path in paths]
            if not any(b[: len(k)] == k or k[: len(b)] == b for b in broken for k in keys):
                problems.append(f"{where(keys[0])}: {problem}")
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return result


def _real_path(loc: tuple, data) -> tuple:
    """pydantic's location without the names of union members, which are not settings."""
    path, here = [], data
    for i, key in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(here, dict) and (key in here or last):
            here = here.get(key)
        elif isinstance(here, list) and isinstance(key, int):
            here = here[key] if key < len(here) else None
        else:
            continue
        path.append(key)
    return tuple(path)


def _remove(data: dict, path: tuple) -> None:
    """Leave a setting out; for an item of a list, the list."""
    for i, key in enumerate(path):
        if i == len(path) - 1 or not isinstance(data.get(key), dict):
            data.pop(key, None)
            return
        data = data[key]


def _explain(kind, path: tuple, item: dict) -> str:
    """What was found, what is allowed, and the nearest known name for a typo."""
    found = item["input"]
    parent, parent_path = kind, []
    for key in path[:-1]:
        parent = _section(parent, key)
        parent_path.append(str(key))
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden") and dataclasses.is_dataclass(parent):
        if str(path[-1]) in {part for dotted, *_ in describe(kind) for part in (dotted, dotted.rpartition(".")[0])} and "." in str(
            path[-1]
        ):
            return (
                f"unknown setting; in a file sections are nested: {str(path[-1]).replace('.', ': {')}: ...{'}' * str(path[-1]).count('.')}"
            )
        here = [f.name for f in dataclasses.fields(parent)]
        near = difflib.get_close_matches(str(path[-1]), here, 1, 0.6)
        if near:
            return f"unknown setting; did you mean {'.'.join([*parent_path, near[0]])}?"
        leaves = dict(_ELSEWHERE)
        for dotted, *_ in describe(kind):
            for part in (dotted, dotted.rpartition(".")[0]):
                leaves.setdefault(part.rsplit(".", 1)[-1], part)
        near = difflib.get_close_matches(str(path[-1]), [leaf for leaf in leaves if leaf], 1, 0.75)
        return f"unknown setting; did you mean {leaves[near[0]]}?" if near else f"unknown setting; known here: {', '.join(here)}"
    if item["type"] == "missing":
        return "not given, and it has no default"
    if isinstance(found, str) and "expected" in item.get("ctx", {}):
        options = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
        near = difflib.get_close_matches(found, options, 1, 0.6)
        return f"found {found!r}, expected {_or(options)}" + (f"; did you mean {near[0]}?" if near else "")
    known = {dotted: (type_, text) for dotted, type_, _, text in describe(kind)}
    type_, text = known.get(".".join(str(key) for key in path if not isinstance(key, int) or key == path[-1]), (None, None))
    if not type_ and item["msg"].startswith(("Input should be less", "Input should be greater")):
        return f"found {json.dumps(found)[:80]}, expected a number {item['msg'].removeprefix('Input should be ')}"
    expected = type_ or re.sub(r"^Input should be (a )?(valid )?", "a ", item["msg"]).replace("a an object", "a mapping of settings")
    return f"found {json.dumps(found, ensure_ascii=False)[:80]}, expected {expected}"


def _or(options: list[str]) -> str:
    return ", ".join(options[:-1]) + (" or " if len(options) > 1 else "") + options[-1] if options else "nothing"


def _section(kind, key):
    """The section behind a key; behind a name of the user's own (a stage), the section that all of them are."""
    if not dataclasses.is_dataclass(kind):
        return None
    hint = typing.get_type_hints(kind).get(key, kind)
    return next((c for c in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(c)), None)


def describe(kind=Recipe, prefix: str = ""):
    """Every setting as (dotted path, type in words, default, sentence)."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        path, hint = prefix + field.name, hints[field.name]
        section = _section(kind, field.name)
        info = field.default
        if section:
            if getattr(info, "description", None):
                several = any(typing.get_origin(a) is tuple for a in typing.get_args(typing.get_type_hints(kind)[field.name]))
                yield path, "a mapping of settings" + (", or a list of them" if several else ""), None, info.description
            yield from describe(section, path + ".")
            continue
        factory = getattr(info, "default_factory", None)
        default = factory() if factory else getattr(info, "default", info)
        bounds = [m for m in getattr(info, "metadata", [])]
        yield path, _words(hint, bounds), default, getattr(info, "description", None) or ""


def _words(hint, bounds=()) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        inner = list(bounds) + [m for a in hint.__metadata__ for m in (getattr(a, "metadata", None) or [a])]
        return _words(args[0], inner)
    if origin is typing.Literal:
        return _or([str(a) for a in args])
    if origin is tuple:
        return "a list of " + (_words(args[0]) + "s" if args[-1] is ... else f"{len(args)} numbers")
    if origin is dict:
        return "a mapping"
    if args:
        return " or ".join("null" if a is type(None) else _words(a, bounds) for a in args)
    word = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(hint, getattr(hint, "__name__", str(hint)))
    limits = [
        f"{sign} {_plain(getattr(b, name))}"
        for b in bounds
        for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
        if getattr(b, name, None) is not None
    ]
    return word + (" " + ", ".join(limits) if limits else "")


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def help_text(kind=Recipe) -> str:
    """Every setting with its type, default and sentence, for --help."""
    lines = []
    for path, type_, default, text in describe(kind):
        shown = "required" if default is ... or type(default).__name__ == "PydanticUndefinedType" else dump_value(default)
        lines.append(f"  --{path}  ({type_}; default {shown})\n      {text}")
    return "\n".join(lines)


def dump_value(value) -> str:
    return "null" if value is None else json.dumps(value) if not isinstance(value, str) else value or "none"
