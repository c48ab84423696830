"""A file of JSON lines that is only added to, so that a kill leaves all that was written before. No torch."""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..console import info
from ..errors import UserError
from ..files import FileLocked, append, lock_file, sync


class AppendOnly:
    """One file. `setting`: what names it, in messages."""

    def __init__(self, path: Path, setting: str):
        self.path, self.setting = path, setting

    @contextlib.contextmanager
    def held(self, fix: str = "name another file") -> Iterator[None]:
        """The file for this process alone, made where there is none. UserError where another process writes to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_file(self.path)
        except FileLocked:
            raise UserError(f"{self.setting}: another process writes to {self.path}; wait for it, or {fix}") from None
        except OSError as error:
            raise UserError(f"{self.setting}: {self.path} cannot be written ({error.strerror}); {fix}") from error
        with lock:
            yield

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Number, from 1, and content of every whole line."""
        raw = self.path.read_bytes()
        yield from enumerate(raw[: raw.rfind(b"\n") + 1].split(b"\n")[:-1], 1)

    def remove_unfinished(self) -> None:
        """Remove a part of a last line, which a kill left, with a word."""
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            info(f"{self.path}: {len(raw) - whole:,} bytes of a last line that is not finished are removed; its answer is written again")
            os.truncate(self.path, whole)
            sync(self.path)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, and wait until they are on the disk."""
        append(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
