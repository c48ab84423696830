"""Charts of a report: values in their cells, whatever the numbers, and colours that can be read."""

import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from llmkd_eval.report import charts, svg, sweep_charts
from llmkd_eval.report.document import Para, as_html
from llmkd_eval.report.sweep_files import read_sweep

from tests.kit.sweep_report import TWO, checked, drawn, written

GRID = {f"kd_ratio={r},lr={lr}": ({"loss.kd_ratio": r, "optim.lr": lr}, 0.4 + r / 4 + lr) for r in (0, 0.5, 1.0) for lr in (0.1, 0.01)}


def test_two_settings_make_maps_with_their_values_in_the_cells(made):
    folder = made(GRID | {"full": ({"student.method": "full", "loss.kd_ratio": 1}, 0.9)})
    html, text = written(folder)
    checked(html)
    sweep = read_sweep(folder)
    chosen, arms = sweep_charts.varied(sweep)
    assert chosen == ["loss.kd_ratio", "optim.lr"] and len(arms) == 6
    assert "Not in it, since they differ in more: `full`." in text and '"' not in "".join(chosen)
    for title in ("Held-out CE", "Held-out KL(teacher || student)", "Held-out agreement with the teacher", "quiz acc"):
        picture = next(p for p in re.findall(r"<svg.*?</svg>", html, re.S) if f">{title.replace('|', '|')} (" in p and "Heat map" in p)
        words = [element.text for element in drawn(picture).iter("text")]
        assert len(drawn(picture).findall("rect[@rx]")) == 6 + picture.count('class="best"') and "baseline" in words
        if title == "quiz acc":
            for arm in GRID:
                assert f"{json.loads((folder / f'arms/{arm}/eval/quiz.json').read_text())['metrics']['acc']['value']:.4f}" in words
    head = text.index("| loss.kd\\_ratio" if "| loss.kd\\_ratio" in text else "| loss.kd_ratio \\\\ optim.lr | 0.01 | 0.1 |")
    assert text[head:].splitlines()[2].startswith("| 0 |")


@pytest.mark.parametrize(
    "arms, chosen, inside",
    [
        ({f"r{r}": ({"loss.kd_ratio": r}, 0.5) for r in (0, 0.25, 1.0)}, ["loss.kd_ratio"], 3),
        # single changes of two settings lie in one map, at the base's value of the other
        ({"sft": ({"loss.kd_ratio": 0}, 0.5), "kd": ({}, 0.5), "r1": ({"loss.kd_ratio": 1}, 0.5), "slow": ({"optim.lr": 1e-3}, 0.5)}, ["loss.kd_ratio", "optim.lr"], 4),
        ({f"{a}{b}{c}": ({"loss.kd_ratio": a, "optim.lr": b, "seed2": c}, 0.5) for a in (0, 1) for b in (1, 2) for c in (1, 2)}, [], 0),
        (TWO, [], 0),
    ],
)  # fmt: skip
def test_which_settings_vary(made, arms, chosen, inside):
    sweep = read_sweep(made(arms))
    found, members = sweep_charts.varied(sweep)
    assert found == chosen and len(members) == inside


def test_one_numeric_setting_makes_lines_with_error_bars_and_words_make_none(made):
    html, text = written(made({f"r{r}": ({"loss.kd_ratio": r}, 0.4 + r / 3) for r in (0, 0.25, 1.0)}))
    checked(html)
    picture = next(p for p in re.findall(r"<svg.*?</svg>", html, re.S) if "quiz acc (higher is better)" in p)
    assert len(drawn(picture).findall(".//line[@class='errors s0']")) == 3 and "| loss.kd_ratio | value | standard error |" in text


def test_settings_that_are_words_are_left_to_the_tables(made):
    _, text = written(made({name: ({"loss.divergence": name}, 0.5) for name in ("a", "b", "c")}))
    assert "its values are no numbers" in text


