"""The head of the report and its curves: which arms are the best, what stands against believing it, which arms have colour."""

import json
import random
import re
from dataclasses import replace

import pytest
from llmkd_eval.comparison.compare import compare
from llmkd_eval.comparison.compare_text import p_text
from llmkd_eval.report.best import Best, best_sentence
from llmkd_eval.report.sweep_charts import over_seeds as band_of
from llmkd_eval.report.sweep_files import Run, read_sweep
from llmkd_eval.report.write import read_report

from tests.kit.sweep_report import TWO, checked, lines, written

GRID = {
    f"{kind}-{lr:g}": ({"loss.kd_ratio": ratio, "optim.lr": lr}, chance)
    for kind, ratio, chances in (("sft", 0, (0.4, 0.5, 0.45)), ("kd", 0.5, (0.3, 0.6, 0.7)))
    for lr, chance in zip((0.001, 0.003, 0.01), chances, strict=True)
}


def head(text: str) -> str:
    """The section of the best arms, without the marks of Markdown."""
    return re.sub(r"[`\\\\]", "", text.split("## The best arms")[1].split("## Against the baseline")[0])


def test_the_best_distilled_arm_is_compared_with_the_best_plain_one_row_by_row(made, capsys):
    folder = made(GRID)
    text = head(written(folder)[1])
    assert capsys.readouterr().err.splitlines() == [line.removeprefix("- ") for line in text.splitlines() if line.startswith("- ")][:4]
    runs = {name: [folder / "arms" / name] for name in ("sft-0.003", "kd-0.01")}
    for task, metric, name in (("held_out", "ce", "Held-out CE"), ("quiz", "acc", "quiz acc")):
        plain, distilled = compare(runs, "sft-0.003", [task], [metric])
        line = next(line for line in text.splitlines() if line.startswith(f"- {name}: "))
        assert (
            f"kd-0.01 at lr 0.01 is the best ({distilled.value:.4f}"[:-1] in line
            and f"sft-0.003 at lr 0.003 ({plain.value:.4f}"[:-1] in line
        )
        assert f"Distilled against plain: better ({distilled.difference:+.4f}"[:-1] in line and line.endswith(f"p {p_text(distilled.p)}).")
    assert "Each was chosen out of 3 distilled and 3 plain arms" in text


@pytest.mark.parametrize("over_seeds, said", [((-0.1, 0.2), "better, not over seeds ("), ((0.01, 0.2), "better ("), (None, "better (")])
def test_a_difference_that_the_seeds_do_not_show_is_not_called_better_alone(made, over_seeds, said):
    sweep = read_sweep(made(GRID))
    plain, distilled = compare({name: [sweep.path / "arms" / name] for name in ("sft-0.003", "kd-0.01")}, "sft-0.003", ["quiz"], ["acc"])
    pair = replace(distilled, seeds=2, seed_interval=over_seeds)
    text = "".join(getattr(part, "text", part) for part in best_sentence(sweep, Best(distilled, distilled, plain, pair, 4)))
    assert f"Distilled against plain: {said}" in text


def test_a_plain_arm_that_is_the_best_is_said_to_be(made):
    text = head(written(made({"sft": ({"loss.kd_ratio": 0}, 0.8), "kd": ({}, 0.4)}))[1])
    assert "sft is the best" in text and ", plain). The best distilled arm is kd" in text and "Distilled against plain: worse (+" in text
    assert "Each was chosen" not in text


def test_without_plain_arms_the_best_is_named_alone(made):
    folder = made({"a": ({}, 0.5), "b": ({"loss.divergence": "jsd"}, 0.8)})
    text = head(written(folder)[1])
    assert {one["cross_fit"] for one in read_report(folder).numbers()["best"]} == {None}
    assert "Held-out CE: b is the best (" in text and "plain" not in text and "learning rate" not in text


@pytest.mark.parametrize("baseline, warned", [("sft-0.001", True), ("sft-0.003", False), ("kd-0.003", True), ("kd-0.01", False)])
def test_a_baseline_that_other_optimizer_settings_better_is_warned_of(made, baseline, warned):
    html, text = written(made(GRID, baseline=baseline))
    assert (f"The baseline {baseline} is not at its best: {baseline.split('-')[0]}-" in head(text)) == warned
    assert ("other optimizer settings alone" in html) == warned


def test_a_best_rate_at_the_end_of_those_tried_or_the_only_one_is_said(made):
    text = head(written(made(GRID))[1])
    assert "The best distilled arm has the largest learning rate that was tried, 0.01" in text and "The best plain arm has" not in text
    text = head(written(made(TWO | {"low": ({"optim.lr": 0.001}, 0.1), "high": ({"optim.lr": 0.1}, 0.1)}))[1])
    assert "The plain arms were tried at one learning rate, 0.01" in text and "The distilled arms were" not in text


