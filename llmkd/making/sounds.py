"""Writes sounds that rows hold as bytes to files, which train.jsonl can name. No torch."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomic
from .rows import Row

FOLDER = "sounds"
#: File endings by a file's first bytes. Files of other kinds are written without an ending.
_ENDINGS = {b"RIFF": ".wav", b"fLaC": ".flac", b"OggS": ".ogg", b"FORM": ".aiff", b"ID3": ".mp3", b"\xff": ".mp3"}


def written_sounds(rows: Sequence[Row], folder: Path) -> list[Row]:
    """The rows with bytes replaced by the path of a file, FOLDER/HASH in the pipeline's folder, which is written unless it exists."""
    return [row if row.audio is None or isinstance(row.audio.file, str) else _written(row, folder / FOLDER) for row in rows]


def _written(row: Row, folder: Path) -> Row:
    raw = row.audio.file
    ending = next((ending for start, ending in _ENDINGS.items() if raw.startswith(start)), "")
    path = folder.resolve() / f"{row.messages[0]['content']}{ending}"
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        write_atomic(path, raw)
    return dataclasses.replace(row, audio=dataclasses.replace(row.audio, file=str(path)))
