"""Comparing runs: metrics, differences and verdicts, recomputed from the files."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from llmkd_eval.comparison.compare import compare
from llmkd_eval.comparison.compare_text import as_numbers, as_text, words

from llmkd.errors import UserError
from tests.kit.comparison import answers, arms, evaluated, held_out, of_items


def test_answers_of_single_runs_are_recomputed_from_the_files(home):
    rng = np.random.default_rng(3)
    evaluated("a", {"acc": answers(600, 0.5, 1)})
    evaluated("b", {"acc": answers(600, 0.56, 2)}, order=rng.permutation(600))  # as several processes might have written it
    base, row = compare(arms("a", "b"))
    a, b = of_items("a", "acc"), of_items("b", "acc")
    d = np.array([b[key] - a[key] for key in a])
    wins, losses = int((d > 0).sum()), int((d < 0).sum())
    p = min(1, 2 * sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1)) / 2 ** (wins + losses))
    assert (base.arm, base.verdict, base.difference, base.seeds, base.seed_spread) == ("a", "baseline", None, 1, None)
    assert (row.task, row.metric, row.arm, row.n, row.seeds, row.test) == ("quiz", "acc", "b", 600, 1, "McNemar")
    assert base.value == np.mean(list(a.values())) and row.value == pytest.approx(np.mean(list(b.values())))
    assert row.stderr == pytest.approx(np.std(list(b.values()), ddof=1) / math.sqrt(600))
    assert row.difference == pytest.approx(d.mean()) and row.difference_stderr == pytest.approx(np.std(d, ddof=1) / math.sqrt(600))
    assert row.p == pytest.approx(p) and row.p_adjusted == row.p and row.family == 1
    assert row.interval == pytest.approx((d.mean() - 1.96 * row.difference_stderr, d.mean() + 1.96 * row.difference_stderr), abs=0.003)
    assert (
        row.verdict == "higher"
        and row.better
        and row.p < 0.05
        and row.detectable == pytest.approx(2.8016 * row.difference_stderr, rel=1e-4)
    )


def test_what_a_model_scored_is_compared_with_its_run(home):
    """Results of a model that is no run stand in a folder of their own, as in runs/eval/NAME."""
    evaluated("run", {"acc": answers(600, 0.56, 2)}, seed=0)
    Path(evaluated("x", {"acc": answers(600, 0.5, 1)}), "eval").rename("model")
    base, row = compare(arms("model", "run"))
    assert (base.value, row.value) == (np.mean(answers(600, 0.5, 1)), pytest.approx(np.mean(answers(600, 0.56, 2))))
    with pytest.raises(UserError, match="^--tasks exam: model has no exam.json with exam.jsonl; it has quiz$"):
        compare(arms("model", "run"), tasks=["exam"])


def test_seeds_are_averaged_item_by_item_and_their_spread_stands_beside_it(home):
    runs = {f"{arm}{s}": answers(400, share, 10 * s + (arm == "b")) for arm, share in (("a", 0.5), ("b", 0.53)) for s in (1, 2, 3)}
    for name, x in runs.items():
        evaluated(name, {"acc": x}, seed=int(name[1]))
    base, row = compare(arms("a=a1,a2,a3", "b=b3,b1,b2"))  # in another order: matched by the recipe's seed
    means = {arm: np.mean([runs[f"{arm}{s}"] for s in (1, 2, 3)], axis=0) for arm in "ab"}
    d = means["b"] - means["a"]
    totals = {arm: np.array([runs[f"{arm}{s}"].mean() for s in (1, 2, 3)]) for arm in "ab"}
    over = totals["b"] - totals["a"]
    half = 4.302653 * over.std(ddof=1) / math.sqrt(3)
    assert (row.seeds, row.test, row.seeds_matched) == (3, "permutation", True)
    assert row.value == pytest.approx(means["b"].mean()) and row.seed_spread == pytest.approx(totals["b"].std(ddof=1))
    assert base.seed_spread == pytest.approx(totals["a"].std(ddof=1))
    assert row.stderr == pytest.approx(means["b"].std(ddof=1) / 20) and row.difference_stderr == pytest.approx(d.std(ddof=1) / 20)
    assert row.seed_interval == pytest.approx((over.mean() - half, over.mean() + half))
    signs = np.random.default_rng(9).choice([-1, 1], size=(4000, 400))
    brute = (np.abs(signs @ d) >= abs(d.sum()) - 1e-9).mean()
    assert row.p == pytest.approx(brute, abs=4 * math.sqrt(brute * (1 - brute) / 4000) + 0.003)


def test_seeds_that_do_not_match_are_not_paired(home):
    for name, seed in (("a1", 1), ("a2", 2), ("b1", 1), ("b3", 3), ("c", 1)):
        evaluated(name, {"acc": answers(300, 0.5, seed + len(name) + ord(name[0]))}, seed=seed)
    _, b, c = compare(arms("a=a1,a2", "b=b1,b3", "c"))
    assert b.seeds_matched is False and b.seed_interval is not None
    assert c.seed_interval is None and c.seeds_matched is None and c.seeds == 1


def test_the_spread_of_held_out_values_over_seeds_is_per_target(home):
    targets, rng = np.array([3, 90, 20, 7]), np.random.default_rng(0)
    for run in ("a1", "a2", "b1", "b2"):
        held_out(run, {"ce": targets * (1 + rng.random(4))}, targets)
        Path(run, "recipe.yaml").write_text(f"seed: {run[1]}\n")
    base, row = compare(arms("a=a1,a2", "b=b1,b2"))
    lines = {run: map(json.loads, Path(run, "held_out.jsonl").read_text().splitlines()) for run in ("a1", "a2", "b1", "b2")}
    means = {run: sum(item["sums"]["ce"] for item in items) / targets.sum() for run, items in lines.items()}
    assert base.seed_spread == pytest.approx(np.std([means["a1"], means["a2"]], ddof=1))
    d = np.array([means["b1"] - means["a1"], means["b2"] - means["a2"]])
    assert np.mean(row.seed_interval) == pytest.approx(d.mean()) and row.difference == pytest.approx(d.mean())


def test_values_of_held_out_rows_are_weighted_by_targets(home):
    rng = np.random.default_rng(5)
    targets = rng.integers(3, 90, 80)
    hard = rng.gamma(3, 0.4, 80)
    for run, shift in (("a", 0.0), ("b", -0.05)):
        ce = targets * (hard + shift + 0.05 * rng.standard_normal(80))
        held_out(
            run,
            {
                "ce": ce,
                "entropy": ce,
                "reverse_kl": ce,
                "forward_kl": ce / 2,
                "top1_agreement": targets * 0.7,
                "teacher_ce": targets * hard,
            },
            targets,
        )
    rows = compare(arms("a", "b"))
    assert [(row.metric, row.arm) for row in rows] == list(itertools.product(("ce", "forward_kl", "top1_agreement"), "ab"))
    read = [[json.loads(line) for line in Path(run, "held_out.jsonl").read_text().splitlines()] for run in "ab"]
    a, b = (np.array([item["sums"]["ce"] for item in items]) for items in read)
    r = (b - a).sum() / targets.sum()
    stderr = math.sqrt(80 / 79 * ((b - a - r * targets) ** 2).sum()) / targets.sum()
    ce = rows[1]
    assert ce.value == pytest.approx(b.sum() / targets.sum()) and ce.difference == pytest.approx(r)
    assert ce.difference_stderr == pytest.approx(stderr) and ce.n == 80
    assert (ce.verdict, ce.better, ce.test, words(ce)) == ("lower", True, "permutation", "lower, better")
    same = rows[5]
    assert (same.difference, same.p, same.interval, same.verdict, words(same)) == (
        0,
        1,
        (0, 0),
        "no difference shown",
        "no difference shown, < 1 se",
    )
    assert {row.metric for row in compare(arms("a", "b"), metrics=["reverse_kl", "ce"])} == {"reverse_kl", "ce"}


def test_examples_of_one_row_of_data_are_one_draw(home):
    rng = np.random.default_rng(6)
    row_effect, targets, places = np.repeat(rng.standard_normal(30), 4), np.full(120, 10), [f"t.jsonl:{i // 4}" for i in range(120)]
    held_out("a", {"ce": np.full(120, 20.0)}, targets, places)
    held_out("b", {"ce": 20 + row_effect}, targets, places)
    _, row = compare(arms("a", "b"))
    d = row_effect[::4] / 10  # per target, of whole rows
    assert row.n == 30 and row.difference_stderr == pytest.approx(d.std(ddof=1) / math.sqrt(30))


def test_an_arm_with_another_teacher_is_left_out_of_the_divergences(home):
    said, targets = [], np.array([5, 9, 20, 11])
    for run, own in (("a", 1.0), ("b", 1.001), ("c", 1.2)):
        held_out(run, {"ce": targets, "forward_kl": targets * 0.1, "teacher_ce": targets * own}, targets)
    held_out("d", {"ce": targets}, targets)
    rows = compare(arms("a", "b", "c", "d"), info=said.append)
    assert [(row.metric, row.arm) for row in rows] == [("ce", arm) for arm in "abcd"] + [("forward_kl", arm) for arm in "ab"]
    assert "held_out forward_kl: c left out; it has another teacher than a" in said[0] and "d left out; d did not measure it" in said[1]


def test_divergences_from_a_part_of_the_teacher_are_another_metric(home):
    """Over its 64 most likely tokens and one bucket they are smaller; the most likely token is the same."""
    said, targets = [], np.array([5, 9, 20, 11])
    sums = {"ce": targets, "forward_kl": targets * 0.1, "top1_agreement": targets * 0.5, "teacher_ce": targets}
    held_out("a", sums, targets)
    held_out("b", sums, targets, teacher_part="top 64 tokens")
    held_out("c", sums, targets, teacher_part="top 64 tokens")
    rows = compare(arms("a", "b"), info=said.append)
    assert [(row.metric, row.arm) for row in rows] == [(metric, arm) for metric in ("ce", "top1_agreement") for arm in "ab"]
    assert said == ["held_out forward_kl: b left out; b measured it on top 64 tokens of its teacher, a on the whole distribution"]
    assert ("forward_kl", "c") in [(row.metric, row.arm) for row in compare(arms("b", "c"))]
    for run, order in (("d", [0, 1, 2, 3]), ("e", [2, 0, 3, 1])):  # of two rows, whatever the order they stand in
        path = held_out(
            run,
            {name: np.array(x)[order] for name, x in sums.items()},
            targets[order],
            hashes=[f"h{i}" for i in order],
            places=[f"p{i}" for i in order],
        )
        rows = [json.loads(line) for line in (path / "held_out.jsonl").read_text().splitlines()]
        lines = [json.dumps(row | ({"teacher_part": "top 64 tokens"} if row["hash"] in ("h0", "h1") else {})) + "\n" for row in rows]
        (path / "held_out.jsonl").write_text("".join(lines))
    assert ("forward_kl", "e") in [(row.metric, row.arm) for row in compare(arms("d", "e"))]


def test_a_metric_under_the_name_of_an_older_version_is_left_out_with_a_note(home):
    said, targets = [], np.array([5, 9, 20, 11])
    held_out("a", {"ce": targets, "top1_agreement": targets * 0.5}, targets)
    held_out("b", {"ce": targets, "agreement": targets * 0.5}, targets)
    rows = compare(arms("a", "b"), info=said.append)
    assert {row.metric for row in rows} == {"ce"}
    assert [line for line in said if "agreement: left out for b" in line and "rename it to top1_agreement" in line]


def test_holm_s_family_is_the_arms_of_one_task_and_metric(home):
    for i, share in enumerate((0.5, 0.53, 0.5, 0.56, 0.52)):
        evaluated(f"r{i}", {"acc": answers(500, share, i), "acc_norm": answers(500, share, 50 + i)})
    rows = compare(arms(*(f"r{i}" for i in range(5))), baseline="r2")
    assert [row.arm for row in rows] == [f"r{i}" for i in range(5)] * 2 and rows[2].verdict == "baseline"
    for block in (rows[:5], rows[5:]):
        others = sorted((row for row in block if row.arm != "r2"), key=lambda row: row.p)
        largest = 0.0
        for i, row in enumerate(others):
            largest = max(largest, min(1, (4 - i) * row.p))
            assert row.p_adjusted == pytest.approx(largest) and row.family == 4
            assert (row.verdict != "no difference shown") == (largest < 0.05) and (row.better is not None) == (largest < 0.05)
            assert row.within_one_stderr == (abs(row.difference) <= row.difference_stderr)
    assert any(row.p < 0.05 <= row.p_adjusted for row in rows if row.p is not None)  # the correction decides somewhere


def test_better_follows_the_metric_s_direction(home):
    high, low = np.r_[np.ones(30), np.zeros(10)], np.r_[np.zeros(30), np.ones(10)]
    evaluated("a", {"acc": low, "loss": low})
    evaluated("b", {"acc": high, "loss": high})
    found = {row.metric: (row.verdict, row.better) for row in compare(arms("a", "b")) if row.arm == "b"}
    assert found == {"acc": ("higher", True), "loss": ("higher", False)}


def test_a_difference_that_the_seeds_do_not_bear_out_says_so(home):
    for s, shift in ((1, 0.0), (2, 0.14)):
        evaluated(f"a{s}", {"acc": answers(900, 0.5, s)}, seed=s)
        evaluated(f"b{s}", {"acc": answers(900, 0.5 + shift, 10 + s)}, seed=s)
    _, row = compare(arms("a=a1,a2", "b=b1,b2"))
    assert (row.verdict, row.better, words(row)) == ("higher", True, "higher, better, not over seeds")


def test_a_document_that_occurs_twice_is_paired_with_its_own_copy(home):
    hashes = ["x", "y", "x", "z"]
    evaluated("a", {"score": [0.1, 0.2, 0.3, 0.4]}, hashes=hashes)
    evaluated("b", {"score": [0.2, 0.2, 0.4, 0.6]}, hashes=hashes)
    _, row = compare(arms("a", "b"))
    assert row.difference == pytest.approx(0.1) and row.difference_stderr == pytest.approx(np.std([0.1, 0, 0.1, 0.2], ddof=1) / 2)
    assert row.test == "permutation, exact" and row.p == 0.25


def test_all_equal_arms_and_a_single_item(home):
    for run in "ab":
        evaluated(run, {"acc": [1, 0, 1, 1]})
        evaluated(run, {"acc": [1]}, task="one")
    rows = {(row.task, row.arm): row for row in compare(arms("a", "b"))}
    same, one = rows["quiz", "b"], rows["one", "b"]
    assert (same.difference, same.p, same.interval, same.verdict) == (0, 1, (0, 0), "no difference shown")
    assert (one.n, one.stderr, one.difference_stderr, one.interval, one.p) == (1, None, None, None, 1)
    assert as_numbers(list(rows.values()))["rows"] and "unknown" in as_text(list(rows.values()))


def test_no_larger_difference_than_there_can_be_is_named(home):
    for run, y in (("a", [1, 0] * 4), ("b", [0, 1] * 4)):
        evaluated(run, {"acc": y})
    _, row = compare(arms("a", "b"))
    assert row.test == "McNemar" and row.difference_stderr > 0.36 and row.detectable == 1
