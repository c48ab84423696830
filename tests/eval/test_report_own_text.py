"""What on-policy runs have written in the report of their sweep, or of one of them: curves, the time of a step, and texts to be read."""

import json
import re

from llmkd_eval.report import stacked
from llmkd_eval.report.own_text import own_text
from llmkd_eval.report.sweep_files import read_sweep

from llmkd.cli import main
from tests.eval.test_report_samples import sampled
from tests.kit.sweep_report import TWO, checked, drawn, lines, written


def on_policy(made):
    """`kd` writes in 30 steps: 3 seconds of writing and 1 of training each, a quarter of it the teacher's."""
    folder = made(TWO)
    run = folder / "arms/kd"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for one in records:
        if "loss" in one:
            one |= {"written": 8, "written_length": 10 + one["step"], "written_finished": one["step"] / 30, "written_entropy": 2.0}
            one |= {"written_seconds": 3.0, "training_seconds": 1.0, "teacher_seconds": 0.25}
        else:
            one["validation"] |= {"own_reverse_kl": 0.9 - one["step"] / 100, "own_length": 12.0, "own_finished": 0.5}
    lines(run / "metrics.jsonl", records)
    texts = [sampled(1, "rubbish <i>"), sampled(1, "more"), sampled(29, "owl", finished=False), sampled(29, "crow")]
    lines(run / "samples.jsonl", [one | {"training": True} for one in texts])
    return folder


def test_curves_time_and_texts_of_the_runs_that_write(made):
    page, text = written(on_policy(made))
    rows = checked(page).rows
    assert ["kd", "90.0", "7.5", "22.5", "75%", f"{sum(8 * (10 + s) for s in range(1, 31)) / 90:,.0f}"] in rows
    assert [row[1:5] for row in rows if row[0] == "kd" and len(row) == 6 and "held" not in row[1]][-3:] == [
        ["1", "3", "Say 7", "rubbish <i>"],
        ["29", "3, cut off", "Say 7", "owl"],
        ["29", "3", "Say 7", "crow"],
    ]
    titles = re.findall(r'<svg class="chart"[^>]*><title id="own-([a-z-]+)-title">', page)
    assert titles == ["written-length", "written-finished", "written-entropy", "own-reverse-kl", "own-length", "own-finished", "time"]
    assert "kd: 11.5 to 39.5" in page and "kd: 0.9 to 0.6" in page, "from the first to the last point, in training of a moving average"
    assert "## What the students write" in text and "rubbish" in text and "<i>" not in page


def test_a_run_alone_has_the_same_section_between_its_curves_and_its_held_out_metrics(made, capsys):
    folder = on_policy(made)
    run = folder / "arms/kd"
    assert main(["report", str(run), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    html, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    rows = checked(html).rows
    assert ["kd", "90.0", "7.5", "22.5", "75%", f"{sum(8 * (10 + s) for s in range(1, 31)) / 90:,.0f}"] in rows
    assert ["own_reverse_kl", "0.9000", "0.6000"] in rows and ["ce", "3.0000", f"{3 - 1.5 * TWO['kd'][1]:.4f}"] in rows
    assert 'id="own-written-length-title"' in html and "rubbish" in text and "Baseline" not in text
    heads = [line for line in text.splitlines() if line.startswith("## ")]
    assert heads[:4] == ["## What was run", "## Learning curves", "## What the student writes", "## Held-out rows"]
    (run / "summary.json").unlink()
    assert main(["report", str(run)]) == 0 and "| not finished: recorded up to step 30 |" in (run / "report.md").read_text()
    (run / "metrics.jsonl").unlink()
    assert main(["report", str(run)]) == 2 and "has no metrics yet" in capsys.readouterr().err


def test_without_a_run_that_writes_there_is_no_section(made):
    sweep = read_sweep(made(TWO))
    assert own_text(sweep, {"sft": 0, "kd": 1}) == []


def test_a_bar_is_as_long_as_its_row_is_large_and_parted_as_it_is():
    picture = drawn(
        stacked.stacked("t", "Time", "seconds", ["writing", "training"], {"a": [3.0, 1.0], "b": [0.5, 1.5], "none": [0.0, 0.0]})
    )
    bars = [float(one.get("width")) for one in picture.iter() if one.tag.endswith("rect")][2:]
    assert abs(bars[0] - 3 * bars[1]) < 0.3 and abs(bars[0] + bars[1] - 2 * (bars[2] + bars[3])) < 0.3 and bars[4:] == [0.0, 0.0]
    assert [one.text for one in picture.iter() if one.tag.endswith("text") and "%" in (one.text or "")] == ["75%", "25%"]
    assert drawn(stacked.stacked("t", "Time", "seconds", ["writing"], {})) is not None
