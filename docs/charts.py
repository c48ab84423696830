"""The pictures of results, drawn from the tables that are committed; `pictures.py` writes them."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

REPO = Path(__file__).resolve().parents[1]
INK, SOFT, PAPER = "#24292f", "#6e7781", "#ffffff"
TEACHER, STUDENT, DATA = "#8250a8", "#1a7f8e", "#c2661a"
VERDICTS = {"better": STUDENT, "worse": DATA}
STYLE = {
    "font.size": 11,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "llmkd",
    "figure.facecolor": PAPER,
}


def sweep():
    """The committed report of eval/results/ablation_small: KL and CE over kd_ratio and learning rate."""
    text = (REPO / "eval/results/ablation_small/report.md").read_text(encoding="utf-8")
    row = re.compile(r"^\| `kd_ratio[=-]([\d.]+)[,_]lr[=-]([\d.e-]+)` \| ([\d.]+)[^|]*\| ([\d.]+)[^|]*\|", re.MULTILINE)
    found = {}
    for ratio, rate, ce, kl in row.findall(text):
        found.setdefault((float(ratio), float(rate)), (float(ce), float(kl)))
    ratios, rates = (sorted({key[i] for key in found}) for i in (0, 1))
    figure, places = plt.subplots(1, 2, figsize=(9.6, 3.4))
    for axes, which, title in zip(places, (1, 0), ("held-out KL to the teacher", "held-out cross-entropy"), strict=True):
        table = np.array([[found[ratio, rate][which] for ratio in ratios] for rate in reversed(rates)])
        axes.imshow(table, cmap="YlGnBu_r", aspect="auto", alpha=0.55)
        for i, j in np.ndindex(table.shape):
            best = table[i, j] == table.min()
            axes.text(j, i, f"{table[i, j]:.3f}", ha="center", va="center", fontsize=9.5, weight="bold" if best else "normal")
        axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
        axes.set_yticks(range(len(rates)), [f"{rate:g}" for rate in reversed(rates)])
        axes.set(xlabel="kd_ratio", ylabel="learning rate")
        axes.set_title(f"{title} (lower is better)", fontsize=11, weight="bold", loc="left")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.tight_layout()
    return figure


def comparison():
    """The same report: differences in held-out CE to plain fine-tuning, with their intervals."""
    text = (REPO / "eval/results/ablation_small/report.md").read_text(encoding="utf-8")
    table = text.split("### Held-out CE:")[1].split("### ")[0]
    number = r"([+-][\d.]+)"
    row = re.compile(rf"^\| `([^`]+)` \|[^|]*\|[^|]*\| {number}[^|]*\| {number} to {number} \|.*\| ([^|]+) \|$", re.MULTILINE)
    shown = {"reverse_kl": "reverse KL", "jsd": "JSD", "base_teacher": "untuned teacher", "tuned_student": "tuned student"}
    rows = []
    for name, *numbers, verdict in row.findall(table):
        grid = re.fullmatch(r"kd_ratio[=-]([\d.]+)[,_]lr[=-]0\.003", name)
        if grid or name in shown:
            rows.append((f"kd_ratio {grid[1]}" if grid else shown[name], *(float(one) for one in numbers), verdict.split(",")[-1].strip()))
    figure, axes = plt.subplots(figsize=(9.6, 3.3))
    intervals(axes, rows, "held-out cross-entropy, difference to the same student without a teacher (left is better)")
    for i, (*_, verdict) in enumerate(rows):
        word = verdict if verdict in ("better", "worse") else "no difference shown"
        axes.text(0.0245, i, word, va="center", fontsize=9.5, color=VERDICTS.get(verdict, SOFT))
    axes.set(xlim=(-0.029, 0.024))
    figure.tight_layout()
    figure.subplots_adjust(right=0.84)
    return figure


def intervals(axes, rows, label):
    """One line a row (name, middle, low, high, verdict), the first on top."""
    for i, (_, middle, low, high, verdict) in enumerate(rows):
        colour = VERDICTS.get(verdict, SOFT)
        axes.plot([low, high], [i, i], color=colour, linewidth=2.5, solid_capstyle="round")
        axes.plot(middle, i, "o", color=colour, markersize=7)
    axes.axvline(0, color=INK, linewidth=1)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(label)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def section(title: str) -> str:
    """A section of eval/results/studies."""
    text = (REPO / "eval/results/studies/README.md").read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def study():
    """The first study of eval/results/studies: CE and KL, differences to plain tuning."""
    text = section("Does distillation beat plain tuning?")
    shown = {
        "kd_0.25": "kd_ratio 0.25",
        "kd_0.5": "kd_ratio 0.5",
        "kd_1": "kd_ratio 1",
        "jsd": "0.5, JSD",
        "reverse_kl": "0.5, reverse KL",
        "kd_64": "0.5, 64 tokens kept",
        "untuned": "0.5, untuned teacher",
        "label_smoothing": "label smoothing",
        "ce_longer": "no teacher, 48 steps",
        "kd_0.5_longer": "kd_ratio 0.5, 48 steps",
    }
    cell = r"([+-][\d.]+) \(([+-][\d.]+) to ([+-][\d.]+)\), (better|worse|none)[^|]*"
    found = dict(
        (name, numbers)
        for name, *numbers in re.findall(rf"^\| `([^`]+)` \|(?: [\d.]+ \|)+ {cell}\| {cell}\|", text, re.MULTILINE)
        if name in shown
    )
    figure, both = plt.subplots(1, 2, figsize=(9.6, 3.9), sharey=True)
    for axes, start, label in zip(both, (0, 4), ("held-out cross-entropy", "KL to the teacher"), strict=True):
        rows = [(words, *map(float, found[name][start : start + 3]), found[name][start + 3]) for name, words in shown.items()]
        intervals(axes, rows, "difference to plain tuning, 24 steps (nats)")
        axes.set_title(label, fontsize=11, loc="left")
        axes.axhline(6.5, color=SOFT, linewidth=0.8, linestyle=":")
    figure.tight_layout()
    return figure


def measured_bars(title, shown, labels, colours, apart):
    """Bars with the KL and the fifth column of a section's table, named by `labels`; `shown` names its rows, those of `apart` stand apart."""
    row = r"^\| `([^`]+)` \| [\d.]+ \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|"
    found = {name: numbers for name, *numbers in re.findall(row, section(title), re.MULTILINE)}
    places = [i + 0.5 * name.startswith(apart) for i, name in enumerate(shown)]
    figure, both = plt.subplots(1, 2, figsize=(9.6, 0.7 + 0.33 * len(shown)), sharey=True)
    for column, (axes, label) in enumerate(zip(both, labels, strict=True)):
        numbers = [float(found[name][column]) for name in shown]
        axes.barh(places, numbers, color=colours, height=0.65)
        for place, number in zip(places, numbers, strict=True):
            axes.text(number + 0.01 * max(numbers), place, f"{number:.3f}", va="center", fontsize=9)
        axes.set_yticks(places, shown.values())
        axes.tick_params(axis="y", length=0)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(label, fontsize=11, loc="left")
        axes.margins(x=0.15)
    both[0].invert_yaxis()
    figure.tight_layout()
    return figure


