"""Time and memory of the loss head over the number of targets, the vocabulary and the chunk size: llmkd, torchtune, Liger and TRL.

    python eval/speed/plots.py --peers FOLDER [--out eval/speed/results/head_growth_cpu] [--rounds 3] [--data FILE.json]

Every point is a process of its own, eval/speed/head.py --alone: first its peak memory, then the median of some rounds of CPU time, or of
CUDA events. Half of all rows are targets. Writes OUT.png, and OUT.md with the same numbers. --data FILE keeps measurements, which are
then not repeated. On a quiet CPU it takes some ten minutes, half of them imports.
"""

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(REPO)  # eval/speed stood there, whose names are not modules of anybody

import torch  # noqa: E402

from eval.report.svg import LIGHT, SERIES  # noqa: E402
from eval.speed.head import alone  # noqa: E402


@dataclass(frozen=True)
class Line:
    label: str
    case: str  # its name in head_cases.py
    chunks: bool = False  # whether the rows of a chunk can be chosen
    lower_bound: bool = False


@dataclass(frozen=True)
class Sweep:
    title: str
    setting: str  # of head.py
    values: list[int]
    fixed: dict[str, int]
    factor: float = 1.0  # from the setting to what the axis shows

    def shown(self, value: int) -> float:
        return value * self.factor


LOWER_BOUND = Line("matrix products alone", "the three matrix products", lower_bound=True)
LINES = (
    Line("llmkd, forward KL + CE", "llmkd forward_kl + CE", chunks=True),
    Line("torchtune, forward KL + CE", "torchtune chunked forward KL + chunked CE"),
    Line("Liger, JSD + CE, compiled", "Liger chunked JSD + CE, compiled", chunks=True),
    Line("TRL chunked, forward KL", "TRL chunked forward KL"),
    Line("TRL GKD, forward KL", "TRL GKD forward KL"),
    LOWER_BOUND,
)
MARKERS = "osD^v"


