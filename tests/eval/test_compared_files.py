"""Runs whose files do not match are refused, or left out of a comparison with a note that names what differs."""

import hashlib
import json
from pathlib import Path

import pytest
from llmkd_eval.comparison import compare as comparison
from llmkd_eval.comparison.compare import compare
from llmkd_eval.comparison.item_results import parse_arms

from llmkd.errors import UserError
from tests.kit.comparison import answers, arms, evaluated, held_out


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


def test_the_conditions_are_those_of_the_record():
    assert {"version", "harness", "fewshot", "limit"} <= set(comparison.CONDITIONS)
