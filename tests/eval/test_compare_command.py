"""`llmkd compare`: its tables, sentences that follow the statistics, and what the command refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llmkd_eval.comparison.compare import compare
from llmkd_eval.comparison.compare_text import as_markdown, as_text

from llmkd import cli
from tests.kit.comparison import answers, arms, evaluated, held_out


def test_items_that_cannot_show_any_difference_are_said_to_be_too_few(home):
    for run, x in (("a", [1, 0, 1, 0]), ("b", [0, 1, 0, 0])):
        evaluated(run, {"acc": x})
        evaluated(run, {"acc": x[:1]}, task="one")
    rows = compare(arms("a", "b"))
    text = as_text(rows)
    assert all(row.detectable is None for row in rows) and "would have been shown" not in text
    assert "4 items cannot show any difference: p cannot be below 0.1250." in text
    assert "1 item cannot show any difference: p cannot be below 1.0000." in text
    targets = np.full(6, 10)
    for i, run in enumerate("pqrst"):
        held_out(run, {"ce": targets * (2 + i + 0.1 * np.arange(6))}, targets)
    rows = compare(arms(*"pqrst"))
    assert {row.p_adjusted for row in rows[1:]} == {0.125} and {row.detectable for row in rows} == {None}
    assert "6 rows cannot show any difference: Holm's p for 4 comparisons cannot be below 0.1250." in as_text(rows)
    held_out("q", {"ce": targets * 3 + np.arange(6)}, targets)
    _, q = compare(arms("p", "q"))  # one arm, and six rows are enough
    assert q.p == 2 / 2**6 and q.verdict == "higher" and "cannot show" not in as_text([q])


def test_a_spread_of_zero_says_nothing_of_what_could_have_been_shown(home):
    x = answers(40, 0.5, 1)
    for run, y in (("a", x), ("same", x), ("other", answers(40, 0.6, 2))):
        evaluated(run, {"acc": y, "score": 0.1 + 0.7 * y})
    evaluated("same", {"acc": x, "score": 0.4 + 0.7 * x})  # always 0.3 more, but for rounding
    same, score = [row for row in compare(arms("a", "same")) if row.arm == "same"]
    assert same.detectable is score.detectable is None and same.same and not score.same
    assert score.verdict == "higher" and 0 < abs(score.difference - 0.3) + score.difference_stderr < 1e-12
    text = as_text([same, score])
    assert (
        "would have been shown" not in text
        and text.count("same: the same as the baseline on every item, so the smallest difference that could be shown") == 1
    )
    block = compare(arms("a", "same", "other"), metrics=["acc"])
    assert block[1].detectable is None and f"A true difference of {block[2].detectable:.4f} would" in as_text(block)
    assert "\nsame: the same as the baseline" in as_text(block)


@pytest.fixture
def two(home):
    long = "a_name_that_is_longer_than_the_column_of_names"
    evaluated("sft", {"acc": answers(300, 0.5, 1)})
    evaluated("kd", {"acc": answers(300, 0.58, 2)})
    evaluated(long, {"acc": answers(300, 0.5, 3)})
    return ["sft", "kd", long]


def test_the_command_prints_a_table_and_writes_the_values(two, capsys):
    assert cli.main(["compare", *two[:2], "--json", "out/c.json", "--tasks", "quiz", two[2], "--metrics=acc"]) == 0
    out, err = capsys.readouterr()
    rows = compare(arms(*two))
    assert out.strip() == as_text(rows) and not err and max(map(len, out.splitlines())) <= 140
    assert json.loads(Path("out/c.json").read_text())["rows"][1]["p"] == rows[1].p
    lines = out.splitlines()
    assert (
        lines[0] == "quiz acc: 300 items, higher is better; McNemar" and lines[4].startswith("kd ") and lines[4].endswith("higher, better")
    )
    assert f"{rows[1].difference:+.4f} ±{rows[1].difference_stderr:.4f}" in lines[4] and f"{rows[1].p_adjusted:.4f}" in lines[4]
    assert "would have been shown 4 times in 5, after the correction for 2 comparisons" in out and "McNemar's exact test" in out


def test_tables_stay_within_140_columns(home):
    name = "kd_ratio=0.5,lr=0.0003,divergence=skewed_forward_kl"
    for s, shift in ((1, 0.0), (2, 0.14)):
        evaluated(f"a{s}", {"acc": answers(900, 0.5, s)}, seed=s)
        evaluated(f"b{s}", {"acc": answers(900, 0.5 + shift, 10 + s)}, seed=s)
    text = as_text(compare(arms("sft=a1,a2", f"{name}=b1,b2", "kd_of_a_tuned_teacher=b1,b2")))
    assert max(map(len, text.splitlines())) <= 140 and f"\n{name}\n  " in text and "\nkd_of_a_tuned_teacher " in text


def test_markdown_has_the_same_cells(two):
    text = as_markdown(compare(arms(*two)))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 5 and len({line.count("|") for line in table}) == 1 and "| higher, better |" in table[3]


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["a"], "found one configuration, expected two or more"),
        (["a", "b", "--baseline", "c"], "--baseline c: no such configuration; there are a, b"),
        (["a", "b", "--alpha", "3"], "--alpha: compare has no such option"),
        (["a", "b", "--json"], "--json: no value given"),
    ],
)
def test_what_the_command_refuses(home, capsys, argv, found):
    for run in "ab":
        evaluated(run, {"acc": [1, 0, 1]})
    assert cli.main(["compare", *argv]) == 2
    assert found in capsys.readouterr().err


def test_every_run_that_is_missing_is_named(home, capsys):
    evaluated("a", {"acc": [1, 0, 1]})
    assert cli.main(["compare", "no", "a", "kd=none,a"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [" no", " kd=none,a"] and all("no such folder" in line for line in lines)


def test_a_baseline_s_name_is_text_whatever_it_looks_like(home, capsys):
    for run in ("1e-4", "no"):
        evaluated(run, {"acc": [1, 0, 1]})
    assert cli.main(["compare", "1e-4", "no", "--baseline", "no"]) == 0
    assert capsys.readouterr().out.splitlines()[4].rstrip().endswith("baseline")


def test_neither_torch_nor_the_harness_is_loaded(two):
    code = (
        "import sys\nfrom llmkd.cli import main\n"
        f"assert main(['compare', *{two!r}]) == 0\n"
        "print(*sorted({'torch', 'transformers', 'lm_eval', 'datasets', 'scipy', 'matplotlib'} & sys.modules.keys()), 'end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1].split() == ["end"]