def test_values_that_are_not_finite_leave_the_charts_whole(made):
    folder = made(TWO)
    with open(folder / "arms/kd/metrics.jsonl", "a") as file:
        file.write(
            '{"step": 31, "ce": NaN, "kd": Infinity, "loss": NaN}\n{"step": 32, "validation": {"ce": Infinity, "forward_kl": null}}\n{"cut'
        )
    checked(written(folder)[0])
    nan, inf = math.nan, math.inf
    for picture in (
        charts.lines("a", "t", "x", "y", [charts.Series("s", 0, [(0, nan), (1, inf), (2, 1.0)], "dots", [None, 0.1, 0.2])]),
        charts.lines("a", "t", "x", "y", []),
        charts.lines("a", "t", "x", "y", [charts.Series("s", 30, [(1e-5, 2.0), (1e-2, 2.0), (0, 3.0)], "dots")], [1e-5, 1e-2], True),
        charts.lines("a", "t", "x", "y", [charts.Series("s", 3, [(k, 1e9 * k) for k in range(9)])]),
        charts.forest("a", "t" * 90, "x", [charts.Interval("n" * 90, 0.0, None, "none"), charts.Interval("b", nan, None, "none"), charts.Interval("c", -1e-7, (-inf, 0.0), "worse")]),
        charts.forest("a", "t", "x", []),
        charts.heatmap("a", "t", "x", "y", ["l" * 50] * 12, ["k" * 50], {(0, 0): charts.Cell(nan, "", "no figure"), (0, 5): charts.Cell(2.0, "2.00000000")}, False),
        charts.heatmap("a", "t", "x", "y", ["1"], ["1"], {}, None),
    ):  # fmt: skip
        drawn(picture)


def test_the_best_cell_is_framed_whichever_way_is_up():
    cells = {(0, 0): charts.Cell(1.0, "1.0"), (0, 1): charts.Cell(2.0, "2.0")}
    for up, best, strong in ((True, 1, 1), (False, 0, 0)):
        root = ET.fromstring(charts.heatmap("a", "t", "x", "y", ["p", "q"], ["r"], cells, up))
        boxes = [r for r in root.iter("rect") if r.get("class") != "best"]
        (frame,) = [r for r in root.iter("rect") if r.get("class") == "best"]
        assert frame.get("x") == boxes[best].get("x") and boxes[strong].get("class") == f"h{len(svg.HEAT) - 1}"


@pytest.mark.parametrize(
    ("values", "low", "high"), [([0.0] * 3, -1, 1), ([0.0, 3e-17], -1, 1), ([2.0] * 3, 1.9, 2.1), ([-2.0, -2.0 + 1e-15], -2.1, -1.9), ([2e-7, 3e-7], 2e-7, 3e-7)]
)  # fmt: skip
def test_the_axis_of_a_constant_figure_has_a_sensible_range(values, low, high):
    assert svg.limits(values) == pytest.approx((low, high))
    picture = charts.lines("a", "t", "x", "y", [charts.Series("s", 0, list(enumerate(values)), "dots")])
    words = [element.text for element in drawn(picture).iter("text")]
    assert ("-1.0" in words and "1.0" in words) == (high == 1) and ("2.00" in words) == (high == 2.1), words


def test_every_series_and_shade_has_its_colour_in_the_style():
    html = as_html("t", [], "f")
    for i in range(len(svg.SERIES)):
        assert f".s{i} {{ stroke: var(--s{i}); }}" in html and f".f{i} {{ fill: var(--s{i}); }}" in html
    for i in range(len(svg.HEAT)):
        assert f".h{i} {{ fill: var(--h{i}); }}" in html and f".t{i} {{ fill: var(--t{i}); }}" in html


def test_ticks_are_round_and_cover_the_range():
    for low, high in ((0, 1), (-3.7e-4, 9e-5), (12, 4300), (0.49, 0.51)):
        ticks = svg.nice_ticks(low, high)
        step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
        assert 4 <= len(ticks) <= 10 and low - 1e-12 <= ticks[0] < low + step * 1.001 and high + 1e-12 >= ticks[-1] > high - step * 1.001
        assert min(abs(step / 10 ** math.floor(math.log10(step) + 1e-9) - m) for m in (1, 2, 5, 10)) < 1e-6


def test_both_colour_schemes_define_every_variable_and_text_can_be_read_on_them():
    html = as_html("t", [Para("x", "warn")], "f")
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", html))
    assert used <= set(svg.LIGHT) == set(svg.DARK) and used >= {"page", "text", "s0", f"s{len(svg.SERIES) - 1}", f"h{len(svg.HEAT) - 1}"}
    light, dark = re.findall(r":root \{([^}]*)\}", html)
    for names, given in ((svg.LIGHT, light), (svg.DARK, dark)):
        assert all(f"--{name}: {colour};" in given for name, colour in names.items())
        for name, colour in names.items():  # WCAG 2.1: 4.5 for text, 3 for lines
            if name in ("text", "quiet", "better", "worse") or name.startswith("s"):
                assert contrast(colour, names["page"]) >= (3 if name.startswith("s") else 4.5), (name, colour)
        assert all(contrast(names[f"t{i}"], names[f"h{i}"]) >= 4.5 for i in range(len(svg.HEAT)))
    assert "@media screen and (prefers-color-scheme: dark)" in html


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
