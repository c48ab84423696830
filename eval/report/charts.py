"""Charts as inline SVG: lines, heat maps, intervals. Colours are CSS variables, so that they follow light and dark.

Every chart is 480 wide in its own units and scales with the page. Points that are not finite are left out.

matplotlib's SVG was tried for lines and intervals and is not used: it writes colours and font sizes into every element, so a dark scheme
and larger letters on phones would need its output rewritten; its element ids repeat from chart to chart, which one page must not have; it
has no titles for screen readers and pointers; and a chart takes 0.6 s instead of 3 ms, of which a report has dozens.
"""

import html
import itertools
import math
from dataclasses import dataclass, field

from .svg import BOTTOM, CHAR, HEAT, RIGHT, TOP, WIDTH, Svg, limits, marker, nice_ticks, scale, stroke, svg, text, tick_labels, widened


@dataclass(frozen=True)
class Series:
    """`number` picks colour, then dash.

    kind: "line", "dots" (a line through markers), "raw" (light, in the background) or "other" (grey, in the background).
    """

    label: str
    number: int
    points: list[tuple[float, float]]
    kind: str = "line"
    errors: list[float | None] = field(default_factory=list)  # half a bar's height, for each point
    band: list[tuple[float, float]] = field(default_factory=list)  # lowest and highest value, for each point


def lines(name: str, title: str, x_label: str, y_label: str, series: list[Series], x_ticks: list[float] | None = None, log_x=False) -> Svg:
    """Curves over a common axis. Raw series are cut to the widened range of the others. `x_ticks`: all x values, if there are only few."""
    series = [_finite(s, log_x) for s in series]
    shown = [p for s in series if s.kind != "raw" for p in s.points] or [p for s in series for p in s.points]
    if not shown:
        return svg(name, title, "No points.", 80, [text(WIDTH / 2, 55, "no points", "none", "middle")])
    spread = [y + e for s in series for (_, y), error in zip(s.points, s.errors, strict=False) if error for e in (error, -error)]
    spread += [y for s in series for pair in s.band for y in pair]
    low, high = widened([y for _, y in shown] + spread)
    ticks = nice_ticks(low, high)
    labels = tick_labels(ticks)
    left = 30 + CHAR * max(map(len, labels))
    height, bottom = 290, 290 - BOTTOM
    warp = math.log10 if log_x else float
    x_low, x_high = limits([warp(x) for x, _ in shown])
    if x_ticks:
        x_low, x_high = x_low - 0.06 * (x_high - x_low), x_high + 0.06 * (x_high - x_low)
    px = scale(x_low, x_high, left, WIDTH - RIGHT)
    py = scale(low, high, bottom, TOP)
    out = [
        f'<clipPath id="{name}-clip"><rect x="{left:.1f}" y="{TOP - 2}" width="{WIDTH - RIGHT - left + 2:.1f}" height="{bottom - TOP + 4}"/></clipPath>'
    ]
    for tick, label in zip(ticks, labels, strict=True):
        out.append(f'<line class="grid" x1="{left:.1f}" x2="{WIDTH - RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        out.append(text(left - 6, py(tick) + 4, label, "tick", "end"))
    xs = sorted(set(x_ticks)) if x_ticks else [t for t in nice_ticks(x_low, x_high, whole=True) if x_low <= t <= x_high]
    last = -math.inf
    for tick, label in zip(xs, [f"{x:g}" for x in xs] if x_ticks else tick_labels(xs), strict=True):
        x, half = px(warp(tick)), CHAR * len(label) / 2
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        if x - half > last + 4:
            out.append(text(x, bottom + 17, label, "tick", "middle"))
            last = x + half
    out.append(text((left + WIDTH - RIGHT) / 2, height - 8, x_label, "label", "middle"))
    middle = (TOP + bottom) / 2
    out.append(f'<text class="label" transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>')
    drawn = [_drawn(s, lambda x: px(warp(x)), py) for s in sorted(series, key=lambda s: (s.kind != "raw", s.kind != "other"))]
    out.append(f'<g clip-path="url(#{name}-clip)">{"".join(drawn)}</g>')
    ends = "; ".join(f"{s.label}: {s.points[0][1]:.4g} to {s.points[-1][1]:.4g}" for s in series if s.kind != "raw" and s.points)
    return svg(name, title, f"{y_label} over {x_label}. {ends}.", height, out)


def _drawn(s: Series, px, py) -> str:
    path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in s.points)
    colour, dashed = stroke(s.number)
    if s.kind == "raw":
        return f'<polyline class="raw s{colour}" points="{path}"/>'
    if s.kind == "other":
        return f'<polyline class="other" points="{path}"><title>{html.escape(s.label)}</title></polyline>'
    out = []
    if s.band:
        edge = [(x, low) for (x, _), (low, _) in zip(s.points, s.band, strict=True)]
        edge += [(x, high) for (x, _), (_, high) in zip(s.points[::-1], s.band[::-1], strict=True)]
        out.append(f'<polygon class="band f{colour}" points="{" ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in edge)}"/>')
    out += [f'<polyline class="line s{colour}" points="{path}"{dashed}><title>{html.escape(s.label)}</title></polyline>']
    for (x, y), error in itertools.zip_longest(s.points, s.errors):
        if error:
            out.append(
                f'<line class="errors s{colour}" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{py(y - error):.1f}" y2="{py(y + error):.1f}"/>'
            )
        if s.kind == "dots":
            out.append(
                f'<path class="dot f{colour}" d="{marker(s.number, px(x), py(y))}"><title>{html.escape(s.label)}: {x:g}, {y:.4f}</title></path>'
            )
    return "".join(out)


