"""What a run shows and keeps of its progress: the bar, metrics.jsonl, trackers, loss.png, and tables for the console."""

import json
import os
import sys
import time
from pathlib import Path

import torch

from .loop import Progress
from .recipe import Recipe
from .trackers import Trackers


class Tracker:
    """Shows progress, appends one JSON object a line to `metrics.jsonl`, and tells the recipe's trackers.

    Silent on every rank but the first.
    """

    def __init__(self, recipe: Recipe, folder: Path, total_steps: int, done: int, main: bool):
        from tqdm import tqdm

        self.path, self.main = folder / "metrics.jsonl", main
        self.lines = main and not sys.stderr.isatty()  # into a file: a line now and then instead of a bar
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
        if main:
            self._keep_until(done)
        self.trackers = Trackers(recipe, folder, done, self.say) if main else None

    def step(self, progress: Progress, learner: int, lr: float, record: bool) -> None:
        """Count a step; record it, and show it, where that is due."""
        self.targets_since += progress.targets
        self.bar.update()
        if not record or not self.main:
            return
        now, step, terms = time.monotonic(), progress.step, progress.terms[learner]
        speed = self.targets_since / max(now - self.time_since, 1e-9)
        self.targets_since, self.time_since = 0, now
        memory = peak_memory()
        measured = {
            "grad_norm": progress.grad_norms[learner],
            "targets": progress.targets,
            "targets_per_s": round(speed, 1),
            "peak_memory": memory,
        }
        self.write({"step": step, "epoch": progress.epoch, **terms, "lr": lr, **measured})
        shown = {name: f"{value:.4f}" for name, value in terms.items()}
        shown |= {"lr": f"{lr:.1e}", "targets/s": f"{speed:.0f}", "mem": f"{memory / 2**30:.1f}G"}
        self.bar.set_postfix(shown, refresh=False)
        if self.lines and (now - self.shown > 10 or step == self.total):
            self.shown = now
            left = (now - self.started) / (step - self.first) * (self.total - step)
            print(
                f"step {step}/{self.total}  " + "  ".join(f"{k} {v}" for k, v in shown.items()) + f"  {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def validation(self, step: int, figures: dict[str, float]) -> None:
        self.write({"step": step, "validation": figures})
        self.say(f"validation at step {step}: " + "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if name != "targets"))
        self.targets_since, self.time_since = 0, time.monotonic()

    def write(self, record: dict) -> None:
        if self.main:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self.trackers.log(record)

    def say(self, text: str) -> None:
        if self.main:
            self.bar.write(text, file=sys.stderr, nolock=True)

    def close(self) -> None:
        self.bar.close()
        if self.trackers:
            self.trackers.finish()

    def _keep_until(self, step: int) -> None:
        """A resumed run writes on from its checkpoint: what was recorded after it is dropped."""
        if self.path.exists():
            kept = [r for r in read(self.path) if r["step"] <= step] if step else []
            part = self.path.with_name(f"metrics.tmp-{os.getpid()}")
            part.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            part.replace(self.path)


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
