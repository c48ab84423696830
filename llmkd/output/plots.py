"""loss.png: training terms and held-out metrics of one run over its steps."""

import io
from collections.abc import Sequence
from pathlib import Path

from ..files import write_atomic
from . import metrics

_COLOURS = {"loss": "#333333", "ce": "#1f6fb4", "kd": "#d1495b"}  # other terms have matplotlib's


def plot_losses(folder: Path) -> None:
    """Draw loss.png from metrics.jsonl: the loss and its terms, and below them validation metrics and statistics of the student's text."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    records = metrics.read_metrics(folder)
    steps = [r for r in records if "loss" in r]
    held_out = [r for r in records if "validation" in r]
    kl = [r for r in held_out if "forward_kl" in r["validation"]]
    written = [r for r in steps if "written_length" in r]
    panels = 1 + bool(held_out) + bool(kl) + bool(written)
    figure, axes = plt.subplots(panels, 1, figsize=(7, 2.6 * panels), sharex=True, layout="constrained", squeeze=False)
    for n, name in enumerate(dict.fromkeys(name for r in steps for name in metrics.terms(r))):
        xs, ys = zip(*((r["step"], r[name]) for r in steps if name in r), strict=True)
        colour = _COLOURS.get(name, f"C{n}")
        axes[0, 0].plot(xs, ys, color=colour, alpha=0.25, linewidth=1)
        axes[0, 0].plot(xs, moving_average(ys), color=colour, linewidth=1.6, label=name)
    axes[0, 0].set_ylabel("training, nats per target")
    if held_out:
        _lines(axes[1, 0], held_out, (("ce", "student CE", "#1f6fb4"), ("teacher_ce", "teacher CE", "#888888")))
        axes[1, 0].set_ylabel("held-out CE, nats")
    if kl:
        own = (("own_forward_kl", "forward KL, own text", "#e8a5ad"), ("own_reverse_kl", "reverse KL, own text", "#c3a6c9"))
        _lines(axes[2, 0], kl, (("forward_kl", "forward KL", "#d1495b"), ("reverse_kl", "reverse KL", "#8d5a97"), *own))
        axes[2, 0].set_ylabel("held-out KL, nats")
    if written:
        _answers(axes[-1, 0], written)
    axes[-1, 0].set_xlabel("optimizer step")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[:, 0]:
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9)
    figure.suptitle(folder.name, fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    plt.close(figure)
    write_atomic(folder / "loss.png", drawn.getvalue())


def _answers(axis, records: list[dict]) -> None:
    """Draw the length of the answers on which the student trained, and the share of them that ended by itself."""
    share = axis.twinx()
    shown = ((axis, "written_length", "length", "#2a9d8f"), (share, "written_finished", "ended by itself", "#888888"))
    for place, name, label, colour in shown:
        ys = moving_average([r[name] for r in records])
        axis.plot([], [], color=colour, label=label)
        place.plot([r["step"] for r in records], ys, color=colour, linewidth=1.6)
    axis.set_ylabel("answers, tokens")
    axis.set_ylim(bottom=0)
    share.set(ylabel="share ended", ylim=(-0.03, 1.03))


def _lines(axis, records: list[dict], series) -> None:
    for name, label, colour in series:
        points = [(r["step"], r["validation"][name]) for r in records if name in r["validation"]]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.4, label=label)


def moving_average(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, in a centred window of a twentieth of all values, cut off at the ends.

    A centred window has no lag: an exponential mean of the same width lags behind a falling loss by the whole window.
    """
    half = round(len(values) / 20) // 2
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot_speeds(path: Path, title: str, lines: dict[str, list[tuple[int, float]]]) -> None:
    """Draw tokens per second over the number of GPUs, and perfect scaling. `lines`: by sharding, [(GPUs, tokens per second)]."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, points in lines.items():
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    first, tokens = next(iter(lines.values()))[0]
    most = max(ranks for points in lines.values() for ranks, _ in points)
    axis.plot((first, most), (tokens, tokens * most / first), color="#aaaaaa", linestyle=":", label="without waiting")
    axis.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens a second, predicted", title=title)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    plt.close(figure)
    write_atomic(path, drawn.getvalue())
