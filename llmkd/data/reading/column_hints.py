"""What to write in the recipe, or to change in the file, where a row does not have the columns of its format."""

import difflib
import re
from typing import Any

from ...config.data import FORMATS, Source
from .recognise import ONE_ROW, ROLE_KEYS, Check, is_read, is_turn, settings_for
from .turn_marks import plain


def column_hint(
    columns: list[str], row: dict[str, Any], theirs: dict[str, str], source: Source, check: Check, csv: bool, choices: bool
) -> tuple[str, bool]:
    """The end of the message about missing columns, and whether it names settings for rows of this shape.

    `columns` are the format's own names; `theirs` maps the format's columns to what the recipe says that the file calls them.
    """
    for column in columns:
        if column in source.fields and (near := difflib.get_close_matches(theirs[column], row, 1, 0.6)):
            return f"; did you mean {near[0]!r}?", False  # a name that the recipe gives has a slip in it
    if settings := settings_for(_answered(row, source) if choices else row, source, check):
        return f"{_found(row)}; {settings}", True
    if is_turn(row):
        return f"{_found(row)}; a row is one turn: {ONE_ROW}", False
    if near := difflib.get_close_matches(theirs[columns[0]], row, 1, 0.6):
        return f"; did you mean {near[0]!r}?", False
    return f"{_found(row)}{_described(columns, row, theirs, source, check, csv)}", False


def _answered(row: dict[str, Any], source: Source) -> dict[str, Any]:
    """A multiple-choice question as a row with an answer, in which its choices are not looked for."""
    asked = {source.fields.get(name, name) for name in ("choices", "answer")}
    answer = {one.answer: "x" for one in FORMATS.values() if one.answer}
    return {name: value for name, value in row.items() if name not in asked} | answer


def _found(row: dict[str, Any]) -> str:
    return f"; found {', '.join(map(repr, row)) or 'none'}"


def _described(columns: list[str], row: dict[str, Any], theirs: dict[str, str], source: Source, check: Check, csv: bool) -> str:
    """What a row is that no known settings read."""
    if inner := next((name for name, value in row.items() if isinstance(value, dict) and is_read(value, source, check)), None):
        return f"; the columns are inside {inner!r}: write what it holds as the row"
    if rows := next((name for name, value in row.items() if is_rows(value) and is_read(value[0], source, check)), None):
        return f"; {rows!r} is a list of objects with columns: write each as a row of its own, or a talk as messages of role and content"
    if turns := next((name for name, value in row.items() if turns_hint(value)), None):
        return f"; in {turns!r} {turns_hint(row[turns])}"
    unused = [name for name in row if name not in theirs.values() and not (columns == ["messages"] and isinstance(row[name], str | dict))]
    wanted = ", ".join(f"{column}: {unused[0] if len(unused) == len(columns) == 1 else 'NAME'}" for column in columns)
    header = "; the first line of a .csv file is its header" if csv and len(columns) > 1 else ""
    return header + (f"; set fields: {{{wanted}}} if the file has other names" if unused else "")


def is_rows(value: Any) -> bool:
    """Whether it is a list of objects, such as the rows of a file."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def row_hint(row: Any, source: Source, check: Check) -> str:
    """The end of the message about a row that is no object."""
    if isinstance(row, str):
        return '; write {"text": ...}' + (" and set format: text" if source.format != "text" else "")
    if is_rows(row):
        messages = "role" in row[0] or settings_for({"messages": row}, source, check)
        return '; write {"messages": [...]} on each line' if messages else "; a file that is one list of rows has the ending .json"
    return ""


def messages_hint(value: Any) -> str:
    """The end of the message about something else where a list of messages is expected."""
    if isinstance(value, str) and re.match(r"\[\s*\{\s*'", value.strip()):
        return "; it is a list as Python writes it: write it as JSON, in a .jsonl, .json or .parquet file"
    hint = turns_hint(value)
    return hint and f"; {hint}"


def turns_hint(value: Any) -> str:
    """What is wrong with turns that are no list of objects: texts in turn, pairs of texts, or a list for each key; "" for anything else."""
    fix = "write a list of {role, content} (format: chat)"
    if (
        isinstance(value, dict)
        and len(value) > 1
        and any(plain(key) in ROLE_KEYS for key in value)
        and all(isinstance(one, list) for one in value.values())
    ):
        return f"the turns are a list for each of {', '.join(map(repr, value))}: {fix}"
    flat = [text for one in value for text in (one if isinstance(one, list) else [one])] if isinstance(value, list) else []
    return f"the turns are texts without roles: {fix}" if len(flat) > 1 and all(isinstance(text, str) for text in flat) else ""
