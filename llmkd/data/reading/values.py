"""Values of a row: their types in words, and texts that are none."""

import json
from typing import Any


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
    """Whether lists and objects lie more than `MOST_LEVELS` deep in `value`: a bound of our own, since the interpreter's may be moved by any library."""
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
    """What a text that is JSON says; any other value as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def kind(value: Any) -> str:
    """The type of a value, in the words of JSON rather than Python."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
