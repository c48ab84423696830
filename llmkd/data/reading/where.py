"""Rows that are chosen by their columns, before any limit: the `where` of a source.

A row without the column is refused, and so is a value of another type than those it is compared with, since such a row would be left
out without a word. CSV has text only: its values are read as the type that they are compared with, and an empty one is null.
"""

import difflib
import math
import re
from collections import Counter
from decimal import Decimal
from typing import Any

from ...config.data import Source
from ...config.where import is_number, value_words, where_words
from ...console import count, info
from ...errors import UserError
from .files import Records
from .problems import BadRow
from .values import kind, opened

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_MOST = 1000  # different values of a column that are kept for the message if no row is chosen
_HOLDS = {
    "above": lambda value, limit: value > limit,
    "at_least": lambda value, limit: value >= limit,
    "below": lambda value, limit: value < limit,
    "at_most": lambda value, limit: value <= limit,
}


class Chosen:
    """Iterates over the rows of a source that its `where` chooses, and counts the rows that were kept and left out so far."""

    def __init__(self, source: Source, setting: str, texts: bool = False):
        """`texts`: whether all values are text, as in CSV files."""
        self.texts = texts
        self.where, self.path, self.setting, self.source = source.where, source.path, setting, source
        self.kept = self.left_out = 0
        self.nulls: Counter[str] = Counter()
        self.seen: dict[str, Counter] = {column: Counter() for column in self.where}

    def records(self, found: Records) -> Records:
        """The chosen records. A record that cannot be compared stays in, and its `get` raises the reason."""
        if not self.where:
            yield from found
            return
        for place, get in found:
            try:
                row = get()
            except BadRow:
                yield place, get
                continue
            try:
                chosen = not isinstance(row, dict) or self._holds(row, place)
            except BadRow as error:
                yield place, _raising(error)
                continue
            self.kept, self.left_out = self.kept + chosen, self.left_out + (not chosen)
            if chosen:
                yield place, get

    def _holds(self, row: dict, place: str) -> bool:
        """Whether a row meets all conditions. BadRow if it cannot be compared with one."""
        from_csv = self.texts or place.rpartition(":")[0].lower().endswith(".csv")
        absent = {one: None for one in self.where if isinstance(row.get(one.partition(".")[0]), dict)}  # columnar files have null there
        row = absent | opened(row, self.where)
        return all([self._one(row, column, asked, from_csv) for column, asked in self.where.items()])

    def _one(self, row: dict, column: str, asked: Any, from_csv: bool) -> bool:
        if column not in row:
            raise BadRow(
                f"no column {column!r}, which {self.setting}.where reads; found {', '.join(row) or 'none'}{self._hint(row, column)}",
                f"no column {column!r}",
            )
        conditions = asked if isinstance(asked, dict) else {"in": asked}
        named = [value for values in conditions.values() for value in _listed(values)]
        value = _typed(row[column], named) if from_csv else _plain(row[column])
        kinds = {kind(one) for one in named}
        if value is None:
            self.nulls[column] += None not in named
        elif kind(value) not in kinds and kinds != {"null"} or isinstance(value, list | dict):
            raise BadRow(
                f"{column} is {_shown(row[column])}, and {self.setting}.where compares it with {' or '.join(sorted(kinds - {'null'})) or 'null'} "
                f"({where_words({column: asked})}); write the condition with values of the file's own type",
                f"{column} is {kind(value)}",
            )
        if value in self.seen[column] or len(self.seen[column]) < _MOST:
            self.seen[column][value] += 1
        return all(_fulfils(value, name, limit) for name, limit in conditions.items())

    def _hint(self, row: dict, column: str) -> str:
        own = self.source.fields.get(column)
        if own in row:
            return f"; the file's own name for it is {own!r}: write that"
        near = difflib.get_close_matches(column, row, 1, 0.7)
        return f"; did you mean {near[0]!r}?" if near else "; name a column that every row has"

    def refuse_none(self) -> None:
        """UserError if rows were read and none was chosen, with the values that they have."""
        if self.left_out and not self.kept:
            there = "; ".join(f"{column} is {_values_words(seen)}" for column, seen in self.seen.items())
            raise UserError(
                f"{self.setting}.where: no row of {self.path} has {where_words(self.where)}: of its {count(self.left_out, 'row')} {there}; "
                "choose among these, or leave the condition out"
            )

    def report(self, of: str = "") -> None:
        """One line with the numbers of rows that were kept and left out; none without conditions."""
        if self.where:
            nulls = [f"{column} is null in {number:,}" for column, number in self.nulls.items() if number]
            info(
                f"{self.setting} ({self.path}): where {where_words(self.where)}: {count(self.kept, 'row')} kept, {self.left_out:,} left out{of}"
                + (f" ({', '.join(nulls)} of them all)" if nulls else "")
            )


def _raising(error: BadRow):
    def get() -> Any:
        raise error

    return get


def _listed(values: Any) -> list:
    return list(values) if isinstance(values, list | tuple) else [values]


def _fulfils(value: Any, name: str, limit: Any) -> bool:
    if name in _HOLDS:
        return value is not None and bool(_HOLDS[name](value, limit))
    return any(kind(value) == kind(one) and value == one for one in _listed(limit)) != (name == "not")


def _plain(value: Any) -> Any:
    """A value of a row, with null for NaN, by which pandas writes a missing number."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value


def _typed(text: str, named: list) -> Any:
    """A value of a CSV file as the type that it is compared with; as text if it does not have that type."""
    if text in named:
        return text
    if text == "":
        return None
    if any(isinstance(one, bool) for one in named) and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if any(map(is_number, named)) and _NUMBER.fullmatch(text):
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    return text


def _shown(value: Any) -> str:
    return f"{value_words(value)} ({kind(value)})" if isinstance(value, str | int | float) else kind(value)


def _values_words(seen: Counter) -> str:
    numbers = [value for value in seen if is_number(value)]
    if len(seen) > 5 and len(numbers) == len(seen):
        return f"from {value_words(min(numbers))} to {value_words(max(numbers))}"
    listed = ", ".join(f"{value_words(value)} ({number:,})" for value, number in seen.most_common(5))
    return listed + (", ..." if len(seen) > 5 else "")
