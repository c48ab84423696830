"""Groups of tasks in comparisons and reports: means, standard errors, differences and intervals against loops over their items."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from llmkd_eval.comparison import stats
from llmkd_eval.comparison.compare import compare
from llmkd_eval.comparison.compare_text import as_markdown, as_numbers, as_text
from llmkd_eval.harness.record_files import write_group

from llmkd import cli
from llmkd.errors import UserError
from tests.kit.comparison import arms, evaluated
from tests.kit.sweep_report import TWO, checked, written

SIZES = {"birds": 30, "few": 8, "many": 90}


def group(run: str, weighting: str = "items", name: str = "all", tasks=tuple(SIZES), metric: str = "acc") -> None:
    write_group(Path(run) / "eval", {"group": name, "tasks": list(tasks), "means": {metric: weighting}})


def quizzes(run: str, share: float, weighting: str, seed: int, whole: bool = False) -> dict[str, list[float]]:
    """Results of three tasks of unequal difficulty, and their group; items by task."""
    rng, out = random.Random(seed), {}
    for i, (task, n) in enumerate(SIZES.items()):
        x = [rng.random() ** (1 + i) for _ in range(n)]
        out[task] = [float(value < share) for value in x] if whole else [value + share for value in x]
        evaluated(run, {"acc": out[task]}, task, hashes=[f"{task}{j}" for j in range(n)])
    group(run, weighting)
    return out


def mean_and_variance(items: dict[str, list[float]], weighting: str) -> tuple[float, float]:
    """sum_t w_t mean_t and sum_t w_t² s_t² / n_t: the mean of independent tasks' means and its variance, written out."""
    total, mean, variance = sum(map(len, items.values())), 0.0, 0.0
    for x in items.values():
        w, m = (len(x) / total if weighting == "items" else 1 / len(items)), math.fsum(x) / len(x)
        mean += w * m
        variance += w**2 * math.fsum((value - m) ** 2 for value in x) / (len(x) - 1) / len(x)
    return mean, variance


@pytest.mark.parametrize("weighting", ["items", "tasks"])
def test_a_groups_mean_and_its_paired_difference_are_those_of_independent_tasks(home, weighting):
    a, b = (quizzes(run, share, weighting, seed) for run, share, seed in (("a", 0.0, 1), ("b", 0.03, 2)))
    base, row = compare(arms("a", "b"), tasks=["all"])
    for found, items in ((base, a), (row, b)):
        mean, variance = mean_and_variance(items, weighting)
        assert (found.value, found.stderr) == pytest.approx((mean, math.sqrt(variance)), rel=1e-12)
        assert (found.task, found.n, found.tasks, found.weighting) == ("all", 128, tuple(SIZES), weighting)
    d = {task: [y - x for x, y in zip(a[task], b[task], strict=True)] for task in SIZES}
    mean, variance = mean_and_variance(d, weighting)
    assert (row.difference, row.difference_stderr) == pytest.approx((mean, math.sqrt(variance)), rel=1e-12)
    v = []
    for task, x in d.items():
        v.append((SIZES[task] / 128 if weighting == "items" else 1 / 3) ** 2 * np.var(x, ddof=1) / SIZES[task])
    df = sum(v) ** 2 / sum(part**2 / (n - 1) for part, n in zip(v, SIZES.values(), strict=True))
    half = stats.t_quantile(0.95, int(df)) * math.sqrt(variance)
    assert row.interval == pytest.approx((mean - half, mean + half), abs=0.1 * half)
    signs, total = np.random.default_rng(9).choice([-1, 1], size=(4000, 128)), 128
    weights = {task: 1 / total if weighting == "items" else 1 / (3 * n) for task, n in SIZES.items()}
    by_item = np.concatenate([weights[task] * np.array(x) for task, x in d.items()])
    brute = (np.abs(signs @ by_item) >= abs(by_item.sum()) - 1e-12).mean()
    assert row.test == "permutation" and 0.001 < brute < 0.999 and row.p == pytest.approx(brute, abs=0.04)


