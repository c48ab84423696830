"""What a run shows and keeps of its progress: the bar, metrics.jsonl, trackers, loss.png, and tables for the console."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .loop import Progress
from .recipe import Recipe
from .trackers import Trackers


class Record:
    """One student's figures: a JSON object a line in `metrics.jsonl`, and the same to the recipe's trackers.

    A resumed run writes on from its checkpoint: what was recorded after it is dropped.
    """

    def __init__(self, recipe: Recipe, folder: Path, done: int, say: Callable[[str], None]):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [r for r in read(self.path) if r["step"] <= done] if done else []
            part = self.path.with_name(f"metrics.tmp-{os.getpid()}")
            part.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            part.replace(self.path)
        self.trackers = Trackers(recipe, folder, done, say)

    def step(self, progress: Progress, learner: int, lr: float, speed: float) -> None:
        measured = {
            "grad_norm": progress.grad_norms[learner],
            "targets": progress.targets,
            "targets_per_s": round(speed, 1),
            "peak_memory": peak_memory(),
        }
        self.write({"step": progress.step, "epoch": progress.epoch, **progress.terms[learner], "lr": lr, **measured})

    def write(self, record: dict) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.trackers.log(record)

    def close(self) -> None:
        self.trackers.finish()


class Display:
    """How far training is, on stderr: a bar on a terminal, a line now and then in a file. Silent on every rank but the first."""

    def __init__(self, total_steps: int, done: int, main: bool):
        from tqdm import tqdm

        self.main, self.lines = main, main and not sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps,
            initial=done,
            unit="step",
            disable=not main or self.lines,
            dynamic_ncols=True,
            mininterval=0.5,
            file=sys.stderr,
        )
        self.total, self.first, self.started, self.shown = total_steps, done, time.monotonic(), 0.0
        self.targets_since, self.time_since = 0, self.started

    def count(self, targets: int) -> None:
        """A step is done."""
        self.targets_since += targets
        self.bar.update()

    def speed(self) -> float:
        """Targets a second since this was last asked."""
        now = time.monotonic()
        speed = self.targets_since / max(now - self.time_since, 1e-9)
        self.targets_since, self.time_since = 0, now
        return speed

    def show(self, step: int, shown: dict[str, str], speed: float) -> None:
        shown = shown | {"targets/s": f"{speed:.0f}", "mem": f"{peak_memory() / 2**30:.1f}G"}
        self.bar.set_postfix(shown, refresh=False)
        now = time.monotonic()
        if self.lines and (now - self.shown > 10 or step == self.total):
            self.shown = now
            left = (now - self.started) / (step - self.first) * (self.total - step)
            figures = "  ".join(f"{k} {v}" for k, v in shown.items())
            print(f"step {step}/{self.total}  {figures}  {left:.0f} s left", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        if self.main:
            self.bar.write(text, file=sys.stderr, nolock=True)

    def close(self) -> None:
        self.bar.close()


def peak_memory() -> int:
    """Bytes: the most the GPU's allocator held, or without a GPU the most this process held."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def plot(folder: Path) -> None:
    """loss.png from metrics.jsonl: the training terms, and below them the validation figures that there are."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    records = read(folder / "metrics.jsonl")
    steps = [r for r in records if "loss" in r]
    held_out = [r for r in records if "validation" in r]
    kl = [r for r in held_out if "forward_kl" in r["validation"]]
    panels = 1 + bool(held_out) + bool(kl)
    figure, axes = plt.subplots(panels, 1, figsize=(7, 2.6 * panels), sharex=True, layout="constrained", squeeze=False)
    for name, colour in (("loss", "#333333"), ("ce", "#1f6fb4"), ("kd", "#d1495b")):
        points = [(r["step"], r[name]) for r in steps if name in r]
        if points:
            xs, ys = zip(*points, strict=True)
            axes[0, 0].plot(xs, ys, color=colour, alpha=0.25, linewidth=1)
            axes[0, 0].plot(xs, smooth(ys), color=colour, linewidth=1.6, label=name)
    axes[0, 0].set_ylabel("training, nats per target")
    if held_out:
        _lines(axes[1, 0], held_out, (("ce", "student CE", "#1f6fb4"), ("teacher_ce", "teacher CE", "#888888")))
        axes[1, 0].set_ylabel("held-out CE, nats")
    if kl:
        _lines(axes[2, 0], kl, (("forward_kl", "forward KL", "#d1495b"), ("reverse_kl", "reverse KL", "#8d5a97")))
        axes[2, 0].set_ylabel("held-out KL, nats")
    axes[-1, 0].set_xlabel("optimizer step")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[:, 0]:
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9)
    figure.suptitle(folder.name, fontsize=10)
    figure.savefig(folder / "loss.png", dpi=130)
    plt.close(figure)


def _lines(axis, records: list[dict], series) -> None:
    for name, label, colour in series:
        points = [(r["step"], r["validation"][name]) for r in records if name in r["validation"]]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.4, label=label)


def smooth(values, share: float = 0.9) -> list[float]:
    """An exponential mean without the pull towards its start."""
    out, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = share * mean + (1 - share) * value, share * weight + (1 - share)
        out.append(mean / weight)
    return out


def table(rows: list[dict[str, object]]) -> str:
    """Rows of the same keys as aligned text."""
    names = list(rows[0])
    cells = [names] + [
        [f"{v:.4f}" if isinstance(v, float) else "" if v is None else str(v) for v in (row.get(n) for n in names)] for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
