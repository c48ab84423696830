"""loss.png: the smoothed lines do not trail the values."""

import json

import pytest
from llmkd_eval.report import sweep_charts
from matplotlib import pyplot

from llmkd.output.plots import moving_average, plot_losses


@pytest.mark.parametrize("count", [1, 2, 24, 39, 400])
def test_a_falling_loss_is_smoothed_without_lag(count):
    falling = [10 - 6 * k / count for k in range(count)]
    smooth = moving_average(falling)
    slope, half = 6 / count, round(count / 20) // 2
    assert smooth == pytest.approx(falling, abs=slope * half / 2 + 1e-9)  # at the very ends
    assert smooth[half : count - half] == pytest.approx(falling[half : count - half])


def test_a_short_run_ends_where_its_last_step_does():
    values = [5.3 - 0.1 * k for k in range(24)]
    assert moving_average(values) == values


def test_noise_is_averaged_over_a_twentieth_of_the_steps():
    alternating = [1.0 + (-1) ** k for k in range(1000)]
    assert moving_average(alternating) == pytest.approx([1.0] * 1000, abs=0.05)


def test_the_report_smooths_as_loss_png_does():
    points = [(10.0 * k, (k * 37 % 11) / 7) for k in range(200)]
    assert sweep_charts.smooth(points) == [(x, y) for (x, _), y in zip(points, moving_average([y for _, y in points]), strict=True)]


def test_a_picture_of_a_run_that_has_just_begun(tmp_path):
    records = [{"step": 1, "loss": 3.0, "ce": 3.0}, {"step": 1, "validation": {"ce": 3.0, "teacher_ce": 2.0, "forward_kl": 0.5}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_losses(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_student_has_written_is_drawn_below(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    steps = [{"step": n, "loss": 3.0, "written_length": 4.0 + n, "written_finished": n / 4, "teacher_seconds": 9.0} for n in (1, 2, 3)]
    own = {"step": 3, "validation": {"ce": 3.0, "forward_kl": 0.5, "own_reverse_kl": 0.7}}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*steps, own]))
    plot_losses(tmp_path)
    drawn = [[(one.get_label(), *one.get_data()) for one in axis.lines] for axis in figures[0].axes]
    assert [label for label, *_ in drawn[0] if not label.startswith("_")] == ["loss"]
    assert drawn[2][-1] == ("reverse KL, own text", (3,), (0.7,))
    values = {axis.get_ylabel(): [float(y) for one in axis.lines for y in one.get_ydata()] for axis in figures[0].axes[3:]}
    assert values == {"answers, tokens": [5.0, 6.0, 7.0], "share ended": [0.25, 0.5, 0.75]}
