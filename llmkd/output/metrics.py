"""metrics.jsonl: the record of a run's metrics, which its trackers get too."""

import json
import sys
from pathlib import Path

from ..files import read_jsonl, write_atomic
from .trackers import Trackers

#: What a training step's record holds beside the loss's terms.
_BESIDE_TERMS = ("step", "epoch", "lr", "grad_norm", "targets", "targets_per_s", "peak_memory")


class MetricsLog:
    """One student's metrics: a JSON object a line in `metrics.jsonl`, and the same to the recipe's trackers.

    A resumed run writes on from its checkpoint: what was recorded after it is dropped.
    """

    def __init__(self, folder: Path, done: int, trackers: Trackers):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [r for r in read_jsonl(self.path) if r["step"] <= done] if done else []
            write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self.trackers = trackers

    def step(self, step: int, epoch: int, terms: dict[str, float], lr: float, grad_norm: float, targets: int, speed: float) -> None:
        measured = {"grad_norm": grad_norm, "targets": targets, "targets_per_s": round(speed, 1), "peak_memory": peak_memory()}
        self.write({"step": step, "epoch": epoch, **terms, "lr": lr, **measured})

    def write(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.trackers.log(record)

    def close(self) -> None:
        self.trackers.finish()


def terms(record: dict) -> dict[str, float]:
    """The loss and its terms in a training step's record, the loss first."""
    return {"loss": record["loss"]} | {name: value for name, value in record.items() if name not in _BESIDE_TERMS}


def peak_memory() -> int:
    """Bytes: the most the GPU's allocator held, or without a GPU the most this process held."""
    import torch  # here, so that the report, which draws with plots.py, does not load it

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
