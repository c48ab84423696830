"""Comparing runs: metrics recomputed from the files, refusals that name what differs, and words that follow the statistics."""

import hashlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from llmkd_eval.comparison import compare as comparison
from llmkd_eval.comparison.compare import compare
from llmkd_eval.comparison.compare_text import as_markdown, as_numbers, as_text, words
from llmkd_eval.comparison.item_results import parse_arms

from llmkd import cli
from llmkd.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluated(run: str, metrics: dict[str, list[float]], task: str = "quiz", order=None, hashes=None, seed=None, **record) -> Path:
    """A run's folder with one task's record and items, in the order given."""
    folder = Path(run) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    n = len(next(iter(metrics.values())))
    hashes = hashes or [f"h{i}" for i in range(n)]
    order = range(n) if order is None else order
    lines = [json.dumps({"id": k, "hash": hashes[i], "metrics": {m: float(x[i]) for m, x in metrics.items()}}) for k, i in enumerate(order)]
    (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    values = {m: {"value": float(np.mean(x)), "stderr": 0.1, "higher_is_better": m != "loss"} for m, x in metrics.items()}
    whole = {"task": task, "version": 1.0, "harness": "0.4.13", "fewshot": 0, "limit": None, "n": n, "metrics": values, "truncated": 0}
    (folder / f"{task}.json").write_text(json.dumps(whole | record))
    if seed is not None:
        (Path(run) / "recipe.yaml").write_text(f"seed: {seed}\n")
    return Path(run)


def held_out(run: str, sums: dict[str, list[float]], targets: list[int], places=None, hashes=None) -> Path:
    Path(run).mkdir(parents=True, exist_ok=True)
    lines = []
    for i, count in enumerate(targets):
        item = {"id": i, "hash": hashes[i] if hashes else f"h{i}", "place": places[i] if places else f"t.jsonl:{i}", "targets": int(count)}
        lines.append(json.dumps(item | {"sums": {name: float(x[i]) for name, x in sums.items()}}))
    (Path(run) / "held_out.jsonl").write_text("\n".join(lines) + "\n")
    return Path(run)


def of_items(run: str, metric: str, task: str = "quiz") -> dict[str, float]:
    """Read back without the code under test."""
    lines = (Path(run) / "eval" / f"{task}.jsonl").read_text().splitlines()
    return {item["hash"]: item["metrics"][metric] for item in map(json.loads, lines)}


def answers(n: int, share: float, seed: int) -> np.ndarray:
    hard = np.random.default_rng(0).random(n)
    return (hard + 0.15 * np.random.default_rng(seed).standard_normal(n) < share).astype(float)


def arms(*runs: str) -> dict[str, list[Path]]:
    return parse_arms(list(runs))


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


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"version": 2.0}, "with version 1.0, b with 2.0"),
        ({"fewshot": 5}, "with fewshot 0, b with 5"),
        ({"harness": "0.4.9"}, "with harness 0.4.13, b with 0.4.9"),
        ({"limit": 10}, "with limit none, b with 10"),
        ({"hashes": [f"h{i}" for i in range(29)] + ["other"]}, "a has 30 items, b 30, and 29 are the same"),
        ({"hashes": [f"h{i}" for i in range(29)] + ["h0"]}, "a has 30 items, b 30, and 29 are the same"),
        ({"metrics": {"acc": answers(20, 0.5, 2)}}, "a has 30 items, b 20, and 20 are the same"),
        ({"n": 31}, "holds 30 items, its record says 31"),
    ],
)
def test_runs_that_were_measured_otherwise_are_refused(home, change, found):
    evaluated("a", {"acc": answers(30, 0.5, 1)})
    evaluated("b", **({"metrics": {"acc": answers(30, 0.5, 2)}} | change))
    with pytest.raises(UserError) as info:
        compare(arms("a", "b"))
    assert found in str(info.value) and len(info.value.problems) == 1 and "\n" not in str(info.value)


