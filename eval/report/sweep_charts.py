"""The charts of a sweep's report: curves over steps, maps over settings, intervals of differences."""

import math
from collections import Counter
from itertools import combinations, groupby

from llmkd.output.plots import moving_average

from ..comparison.compare import Row
from ..comparison.compare_text import digits
from .charts import Cell, Interval, Series, forest, heatmap, lines
from .document import Chart, Gallery, Span, Table, Text
from .findings import compared, label, mark
from .sweep_files import Arm, SweepFolder, changed

_POINTS = 240  # of a curve that are drawn
_MANY = 21  # arms beyond which the raw lines are left out, which would hide the others


def training_curves(sweep: SweepFolder) -> Gallery | None:
    """CE and KD loss over steps: smoothed, with the raw values behind."""
    charts, seen = [], {}
    for name, title in (("ce", "Training: cross-entropy"), ("kd", "Training: KD loss")):
        drawn = [(arm, curve) for arm in sweep.arms.values() for run in arm.runs if len(curve := run.curve(name)) > 1]
        seen |= {arm.number: arm for arm, _ in drawn}
        raw = [Series(arm.name, arm.number, thin(curve), "raw") for arm, curve in drawn if len(sweep.arms) <= _MANY]
        smoothed = [Series(arm.name, arm.number, thin(smooth(curve))) for arm, curve in drawn]
        if drawn:
            svg = lines(f"curve-{name}", title, "optimizer step", "nats per target", raw + smoothed)
            charts.append(Chart(f"curve-{name}", title, svg))
    return Gallery(charts, legend([seen[number] for number in sorted(seen)])) if charts else None


def held_out_curves(sweep: SweepFolder) -> Gallery | None:
    """CE, KL and agreement on the held-out rows over steps."""
    charts = []
    for name, title, unit in (
        ("ce", "Held-out cross-entropy", "nats per target"),
        ("forward_kl", "Held-out KL(teacher || student)", "nats per target"),
        ("top1_agreement", "Held-out agreement with the teacher", "share of targets"),
    ):
        series = [
            Series(a.name, a.number, thin(curve), "dots") for a in sweep.arms.values() for r in a.runs if len(curve := r.held_out(name)) > 1
        ]
        if series:
            charts.append(Chart(f"held-{name}", title, lines(f"held-{name}", title, "optimizer step", unit, series)))
    arms = [arm for arm in sweep.arms.values() if any(len(run.held_out("ce")) > 1 for run in arm.runs)]
    return Gallery(charts, legend(arms)) if charts else None


def legend(arms: list[Arm]) -> list[tuple[Text, int]]:
    out = []
    for arm in arms:
        seeds = f" {len(arm.runs)} seeds" if len(arm.runs) > 1 else ""
        states = Counter(run.status for run in arm.runs if run.status != "done")
        told = ", ".join(f"{count} {status}" if len(arm.runs) > 1 else status for status, count in states.items())
        out.append(((Span(arm.name), seeds + (f" ({told})" if told else "")), arm.number))
    return out


def intervals(block: list[Row], name: str) -> Chart | None:
    """The differences of one task and metric; colour and filling follow the verdict, which is corrected, the interval is not."""
    others = compared(block)
    if not others:
        return None
    kinds = {True: "better", False: "worse", None: "none"}
    better = {True: ", higher is better", False: ", lower is better", None: ""}[others[0].higher_is_better]
    title = f"{label(block[0].task, block[0].metric)}: difference"
    drawn = [Interval(row.arm, row.difference, row.interval, kinds[row.better]) for row in others]
    svg = forest(name, title, f"arm minus baseline{better}", drawn)
    return Chart(name, title, svg)


def varied(sweep: SweepFolder) -> tuple[list[str], list[Arm]]:
    """The one or two settings in which more than half of the arms differ, and in nothing else; and those arms.

    A setting that an arm doesn't change has the base's value, so that single changes and combinations lie in one map.
    """
    arms = list(sweep.arms.values())
    own = {arm.name: {k: v for k, v in arm.changes.items() if k not in sweep.base or sweep.base[k] != v} for arm in arms}
    settings = list(dict.fromkeys(key for arm in arms for key in arm.changes))
    best: tuple[list[str], list[Arm]] = ([], [])
    for size in (1, 2):
        for chosen in combinations(settings, size):
            rest = {arm.name: repr(sorted((k, repr(v)) for k, v in own[arm.name].items() if k not in chosen)) for arm in arms}
            common = Counter(rest.values()).most_common(1)[0][0]
            inside = [arm for arm in arms if rest[arm.name] == common]
            several = all(len({repr(value_of(sweep, arm, key)) for arm in inside}) > 1 for key in chosen)
            if several and len(inside) > max(1 + size, len(arms) / 2, len(best[1])):
                best = (list(chosen), inside)
    return best


