"""Nested mappings and settings classes by dotted path, as in `optim.lr`."""

import dataclasses
import typing

from .schedule import is_schedule


def flatten(value, path: str = "", lists: bool = False) -> dict[str, typing.Any]:
    """A settings object or a mapping, or a part of one, as {dotted path: value}. An empty mapping or a schedule is one value.

    `lists`: flatten lists of sources and teachers too, with the numbers of their items as keys.
    """
    if dataclasses.is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif lists and isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
        value = dict(enumerate(value))
    if isinstance(value, dict) and (value or not path) and not is_schedule(value):
        out = {}
        for key, inner in value.items():
            out |= flatten(inner, f"{path}.{key}" if path else str(key), lists)
        return out
    return {path: value}


def keys_of(dotted: str) -> tuple[str | int, ...]:
    """The keys of a dotted path; those of list items are numbers."""
    return tuple(int(key) if key.isdigit() else key for key in dotted.split("."))


def replaced(value: typing.Any, old: str, new: str | int) -> typing.Any:
    """A copy with `old` replaced by `new` in every text, at any depth. If `new` is a number, a text that equals `old` becomes that number."""
    if isinstance(value, dict):
        return {key: replaced(inner, old, new) for key, inner in value.items()}
    if isinstance(value, list):
        return [replaced(inner, old, new) for inner in value]
    if isinstance(new, int):
        return new if value == old else replaced(value, old, str(new))
    return value.replace(old, new) if isinstance(value, str) and old in value and new else value
