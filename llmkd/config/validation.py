"""Checks a recipe, a pipeline or a sweep, and reports all problems at once."""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator

from pydantic import TypeAdapter, ValidationError

from ..errors import UserError
from .contradictions import contradictions
from .dotted import keys_of
from .recipe import Recipe
from .schema import describe, join_or, section_of
from .sweep import Sweep, sweep_contradictions
from .yaml_loader import is_number

LARGEST = 2**53  #: whole numbers up to this one are exact in JSON, and fit into 64 bits after a little arithmetic
_OPENING, _CLOSING = (
    "\u201c\u201d\u201e\u2018\u2019\u201a\u00ab\u00bb",
    "\u201c\u201d\u2018\u2019\u00ab\u00bb",
)  # quotation marks that YAML does not know
#: Limits of fractional numbers: beyond them the number, or its product with another, is 0 or infinity in float32.
SMALLEST_FRACTION, LARGEST_FRACTION = 1e-30, 1e30
#: Names of settings in other trainers, for the hint at an unknown name.
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
    "clip_grad_norm": "optim.max_grad_norm",
    "lora_rank": "student.lora.rank",
    "r": "student.lora.rank",
    "top_k": "teacher.cache.k",
    "lora_r": "student.lora.rank",
    "lora_alpha": "student.lora.alpha",
    "lora_dropout": "student.lora.dropout",
    "bf16": "student.mixed_precision",
    "save_steps": "checkpoint.every",
    "eval_steps": "validation.every",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "train.log_every",
    "alpha": "loss.kd_ratio",
    "beta": "loss.divergence_options.beta",
    "lmbda": "on_policy.share",
    "max_completion_length": "on_policy.max_new_tokens",
    "num_generations": "on_policy.samples",
    "trackers": "report_to",
    "tracking": "report_to",
}

#: Other names of values, for the hint at an unknown value.
_VALUES = {
    "kl": "forward_kl",
    "kld": "forward_kl",
    "rkl": "reverse_kl",
    "js": "generalized_jsd",
    "jsd": "generalized_jsd",
    "tvd": "total_variation",
}
_VALUES |= {
    "loss": "ce",
    "cross_entropy": "ce",
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "fp64": "float64",
} | {
    name: format
    for format, names in {
        "chat": "sharegpt messages openai chatml conversation conversations conversational",
        "alpaca": "instruct instruction",
        "text": "plain raw pretrain pretraining language_modeling",
    }.items()
    for name in names.split()
}
#: Further settings that a value under another name needs.
_WITH = {"sharegpt": " with fields: {messages: conversations, role: from, content: value}, roles: {user: human, assistant: gpt}"}

#: Renamed settings by the kind of file: {old dotted path: new one}. The old name is refused with the new one as a hint.
_RENAMED = {
    Recipe: {
        "data.share_beginnings": "data.share_prefixes",
        "data.validation_share": "data.validation_fraction",
        "loss.chunk_rows": "loss.chunk_size",
        "loss.divergence_options.forward_share": "loss.divergence_options.forward_weight",
        "optim.warmup_share": "optim.warmup_ratio",
        "optim.min_lr_share": "optim.min_lr_ratio",
        "teacher.cache.draws": "teacher.cache.num_samples",
        "train.length_group": "train.group_by_length",
        "validation.gate": "validation.teacher_check",
    },
    Sweep: {"side_by_side": "students_per_teacher"},
}


def renamed(kind, path: tuple) -> str | None:
    """The new dotted path of a renamed setting; None if the setting was not renamed."""
    new = _RENAMED.get(kind, {}).get(".".join(str(key) for key in path if not isinstance(key, int)))
    return new and ".".join([*map(str, path[:-1]), new.rpartition(".")[2]])


def locator(name: str, lines: dict, changed: set[tuple]) -> Callable[[tuple], str]:
    """A function that turns a setting's keys into its place for messages: `--dotted.path` or `file:line: dotted.path`."""

    def where(path: tuple) -> str:
        dotted = ".".join(map(str, path))
        if any(path[: len(keys)] == keys or (keys[: len(path)] == path and path not in lines) for keys in changed):
            return f"--{dotted}"
        found = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), None)
        return f"{name}:{found}: {dotted}" if found else f"{name}: {dotted}"

    return where


