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
from .recipe import Recipe, Study, contradictions

_MAX_BYTES, _MAX_NODES = 1 << 20, 100_000


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 1e-4 is a number; no, on and 12:30 are text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_first] + ([""] if _tag == "null" else []))


#: What other trainers call some of our settings, for the hint at an unknown name.
_ELSEWHERE = {
    "learning_rate": "optim.lr", "num_train_epochs": "train.epochs", "num_epochs": "train.epochs", "total_epochs": "train.epochs",
    "per_device_train_batch_size": "train.micro_batch_size", "gradient_accumulation_steps": "train.batch_size",
    "max_seq_length": "data.max_length", "max_seq_len": "data.max_length", "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup_share", "clip_grad_norm": "optim.max_grad_norm", "lora_rank": "student.lora.rank", "lora_r": "student.lora.rank",
    "lora_alpha": "student.lora.alpha", "lora_dropout": "student.lora.dropout", "bf16": "train.mixed_precision", "save_steps": "checkpoint.every",
    "eval_steps": "validation.every", "save_total_limit": "checkpoint.keep", "logging_steps": "train.log_every", "alpha": "loss.kd_ratio",
}


def parse_yaml(text: str, name: str) -> tuple[typing.Any, dict[tuple, int], list[str]]:
    """The data in `text`, the line of every path in it, and the problems found (duplicate keys, odd tags)."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{name}:{mark.line + 1 if mark else 1}: not valid YAML: {getattr(error, 'problem', error)}") from None
    lines: dict[tuple, int] = {}
    problems: list[str] = []
    loader = _Loader("")
    nodes = 0

    def build(node, path):
        nonlocal nodes
        nodes += 1
        if nodes > _MAX_NODES:
            raise UserError(f"{name}: more than {_MAX_NODES} values; a recipe is small")
        lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            out = {}
            for key_node, value in node.value:
                key, line = str(key_node.value), key_node.start_mark.line + 1
                if key in out:
                    problems.append(f"{name}:{line}: {'.'.join((*path, key))}: given twice (first on line {lines[*path, key]}); keep one")
                lines[*path, key] = line
                out[key] = build(value, (*path, key))
            return out
        if isinstance(node, yaml.SequenceNode):
            return [build(value, (*path, i)) for i, value in enumerate(node.value)]
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rsplit(":", 1)[1] not in ("null", "bool", "int", "float", "str"):
            problems.append(f"{name}:{node.start_mark.line + 1}: {'.'.join(map(str, path))}: found the tag {node.tag}; write a plain value")
            return None
        if node.tag.endswith(":float"):  # PyYAML's own converter is YAML 1.1's
            return float(node.value.replace(".inf", "inf").replace(".nan", "nan").replace(".NaN", "nan"))
        return loader.construct_object(node)

    return (build(root, ()) if root else {}), lines, problems


def split_overrides(words: list[str]) -> dict[str, typing.Any]:
    """`--optim.lr 1e-4 --train.epochs=2` as {dotted path: value}; values are read as YAML."""
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
    bad = [s for s in study.stages if not re.fullmatch(r"[A-Za-z0-9._-]+", s) or s.startswith(".")]
    if missing or bad:
        raise UserError(*(f"{path}: {s}: not a stage; the stages are {', '.join(study.stages)}" for s in missing),
                        *(f"{path}:{lines['stages', s]}: stages.{s}: a stage's name has letters, digits, '.', '_' and '-' only" for s in bad))
    return study


def resolve(recipe: Recipe) -> Recipe:
    """Write out the defaults that depend on other settings."""
    loss, train = recipe.loss, recipe.train
    if loss.kd_ratio is None:
        loss = dataclasses.replace(loss, kd_ratio=0.5 if recipe.teacher else 0.0)
    if train.epochs is None and train.max_steps is None:
        train = dataclasses.replace(train, epochs=1)
    return dataclasses.replace(recipe, loss=loss, train=train)


def dump(recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal object."""
    return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(recipe))), sort_keys=False, allow_unicode=True)


def flatten(value, path="") -> dict[str, typing.Any]:
    """A recipe (or a part of it) as {dotted path: value}, for comparing two."""
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict) and value:
        out = {}
        for key, inner in value.items():
            out |= flatten(inner, f"{path}.{key}" if path else str(key))
        return out
    return {path: value}


def _override(data: dict, overrides: dict, problems: list[str]) -> set[tuple]:
    changed = set()
    for dotted, value in overrides.items():
        *parents, last = keys = tuple(dotted.split("."))
        place = data
        for key in parents:
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
            if not isinstance(place, dict):
                problems.append(f"--{dotted}: {key} is not a section")
                break
        else:
            place[last] = value
            changed.add(keys)
    return changed