def test_answers_of_a_group_by_items_have_mcnemars_test_over_all_items(home):
    a, b = (quizzes(run, share, "items", seed, whole=True) for run, share, seed in (("a", 0.4, 1), ("b", 0.5, 2)))
    _, row = compare(arms("a", "b"), tasks=["all"])
    pairs = [(x, y) for task in SIZES for x, y in zip(a[task], b[task], strict=True)]
    wins, losses = sum(y > x for x, y in pairs), sum(y < x for x, y in pairs)
    p = min(1, 2 * sum(math.comb(wins + losses, k) for k in range(min(wins, losses) + 1)) / 2 ** (wins + losses))
    assert row.test == "McNemar" and row.p == pytest.approx(p)


def test_seeds_of_a_group_are_averaged_and_have_their_interval(home):
    found = {run: quizzes(run, 0.1 * (run[0] == "b"), "tasks", i) for i, run in enumerate(("a1", "a2", "b2", "b1"))}
    for run in found:
        Path(run, "recipe.yaml").write_text(f"seed: {run[1]}\n")
    base, row = compare(arms("a=a1,a2", "b=b2,b1"), tasks=["all"])
    means = {run: mean_and_variance(items, "tasks")[0] for run, items in found.items()}
    assert base.value == pytest.approx((means["a1"] + means["a2"]) / 2) and row.seed_spread == pytest.approx(
        abs(means["b1"] - means["b2"]) / math.sqrt(2)
    )
    over = [means["b1"] - means["a1"], means["b2"] - means["a2"]]
    assert row.seeds_matched and np.mean(row.seed_interval) == pytest.approx(np.mean(over))


def test_strata_are_drawn_by_themselves_and_one_is_none():
    rng = np.random.default_rng(3)
    a, b = rng.gamma(2, 1, 12), rng.gamma(2, 1, 12)
    one, none = stats.paired_difference(a, b, strata=np.zeros(12, int)), stats.paired_difference(a, b)
    assert (one.value, one.stderr, *one.interval) == pytest.approx((none.value, none.stderr, *none.interval), rel=1e-12)
    apart, strata = np.repeat([0.0, 50.0], 6), np.repeat([0, 1], 6)  # far from one another: drawn together the spread is 14
    found = stats.paired_difference(a + apart, b, strata=strata)
    assert found.stderr < 1 and found.interval[1] - found.interval[0] < 5
    one_item = stats.paired_difference(a[:4], b[:4], strata=np.array([0, 0, 0, 1]))
    assert math.isnan(one_item.stderr) and all(map(math.isnan, one_item.interval))
    same = stats.paired_difference(a + 1, a, strata=strata)
    assert same.interval == pytest.approx((1, 1)) and same.stderr == pytest.approx(0, abs=1e-12)


def test_small_tasks_widen_the_interval_by_their_degrees_of_freedom():
    """Two tasks of four items: t of Satterthwaite's degrees of freedom on the true standard error, where the bootstrap is near normal."""
    d, strata = np.array([0.0, 1, 2, 3, 5, 6, 7, 8]), np.repeat([0, 1], 4)
    found = stats.paired_difference(d, np.zeros(8), strata=strata, resamples=40_000)
    v = (5 / 3) / 4 / 4  # (1/2)² s² / n of each task
    assert found.stderr == pytest.approx(math.sqrt(2 * v))
    df = (2 * v) ** 2 / (2 * v**2 / 3)
    assert df == pytest.approx(6) and found.interval[1] - found.value == pytest.approx(2.4469 * found.stderr, rel=0.09)
    sure = stats.paired_difference(np.concatenate([d, np.zeros(92)]), np.zeros(100), strata=np.append(strata, np.full(92, 2)))
    assert sure.interval[1] - sure.value == pytest.approx(2.4469 * sure.stderr, rel=0.09)  # what never differs adds no degree of freedom


