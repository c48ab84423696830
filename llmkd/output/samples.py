"""samples.jsonl: what a student has written, at validations (`validation.samples`) and in on-policy training (`on_policy.record`).

A line holds step, place, prompt, reference (the data's answer), text (without its end token), tokens, and whether it finished by itself; of an answer
that was trained on also `"training": true`.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from ..console import warn
from ..files import read_jsonl, write_atomic

_KEYS = {"step": int, "place": str, "prompt": str, "reference": str, "text": str, "tokens": int, "finished": bool}


def in_training(record: dict) -> bool:
    """Whether it is an answer that was written in training, and trained on."""
    return record.get("training") is True


def add_samples(folder: Path, step: int, records: Sequence[dict]) -> str:
    """Write answers of that step, all of validation or all of training, behind those of the steps before it. Answers of a later step, or of this one
    and written after those, are another attempt's, and are replaced. Returns the file's hash."""
    own = [*map(in_training, records)] == [True] * len(records)
    before = [one for one in read_samples(folder, warn) if one["step"] < step or (one["step"] == step and in_training(one) and not own)]
    content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in [*before, *records])
    write_atomic(folder / "samples.jsonl", content)
    return hashlib.sha256(content.encode()).hexdigest()


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
    found = [record for record in read_samples(folder) if not in_training(record)]
    return [record for record in found if record["step"] == found[-1]["step"]]
