"""Columns that a format does not read: they are counted, and refused if they change the meaning of the row (`meanings.py`)."""

from collections import Counter
from collections.abc import Collection

from ...config.data import Source
from ...config.formats import FORMATS
from ...console import count, warn
from .calls import are_tools
from .meanings import BETTER, PREFERENCE, Meaning, is_copy, meaning_of
from .problems import ErrorCollector
from .values import as_yaml, plain


def count_unread(row: dict, read: set[str], source: Source, place: str, problems: ErrorCollector, unread: Counter) -> set[str]:
    """Count the row's columns that are neither in `read` nor ignored; those with a meaning are added to `problems`, and their names returned."""
    for name, value in row.items():
        if name in read or name in source.ignore or name in FORMATS[source.format].notes or value is None:
            continue
        unread[name] += 1
    lost = lost_columns(row, read, source)
    for name, meaning in lost.items():
        problems.add(
            f"{place}: column {name!r} is not read: {_advice(meaning, name, row, source)}",
            alike=f"column {name!r} is not read",
        )
    return {*lost}


def lost_columns(row: dict, read: Collection[str], source: Source) -> dict[str, Meaning]:
    """The columns neither in `read` nor ignored that change a row's meaning, and of which the columns that are read hold no copy."""
    if source.path.startswith("builtin:"):  # its rows have columns for several formats
        return {}
    named = ((name, value) for name, value in row.items() if name not in read and name not in source.ignore and value is not None)
    found = {name: meaning for name, value in named if (meaning := meaning_of(name, value, source.format))}
    texts = [row[name] for name in read if name in row] if found else []
    worse = {name for name, meaning in found.items() if meaning.what == PREFERENCE and plain(name) not in BETTER}
    return {name: meaning for name, meaning in found.items() if name in worse or not is_copy(row[name], texts)}


def _advice(meaning: Meaning, name: str, row: dict, source: Source) -> str:
    """The message on what a column means, with the lines of the recipe that read it or leave it out."""
    ways = []
    if settings := reading_settings(meaning, name, row, source):
        ways.append(f"set {settings}")
    elif meaning.fix:
        ways.append(meaning.fix.format(as_yaml(name)))
    ways.append(f"set ignore: {as_yaml([*source.ignore, name])} to train without it")
    return f"it may hold {meaning.what}; {', or '.join(ways)}"


def reading_settings(meaning: Meaning, name: str, row: dict, source: Source) -> str | None:
    """The settings by which the format reads the column with its meaning; None if it has no such column, or that is taken."""
    columns, row_format = FORMATS[source.format].columns, FORMATS[source.format]
    value = row[name]
    known = meaning.column in columns and (are_tools(value) if meaning.column == "tools" else isinstance(value, str))
    if not known or row.get(source.fields.get(meaning.column, meaning.column)) not in (None, "", [], {}):
        return None
    fields = source.fields | {meaning.column: name}
    said = f"fields: {as_yaml(fields)}"
    texts = row_format.template == "optional" and not isinstance(row.get(source.fields.get("prompt", "prompt")), list)
    return f"{said}, chat_template: true" if texts and meaning.column != "input" and not source.chat_template else said


def note_unread(setting: str, source: Source, unread: Counter, rows: int, of: str = "of {}") -> None:
    """One line that lists the columns that were not read, the most frequent first; none for the built-in corpus, whose columns are for several formats.

    `rows`: the number of rows that were counted; `of`: what they are.
    """
    if unread and not source.path.startswith("builtin:"):
        listed = ", ".join(f"{name} ({number:,})" for name, number in unread.most_common())
        warn(
            f"note: {setting} ({source.path}): columns that are not read, with the rows that have them, {of.format(count(rows, 'row'))}: {listed}"
        )
