"""Draws the pictures of the documents: `python docs/pictures.py [FOLDER]`, by default docs/pictures.

Same matplotlib, same bytes. `tests/test_docs.py` runs it and checks that every picture that a page shows is drawn here.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from charts import CHARTS, DATA, INK, SOFT, STUDENT, STYLE, TEACHER
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PALE = {TEACHER: "#efe6f7", STUDENT: "#dff1f3", DATA: "#fbeadb", SOFT: "#f3f4f6"}


def canvas(width: float, height: float):
    """A figure whose only axes count in tenths of an inch, without frame."""
    figure, axes = plt.subplots(figsize=(width, height))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 10 * width), ylim=(0, 10 * height))
    axes.axis("off")
    return figure, axes


def box(axes, x, y, width, height, text="", colour=SOFT, size=11, weight="normal"):
    axes.add_patch(
        FancyBboxPatch(
            (x, y), width, height, boxstyle="round,pad=0,rounding_size=1", facecolor=PALE[colour], edgecolor=colour, linewidth=1.3
        )
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, weight=weight, linespacing=1.35)


def arrow(axes, start, end, colour=INK, curve=0.0):
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=colour, linewidth=1.4, connectionstyle=f"arc3,rad={curve}")
    )


def bars(axes, x, y, heights, colour, words, marked=None, label=""):
    """A small bar chart of a next-token distribution: one bar a word."""
    for i, (height, word) in enumerate(zip(heights, words, strict=True)):
        axes.bar(x + 6.2 * i, 11 * height, width=4.2, bottom=y, color=colour, alpha=1 if marked in (None, i) else 0.35)
        axes.text(x + 6.2 * i, y - 0.6, word, ha="center", va="top", fontsize=9, color=INK)
        axes.text(x + 6.2 * i, y + 11 * height + 0.4, f"{height:.2f}", ha="center", va="bottom", fontsize=8, color=SOFT)
    axes.plot([x - 2.8, x + 6.2 * len(heights) - 3.4], [y, y], color=SOFT, linewidth=0.8)
    axes.text(x - 2.8, y + 14.2, label, fontsize=10, color=colour, weight="bold")


def loss():
    """One target: what the data says, what the teacher says, what the student says, and the two terms."""
    figure, axes = canvas(9.6, 5.0)
    words = ["Nairobi", "Kampala", "the", "Paris"]
    tokens = ["What", "is", "the", "capital", "of", "Kenya?", "It", "is", "Nairobi", "."]
    for i, token in enumerate(tokens):
        answer = i >= 6
        box(axes, 2 + 9.2 * i, 44, 8.6, 4, token, DATA if answer else SOFT, 10, "bold" if i == 8 else "normal")
    axes.text(2, 42.6, "prompt: read by both models, never a target", fontsize=9, color=SOFT, va="top")
    axes.text(57.2, 42.6, "answer: every token is a target", fontsize=9, color=DATA, va="top")
    axes.text(
        48, 38.4, "At each target both models give a probability to every token of the vocabulary. Here the target is “Nairobi”.", ha="center", fontsize=10.5
    )  # fmt: skip
    p, q = np.array([0.70, 0.18, 0.08, 0.04]), np.array([0.45, 0.15, 0.20, 0.20])
    bars(axes, 5.6, 19, [1.0, 0, 0, 0], DATA, words, label="data: one right token")
    bars(axes, 39, 19, q, STUDENT, words, label="student  q")
    bars(axes, 71.5, 19, p, TEACHER, words, label="teacher  p")
    ce, kl = -np.log(q[0]), float((p * np.log(p / q)).sum())
    box(axes, 15, 8.2, 24, 5.6, f"cross-entropy  CE\n−log 0.45 = {ce:.2f} nats", DATA, 10)
    box(axes, 56, 8.2, 26, 5.6, f"divergence  D(p, q)\nforward KL = {kl:.2f} nats", TEACHER, 10)
    arrow(axes, (12, 16.5), (22, 14.0), DATA)
    arrow(axes, (42, 16.5), (32, 14.0), STUDENT)
    arrow(axes, (48, 16.5), (62, 14.0), STUDENT)
    arrow(axes, (80, 16.5), (74, 14.0), TEACHER)
    box(axes, 22, 0.8, 52, 4.6, "loss  =  (1 − kd_ratio) · CE  +  kd_ratio · T² · D", STUDENT, 12, "bold")
    arrow(axes, (27, 8.0), (36, 5.7), DATA)
    arrow(axes, (69, 8.0), (60, 5.7), TEACHER)
    return figure


def stages():
    figure, axes = canvas(9.6, 3.9)
    axes.text(2, 35.5, "Stage 1: tune the teacher on your data", fontsize=12, weight="bold", color=TEACHER)
    box(axes, 2, 25, 19, 7, "large base model\n(frozen)", TEACHER)
    box(axes, 30, 25, 15, 7, "your data", DATA)
    box(axes, 54, 25, 20, 7, "llmkd train\nwithout a teacher", SOFT)
    box(axes, 80, 25, 14, 7, "teacher\nadapter", TEACHER, weight="bold")
    axes.text(25.4, 28.5, "+", ha="center", va="center", fontsize=14)
    arrow(axes, (45.6, 28.5), (53.4, 28.5))
    arrow(axes, (74.6, 28.5), (79.4, 28.5))
    axes.text(2, 19, "Stage 2: distil it into the student", fontsize=12, weight="bold", color=STUDENT)
    box(axes, 2, 8, 19, 7, "small base model", STUDENT)
    box(axes, 30, 8, 15, 7, "the same data", DATA)
    box(axes, 54, 8, 20, 7, "llmkd train\nwith the teacher", SOFT)
    box(axes, 80, 8, 14, 7, "student", STUDENT, weight="bold")
    axes.text(25.4, 11.5, "+", ha="center", va="center", fontsize=14)
    arrow(axes, (45.6, 11.5), (53.4, 11.5))
    arrow(axes, (74.6, 11.5), (79.4, 11.5))
    arrow(axes, (87, 24.5), (70, 15.6), TEACHER, curve=-0.2)
    axes.text(88, 18.6, "frozen, asked for\nits probabilities", fontsize=9, color=TEACHER, ha="center", va="center")
    axes.text(
        48, 3.2, "llmkd cache can write the teacher's answers to disk between the stages: stage 2 then needs no teacher in memory.", ha="center", fontsize=9.5, color=SOFT
    )  # fmt: skip
    return figure


def best_bump(divergence, p, x):
    """The mean and width of the single bump that is nearest to p by `divergence(log p, log q)`, found on a grid."""
    best = (np.inf, 0.0, 0.0)
    for mean in np.linspace(-4, 4, 161):
        for width in np.linspace(0.4, 4, 73):
            log_q = -0.5 * ((x - mean) / width) ** 2
            log_q -= np.log(np.exp(log_q).sum())
            best = min(best, (divergence(np.log(p), log_q), mean, width))
    return best[1], best[2]


def modes():
    """What a student too small for a teacher with two modes settles on, by the divergence."""
    x = np.linspace(-6, 6, 601)
    p = 0.62 * np.exp(-0.5 * ((x + 1.8) / 0.65) ** 2) / 0.65 + 0.38 * np.exp(-0.5 * ((x - 2.2) / 0.65) ** 2) / 0.65
    p /= p.sum()
    forward = best_bump(lambda a, b: (np.exp(a) * (a - b)).sum(), p, x)
    reverse = best_bump(lambda a, b: (np.exp(b) * (b - a)).sum(), p, x)
    figure, places = plt.subplots(1, 2, figsize=(9.6, 3.1), sharey=True)
    texts = (
        ("forward KL covers", "The student spreads over all that the teacher\nthinks possible, gaps included.", forward),
        ("reverse KL seeks", "The student picks what the teacher finds likely\nand leaves the rest out.", reverse),
    )
    for axes, (title, text, (mean, width)) in zip(places, texts, strict=True):
        q = np.exp(-0.5 * ((x - mean) / width) ** 2)
        q /= q.sum()
        axes.fill_between(x, p, color=TEACHER, alpha=0.22, linewidth=0)
        axes.plot(x, p, color=TEACHER, linewidth=1.6, label="teacher")
        axes.plot(x, q, color=STUDENT, linewidth=2.2, label="student")
        axes.set(xticks=[], yticks=[], ylim=(0, 2.15 * p.max()))
        axes.set_title(title, fontsize=12, weight="bold", loc="left")
        axes.text(0.01, 0.97, text, transform=axes.transAxes, va="top", fontsize=9.5, color=SOFT)
        axes.set_xlabel("possible next tokens")
    places[0].set_ylabel("probability")
    places[1].legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.82))
    figure.tight_layout()
    return figure


def temperature():
    logits = np.array([5.0, 3.6, 2.8, 2.2, 1.2, 0.4, -0.6])
    figure, places = plt.subplots(1, 3, figsize=(9.6, 2.6), sharey=True)
    for axes, T in zip(places, (0.5, 1, 4), strict=True):
        p = np.exp(logits / T)
        axes.bar(range(len(p)), p / p.sum(), color=TEACHER, width=0.75)
        axes.set_title(f"T = {T:g}", fontsize=12, weight="bold", loc="left")
        axes.set(xticks=[], ylim=(0, 1))
        axes.set_xlabel("tokens, most likely first")
    places[0].set_ylabel("teacher's probability")
    figure.tight_layout()
    return figure


#: llmkd's folders by layer, the highest first; tests/test_house.py holds the code to it.
LAYERS = (
    (("train.py  cli.py", "entry points"), ("eval/", "benchmarks, comparison, report")),
    (("commands/", "sweep, cache, export, data, ..."), ("api.py", "the Python API")),
    (
        ("doctor/", "checks of a recipe before it is run"),
        ("planning/", "what a run needs and costs"),
        ("making/", "data that a model writes: stages"),
    ),
    (("training/", "run, trainer, loop, checkpoint, validation"),),
    (("output/", "run folder, metrics, model card, hub"), ("tasks/", "what a model is trained for")),
    (("teachers/", "live, cached, served, mixture; the cache on disk"), ("rollouts/", "text that a model writes")),
    (("models/", "load, adapters, attention"), ("data/", "files to examples to batches"), ("servers/", "requests to vLLM, SGLang")),
    (("config/", "settings"), ("losses/", "divergences, fused head"), ("model_folder/", "files, weights, hashes")),
    (
        ("batch.py  signals.py  head.py", "the nouns"),
        ("console.py  errors.py  files.py  process/", "messages, exit codes, files, what befalls a process"),
    ),
)


def layers():
    figure, axes = canvas(9.6, 5.6)
    for i, row in enumerate(LAYERS):
        width = (88 - 2 * (len(row) - 1)) / len(row)
        for j, (name, text) in enumerate(row):
            x, y = 3 + j * (width + 2), 49.5 - 5.95 * i
            box(axes, x, y, width, 5.2, "", STUDENT if i == 3 else TEACHER if i == 5 else SOFT)
            axes.text(x + width / 2, y + 3.4, name, ha="center", va="center", fontsize=11, weight="bold", family="DejaVu Sans Mono")
            axes.text(x + width / 2, y + 1.5, text, ha="center", va="center", fontsize=9, color=SOFT)
    arrow(axes, (92.6, 54), (92.6, 3))
    axes.text(93.6, 28, "imports", rotation=270, va="center", fontsize=9, color=SOFT)
    return figure


PICTURES = (loss, stages, modes, temperature, layers, *CHARTS)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        for draw in PICTURES:
            figure = draw()
            figure.savefig(folder / f"{draw.__name__}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures")
