"""The charts of a sweep's report: curves over steps, maps over settings, intervals of differences."""

import math
from collections import Counter
from itertools import combinations, groupby

from llmkd.config.schedule import in_words
from llmkd.output.plots import moving_average

from ..comparison.compare import Row
from ..comparison.compare_text import digits
from .best import find_best
from .charts import Cell, Interval, Series, forest, heatmap, lines
from .document import Chart, Gallery, Span, Table, Text
from .findings import compared, label, mark
from .sweep_files import Arm, SweepFolder

_POINTS = 240  # of a curve that are drawn
#: Settings of the loss whose schedules are drawn.
SCHEDULES = {
    "kd_ratio": "Schedule: weight of the KD loss",
    "temperature": "Schedule: temperature",
    "features.weight": "Schedule: weight of hidden states",
    "attention.weight": "Schedule: weight of attention",
}
_HIGHLIGHTED = 8  # arms in colour; more cannot be told apart


def highlighted(sweep: SweepFolder, rows: list[Row]) -> dict[str, int]:
    """The arms that curves show in colour, and the number of each one's colour: all, or of many the baseline and the best.

    The best plain and the best distilled arm are among them, then the best by the first metric.
    """
    arms = list(sweep.arms)
    if len(arms) > _HIGHLIGHTED:
        found = find_best(sweep, rows)[:1]
        first = [row.arm for one in found for row in (one.best, one.distilled, one.plain) if row]
        block = [row for one in found for row in rows if (row.task, row.metric) == (one.best.task, one.best.metric)]
        by_value = sorted(block, key=lambda row: -row.value if row.higher_is_better else row.value)
        chosen = list(dict.fromkeys([sweep.baseline, *first, *(row.arm for row in by_value), *arms]))[:_HIGHLIGHTED]
        arms = [name for name in arms if name in chosen]
    return {name: number for number, name in enumerate(arms)}


def training_curves(sweep: SweepFolder, colours: dict[str, int]) -> Gallery | None:
    """CE and KD loss over steps, smoothed. KD losses of other divergences or temperatures are other quantities: each has its own chart."""
    arms = list(sweep.arms.values())
    charts = [curves("curve-ce", "Training: cross-entropy", "nats per target", arms, colours, lambda run: smooth(run.curve("ce")), "line")]
    kinds: dict[str, list[Arm]] = {}
    for arm in arms:
        kinds.setdefault(_kd_loss(arm), []).append(arm)
    kinds = {kind: some for kind, some in kinds.items() if any(len(run.curve("kd")) > 1 for arm in some for run in arm.runs)}
    for number, (kind, some) in enumerate(kinds.items()):
        title = "Training: KD loss" + (f" ({kind})" if len(kinds) > 1 else "")
        charts.append(
            curves(f"curve-kd{number or ''}", title, "nats per target", some, colours, lambda run: smooth(run.curve("kd")), "line")
        )
    for name, title in SCHEDULES.items():
        of_schedule = [arm for arm in arms if isinstance(arm.setting(f"loss.{name}"), dict)]
        charts.append(
            curves(f"curve-{name.replace('.', '-')}", title, name, of_schedule, colours, lambda run, name=name: run.curve(name), "line")
        )
    charts = [chart for chart in charts if chart]
    return Gallery(charts, legend(sweep, colours)) if charts else None


def _kd_loss(arm: Arm) -> str:
    """What makes two arms' KD losses the same quantity."""
    options = [
        f"{path.rpartition('.')[2]} {value:g}"
        for path, value in sorted(arm.settings.items())
        if path.startswith("loss.divergence_options.")
    ]
    return ", ".join([str(arm.setting("loss.divergence")), *options, f"T {in_words(arm.setting('loss.temperature') or 1)}"])


def held_out_curves(sweep: SweepFolder, colours: dict[str, int]) -> Gallery | None:
    """CE, KL and agreement on the held-out rows over steps; of classifiers accuracy and macro F1 too."""
    arms = list(sweep.arms.values())
    charts = [
        curves(f"held-{name}", title, unit, arms, colours, lambda run, name=name: run.held_out(name), "dots")
        for name, title, unit in (
            ("ce", "Held-out cross-entropy", "nats per target"),
            ("forward_kl", "Held-out KL(teacher || student)", "nats per target"),
            ("top1_agreement", "Held-out agreement with the teacher", "share of targets"),
            ("accuracy", "Held-out accuracy", "share of rows"),
            ("f1", "Held-out macro F1", "mean over classes"),
        )
    ]
    charts = [chart for chart in charts if chart]
    return Gallery(charts, legend(sweep, colours)) if charts else None


def curves(name: str, title: str, unit: str, arms: list[Arm], colours: dict[str, int], curve, kind: str) -> Chart | None:
    """One curve an arm, the mean of its seeds in a band from the lowest to the highest. `curve` gives a run's points.

    Of a single seed the raw values of a smoothed curve stand behind it.
    """
    series = []
    for arm in arms:
        points, band = over_seeds([found for run in arm.done or arm.runs if len(found := curve(run)) > 1])
        if not points:
            continue
        some = thin(list(range(len(points))))
        points, band = [points[i] for i in some], [band[i] for i in some] if band else []
        shown = arm.name in colours
        series.append(Series(arm.name, colours.get(arm.name, 0), points, kind if shown else "other", band=band if shown else []))
    return Chart(name, title, lines(name, title, "optimizer step", unit, series)) if series else None


def over_seeds(curves: list[list[tuple[float, float]]]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """The mean at every step that all curves have, and with several curves the lowest and highest value there."""
    if len(curves) < 2:
        return (curves[0] if curves else []), []
    values = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*map(set, values)))
    every = [[one[step] for one in values] for step in steps]
    return [(step, sum(ys) / len(ys)) for step, ys in zip(steps, every, strict=True)], [(min(ys), max(ys)) for ys in every]


def legend(sweep: SweepFolder, colours: dict[str, int]) -> list[tuple[Text, int | None]]:
    out: list[tuple[Text, int | None]] = []
    for name, number in colours.items():
        arm = sweep.arms[name]
        seeds = f" {len(arm.runs)} seeds" if len(arm.runs) > 1 else ""
        states = Counter(run.status for run in arm.runs if run.status != "done")
        told = ", ".join(f"{count} {status}" if len(arm.runs) > 1 else status for status, count in states.items())
        out.append(((Span(arm.name), seeds + (f" ({told})" if told else "")), number))
    others = len(sweep.arms) - len(colours)
    return out + ([(f"the other {others} arms", None)] if others else [])


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
            several = all(len({repr(arm.setting(key)) for arm in inside}) > 1 for key in chosen)
            if several and len(inside) > max(1 + size, len(arms) / 2, len(best[1])):
                best = (list(chosen), inside)
    return best


def maps(sweep: SweepFolder, rows: list[Row]) -> tuple[list[Chart], list[str], list[Arm]]:
    """Heat maps over two settings, or lines over one numeric setting, of every task and metric. Also the settings, and the arms in them."""
    chosen, arms = varied(sweep)
    if not chosen:
        return [], [], []
    held = {key: [arm.setting(key) for arm in arms] for key in chosen}
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
        charts.append(draw(name, title, chosen, {arm.name: [arm.setting(key) for key in chosen] for arm in arms}, by_arm, digits(block)))
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
    points = sorted(((float(place[0]), rows[arm]) for arm, place in places.items() if arm in rows), key=lambda point: point[0])
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


def thin(points: list) -> list:
    """At most `_POINTS` of them, evenly, the last always."""
    every = math.ceil(len(points) / _POINTS)
    return points if every <= 1 else points[:-1][::every] + points[-1:]
