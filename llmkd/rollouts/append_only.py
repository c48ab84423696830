"""Append-only files of JSON lines: a kill leaves all lines that were written before. No torch."""

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
    """One append-only file. `setting`: the setting or option that names it, for messages."""

    def __init__(self, path: Path, setting: str):
        self.path, self.setting = path, setting

    @contextlib.contextmanager
    def held(self, fix: str = "name another file") -> Iterator[None]:
        """Lock the file for this process, creating it if needed. UserError if another process writes to it. `fix`: for the message."""
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
        """Number (from 1) and content of every finished line."""
        raw = self.path.read_bytes()
        yield from enumerate(raw[: raw.rfind(b"\n") + 1].split(b"\n")[:-1], 1)

    def remove_unfinished(self) -> None:
        """Remove an unfinished last line, left by a kill, and say so."""
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            info(f"{self.path}: {len(raw) - whole:,} bytes of an unfinished last line are removed; its answer is written again")
            os.truncate(self.path, whole)
            sync(self.path)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows, and wait until they are on the disk."""
        append(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
