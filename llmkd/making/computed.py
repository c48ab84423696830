"""Results that a stage has computed, stored by key so that the same command does not compute them again. No torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..rollouts.append_only import AppendOnly
from .rows import row_id

NAME = "computed.jsonl"


class Computed:
    """JSON values by key, in an append-only file. UserError if it is damaged."""

    def __init__(self, folder: Path):
        self.file = AppendOnly(folder / NAME, "output_dir")
        self.values: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.file.path.touch()
        self.file.remove_unfinished()
        for number, line in self.file.lines():
            try:
                row = json.loads(line)
                if row["checksum"] != _checksum(row["key"], row["value"]):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                raise UserError(f"output_dir: {self.file.path}:{number} is damaged; delete the line, and it is computed again") from None
            self.values[row["key"]] = row["value"]

    def put(self, key: str, value: Any) -> None:
        self.file.add([{"key": key, "value": value, "checksum": _checksum(key, value)}])
        self.values[key] = value


def key_of(*parts: Any) -> str:
    """A key that depends on all parts, as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _checksum(key: str, value: Any) -> str:
    return row_id(key, value)
