"""A chart of sums and their parts: one bar a row, as SVG. The other charts are in `charts.py`."""

import math

from .svg import BOTTOM, CHAR, TOP, WIDTH, Svg, nice_ticks, scale, svg, text, tick_labels


def stacked(name: str, title: str, x_label: str, parts: list[str], rows: dict[str, list[float]]) -> Svg:
    """Bars one below the other, each under its name: of each row a value for each of the parts, none below 0. A row's share of the first part
    stands after its bar."""
    rows = {row: values for row, values in rows.items() if all(map(math.isfinite, values))}
    high = max([sum(values) for values in rows.values()], default=0.0) or 1.0
    end = WIDTH - 12 - CHAR * 5
    height, px, out = TOP + 22 + 36 * len(rows) + BOTTOM, scale(0.0, high, 16, end), []
    bottom, x = height - BOTTOM, 16.0
    for number, part in enumerate(parts):
        out.append(f'<rect class="f{number}" x="{x:.1f}" y="{TOP - 2}" width="11" height="11"/>' + text(x + 16, TOP + 8, part, "name"))
        x += 34 + CHAR * len(part)
    ticks = [t for t in nice_ticks(0.0, high, 5) if t <= high]
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        out.append(f'<line class="grid" x1="{px(tick):.1f}" x2="{px(tick):.1f}" y1="{TOP + 18}" y2="{bottom}"/>')
        out.append(text(max(px(tick), CHAR * len(label) / 2), bottom + 17, label, "tick", "middle"))
    for k, (row, values) in enumerate(rows.items()):
        y, start = TOP + 22 + 36 * k + 16, 0.0
        short = row if len(row) <= 66 else row[:65] + "…"
        out.append(text(16, y - 3, short, "name", "start", row))
        for number, (part, value) in enumerate(zip(parts, values, strict=True)):
            wide = px(start + value) - px(start)
            out.append(
                f'<rect class="f{number}" x="{px(start):.1f}" y="{y}" width="{wide:.1f}" height="13"><title>{part}: {value:.4g}</title></rect>'
            )
            start += value
        out.append(text(px(start) + 6, y + 11, f"{values[0] / start:.0%}" if start else "", "tick"))
    out.append(text((16 + end) / 2, height - 8, x_label, "label", "middle"))
    said = "; ".join(
        f"{row}: " + ", ".join(f"{part} {value:.4g}" for part, value in zip(parts, values, strict=True)) for row, values in rows.items()
    )
    return svg(name, title, f"{x_label}. {said}.", height, out)