def _check(kind, data: dict, name: str, lines: dict, problems: list[str], changed: set[tuple]):
    """Validate; then leave out what failed and look for contradictions in the rest, so that one round shows all."""
    adapter = TypeAdapter(kind)

    def where(path: tuple) -> str:
        dotted = ".".join(map(str, path))
        if any(path[: len(keys)] == keys for keys in changed):
            return f"--{dotted}"
        found = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
        return f"{name}:{found}: {dotted}" if found else f"{name}: {dotted}"

    def validate(value):
        return adapter.validate_json(json.dumps(value), strict=True)

    broken: list[tuple] = []
    remove: list[tuple] = []
    try:
        result = validate(data)
    except ValidationError as error:
        result = None
        for item in error.errors():
            path = _real_path(item["loc"], data)
            if path in broken:
                continue
            broken.append(path)
            problems.append(f"{where(path)}: {_explain(kind, path, item)}")
            remove.append(path[:-1] if item["type"] == "missing" else path)
        for path in remove:
            _remove(data, path)
        try:
            result = validate(data)
        except ValidationError:
            pass
    if isinstance(result, Recipe):
        for dotted, problem in contradictions(result):
            path = tuple(dotted.split("."))
            if not any(b[: len(path)] == path or path[: len(b)] == b for b in broken):
                problems.append(f"{where(path)}: {problem}")
    if problems:
        raise UserError(*problems)
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


def _remove(data, path: tuple) -> None:
    for key in path[:-1]:
        if not isinstance(data, dict):
            return
        data = data.get(key)
    if isinstance(data, dict) and path:
        data.pop(path[-1], None)


def _explain(kind, path: tuple, item: dict) -> str:
    """What was found, what is allowed, and the nearest known name for a typo."""
    found = item["input"]
    parent, parent_path = kind, []
    for key in path[:-1]:
        parent = _section(parent, key)
        parent_path.append(str(key))
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden") and dataclasses.is_dataclass(parent):
        here = [f.name for f in dataclasses.fields(parent)]
        near = difflib.get_close_matches(str(path[-1]), here, 1, 0.6)
        if near:
            return f"unknown setting; did you mean {'.'.join([*parent_path, near[0]])}?"
        leaves = dict(_ELSEWHERE)
        for dotted, *_ in describe(kind):
            leaves.setdefault(dotted.rsplit(".", 1)[-1], dotted)
        near = difflib.get_close_matches(str(path[-1]), leaves, 1, 0.75)
        return f"unknown setting; did you mean {leaves[near[0]]}?" if near else f"unknown setting; known here: {', '.join(here)}"
    if item["type"] == "missing":
        return "not given, and it has no default"
    if isinstance(found, str) and "expected" in item.get("ctx", {}):
        options = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
        near = difflib.get_close_matches(found, options, 1, 0.6)
        return f"found {found!r}, expected {_or(options)}" + (f"; did you mean {near[0]}?" if near else "")
    known = {dotted: (type_, text) for dotted, type_, _, text in describe(kind)}
    type_, text = known.get(".".join(map(str, path)), (None, None))
    expected = type_ or re.sub(r"^Input should be (a )?(valid )?", "a ", item["msg"]).replace("a an object", "a mapping of settings")
    return f"found {json.dumps(found, ensure_ascii=False)[:80]}, expected {expected}"


def _or(options: list[str]) -> str:
    return ", ".join(options[:-1]) + (" or " if len(options) > 1 else "") + options[-1] if options else "nothing"


def _section(kind, key):
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        for candidate in (hints.get(key), *typing.get_args(hints.get(key))):
            if dataclasses.is_dataclass(candidate):
                return candidate
    for candidate in typing.get_args(kind):
        if dataclasses.is_dataclass(candidate):
            return candidate
    return None


def describe(kind=Recipe, prefix: str = ""):
    """Every setting as (dotted path, type in words, default, sentence)."""
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        path, hint = prefix + field.name, hints[field.name]
        section = _section(kind, field.name)
        info = field.default
        if section:
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
    limits = [f"{sign} {getattr(b, name):g}" for b in bounds for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")) if getattr(b, name, None) is not None]
    return word + (" " + ", ".join(limits) if limits else "")


def help_text() -> str:
    """Every setting with its type, default and sentence, for --help."""
    lines = []
    for path, type_, default, text in describe():
        shown = "required" if default is ... or type(default).__name__ == "PydanticUndefinedType" else dump_value(default)
        lines.append(f"  --{path}  ({type_}; default {shown})\n      {text}")
    return "\n".join(lines)


def dump_value(value) -> str:
    return "null" if value is None else json.dumps(value) if not isinstance(value, str) else value or "none"
