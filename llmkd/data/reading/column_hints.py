"""Hints for rows without the columns of their format: what to write in the recipe, or to change in the file."""

import difflib
import itertools
import re
from typing import Any

from ...config.data import Source
from ...config.formats import FORMATS
from .meanings import ONE_ROW, meaning_of
from .names import ANSWERS, ASKING, PROMPTS, ROLE_KEYS, named
from .recognise import Check, is_read, is_turn, settings_for
from .values import as_yaml, kind, parsed, plain


def column_hint(
    columns: list[str], row: dict[str, Any], theirs: dict[str, str], source: Source, check: Check, csv: bool, choices: bool
) -> tuple[str, bool]:
    """The end of the message about missing columns, and whether it names settings for rows of this shape.

    `columns` are the format's own names; `theirs` maps the format's columns to what the recipe says that the file calls them.
    """
    for column in columns:
        if column in source.fields and (near := difflib.get_close_matches(theirs[column], row, 1, 0.6)):
            return f"; did you mean {near[0]!r}?", False  # a name in the recipe is misspelt
    if settings := settings_for(_answered(row, source) if choices else row, source, check):
        return f"{_found(row)}; {settings}", True
    if is_turn(row):
        return f"{_found(row)}; a row is one turn: {ONE_ROW}", False
    row_format = FORMATS[source.format]
    alike = [
        name for name, value in row.items() if isinstance(value, str) or (row_format.columns | row_format.views)[columns[0]].kind != "text"
    ]
    if near := difflib.get_close_matches(theirs[columns[0]], alike, 1, 0.8):
        return f"; did you mean {near[0]!r}?", False
    return f"{_found(row)}{_described(columns, row, theirs, source, check, csv)}", False


def _answered(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """A multiple-choice question as a row with an answer and without its choices."""
    asked = {source.fields.get(name, name) for name in ("choices", "answer")}
    answer = {one.answer: "x" for one in FORMATS.values() if one.answer}
    return {name: value for name, value in row.items() if name not in asked} | answer


def _found(row: dict[str, Any]) -> str:
    """The names of the columns, only the first of many, so that the rest of the message is not cut off."""
    shown = [name for name, end in zip(row, itertools.accumulate(len(name) + 4 for name in row), strict=True) if end < 200]
    more = f" and {len(row) - len(shown)} more" if len(shown) < len(row) else ""
    return f"; found {', '.join(map(repr, shown)) or 'none'}{more}"


def _described(columns: list[str], row: dict[str, Any], theirs: dict[str, str], source: Source, check: Check, csv: bool) -> str:
    """A description of a row that no known settings read."""
    if rows := next((name for name, value in row.items() if is_rows(value) and is_read(value[0], source, check)), None):
        return f"; {rows!r} is a list of objects with columns: write each as a row of its own, or a talk as messages of role and content"
    if calls := next((name for name, value in row.items() if isinstance(value, str) and _are_calls(parsed(value))), None):
        return f"; {calls!r} holds tool calls: write messages (format: chat) with tool_calls"
    choices = {name for name, value in row.items() if isinstance(value, list) and meaning_of(name, value, "alpaca")}
    if turns := next((name for name, value in row.items() if turns_hint(value) and name not in choices), None):
        return f"; in {turns!r} {turns_hint(row[turns])}"
    if named(row, PROMPTS) and (answer := next((name for name in named(row, ANSWERS) if not isinstance(row[name], str)), None)):
        return f"; {answer!r} is {kind(row[answer])}, expected text: write the answer to train on as text"
    unused = [name for name in row if name not in theirs.values() and not (columns == ["messages"] and isinstance(row[name], str | dict))]
    asked = next((name for name in named(row, ASKING) if name in unused and isinstance(row[name], str)), "NAME")
    names = [asked if column in ("instruction", "prompt") else "NAME" for column in columns]
    names = unused if len(unused) == len(columns) == 1 else names
    wanted = ", ".join(f"{column}: {as_yaml(name)}" for column, name in zip(columns, names, strict=True))
    header = "; the first line of a .csv file is its header" if csv and len(columns) > 1 else ""
    return header + (f"; set fields: {{{wanted}}} if the file has other names" if unused else "")


#: Where a turn begins in a conversation that is one text.
_TURN = re.compile(r"(?:^|\n)\W*(user|human|assistant|system|gpt|bot|ai)\W*:", re.I)


def _are_calls(value: Any) -> bool:
    return is_rows(value) and all("name" in one and one.keys() & {"arguments", "parameters"} for one in value)


def is_rows(value: Any) -> bool:
    """Whether the value is a list of objects, such as the rows of a file."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def row_hint(row: Any, source: Source, check: Check) -> str:
    """The end of the message about a row that is not an object."""
    if isinstance(row, str):
        return '; write {"text": ...}' + (" and set format: text" if source.format != "text" else "")
    if is_rows(row):
        messages = "role" in row[0] or settings_for({"messages": row}, source, check)
        return '; write {"messages": [...]} on each line' if messages else "; a file that is one list of rows has the ending .json"
    return ""


def messages_hint(value: Any) -> str:
    """The end of the message about another value in place of a list of messages."""
    if isinstance(value, str) and re.match(r"\[\s*\{\s*'", value.strip()):
        return "; it is a list as Python writes it: write it as JSON, in a .jsonl, .json or .parquet file"
    hint = turns_hint(value)
    return hint and f"; {hint}"


def turns_hint(value: Any) -> str:
    """The problem with turns that are not a list of objects but one text, a list of texts or of pairs of texts, or a list for each key; "" for
    anything else."""
    fix = "write a list of {role, content} (format: chat)"
    if (
        isinstance(value, dict)
        and len(value) > 1
        and any(plain(key) in ROLE_KEYS for key in value)
        and all(isinstance(one, list) for one in value.values())
    ):
        return f"the turns are a list for each of {', '.join(map(repr, value))}: {fix}"
    if isinstance(value, str) and len({turn.lower() for turn in _TURN.findall(value)}) > 1:
        return f"the turns are one text: {fix}"
    flat = [text for one in value for text in (one if isinstance(one, list) else [one])] if isinstance(value, list) else []
    return f"the turns are texts without roles: {fix}" if len(flat) > 1 and all(isinstance(text, str) for text in flat) else ""