def test_of_many_arms_eight_have_colour_the_baseline_and_the_best_among_them(made):
    arms = {"sft": ({"loss.kd_ratio": 0}, 0.2)} | {f"arm{i}": ({"optim.lr": i / 1000}, i / 20) for i in range(1, 13)}
    page, _ = written(made(arms))
    checked(page)
    curves = page.split('id="curves"')[1].split('id="held-out"')[0]
    shown = re.findall(r"<li><svg.*?</svg>(?:<code>([^<]*)</code>)?([^<]*)</li>", curves)
    eight = ["sft", *(f"arm{i}" for i in range(6, 13))]
    assert [name for name, _ in shown] == [*eight, ""] * 2 and shown[-1][1] == "the other 5 arms"
    ce = re.search(r'<figure id="curve-ce">.*?</figure>', curves, re.S)[0]
    assert ce.count('class="other"') == 5 and len(re.findall('class="line s', ce)) == 8


def test_seeds_are_drawn_as_their_mean_in_a_band(made):
    folder = made(TWO, seeds=(1, 2, 3))
    rng = random.Random(0)
    for path in folder.glob("arms/*/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines(path, [row | ({"ce": row["ce"] + rng.random()} if "ce" in row else {}) for row in rows])
    page, _ = written(folder)
    checked(page)
    ce = re.search(r'<figure id="curve-ce">.*?</figure>', page, re.S)[0]
    assert ce.count('class="band f') == 2 and len(re.findall('class="line s', ce)) == 2
    points, band = band_of([[(1, 3.0), (2, 2.0), (3, 1.0)], [(1, 5.0), (2, 1.0)]])
    assert points == [(1, 4.0), (2, 1.5)] and band == [(3.0, 5.0), (1.0, 2.0)]
    assert band_of([[(1, 3.0)]]) == ([(1, 3.0)], []) and band_of([]) == ([], [])


def test_kd_losses_of_other_divergences_or_temperatures_have_their_own_charts(made):
    base = {"loss.divergence": "forward_kl", "loss.temperature": 1.0}
    arms = TWO | {
        "hot": ({"loss.temperature": 2.0}, 0.6),
        "jsd": ({"loss.divergence": "generalized_jsd", "loss.divergence_options.beta": 0.1}, 0.6),
    }
    page, _ = written(made(arms, base=base))
    checked(page)
    assert re.findall(r">Training: KD loss([^<]*)</text>", page) == [
        " (forward_kl, T 1)",
        " (forward_kl, T 2)",
        " (generalized_jsd, beta 0.1, T 1)",
    ]


def test_every_cell_names_its_column_for_narrow_screens(made):
    page, _ = written(made(TWO))
    for table in re.findall(r"<table.*?</table>", page, re.S):
        heads = [re.sub("<.*?>", "", cell) for cell in re.findall(r"<th scope.*?>(.*?)</th>", table)]
        for row in re.findall(r"<tr>(<td.*?)</tr>", table):
            assert re.findall(r'<td[^>]*data-column="([^"]*)"', row) == [cell for cell in heads if cell], row


def test_runs_that_ended_worse_than_they_began_are_listed(made):
    folder = made(TWO)
    assert "ended worse" not in written(folder)[1]
    (folder / "arms/kd/summary.json").write_text(json.dumps({"warnings": ["worse than before training: <CE>"]}))
    page, text = written(folder)
    assert "### Runs that ended worse than they began\n\n- `kd`: worse than before training" in text and "training: &lt;CE&gt;" in page


@pytest.mark.parametrize(
    ("recipe", "teachers"),
    [
        ({"loss.kd_ratio": 0.5, "teacher.model": "big"}, ("big",)),
        ({"loss.kd_ratio": 0.0, "teacher.model": "big"}, ()),
        ({"loss.kd_ratio": 0.0, "loss.features": None, "loss.attention": None, "teacher.model": "big"}, ()),
        ({"loss.kd_ratio": 0.0, "loss.features.weight": 1.0, "teacher.model": "big"}, ("big",)),
        ({"loss.kd_ratio": 0.0, "loss.attention.weight": 1.0, "teacher.model": "big"}, ("big",)),
        ({"loss.kd_ratio": 1.0, "teacher.server": "http://host:1"}, ("http://host:1",)),
        ({"loss.kd_ratio": 1.0, "teacher": [{"model": "a"}, {"cache": {"path": "c"}}]}, ("a", "c")),
    ],
)
def test_an_arm_is_distilled_where_any_term_of_its_loss_has_a_teacher(recipe, teachers, tmp_path):
    """By hidden states or attention a student learns without a kd_ratio too: it was counted among the plain arms."""
    run = Run("a", "a", None, tmp_path / "not there", {}, "done", None, 0.0, recipe)
    assert (run.teachers, run.distils) == (teachers, bool(teachers))
