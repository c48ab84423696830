"""Reads the lines of a file of log-probabilities from elsewhere, and checks what can be checked without the examples. No torch."""

import json
from collections.abc import Iterator
from pathlib import Path

from ...data.reading.problems import ErrorCollector
from ...errors import UserError, fix_of
from ...files import open_file
from ...servers.logprobs import SLACK
from .distillkit import ParquetSet


class JsonLines:
    """A file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def parts(self) -> list[Path]:
        """All files that the rows depend on."""
        return [self.path]

    def rows(self) -> Iterator[tuple[str, int, bytes]]:
        """Place (file:line), position and content of each line that is not empty."""
        start = 0
        try:
            with open_file(self.path) as file:
                for number, content in enumerate(file, 1):
                    if content.strip():
                        yield f"{self.path}:{number}", start, content
                    start += len(content)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror}); {fix_of(error, 'copy it again')}") from error

    def at(self, position: int) -> dict:
        """The line at a position."""
        with open(self.path, "rb") as file:
            file.seek(position)
            return self.parsed(file.readline())

    def parsed(self, content: bytes) -> dict:
        return parsed(content)


def rows_in(path: Path) -> JsonLines | ParquetSet:
    """The rows of a file, or of a folder of Parquet files."""
    return ParquetSet(path) if path.is_dir() or path.suffix == ".parquet" else JsonLines(path)


def parsed(content: bytes) -> dict:
    """The object on a line, merged with the first of its `choices` if it has these. ValueError if it is no object."""
    try:
        line = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}); correct the line, or write the file again") from None
    if not isinstance(line, dict):
        raise ValueError("expected an object")
    choices = line.get("choices")
    return line | choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else line


def entries_of(line: dict) -> list[dict] | None:
    """The listed tokens of each target, {id: log-probability}, of a line with `top`; None for another form. ValueError if no form is recognised."""
    if "top" not in line:
        if "prompt_logprobs" not in line and "listed" not in line and not isinstance(line.get("logprobs"), dict | list):
            raise ValueError("found neither top, prompt_logprobs nor logprobs.content")
        return None
    if not isinstance(line.get("labels"), list) or not isinstance(line["top"], list):
        raise ValueError("expected lists as labels and top")
    try:
        entries = [{int(token): value for token, value in target or ()} for target in line["top"]]
        twice = any(len(entry) != len(target or ()) for entry, target in zip(entries, line["top"], strict=True))
    except (TypeError, ValueError, OverflowError):
        raise ValueError("top: expected a list of [id, logprob] for each target") from None
    if twice:
        raise ValueError("top: names a token twice")
    return entries


def refuse_unreadable(path: Path) -> None:
    """UserError with all lines that cannot be used whatever the examples: no JSON, no known form, or values that are no log-probabilities."""
    problems, empty, found = ErrorCollector(), True, rows_in(path)
    if isinstance(found, ParquetSet):
        return found.refuse_unreadable()
    for place, _, content in found.rows():
        empty = False
        try:
            for n, entry in enumerate(entries_of(parsed(content)) or (), 1):
                for token, value in entry.items():
                    if type(value) not in (int, float) or not value <= SLACK:
                        raise ValueError(f"target {n}: found {value!r} for token {token}, expected a log-probability (at most 0)")
        except ValueError as error:
            problems.add(f"{place}: {error}")
    problems.raise_if_any()
    if empty:
        raise UserError(f"{path}: holds no lines; name the file of log-probabilities")