def test_common_items_are_compared_when_that_is_asked_for(home):
    said, x = [], answers(30, 0.5, 1)
    evaluated("a", {"acc": x})
    evaluated("b", {"acc": 1 - x[:20]}, hashes=[f"h{i}" for i in range(5, 25)], limit=20)
    base, row = compare(arms("a", "b"), common=True, info=said.append)
    assert row.n == base.n == 20 and base.value == x[5:25].mean() and "on the 20 items" in said[0]
    assert row.difference == pytest.approx((1 - x[:20]).mean() - x[5:25].mean())
    evaluated("c", {"acc": x}, hashes=[f"z{i}" for i in range(30)])
    with pytest.raises(UserError, match="no item in common"):
        compare(arms("a", "c"), common=True)


def test_a_document_that_occurs_twice_is_paired_with_its_own_copy(home):
    hashes = ["x", "y", "x", "z"]
    evaluated("a", {"score": [0.1, 0.2, 0.3, 0.4]}, hashes=hashes)
    evaluated("b", {"score": [0.2, 0.2, 0.4, 0.6]}, hashes=hashes)
    _, row = compare(arms("a", "b"))
    assert row.difference == pytest.approx(0.1) and row.difference_stderr == pytest.approx(np.std([0.1, 0, 0.1, 0.2], ddof=1) / 2)
    assert row.test == "permutation, exact" and row.p == 0.25


def test_different_targets_in_the_same_examples_are_refused(home):
    held_out("a", {"ce": [1, 2]}, [3, 4])
    held_out("b", {"ce": [1, 2]}, [3, 5])
    with pytest.raises(UserError, match="count different targets"):
        compare(arms("a", "b"))


def test_a_figure_that_is_no_mean_over_items_is_left_out(home):
    said = []
    for run in "ab":
        evaluated(run, {"f1": [1, 0, 1, 0], "acc": [1, 0, 1, 0]})
        path = Path(run, "eval", "quiz.json")
        record = json.loads(path.read_text())
        record["metrics"] |= {"f1": {"value": 0.66}, "perplexity": {"value": 9.0}}
        path.write_text(json.dumps(record))
    assert {row.metric for row in compare(arms("a", "b"), info=said.append)} == {"acc"}
    assert [line.split(":")[0] for line in said] == ["quiz f1", "quiz perplexity"] * 2


def test_tasks_that_not_all_have_are_left_out_or_refused_by_name(home):
    said = []
    for run, tasks in (("a", ("quiz", "exam")), ("b", ("quiz",))):
        for task in tasks:
            evaluated(run, {"acc": [1, 0, 1]}, task=task)
    Path("b/eval/exam.jsonl").write_text("{}\n")  # cut off before its record was written
    assert {row.task for row in compare(arms("a", "b"), info=said.append)} == {"quiz"}
    assert said == ["exam: left out; b has no results of it"]
    for wanted, found in (
        ({"tasks": ["exam"]}, "--tasks exam: b has no eval/exam.json"),
        ({"metrics": ["f1"]}, "--metrics f1: no task has it"),
    ):
        with pytest.raises(UserError, match=found):
            compare(arms("a", "b"), **wanted)
    Path("c").mkdir()
    with pytest.raises(UserError, match="no task in common; a: exam, quiz; c: none"):
        compare(arms("a", "c"))


