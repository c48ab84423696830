"""metrics.jsonl, the record of a run's metrics, which also go to its trackers."""

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..config.recipe import SCHEDULED
from ..console import count, warn
from ..files import append, read_jsonl, write_atomic
from .trackers import Trackers

#: The entries of a training step's record that are not terms of the loss.
_BESIDE_TERMS = (
    *("step", "epoch", "lr", "grad_norm", "targets", "targets_per_s", "training_seconds", "teacher_seconds", "peak_memory"),
    *SCHEDULED,
)


#: For each metric the part of the loss by whose weights held-out examples are weighted; in other metrics all examples count equally.
WEIGHED_BY = {"ce": "ce", "teacher_ce": "ce", "forward_kl": "kd", "reverse_kl": "kd", "top1_agreement": "kd", "accuracy": "ce"}
#: Seconds between two syncs to the disk. A kill loses no record; a power cut loses those after the last sync.
SYNC_EVERY = 1.0
#: The groups of measurements that a record may hold instead of a training step.
_GROUPS = ("validation", "teacher_check", "fidelity", "unexplained")


class MetricsLog:
    """One student's metrics: one JSON object per line in `metrics.jsonl`, and the same to the recipe's trackers.

    A resumed run continues from its checkpoint: records after it are dropped.

    done         the steps of that checkpoint, or 0
    then         `state` at that checkpoint
    check_there  called before each record; raises an OSError if the folder no longer belongs to the run
    """

    def __init__(self, folder: Path, done: int, trackers: Trackers, then: dict | None, check_there: Callable[[], None]):
        self.path, self.trackers, self.check_there = folder / "metrics.jsonl", trackers, check_there
        kept = [r for r in read_metrics(folder, warn) if r["step"] <= done] if done else []
        content = "".join(json.dumps(r) + "\n" for r in kept)
        self._bytes, self._hash = 0, hashlib.sha256()
        self._count(content)
        if then and hashlib.sha256(content.encode()[: then["bytes"]]).hexdigest() != then["sha256"]:
            warn(
                f"warning: {self.path} was changed since step {done} was recorded; its remaining records are kept, and loss.png is drawn from them"
            )
        write_atomic(self.path, content)
        self._synced = time.monotonic()

    @property
    def state(self) -> dict:
        """The state for a checkpoint: size in bytes and hash of the records so far."""
        return {"bytes": self._bytes, "sha256": self._hash.hexdigest()}

    def step(
        self, step: int, epoch: int, terms: dict[str, float], scheduled: dict[str, float], grad_norm: float, targets: int, speed: float
    ) -> None:
        """Record a training step. `scheduled`: its learning rate, the values of scheduled settings of the loss, and metrics of the batch source."""
        measured = {"grad_norm": grad_norm, "targets": targets, "targets_per_s": round(speed, 1), "peak_memory": peak_memory()}
        self.write({"step": step, "epoch": epoch, **terms, **scheduled, **measured})

    def write(self, record: dict) -> None:
        """Append a record, and send it to the trackers."""
        self.check_there()
        self._append(json.dumps(record) + "\n", time.monotonic() - self._synced >= SYNC_EVERY)
        self.trackers.log(record)

    def sync(self) -> None:
        """Sync all records to the disk, before a checkpoint."""
        self._append("", True)

    def _append(self, content: str, sync: bool) -> None:
        append(self.path, content, sync)
        self._count(content)
        if sync:
            self._synced = time.monotonic()

    def _count(self, content: str) -> None:
        self._bytes += len(content.encode())
        self._hash.update(content.encode())

    def close(self) -> None:
        self.trackers.finish()


def read_metrics(folder: Path, note: Callable[[str], None] = lambda text: None) -> list[dict]:
    """The records of a run's metrics.jsonl; [] if it is missing. Lines that are damaged or hold no record are left out.

    note   called with a line about a missing file, or about lines that are left out

    OSError if the file cannot be read.
    """
    path, found, bad = folder / "metrics.jsonl", [], []
    if not path.exists():
        note(f"warning: {path} is missing, so loss.png and the report lack everything that was recorded so far")
        return found
    for record in read_jsonl(path, lambda line, what: bad.append((f"line {line}", what))):
        if _is_record(record):
            found.append(record)
        else:
            bad.append((json.dumps(record)[:60], "it is not a record of metrics"))
    if bad:
        (where, what), more = bad[0], f", and {count(len(bad) - 1, 'more line')}" if bad[1:] else ""
        note(f"warning: {path}: {where} is damaged and left out ({what}){more}; the other records are read")
    return found


def _is_record(record: dict) -> bool:
    """Whether a record has a step, and the terms of the loss or a group of measurements."""
    group = next((record[name] for name in _GROUPS if name in record), record)
    step = record.get("step")
    whole = isinstance(step, int) and isinstance(group, dict) and (group is not record or "loss" in record)
    return whole and all(isinstance(value, int | float) for value in group.values())


def terms(record: dict) -> dict[str, float]:
    """The loss and its terms in a training step's record, the loss first."""
    return {"loss": record["loss"]} | {
        name: value for name, value in record.items() if name not in _BESIDE_TERMS and not is_count(name) and not name.startswith("written")
    }


def seconds_of(records: list[dict]) -> dict[str, float]:
    """The seconds that an on-policy run spent writing and training, and the teacher's share of the latter, by its records; {} for other runs."""
    found = [{"writing": writing_seconds(r)} | {name: r.get(f"{name}_seconds", 0.0) for name in ("training", "teacher")} for r in records]
    found = [one for one, record in zip(found, records, strict=True) if "training_seconds" in record]
    return {name: round(sum(one[name] for one in found), 3) for name in found[0]} if found else {}


def writing_seconds(values: dict[str, float]) -> float:
    """The seconds that student and teacher spent writing, from the values of a training step."""
    return sum(value for name, value in values.items() if name.startswith("written") and name.endswith("_seconds"))


def is_count(name: str) -> bool:
    """Whether a metric is about the number of targets: all of them (targets), the share that counts (kept), those with a weight in a term
    (NAME_targets), or their mean weight (NAME_weight)."""
    return name in ("targets", "kept") or name.endswith(("_targets", "_weight"))


def peak_memory() -> int:
    """Peak memory in bytes: of the GPU's allocator, or without a GPU of this process."""
    import torch  # here, since the report, which uses plots.py, does not need torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
