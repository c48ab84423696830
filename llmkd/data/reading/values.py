"""Helpers for the values and names in a row."""

import functools
import json
import re
from collections.abc import Iterable
from typing import Any

import yaml


@functools.lru_cache(4096)  # every row of a file has the same names
def plain(name: str) -> str:
    """A name without case, spaces, dashes and underscores: isTrainable and is_trainable become the same."""
    return re.sub(r"[\W_]+", "", name).lower()


@functools.lru_cache(4096)
def words_of(name: str) -> list[str]:
    """The words of a name in small letters, without digits: isTrainable2 is [is, trainable]."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]


def check_text(text: str, where: str, problems) -> None:
    if surrogate(text) is not None:
        problems.add(f"{where} contains half of a surrogate pair, which is not a character; fix the file's encoding")


def surrogate(value: Any) -> str | None:
    """The first text in `value`, at any depth, that cannot be encoded as UTF-8."""
    if isinstance(value, dict | list):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return next((bad for bad in map(surrogate, inner) if bad is not None), None)
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        return value
    return None


MOST_LEVELS = 100
TOO_DEEP = f"nested too deeply; give it at most {MOST_LEVELS} levels"


def too_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `MOST_LEVELS` deep. Any library may change the interpreter's own limit."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def parsed(value: Any) -> Any:
    """The value of a JSON text; any other value unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def kind(value: Any) -> str:
    """The type of a value, in the words of JSON rather than Python."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", bytes: "bytes"}
    own = str if isinstance(value, str) else type(value)
    return "null" if value is None else names.get(own, f"a {own.__name__}")


def opened(row: dict, names: Iterable[str]) -> dict:
    """The row with columns for values inside its objects if one of `names` is a path to them, such as translation.de."""
    for name in names:
        while name not in row and (outer := next((one for one in row if name.startswith(f"{one}.") and isinstance(row[one], dict)), None)):
            inner = {f"{outer}.{key}": value for key, value in row[outer].items()}
            row = {column: value for column, value in row.items() if column != outer} | inner
    return row


def as_yaml(value: Any) -> str:
    """A setting as a line of a recipe, with names in quotes if necessary."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{as_yaml(key)}: {as_yaml(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(as_yaml, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    plain = re.fullmatch(r"[A-Za-z_][\w.-]*( [\w.-]+)*", value) and yaml.safe_load(value) == value
    return value if plain else json.dumps(value, ensure_ascii=False)