def test_text_numbers_and_order(home, capsys):
    for run, seed in (("a", 1), ("b", 2)):
        quizzes(run, 0.0, "tasks", seed)
    rows = compare(arms("a", "b"))
    assert [row.task for row in rows[::2]] == ["birds", "few", "many", "all"]
    assert "all acc: mean of 3 tasks, each alike, 128 items, higher is better; permutation\n" in as_text(rows)
    assert "**all acc: mean of 3 tasks, each alike, 128 items" in as_markdown(rows)
    assert [(row["tasks"], row["weighting"]) for row in as_numbers(rows)["rows"][::6]] == [(None, None), (tuple(SIZES), "tasks")]
    assert cli.main(["compare", "a", "b", "--tasks", "all", "--json", "-"]) == 0
    (base, row) = json.loads(capsys.readouterr().out)["rows"]
    assert base["tasks"] == list(SIZES) and row["difference"] == pytest.approx(rows[-1].difference)


def test_results_without_the_group_are_read_and_named(home):
    for run, seed in (("a", 1), ("b", 2), ("old", 3)):
        quizzes(run, 0.0, "items", seed)
    (home / "old/eval/all.group.json").unlink()
    notes = []
    assert {row.task for row in compare(arms("a", "old"), info=notes.append)} == set(SIZES)
    fix = "llmkd eval old --tasks all records it, and measures nothing twice"
    assert notes == [f"all: left out; old has no results of this group; {fix}"]
    with pytest.raises(UserError, match=f"--tasks all: old has no eval/all.group.json; it has birds, few, many; {fix}"):
        compare(arms("a", "old"), tasks=["all"])
    (home / "b/eval/few.json").unlink()
    (home / "b/eval/few.jsonl").unlink()
    notes.clear()
    assert {row.task for row in compare(arms("a", "b"), info=notes.append)} == {"birds", "many"}
    assert "all: left out; b has no results of its task few" in notes
    with pytest.raises(UserError, match="--tasks all: b has no results of its task few; evaluate it again"):
        compare(arms("a", "b"), tasks=["all"])


def test_other_groups_and_damaged_ones_are_refused(home):
    for run, seed in (("a", 1), ("b", 2)):
        quizzes(run, 0.0, "items", seed)
    group("b", "tasks")
    with pytest.raises(UserError, match="all: a was evaluated with other means of this group than b"):
        compare(arms("a", "b"))
    group("b", "items", tasks=["birds", "many"])
    with pytest.raises(UserError, match="all: a was evaluated with other tasks of this group than b"):
        compare(arms("a", "b"))
    path = home / "b/eval/all.group.json"
    for content in ('{"group": "all"}', '{"tasks": ["few"], "means": {"acc": "size"}}', path.read_text().replace("birds", "birdz"), "{"):
        path.write_text(content)
        with pytest.raises(UserError, match=f"{'b/eval/all.group.json'}: is damaged"):
            compare(arms("a", "b"))


def test_a_metric_that_a_task_lacks_has_no_mean(home):
    for run, seed in (("a", 1), ("b", 2)):
        quizzes(run, 0.0, "items", seed)
        write_group(home / run / "eval", {"group": "all", "tasks": list(SIZES), "means": {"acc": "items", "f1": "items"}})
        stated = json.loads((home / run / "eval/few.json").read_text())
        (home / run / "eval/few.json").write_text(json.dumps(stated | {"metrics": {}}))
    notes = []
    assert "all" not in {row.task for row in compare(arms("a", "b"), info=notes.append)}
    assert "all acc: left out for a; few has no such mean of one number an item" in notes
    for run in "ab":
        write_group(home / run / "eval", {"group": "none", "tasks": ["few"], "means": {}})
    compare(arms("a", "b"), info=notes.append)
    assert notes.count("none: left out; its tasks lack the metrics that it is the mean of") == 1
    assert "all f1: left out for b; birds, few, many has no such mean of one number an item" in notes


def test_a_report_shows_the_groups_mean(made):
    folder = made(TWO, tasks=("quiz", "test"))
    for arm in (folder / "arms").iterdir():
        group(str(arm), "tasks", tasks=("quiz", "test"))
    html, text = written(folder)
    checked(html)
    assert "all acc: mean of 2 tasks, each alike, 400 items" in html and "all acc: mean of 2 tasks, each alike, 400 items" in text
    assert "all acc: `kd` is the best" in text
    shutil.rmtree(folder / "arms/kd/eval")
    assert "all: not measured in every run of kd" in written(folder)[1]
