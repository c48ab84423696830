"""The conditions of `data.train.where`, such as {clean: true, score: {above: 0.5}}: only rows that meet all of them are used."""

import math
from collections.abc import Iterator
from typing import Any

#: A condition's name, and its words.
ORDERS = {"above": "above", "below": "below", "at_least": "at least", "at_most": "at most"}
CONDITIONS = ("above", "at_least", "below", "at_most", "not")


def where_contradictions(where: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Invalid conditions: yields (the setting's path below `where`, problem and fix)."""
    for column, asked in where.items():
        if not column:
            yield "", "found a column without a name; name a column of the file"
        elif isinstance(asked, dict):
            yield from _range(column, asked)
        else:
            yield from _values(column, asked)


def _range(column: str, asked: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if not asked:
        yield column, f"found no condition; give a value, a list of values, or {', '.join(CONDITIONS[:-1])} or {CONDITIONS[-1]}"
    for name, value in asked.items():
        path = f"{column}.{name}"
        if name not in CONDITIONS:
            yield (
                path,
                f"no such condition; there are {', '.join(CONDITIONS[:-1])} and {CONDITIONS[-1]} (a column's own name is not split at dots)",
            )
        elif name == "not":
            yield from _values(path, value)
        elif not is_number(value) or not math.isfinite(value):
            yield path, f"found {value!r}, expected a number"
    for pair in (("above", "at_least"), ("below", "at_most")):
        if all(name in asked for name in pair):
            yield f"{column}.{pair[0]}", f"given together with {pair[1]}; keep one of them"
    low, high = (next((asked[name] for name in pair if is_number(asked.get(name))), None) for pair in (CONDITIONS[:2], CONDITIONS[2:4]))
    if low is not None and high is not None and (low > high or (low == high and not {"at_least", "at_most"} <= asked.keys())):
        yield column, f"no number is {_words({k: v for k, v in asked.items() if k != 'not'})}; correct one of them"


def _values(path: str, asked: Any) -> Iterator[tuple[str, str]]:
    values = asked if isinstance(asked, list | tuple) else [asked]
    if not values:
        yield path, "found an empty list, in which no value is; name the values"
    for value in values:
        if isinstance(value, list | tuple | dict):
            yield path, f"found {value!r}, expected a number, text, true, false or null"
        elif isinstance(value, float) and not math.isfinite(value):
            yield path, f"found {value}, expected a number that can be written in a file"


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def where_words(where: dict[str, Any]) -> str:
    """The conditions in words: `clean is true and score is above 0.5`."""
    return " and ".join(f"{column} is {_words(asked)}" for column, asked in where.items())


def _words(asked: Any) -> str:
    if isinstance(asked, dict):
        return " and ".join(f"{ORDERS.get(name, name)} {_words(value)}" for name, value in asked.items())
    if isinstance(asked, list | tuple):
        return " or ".join(map(_words, asked))
    return value_words(asked)


def value_words(value: Any) -> str:
    """A value as in a recipe; a long text is cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:36]} ..."