def value_of(sweep: SweepFolder, arm: Arm, key: str):
    return changed(sweep.base, arm.runs[0].changes).get(key)


def maps(sweep: SweepFolder, rows: list[Row]) -> tuple[list[Chart], list[str], list[Arm]]:
    """Heat maps over two settings, or lines over one numeric setting, of every task and metric. Also the settings, and the arms in them."""
    chosen, arms = varied(sweep)
    if not chosen:
        return [], [], []
    held = {key: [value_of(sweep, arm, key) for arm in arms] for key in chosen}
    if len(chosen) == 1 and not all(_numeric(value) for value in held[chosen[0]]):
        return [], chosen, arms
    charts = []
    for (task, metric), found in groupby(rows, key=lambda row: (row.task, row.metric)):
        block = list(found)
        by_arm = {row.arm: row for row in block}
        inside = [arm for arm in arms if arm.name in by_arm]
        if len(inside) < 2:
            continue
        name, title = f"map-{len(charts)}", label(task, metric)
        draw = _map if len(chosen) == 2 else _line
        charts.append(
            draw(name, title, chosen, {arm.name: [value_of(sweep, arm, key) for key in chosen] for arm in arms}, by_arm, digits(block))
        )
    return charts, chosen, arms


def _map(name: str, title: str, chosen: list[str], places: dict[str, list], rows: dict[str, Row], d: int) -> Chart:
    ys, xs = (_ordered([place[i] for place in places.values()]) for i in (0, 1))
    cells = {}
    for arm, (y, x) in places.items():
        place = (ys.index(y), xs.index(x))
        row = rows.get(arm)
        cells[place] = Cell(row.value, f"{row.value:.{d}f}", mark(row)) if row else Cell(math.nan, "", "no value")
    up = next((row.higher_is_better for row in rows.values()), None)
    xs_text, ys_text = [_shown(x) for x in xs], [_shown(y) for y in ys]
    svg = heatmap(name, f"{title} ({_way(up)})", chosen[1], chosen[0], xs_text, ys_text, cells, up)
    body = []
    for r, y in enumerate(ys_text):
        line: list[Text] = [y]
        for c in range(len(xs)):
            cell = cells.get((r, c))
            line.append("" if cell is None else cell.note if not cell.text else cell.text + (f", {cell.note}" if cell.note else ""))
        body.append(line)
    return Chart(name, title, svg, "", Table([f"{chosen[0]} \\ {chosen[1]}", *xs_text], body))


def _line(name: str, title: str, chosen: list[str], places: dict[str, list], rows: dict[str, Row], d: int) -> Chart:
    points = sorted((float(place[0]), rows[arm]) for arm, place in places.items() if arm in rows)
    xs = [x for x, _ in points]
    series = Series(title, 0, [(x, row.value) for x, row in points], "dots", [row.stderr for _, row in points])
    log = min(xs) > 0 and max(xs) / min(xs) >= 20
    up = points[0][1].higher_is_better
    svg = lines(name, f"{title} ({_way(up)})", chosen[0] + (", logarithmic" if log else ""), "mean ± 1 standard error", [series], xs, log)
    body = [[f"{x:g}", f"{row.value:.{d}f}", "" if row.stderr is None else f"{row.stderr:.{d}f}", mark(row)] for x, row in points]
    return Chart(name, title, svg, "", Table([chosen[0], "value", "standard error", ""], body, words=1))


def _way(up: bool | None) -> str:
    return {True: "higher is better", False: "lower is better", None: "no direction"}[up]


def _numeric(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ordered(values: list) -> list:
    """Numbers by size, others as they come; each once."""
    unique = []
    for value in values:
        if value not in unique:
            unique.append(value)
    return sorted(unique) if all(map(_numeric, unique)) else unique


def _shown(value) -> str:
    """A value on an axis: of a path its last two parts."""
    if isinstance(value, str):
        parts = value.rstrip("/").split("/")
        return value if len(parts) <= 2 else "…/" + "/".join(parts[-2:])
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """(step, value) with the values smoothed as in a run's loss.png."""
    return [(step, value) for (step, _), value in zip(points, moving_average([y for _, y in points]), strict=True)]


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_POINTS` of them, evenly, the last always."""
    every = math.ceil(len(points) / _POINTS)
    return points if every <= 1 else points[:-1][::every] + points[-1:]