def test_texts_may_hold_what_python_takes_for_the_end_of_a_line(home):
    evaluated("a", {"acc": [1, 0, 1]})
    path = evaluated("b", {"acc": [1, 0, 1]}) / "eval" / "quiz.jsonl"
    path.write_text("".join(line[:-1] + ', "text": "x\u2028y\x85z"}\n' for line in path.read_text().splitlines()), encoding="utf-8")
    assert compare(arms("a", "b"))[1].difference == 0


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{nonsense", "quiz.jsonl:2: not a JSON object"),
        ('{"id": 1, "metrics": {"acc": 1.0}}', "quiz.jsonl:2: not an item; expected hash and metrics"),
        ('{"id": 1, "hash": "h1", "metrics": {"acc": NaN}}', "quiz.jsonl:2: acc is nan"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(home, line, found):
    evaluated("a", {"acc": [1, 0, 1]})
    path = evaluated("b", {"acc": [1, 0, 1]}) / "eval" / "quiz.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[2]]))
    with pytest.raises(UserError, match=found):
        compare(arms("a", "b"))


def test_edited_items_are_refused(home):
    """Of the same size, so that only the hash in the record tells."""
    for run in "ab":
        path = evaluated(run, {"acc": [1, 0, 1]}) / "eval/quiz"
        path = path.with_suffix(".jsonl")
        record = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(record | {"items_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))
    assert len(compare(arms("a", "b"))) == 2
    path.write_text(path.read_text().replace('"acc": 0.0', '"acc": 1.0'))
    with pytest.raises(UserError, match="quiz.jsonl: is not what quiz.json was made of; evaluate b again"):
        compare(arms("a", "b"))


def test_lost_items_are_missed_and_other_json_is_no_task(home):
    for run in "ab":
        record = evaluated(run, {"acc": [1, 0, 1]}) / "eval/quiz.json"
        (record.parent / "all.json").write_text("[1]")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"items_sha256": "0" * 64}))
    record.with_suffix(".jsonl").unlink()
    with pytest.raises(UserError, match=r"b/eval/quiz.jsonl: cannot be read \(No such file or directory\); evaluate its run again"):
        compare(arms("a", "b"))


def test_names_and_folders_of_a_sweep(home):
    for seed in (1, 2):
        Path(f"arms/kd=0.5,lr=0.1,seed={seed}").mkdir(parents=True)
    one, two = (f"arms/kd=0.5,lr=0.1,seed={seed}" for seed in (1, 2))
    assert parse_arms([one]) == {"kd=0.5,lr=0.1,seed=1": [Path(one)]}
    assert parse_arms([f"kd={one},{two}", f"x={two}"]) == {"kd": [Path(one), Path(two)], "x": [Path(two)]}
    assert parse_arms([f"kd=0.5,lr=0.1={one},{two}"]) == {"kd=0.5,lr=0.1": [Path(one), Path(two)]}
    for given, found in (
        (["nowhere"], "nowhere: no such folder"),
        (["kd=nowhere"], "kd=nowhere: no such folder"),
        ([f"={one}"], "no such folder"),
        ([f"a={one}", f"a={two}"], "a second configuration called a"),
        ([f"a={one},{one}"], "names a run twice"),
    ):
        with pytest.raises(UserError, match=found):
            parse_arms(given)


def test_all_equal_arms_and_a_single_item(home):
    for run in "ab":
        evaluated(run, {"acc": [1, 0, 1, 1]})
        evaluated(run, {"acc": [1]}, task="one")
    rows = {(row.task, row.arm): row for row in compare(arms("a", "b"))}
    same, one = rows["quiz", "b"], rows["one", "b"]
    assert (same.difference, same.p, same.interval, same.verdict) == (0, 1, (0, 0), "no difference shown")
    assert (one.n, one.stderr, one.difference_stderr, one.interval, one.p) == (1, None, None, None, 1)
    assert as_numbers(list(rows.values()))["rows"] and "unknown" in as_text(list(rows.values()))


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


def test_no_larger_difference_than_there_can_be_is_named(home):
    for run, y in (("a", [1, 0] * 4), ("b", [0, 1] * 4)):
        evaluated(run, {"acc": y})
    _, row = compare(arms("a", "b"))
    assert row.test == "McNemar" and row.difference_stderr > 0.36 and row.detectable == 1


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


def test_the_conditions_are_those_of_the_record():
    assert {"version", "harness", "fewshot", "limit"} <= set(comparison.CONDITIONS)
