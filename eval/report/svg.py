"""Parts of SVG charts: colours as CSS variables, markers, ticks, scales, escaped text."""

import html
import itertools
import math

WIDTH = 480
TOP, BOTTOM, RIGHT = 34, 46, 14
CHAR = 7.0  # width of a character of a tick, at 12 units

#: Okabe and Ito's palette (jfly.uni-koeln.de/color, 2008), told apart with every common colour blindness; darker in light, for contrast.
SERIES = ("#0067a8", "#c04a00", "#007f5f", "#a8478a", "#8a6a00", "#2b86bd", "#404040")
SERIES_DARK = ("#58b4ee", "#ff8c42", "#2fcf9f", "#eb9fcb", "#f0c52e", "#9bd8ff", "#d0d0d0")
#: One hue by lightness, and the text on it.
HEAT = ("#f2f6fb", "#d8e6f5", "#b5d0ea", "#8ab6dd", "#5c99cc", "#2f72b0", "#14508a")
HEAT_DARK = ("#18222d", "#1c3146", "#21435f", "#28597e", "#37729f", "#6aa6d3", "#a9d2f2")
LIGHT = {
    "page": "#ffffff",
    "text": "#1b1f24",
    "quiet": "#5b6570",
    "rule": "#dfe3e8",
    "panel": "#f4f6f8",
    "better": "#00704f",
    "worse": "#b03a00",
}
DARK = {
    "page": "#12161b",
    "text": "#e4e8ec",
    "quiet": "#9aa5b1",
    "rule": "#333b45",
    "panel": "#1c2229",
    "better": "#45d6a8",
    "worse": "#ff9a5c",
}
for _names, _series, _heat, _words in ((LIGHT, SERIES, HEAT, "ddddd" + "ll"), (DARK, SERIES_DARK, HEAT_DARK, "lllll" + "dd")):
    _names |= {f"s{i}": colour for i, colour in enumerate(_series)} | {f"h{i}": colour for i, colour in enumerate(_heat)}
    _names |= {f"t{i}": {"d": "#10151a", "l": "#ffffff"}[word] for i, word in enumerate(_words)}

_DASHES = ("", "6 3", "2 2.5", "9 3 2 3")


class Svg(str):
    """Markup that is escaped already, which a template takes as it is."""

    def __html__(self) -> str:
        return self


def stroke(number: int) -> tuple[int, str]:
    """The number of a series' colour, and its dash as an attribute: dashes tell apart series of one colour."""
    dash = _DASHES[number // len(SERIES) % len(_DASHES)]
    return number % len(SERIES), f' stroke-dasharray="{dash}"' if dash else ""


def marker(number: int, x: float, y: float) -> str:
    """Circle, square, triangle, diamond, cross: what colours alone might not tell."""
    shapes = ("m-3.8 0a3.8 3.8 0 1 0 7.6 0a3.8 3.8 0 1 0 -7.6 0z", "m-3.4-3.4h6.8v6.8h-6.8z", "m0-4.4l4.2 7.4h-8.4z", "m0-4.8l4.2 4.8l-4.2 4.8l-4.2-4.8z",
              "m-1.4-4.2h2.8v2.8h2.8v2.8h-2.8v2.8h-2.8v-2.8h-2.8v-2.8h2.8z")  # fmt: skip
    return f"M{x:.1f} {y:.1f}{shapes[number % len(shapes)]}"


def key(number: int | None) -> Svg:
    """A series' line and marker, for a legend in the page; None: the line of those in grey."""
    if number is None:
        return Svg('<svg viewBox="0 0 34 12" aria-hidden="true"><line class="other" x1="1" x2="33" y1="6" y2="6"/></svg>')
    colour, dashed = stroke(number)
    line = f'<line class="line s{colour}" x1="1" x2="33" y1="6" y2="6"{dashed}/>'
    return Svg(f'<svg viewBox="0 0 34 12" aria-hidden="true">{line}<path class="dot f{colour}" d="{marker(number, 17, 6)}"/></svg>')


def nice_ticks(low: float, high: float, count: int = 6, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, about `count` of them."""
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / rough)))
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(ticks: list[float], sign: bool = False) -> list[str]:
    step = min((b - a for a, b in itertools.pairwise(ticks)), default=abs(ticks[0]) if ticks and ticks[0] else 1.0)
    if max(map(abs, ticks), default=0) >= 1e6 or step < 1e-6:
        return [f"{t:.3g}" for t in ticks]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{t:+,.{decimals}f}" if sign and t else f"{t:,.{decimals}f}" for t in ticks]


def limits(values: list[float]) -> tuple[float, float]:
    """Never empty: round values that are the same, up to rounding, a twentieth of their size either way; round 0 from -1 to 1."""
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if high - low > max(1e-9 * size, 1e-12):
        return low, high
    half = 0.05 * size if size > 1e-12 else 1.0
    return low - half, high + half


def widened(values: list[float]) -> tuple[float, float]:
    low, high = limits(values)
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (value - low) / (high - low) * (end - start)


def text(x: float, y: float, text: str, kind: str = "", anchor: str = "start", full: str = "", size: float | None = None) -> str:
    style = f' style="font-size:{size:.1f}px"' if size else ""
    whole = f"<title>{html.escape(full)}</title>" if full and full != text else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{html.escape(text)}{whole}</text>'


def svg(name: str, title: str, description: str, height: float, inside: list[str]) -> Svg:
    room = int(WIDTH / 8.4)
    heading = text(2, 16, title if len(title) <= room else title[: room - 1] + "…", "title")
    return Svg(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{html.escape(title)}</title><desc id="{name}-desc">{html.escape(description)}</desc>{heading}{"".join(inside)}</svg>'
    )