def check(kind, data: dict, name: str, lines: dict, problems: list[str], changed: set[tuple]):
    """The checked object of class `kind`. UserError with every problem, those found by the caller (`problems`) first.

    Invalid settings are removed and the rest is checked again until it is valid; then contradictions are looked for.
    """
    adapter, where = TypeAdapter(kind), locator(name, lines, changed)
    broken: list[tuple] = []
    for path, text in _texts_in(data):
        if len(text) > 1 and text[0] in _OPENING and text[-1] in _CLOSING and not {"where", "fields", "roles"} & set(path):
            problems.append(f'{where(path)}: found {text}, in quotation marks of a text processor; write "{text[1:-1]}"')
            broken.append(path)
            _remove(data, path)
    for path, text in _not_utf8(data):
        problems.append(f"{where(path)}: found {text!r}, which is not UTF-8; rename the file, or set a locale with UTF-8 (LC_ALL=C.UTF-8)")
        broken.append(path)
        _remove(data, path)
    result = None
    while result is None:
        try:
            result = adapter.validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            remove = []
            for item in error.errors():
                path = _real_path(item["loc"], data, item["type"] == "missing")
                remove.append(path[:-1] if item["type"] == "missing" else path)
                known = any(b == path[: len(b)] for b in broken) or any(p.startswith(f"{where(path)}: ") for p in problems)
                broken.append(path)
                if new := renamed(kind, path):
                    broken.append(keys_of(new))
                if not known:
                    problems.append(f"{where(path)}: {_explain(kind, path, item)}")
            before = json.dumps(data)
            for path in remove:
                _remove(data, path)
                broken.append(path)
            if json.dumps(data) == before:  # nothing more can be removed
                break
    for path, number, expected in _out_of_range(data):
        problems.append(f"{where(path)}: found {str(number)[:80]}, expected {expected}")
        broken.append(path)
    together = {Recipe: contradictions, Sweep: sweep_contradictions}.get(kind)
    if together and result is not None:
        for paths, problem in together(result):
            keys = [keys_of(path) for path in paths]
            if not any(b[: len(k)] == k or k[: len(b)] == b for b in broken for k in keys):
                new = renamed(kind, keys[0])
                problems.append(f"{where(keys[0])}: {f'is now {new}' if new else problem}")
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return result


def _texts_in(data: dict) -> list[tuple[tuple, str]]:
    """All texts and keys, with their settings."""

    def found(value, path: tuple) -> Iterator[tuple[tuple, str]]:
        if isinstance(value, str):
            yield path, value
        elif isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from found(key, (*path, key)) if isinstance(key, str) else ()
                yield from found(inner, (*path, key))

    return list(found(data, ()))


def _not_utf8(data: dict) -> list[tuple[tuple, str]]:
    """Texts with surrogates, and their settings: Python puts these in place of bytes that are not UTF-8 in a file's name or an argument."""
    return list(dict((path, text) for path, text in _texts_in(data) if text != text.encode(errors="ignore").decode()).items())


def _out_of_range(value, path: tuple = ()) -> Iterator[tuple[tuple, float, str]]:
    """(setting, number, what is expected) of numbers that the libraries cannot hold: in 64 bits or, with a fraction, in float32.

    Numbers of `where` are not limited, since they are compared with those of the user's rows.
    """
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _out_of_range(inner, (*path, key))
    elif type(value) is int and abs(value) > LARGEST:
        yield path, value, f"a number of at most {LARGEST}"
    elif type(value) is not float or "where" in path:
        return
    elif abs(value) > LARGEST_FRACTION:
        yield path, value, f"a number of at most {LARGEST_FRACTION:g}"
    elif 0 < abs(value) < SMALLEST_FRACTION:
        yield path, value, f"at least {SMALLEST_FRACTION:g}, or 0 where it may be 0"


def _real_path(loc: tuple, data, missing: bool) -> tuple:
    """The location of an error without the names of union members, which pydantic adds and which are not settings. `missing`: the last key is that
    of a missing setting."""
    path, here = [], data
    for i, key in enumerate(loc):
        if isinstance(here, dict) and (key in here or (missing and i == len(loc) - 1)):
            here = here.get(key)
        elif isinstance(here, list) and isinstance(key, int):
            here = here[key] if key < len(here) else None
        else:
            continue
        path.append(key)
    return tuple(path)


def _remove(data: dict, path: tuple) -> None:
    """Remove a setting, or the whole list if it is an item of a list."""
    for i, key in enumerate(path):
        if i == len(path) - 1 or not isinstance(data.get(key), dict):
            data.pop(key, None)
            return
        data = data[key]