def quantised():
    """The second study of eval/results/studies: KL and agreement to the unquantised model."""
    shown = {
        "nf4_untrained": "nf4, untrained",
        "nf4_label_smoothing": "label smoothing",
        "nf4_ce": "plain tuning",
        "nf4_kd": "distilled, 24 steps",
        "nf4_kd_longer": "distilled, 48 steps",
        "fp4_untrained": "fp4, untrained",
        "fp4_label_smoothing": "label smoothing",
        "fp4_ce": "plain tuning",
        "fp4_kd": "distilled, 24 steps",
        "fp4_kd_longer": "distilled, 48 steps",
    }
    labels = "KL to the unquantised model", "agreement with it"
    colours = [STUDENT if "distilled" in words else SOFT if "untrained" in words else DATA for words in shown.values()]
    return measured_bars("Does distillation repair quantisation?", shown, labels, colours, apart="fp4")


def on_policy():
    """The third study of eval/results/studies: KL on the data's answers, and reverse KL on the student's own."""
    shown = {
        "before": "before",
        "ce": "plain tuning",
        "forward_kl": "forward KL, data",
        "reverse_kl": "reverse KL, data",
        "jsd": "JSD, data",
        "on_policy_half": "reverse KL, half own text",
        "on_policy": "reverse KL, own text",
        "on_policy_jsd": "JSD, own text",
        "forward_kl_longer": "forward KL, data, 72 steps",
        "reverse_kl_longer": "reverse KL, data, 72 steps",
    }
    labels = "KL to the teacher on the data's answers", "reverse KL to it on the student's own text"
    colours = [STUDENT if "own" in words else SOFT if words == "before" else DATA for words in shown.values()]
    return measured_bars("On-policy or off?", shown, labels, colours, apart=("forward_kl_longer", "reverse_kl_longer"))


def head():
    """Time and memory of the loss head, from the first table of eval/speed/results/head_cpu.md."""
    text = (REPO / "eval/speed/results/head_cpu.md").read_text(encoding="utf-8")
    row = re.compile(r"^\| (.+?) \| (\d+) \([^)]*\) \| [\d.]+ \| (\d+|-) \|", re.MULTILINE)
    first = text.split("frozen head;")[0]
    names = {
        "the three matrix products": "matrix products alone",
        "llmkd forward_kl + CE": "llmkd: forward KL + CE",
        "torchtune chunked forward KL + chunked CE": "torchtune: forward KL + CE",
        "Liger chunked JSD + CE, compiled, 256 rows a chunk": "Liger: JSD + CE, compiled",
        "TRL GKD forward KL": "TRL GKD: forward KL, no CE",
        "TRL chunked forward KL": "TRL chunked: forward KL, no CE",
    }
    found = {name: (int(ms), None if mib == "-" else int(mib)) for name, ms, mib in row.findall(first) if name in names}
    figure, places = plt.subplots(1, 2, figsize=(9.6, 2.9), sharey=True)
    labels = [names[name] for name in names]
    for axes, which, title in zip(places, (0, 1), ("milliseconds", "peak MiB"), strict=True):
        values = [found[name][which] for name in names]
        colours = [SOFT if "products" in label else STUDENT if "llmkd" in label else "#b8c4ce" for label in labels]
        axes.barh(range(len(values)), [value or 0 for value in values], color=colours, height=0.65)
        for i, value in enumerate(values):
            axes.text(
                (value or 0) + 0.01 * max(v or 0 for v in values),
                i,
                "not measured" if value is None else f"{value:,}",
                va="center",
                fontsize=9,
            )
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(title, fontsize=11, weight="bold", loc="left")
    places[0].invert_yaxis()
    places[0].margins(x=0.15)
    places[1].margins(x=0.2)
    figure.tight_layout()
    return figure


CHARTS = (sweep, comparison, study, quantised, on_policy, head)
