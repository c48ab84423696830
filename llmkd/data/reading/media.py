"""Sounds and images as rows: from a folder for each class, from file names that match a regular expression, and from rows that name files."""

import functools
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ...config.data import Source
from ...config.formats import FORMATS
from ...errors import UserError
from .files import Records
from .problems import BadRow, ErrorCollector
from .row_checks import check_is_text, check_label
from .turn_marks import row_mark
from .values import kind, opened

#: {column of the format: endings of the files that folders are searched for}.
ENDINGS = {
    "audio": (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"),
}
#: Endings of sounds and images that cannot be read here. They are refused, as they would otherwise be missing without notice.
_UNREADABLE = (".m4a", ".aac", ".wma", ".webm", ".mp4", ".amr", ".heic", ".heif", ".avif", ".svg", ".raw")


def media_files(root: Path, name: str, endings: Sequence[str], setting: str) -> list[Path]:
    """The files of a folder and of those in it that have one of the endings, relative to it and sorted.

    Names that begin with a dot are left out. UserError where there is none, or one in an encoding that cannot be read.
    """
    every = sorted(Path(folder, file).relative_to(root) for folder, _, files in os.walk(root, followlinks=True) for file in files)
    every = [path for path in every if not any(part.startswith(".") for part in path.parts)]
    found = [path for path in every if path.suffix.lower() in endings]
    if other := next((path for path in every if path.suffix.lower() in _UNREADABLE), None):
        raise UserError(f"{setting}.path: {name}/{other} cannot be read; convert it to {endings[0]}, or remove it ({', '.join(endings)})")
    if not found:
        there = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{setting}.path: {name} has no file with one of the endings {', '.join(endings)}; it has {there}; name another folder"
        )
    return found


def media_rows(root: Path, name: str, column: str, files: Sequence[Path], pattern: str | None, labelled: bool = True) -> Records:
    """A row for each file, with its path under `column`: {audio: path, label: class}, or with the named groups of the pattern.

    pattern   matched with the whole name of a file or, where it contains a slash, with the whole path in the folder; None: where rows are
              labelled, the folder that a file is in is its label

    The place of a row is its file. A file that does not fit is a BadRow.
    """
    named = re.compile(pattern) if pattern is not None else None
    for file in files:
        yield f"{name}/{file}", functools.partial(_row, root, file, column, named, labelled)


def _row(root: Path, file: Path, column: str, named: re.Pattern | None, labelled: bool) -> dict[str, Any]:
    row = {column: str(root / file)}
    if named is None and not labelled:
        return row
    if named is None:
        if len(file.parts) != 2:
            where = "in no folder of a class" if len(file.parts) == 1 else f"{len(file.parts) - 1} folders deep"
            raise BadRow(
                f"it lies {where}, expected CLASS/{file.name}; name the folder above the classes, or give a pattern",
                "its folder is no class",
            )
        return {**row, "label": file.parts[0]}
    whole = file.as_posix() if "/" in named.pattern else file.name
    found = named.fullmatch(whole)
    if not found:
        raise BadRow(
            f"{whole!r} does not match the pattern {named.pattern!r}; rename it, remove it, or correct the pattern",
            "it does not match the pattern",
        )
    return {**row, **found.groupdict()}


def media_of(value: Any, place: str) -> Path | bytes:
    """The file of a row, given by its path, its bytes, or an object with either, as `datasets` writes it. A path is relative to the rows' file.

    place   of the row: `FILE:LINE`
    """
    if isinstance(value, dict) and value.keys() <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        what = "an empty text" if isinstance(value, str) else kind(value)
        raise BadRow(f"found {what}, expected the path of a file, or its bytes")
    if re.match(r"[a-z][a-z0-9+.-]+://", value):
        raise BadRow(f"found the address {value[:80]}, expected the path of a file; download it first")
    path = Path(value).expanduser()
    return path if path.is_absolute() else Path(place.rpartition(":")[0]).expanduser().parent / path


def check_media_row(row: Any, place: str, source: Source, problems: ErrorCollector, unread: Counter, views: Collection[str] = ()) -> Any:
    """The row's file and label under the format's own names, and `train: False` if it is marked as not trained on.

    Its errors are added to `problems`, the columns that are not read to `unread`. `views`: columns that teachers read in place of the
    student's.
    """
    row_format = FORMATS[source.format]
    if not isinstance(row, dict):
        problems.add(f"{place}: found {kind(row)}, expected an object with the columns of format {source.format}", alike=kind(row))
        return row
    columns = row_format.columns_for(views)
    theirs = {column: source.fields.get(column, column) for column in columns}
    row = opened(row, theirs.values())
    if lacking := [name for name in theirs.values() if name not in row]:
        named = f"column{'s' * (len(lacking) > 1)} {' and '.join(map(repr, lacking))}"
        fields = ", ".join(f"{column}: NAME" for column, name in theirs.items() if name in lacking)
        problems.add(
            f"{place}: no {named}; found {', '.join(map(repr, row))}; set fields: {{{fields}}} if it has another name", alike=f"no {named}"
        )
        return row
    found = {column: row[name] for column, name in theirs.items()}
    if source.pattern is None:  # its other groups are for human readers and for `where`
        trained, marks = row_mark(row, set(theirs.values()), source, place, problems)
        unread.update(name for name in row.keys() - {*theirs.values(), *source.ignore, *source.where, *marks} if row[name] is not None)
        found |= {"train": False} if trained is False else {}
    for column, name in theirs.items():
        if columns[column].kind == "label":
            check_label(found[column], f"{place}: {name}", problems)
        elif columns[column].kind == "text":
            check_is_text(found[column], f"{place}: {name}", problems)
    return found
