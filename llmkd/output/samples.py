"""Reads samples.jsonl, which a run with `validation.samples` leaves: for the run itself, its model card and the report."""

from collections.abc import Callable
from pathlib import Path

from ..files import read_jsonl

_KEYS = {"step": int, "place": str, "prompt": str, "reference": str, "text": str, "tokens": int, "finished": bool}


def read_samples(folder: Path, note: Callable[[str], None] = lambda text: None) -> list[dict]:
    """The answers that a run recorded, step by step; none where it recorded none. Lines that are damaged are left out and `note`d."""
    path, found = folder / "samples.jsonl", []
    if not path.exists():
        return found
    bad = []
    for record in read_jsonl(path, lambda line, what: bad.append(f"line {line} is left out ({what})")):
        if all(isinstance(record.get(key), kind) for key, kind in _KEYS.items()):
            found.append(record)
        else:
            bad.append("a line that is no sample is left out")
    if bad:
        note(f"warning: {path}: {bad[0]}" + (f", and {len(bad) - 1} more" if bad[1:] else ""))
    return found


def last_samples(folder: Path) -> list[dict]:
    """The answers at the last validation."""
    found = read_samples(folder)
    return [record for record in found if record["step"] == found[-1]["step"]]
