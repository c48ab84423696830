"""A file of answers that a model writes, as rows of `format: tokens`. It is append-only, so that a killed command can continue. No torch here.

Its sidecar, FILE.jsonl.roll.json, records how the answers were written; training reads it with `read_about`.
"""

import contextlib
import functools
import json
import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.reading.token_columns import ROW_CHECKSUM, refuse_changed, row_checksum
from ..errors import UserError
from ..files import Damaged, open_file, read_sealed, write_sealed
from .append_only import AppendOnly

SUFFIX = ".roll.json"
TEXT, IDS, TARGETS = "answer", "input_ids", "loss_mask"
_KEY = re.compile("[0-9a-f]{1,16}")
_OF_ROW = re.compile(rb'"key": ?"([0-9a-f]{16})"')  # inside a text, the quotation marks would have a backslash


@dataclass(frozen=True)
class Written:
    """An answer in the file: its number of tokens, end token included, whether it ended by itself, and the `length` of the row in tokens."""

    tokens: int
    finished: bool
    length: int


class AnswerFile:
    """Answers by their keys.

    settings  everything that the answers depend on, apart from the prompts; a file with other settings is refused
    about     further records of the sidecar
    option    the option that names the file, for messages
    """

    def __init__(self, path: Path, settings: dict[str, Any], about: dict[str, Any], option: str = "--to"):
        self.path, self.settings, self.about, self.option = path, settings, about, option
        self.written: dict[str, Written] = {}
        self.lines = AppendOnly(path, option)

    @contextlib.contextmanager
    def open(self, asked: Sequence[str]) -> Iterator["AnswerFile"]:
        """Open the file for this process alone, and read its answers, whose keys must be among `asked`. An unfinished last line, left by a kill,
        is removed. UserError if another command wrote the file, or it is damaged."""
        with self.lines.held():
            self._begin()
            self._read(frozenset(asked))
            yield self

    def _begin(self) -> None:
        """Compare the settings with those of the sidecar, and write the sidecar."""
        if then := refuse_foreign(self.path, self.option):
            known = then["settings"]
            other = [f"{name} {known.get(name)}, not {value}" for name, value in self.settings.items() if known.get(name) != value]
            if other:
                raise UserError(f"{self.option}: {self.path} was written with {'; with '.join(other)}; name another file")
        write_sealed(about_path(self.path), self.about | {"settings": self.settings, "complete": False})

    def _read(self, asked: frozenset[str]) -> None:
        for number, line in self.lines.lines():
            try:
                row = json.loads(line)
                refuse_changed(row)
                key, one = row["key"], Written(sum(row[TARGETS]), row["finished"], len(row[IDS]))
            except (ValueError, KeyError, TypeError, AttributeError):
                fix = "delete the line, and its answer is written again"
                raise UserError(f"{self.option}: {self.path}:{number} is damaged; {fix}") from None
            if key in self.written:
                raise UserError(f"{self.option}: {self.path}:{number} repeats the answer of an earlier line; delete one of them")
            self.written[key] = one
        if more := len(self.written.keys() - asked):
            raise UserError(
                f"{self.option}: {self.path} holds {more} answers that are not asked for: the prompts were different, or --limit or --samples higher; "
                "name another file"
            )
        self.lines.remove_unfinished()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, each with its `key`, and wait until they are on the disk."""
        sealed = (row | {ROW_CHECKSUM: row_checksum(row)} for row in rows)
        self.lines.add(list(sealed))
        self.written |= {row["key"]: Written(sum(row[TARGETS]), row["finished"], len(row[IDS])) for row in rows}

    def complete(self) -> None:
        """Record that all answers are there, and which they are."""
        write_sealed(about_path(self.path), self.about | {"settings": self.settings, "complete": True, "rows": rows_of(self.written)})


def rows_of(keys: Iterable[str]) -> list[int | str]:
    """The number of answers, and a checksum of their keys that does not depend on the order."""
    numbers = [int(key, 16) if _KEY.fullmatch(key) else 0 for key in keys]
    return [len(numbers), f"{functools.reduce(operator.xor, numbers, 0):016x}"]


def rows_in(path: Path) -> list[int | str]:
    """`rows_of` the answers in a file, without parsing its rows."""
    with open_file(path) as file:
        return rows_of((found[1].decode() if (found := _OF_ROW.search(line)) else "") for line in file if line.strip())


def refuse_foreign(path: Path, option: str) -> dict[str, Any] | None:
    """The sidecar of a file of answers; None if there are no answers yet. UserError if the file holds something else."""
    if not path.exists() or not path.stat().st_size:
        return None
    if (then := read_about(path)) is None:
        raise UserError(f"{option}: {path} was not written by llmkd roll (there is no {about_path(path).name}); name another file")
    return then


def about_path(path: Path) -> Path:
    """The path of a file's sidecar."""
    return path.with_name(path.name + SUFFIX)


def read_about(path: Path) -> dict[str, Any] | None:
    """The sidecar of a file of answers: `settings`, `complete`, `writer`, `learnt_from`, and `rows` if it is complete. None for any other file;
    UserError if it is damaged."""
    sidecar = about_path(path)
    try:
        found = read_sealed(sidecar)
        found["settings"], found["complete"], found["writer"], found["learnt_from"]
    except FileNotFoundError:
        return None
    except (Damaged, KeyError, OSError) as error:
        raise UserError(f"{sidecar}: is damaged or cannot be read ({error}); restore it, or remove it and {path.name}") from None
    return found