def _explain(kind, path: tuple, item: dict) -> str:
    """The message for one error of pydantic: found, expected, and for a typo the nearest known name."""
    found = item["input"]
    parent, parent_path = kind, []
    for key in path[:-1]:
        parent = section_of(parent, key)
        parent_path.append(str(key))
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden") and dataclasses.is_dataclass(parent):
        return _explain_unknown(kind, path, found, parent, parent_path)
    if item["type"] == "missing":
        return "not given, and it has no default"
    if isinstance(found, str) and "expected" in item.get("ctx", {}):
        options = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
        near = [_VALUES[found]] if _VALUES.get(found) in options else difflib.get_close_matches(found, options, 1, 0.6)
        if "alpaca" in options and found.lower().lstrip(".") in ("json", "jsonl", "csv", "parquet", "arrow"):
            return f"found {found!r}, expected {join_or(options)}: what the columns mean; the kind of a file is known by its ending"
        or_settings = (
            ", or a mapping of settings" if isinstance(path[-1], str) and section_of(parent, path[-1]) not in (None, parent) else ""
        )
        return f"found {found!r}, expected {join_or(options)}{or_settings}" + (
            f"; did you mean {near[0]}{_WITH.get(found, '')}?" if near else ""
        )
    known = {dotted: (type_, text) for dotted, type_, _, text in describe(kind)}
    type_, text = known.get(".".join(str(key) for key in path if not isinstance(key, int) or key == path[-1]), (None, None))
    if not type_ and item["msg"].startswith(("Input should be less", "Input should be greater")):
        return f"found {json.dumps(found)[:80]}, expected a number {item['msg'].removeprefix('Input should be ')}"
    expected = type_ or re.sub(r"^Input should be (a )?(valid )?", "a ", item["msg"]).replace(
        "a an object", "a mapping of settings"
    ).replace("a integer", "a whole number")
    hint = _number_hint(found) if isinstance(found, str) and expected.startswith(("a number", "a whole number")) else ""
    if isinstance(found, str) and expected.startswith("a list of "):
        hint = _list_hint(expected, found)
    if path[-1] == "path" and isinstance(found, list) and found and all(isinstance(one, str) for one in found):
        several = ", ".join(f"{{path: {one}}}" for one in found[:3])
        hint = (
            f"; for several files write a list of sources, {'.'.join(map(str, path[:-1]))}: [{several}{', ...' if len(found) > 3 else ''}]"
        )
    if expected.startswith("a mapping") and isinstance(found, list) and found and isinstance(found[0], dict):
        hint = "; give each a name, as in {one: {...}, other: {...}}"
    beyond = expected.startswith("a number") and not isinstance(found, str)  # out of range, which it would be in a mapping too
    if "a mapping of settings" in expected and isinstance(found, str | int | float) and not beyond:
        hint = _section_hint(section_of(parent, path[-1]), found)
    return f"found {json.dumps(found, ensure_ascii=False)[:80]}, expected {expected}{hint}"


def _explain_unknown(kind, path: tuple, found, parent, parent_path: list[str]) -> str:
    """The message for a setting that its section, `parent`, does not have."""
    if new := renamed(kind, path):
        return f"is now {new}"
    if str(path[-1]) in {part for dotted, *_ in describe(kind) for part in (dotted, dotted.rpartition(".")[0])} and "." in str(path[-1]):
        return f"unknown setting; in a file sections are nested: {str(path[-1]).replace('.', ': {')}: ...{'}' * str(path[-1]).count('.')}"
    if found is None and re.search(r"[/=.\\ ]", str(path[-1])):
        return "unknown setting; a comma inside { } begins the next setting: put a text that has a comma in quotes"
    here = [f.name for f in dataclasses.fields(parent)]
    near = difflib.get_close_matches(str(path[-1]), here, 1, 0.8 if path[-1] in _ELSEWHERE else 0.6)
    if near:
        return f"unknown setting; did you mean {'.'.join([*parent_path, near[0]])}?"
    leaves = dict(_ELSEWHERE)
    for dotted, *_ in sorted(describe(kind), key=lambda setting: setting[0].count(".")):  # optim.lr before loss.features.lr
        for part in (dotted, dotted.rpartition(".")[0]):
            leaves.setdefault(part.rsplit(".", 1)[-1], part)
    near = difflib.get_close_matches(str(path[-1]), [leaf for leaf in leaves if leaf], 1, 0.75)
    return f"unknown setting; did you mean {leaves[near[0]]}?" if near else f"unknown setting; known here: {', '.join(here)}"


def _section_hint(section, found: str | float) -> str:
    """What to write if a section is given as a single value: the setting for the section's file, model, kind or number has that value."""
    fields = {field.name for field in dataclasses.fields(section)} if section else set()
    if isinstance(found, str) and {"train", "validation"} <= fields:
        return f"; did you mean {{train: {{path: {found}}}}}?"
    text = ("server",) * str(found).startswith(("http://", "https://")) + ("path", "model", "by", "type", "repo")
    name = next((name for name in (text if isinstance(found, str) else ("weight", "rank", "share", "count")) if name in fields), None)
    return f"; did you mean {{{name}: {found}}}?" if name and not isinstance(found, bool) else ""


def _list_hint(expected: str, found: str) -> str:
    """What to write if a list of texts is given as a single text."""
    numbers = re.split(r"[,\s]+", found.strip("()[] "))
    if re.match(r"a list of \d+ numbers", expected) and len(numbers) > 1 and all(is_number(one) for one in numbers):
        return f"; write [{', '.join(numbers)}]"
    options = re.split(", | or ", expected.removeprefix("a list of "))
    return f"; write [{found}]" if expected.startswith("a list of texts") or found in options else ""


def _number_hint(found: str) -> str:
    """What to do about a text that is meant as a number: it may be a text because of its quotation marks, or of its spelling."""
    if re.fullmatch(r"-?\d+,\d+", found):
        return f"; write {found.replace(',', '.')}"
    try:
        number = float(found)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    return "; remove the quotation marks" if is_number(found.strip()) else f"; write {int(number) if number.is_integer() else number}"