def sweeps(device: str, scale: float = 1.0) -> list[Sweep]:
    """`scale` shrinks everything, for a trial."""
    if device == "cuda":
        wide = {"width": 2048, "teacher_width": 4096}
        rows, vocab, fixed, small = [2048, 4096, 8192, 16384, 32768], [32_000, 64_000, 128_256, 256_000], 128_256, 8192
        chunks = [256, 512, 1024, 2048, 4096]
    else:
        wide = {"width": 256, "teacher_width": 512}
        rows, vocab, fixed, small = [128, 256, 512, 1024], [16_000, 32_000, 64_000, 128_256], 32_000, 256
        chunks = [32, 64, 128, 256, 512]
    rows, vocab, chunks = ([max(8, round(scale * x)) for x in some] for some in (rows, vocab, chunks))
    fixed, small = round(scale * fixed), round(scale * small)
    return [
        Sweep("targets", "rows", rows, wide | {"vocab": fixed}, 0.5),
        Sweep("vocabulary", "vocab", vocab, wide | {"rows": small}),
        Sweep("rows of a chunk", "chunk", chunks, wide | {"vocab": fixed, "rows": rows[-1]}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="folder that eval/speed/peers.sh filled; without it llmkd's lines are alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="a share of all sizes, for a trial")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, help="path without an ending")
    options = parser.parse_args()
    options.out = options.out or REPO / f"eval/speed/results/head_growth_{options.device}"
    known, plan = [one for one in LINES if options.peers or one.lower_bound or one is LINES[0]], sweeps(options.device, options.scale)
    points = measured(options, known, plan)
    draw(points, known, plan, options.out.with_suffix(".png"), options.device)
    options.out.with_suffix(".md").write_text("\n".join(table(points, known, plan, options)) + "\n")


def measured(options, known: list[Line], plan: list[Sweep]) -> dict[str, dict]:
    """{"mib", "ms"} by `key_of`, or None where a case fails."""
    found = json.loads(options.data.read_text()) if options.data and options.data.exists() else {}
    for sweep in plan:
        for value in sweep.values:
            for line in lines_of(sweep, known):
                if (key := key_of(sweep, value, line)) in found:
                    continue
                given = sweep.fixed | {sweep.setting: value, "rounds": options.rounds}
                arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
                arguments += ["--device", options.device, *(["--peers", options.peers] if options.peers else [])]
                found[key] = alone(line.case, arguments)
                if options.data:
                    options.data.write_text(json.dumps(found, indent=1))
    return found


def lines_of(sweep: Sweep, known: list[Line]) -> list[Line]:
    return [line for line in known if line.chunks or sweep.setting != "chunk"]


def key_of(sweep: Sweep, value: int, line: Line) -> str:
    return f"{sweep.setting} {value} {sorted(sweep.fixed.items())} {line.case}"


def values_of(points: dict, sweep: Sweep, line: Line, what: str) -> list[tuple[float, float]]:
    """(what the axis shows, milliseconds or MiB)."""
    found = [(sweep.shown(v), points.get(key_of(sweep, v, line))) for v in sweep.values]
    return [(x, statistics.median(one["ms"]) if what == "ms" else one["mib"]) for x, one in found if one]


def draw(points: dict, known: list[Line], plan: list[Sweep], path: Path, device: str) -> None:
    """Time above, memory below; one column for each sweep. Both axes are logarithmic."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure, axes = plt.subplots(2, len(plan), figsize=(10.5, 6.4), layout="constrained", sharey="row", sharex="col")
    unit = "CPU ms" if device == "cpu" else "ms"
    for column, sweep in enumerate(plan):
        for row, (what, label) in enumerate((("ms", f"time, {unit}"), ("mib", "peak memory, MiB"))):
            axis = axes[row, column]
            for number, line in enumerate(lines_of(sweep, known)):
                drawn = values_of(points, sweep, line, what)
                if not drawn or (line.lower_bound and what == "mib"):
                    continue
                number = known.index(line)
                style = {"color": LIGHT["quiet"], "linestyle": (0, (1.5, 2))} if line.lower_bound else {"color": SERIES[number]}
                style |= {} if line.lower_bound else {"marker": MARKERS[number], "markersize": 5, "markeredgecolor": "white"}
                axis.plot(*zip(*drawn, strict=True), linewidth=2.2 if number == 0 else 1.5, label=line.label, zorder=9 - number, **style)
            axis.set_xscale("log")
            axis.set_yscale("log")
            shown = [sweep.shown(v) for v in sweep.values]
            axis.set_xticks(shown, [f"{x:,.0f}" for x in shown], fontsize=9)
            axis.xaxis.set_minor_locator(NullLocator())
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
            axis.tick_params(colors=LIGHT["quiet"], labelsize=9)
            axis.grid(color=LIGHT["rule"], linewidth=0.8)
            axis.set_axisbelow(True)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
            if column == 0:
                axis.set_ylabel(label, color=LIGHT["text"])
            if row == 0:
                axis.set_title(f"by {sweep.title}", fontsize=11, color=LIGHT["text"])
            else:
                axis.set_xlabel(f"{sweep.title}\n{said(sweep)}", fontsize=9, color=LIGHT["quiet"])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)


def said(sweep: Sweep) -> str:
    names = {"vocab": "V = {:,}", "rows": "{:,} targets"}
    return ", ".join(names[name].format(value // (2 if name == "rows" else 1)) for name, value in sweep.fixed.items() if name in names)


def table(points: dict, known: list[Line], plan: list[Sweep], options) -> list[str]:
    out = [f"# How the loss head grows\n\n![time and peak memory]({options.out.name}.png)\n"]
    for sweep in plan:
        columns = lines_of(sweep, known)
        out += [f"\nBy {sweep.title}; {said(sweep)}. Milliseconds / peak MiB:\n"]
        out += [f"| {sweep.title} | {' | '.join(line.label for line in columns)} |", "| --- |" + " --- |" * len(columns)]
        for value in sweep.values:
            cells = []
            for line in columns:
                one = points.get(key_of(sweep, value, line))
                mib = "" if line.lower_bound or not one else f" / {one['mib']:,.0f}"
                cells.append(f"{statistics.median(one['ms']):,.0f}{mib}" if one else "failed")
            out.append(f"| {sweep.shown(value):,.0f} | {' | '.join(cells)} |")
    hidden = " and ".join(str(plan[0].fixed[name]) for name in ("width", "teacher_width"))
    where = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU, one thread"
    ours = {"--data", str(options.data), "--out", str(options.out)}
    given = ["PEERS" if word == options.peers else word for word in sys.argv[1:] if word not in ours]
    return [
        *out,
        f"\nForward and backward of head and loss; widths {hidden}; half of all rows are targets. TRL's have no CE. Medians of {options.rounds} rounds",
        f"on {where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; `{' '.join(['python eval/speed/plots.py', *given])}`. From the fewest",
        f"to the most targets, x {plan[0].values[-1] / plan[0].values[0]:.0f}, llmkd's peak grows x {growth(points, plan[0], known[0]):.1f}.",
    ]


def growth(points: dict, sweep: Sweep, line: Line) -> float:
    found = values_of(points, sweep, line, "mib")
    return found[-1][1] / found[0][1] if found and found[0][1] else math.nan


if __name__ == "__main__":
    main()
