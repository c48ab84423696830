"""samples.jsonl: answers that a student wrote, at validations (`validation.samples`) and in on-policy training (`on_policy.record`).

A line holds step, place, prompt, reference (the data's answer), text (without its end token), tokens, and whether the answer ended by itself; for
an answer on which the student trained also `"training": true`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..console import warn
from ..files import read_jsonl, write_atomic

_KEYS = {"step": int, "place": str, "prompt": str, "reference": str, "text": str, "tokens": int, "finished": bool}


def in_training(record: dict) -> bool:
    """Whether a record is an answer on which the student trained."""
    return record.get("training") is True


def add_samples(folder: Path, step: int, records: Sequence[dict]) -> str:
    """Write a step's answers, all from validation or all from training, after those of earlier steps. Later answers in the file come from another
    attempt and are dropped. Returns the file's hash."""
    own = all(map(in_training, records))
    before = [one for one in read_samples(folder, warn) if one["step"] < step or (one["step"] == step and in_training(one) and not own)]
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in [*before, *records])
    write_atomic(folder / "samples.jsonl", content)
    return hashlib.sha256(content.encode()).hexdigest()


def read_samples(folder: Path, note: Callable[[str], None] = lambda text: None) -> list[dict]:
    """The answers that a run recorded, in the order of steps. Damaged lines are left out, and `note` is called with a line about them."""
    path, found = folder / "samples.jsonl", []
    if not path.exists():
        return found
    bad = []
    for record in read_jsonl(path, lambda line, what: bad.append(f"line {line} is left out ({what})")):
        if all(isinstance(record.get(key), kind) for key, kind in _KEYS.items()):
            found.append(record)
        else:
            bad.append("a line that is not a sample is left out")
    if bad:
        note(f"warning: {path}: {bad[0]}" + (f", and {len(bad) - 1} more" if bad[1:] else ""))
    return found


def last_samples(folder: Path) -> list[dict]:
    """The answers at the last validation."""
    found = [record for record in read_samples(folder) if not in_training(record)]
    return [record for record in found if record["step"] == found[-1]["step"]]
