"""What to write in the recipe where a row does not have the columns of its format."""

import difflib
from typing import Any

from ...config.data import FORMATS, Source


def column_hint(column: str, row: dict[str, Any], theirs: dict[str, str], source: Source, csv: bool) -> str:
    """The end of the message about a missing column: the closest name, or what was found and the setting that fits it.

    `column` is the format's own name; `theirs` maps the format's columns to what the recipe says that the file calls them.
    """
    found = f"; found {', '.join(map(repr, row)) or 'none'}"
    if csv and len(row) == 1 and (separators := [s for s in ";\t|" if s in next(iter(row))]):
        return f"{found}; columns are separated by {separators[0]!r} here, expected commas: save the file with commas"
    if not source.fields and (fits := [name for name in FORMATS if name != source.format and _fits(name, row)]):
        return f"{found}; set format: {fits[0]}, whose columns these are"
    if near := difflib.get_close_matches(theirs[column], row, 1, 0.6):
        return f"; did you mean {near[0]!r}?"
    for name, value in row.items():
        if (
            column == "messages"
            and isinstance(value, list)
            and value
            and isinstance(value[0], dict)
            and {"from", "value"} <= value[0].keys()
        ):
            return (
                f"{found}; for ShareGPT's names set fields: {{messages: {name}, role: from, content: value}} and "
                "roles: {user: human, assistant: gpt}"
            )
    unused = [name for name in row if name not in theirs.values()]
    return found + (f"; set fields: {{{column}: {unused[0] if len(unused) == 1 else 'NAME'}}} if it has another name" if unused else "")


def _fits(name: str, row: dict) -> bool:
    return all(column in row for column, kind in FORMATS[name].row.items() if not kind.optional)