@dataclass(frozen=True)
class Cell:
    value: float
    text: str
    note: str = ""  # a word below it


def heatmap(
    name: str,
    title: str,
    x_label: str,
    y_label: str,
    columns: list[str],
    rows: list[str],
    cells: dict[tuple[int, int], Cell],
    up: bool | None,
) -> Svg:
    """cells by (row, column). Stronger colours are better; `up`: whether higher is. The best cell has a frame; missing ones stay empty."""
    good = {place: -cell.value if up is False else cell.value for place, cell in cells.items() if math.isfinite(cell.value)}
    low, high = (min(good.values()), max(good.values())) if good else (0.0, 0.0)
    cut = [label if len(label) <= 18 else label[:17] + "…" for label in rows]
    left, tall = 34 + CHAR * max(map(len, cut), default=1), 46
    wide = (WIDTH - RIGHT - left) / max(1, len(columns))
    height, out = TOP + tall * len(rows) + BOTTOM, []
    for r, label in enumerate(cut):
        out.append(text(left - 7, TOP + tall * (r + 0.5) + 4, label, "tick", "end", rows[r]))
    for c, label in enumerate(columns):
        room = max(3, int(wide / CHAR))
        short = label if len(label) <= room else label[: room - 1] + "…"
        out.append(text(left + wide * (c + 0.5), TOP + tall * len(rows) + 17, short, "tick", "middle", label))
    frame = ""
    for r, c in itertools.product(range(len(rows)), range(len(columns))):
        x, y, cell = left + wide * c, TOP + tall * r, cells.get((r, c))
        box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="{tall - 2}" rx="3"'
        if (r, c) not in good:
            out.append(f'<rect class="hole" {box}/>' + text(x + wide / 2, y + tall / 2 + 4, cell.note if cell else "–", "none", "middle"))
            continue
        level = round((good[r, c] - low) / (high - low) * (len(HEAT) - 1)) if high > low else len(HEAT) // 2
        size = min(13.0, (wide - 6) / (0.6 * max(len(cell.text), 1)))
        out.append(f'<rect class="h{level}" {box}/>')
        out.append(text(x + wide / 2, y + tall / 2 + (-1 if cell.note else 4.5), cell.text, f"t{level}", "middle", size=size))
        if cell.note:
            out.append(
                text(
                    x + wide / 2, y + tall / 2 + 14, cell.note, f"t{level}", "middle", size=min(10.5, (wide - 6) / (0.56 * len(cell.note)))
                )
            )
        if good[r, c] == high and high > low:
            frame += f'<rect class="best" {box}/>'
    out += [frame, text((left + WIDTH - RIGHT) / 2, height - 8, x_label, "label", "middle")]
    middle = TOP + tall * len(rows) / 2
    out.append(f'<text class="label" transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>')
    said = "; ".join(
        f"{y_label} {rows[r]}, {x_label} {columns[c]}: {cell.text} {cell.note}".strip() for (r, c), cell in sorted(cells.items())
    )
    return svg(name, title, f"Heat map. {said}.", height, out)


@dataclass(frozen=True)
class Interval:
    label: str
    value: float
    interval: tuple[float, float] | None
    kind: str  # "better", "worse" or "none"


def forest(name: str, title: str, x_label: str, intervals: list[Interval]) -> Svg:
    """Differences with their intervals around a line at 0, one below the other, each under its name."""
    intervals = [i for i in intervals if math.isfinite(i.value)]
    ends = [x for i in intervals for x in (i.value, *(i.interval or ())) if math.isfinite(x)]
    low, high = widened([0.0, *ends])
    ticks = [t for t in nice_ticks(low, high, 5) if low <= t <= high]
    height, left, right = TOP + 36 * len(intervals) + BOTTOM, 16, WIDTH - 24
    bottom, px, out = height - BOTTOM, scale(low, high, 16, WIDTH - 24), []
    for tick, label in zip(ticks, tick_labels(ticks, sign=True), strict=True):
        kind = "zero" if tick == 0 else "grid"
        out.append(f'<line class="{kind}" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="{TOP}" y2="{bottom}"/>')
        half = CHAR * len(label) / 2
        out.append(text(min(max(px(tick), half), WIDTH - half), bottom + 17, label, "tick", "middle"))
    for k, i in enumerate(intervals):
        y = TOP + 36 * k + 26
        short = i.label if len(i.label) <= 66 else i.label[:65] + "…"
        out.append(text(left, y - 11, short, "name", "start", i.label))
        if i.interval and all(map(math.isfinite, i.interval)):
            a, b = (px(x) for x in i.interval)
            out.append(f'<line class="interval i-{i.kind}" x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}"/>')
        out.append(f'<circle class="mark i-{i.kind}" cx="{px(i.value):.1f}" cy="{y}" r="4.2"/>')
    out.append(text((left + right) / 2, height - 8, x_label, "label", "middle"))
    said = "; ".join(
        f"{i.label}: {i.value:+.4g}" + (f" ({i.interval[0]:+.4g} to {i.interval[1]:+.4g})" if i.interval else "") for i in intervals
    )
    return svg(name, title, f"Differences with intervals. {said}.", height, out)


def _finite(s: Series, log_x: bool) -> Series:
    kept = [i for i, (x, y) in enumerate(s.points) if math.isfinite(x) and math.isfinite(y) and (x > 0 or not log_x)]
    errors, band = ([values[i] for i in kept] if values else [] for values in (s.errors, s.band))
    return Series(s.label, s.number, [s.points[i] for i in kept], s.kind, errors, band)
