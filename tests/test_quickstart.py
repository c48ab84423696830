"""The embedded default, in fewer steps: the distilled student is honestly the closer one."""

import json
from pathlib import Path

import pytest
import yaml

from llmkd.cli import main
from llmkd.data.reading import skills

REPO = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_distilled_student_is_the_closer_one(tmp_path, monkeypatch):
    monkeypatch.chdir(REPO)
    pipeline = yaml.safe_load((REPO / "recipes/quickstart.yaml").read_text())
    for name, stage in pipeline["stages"].items():
        stage["recipe"] = str(REPO / "recipes" / stage["recipe"])
        stage["set"] = stage.get("set", {}) | {"train.epochs": 1 if name == "teacher" else 2}
    (tmp_path / "q.yaml").write_text(json.dumps(pipeline))
    assert main(["train", "--config", str(tmp_path / "q.yaml"), "--output_dir", str(tmp_path / "q")]) == 0
    results = json.loads((tmp_path / "q/summary.json").read_text())
    assert list(results) == ["teacher", "sft_student", "kd_student"]
    for metrics in results.values():
        assert list(metrics) == ["ce", "kl_to_teacher", "top1_agreement", "accuracy", "accuracy_stderr"]
    teacher, sft, kd = results.values()
    assert kd["kl_to_teacher"] < sft["kl_to_teacher"] and kd["top1_agreement"] > sft["top1_agreement"]
    assert kd["accuracy"] > sft["accuracy"]
    assert teacher["ce"] < min(sft["ce"], kd["ce"])
    assert teacher["accuracy"] > sft["accuracy"] + 2 * sft["accuracy_stderr"]
    steps = [json.loads((tmp_path / f"q/{name}/summary.json").read_text())["steps"] for name in ("sft_student", "kd_student")]
    assert steps[0] == steps[1]


def test_the_corpus_is_the_same_every_time_and_its_splits_do_not_meet():
    asked = {split: {row["messages"][0]["content"] for row in skills.rows(split)} for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in asked.items()} == skills.SIZES["questions"]
    assert not asked["train"] & asked["validation"] and not asked["train"] & asked["test"] and not asked["validation"] & asked["test"]
    prose = " ".join(row["text"] for row in skills.rows("train", "prose"))
    assert not [q for q in asked["test"] | asked["validation"] if q in prose]
    skills.question_splits.cache_clear()
    assert asked["test"] == {row["messages"][0]["content"] for row in skills.rows("test")}


def test_shipped_weights_are_small():
    assert sum(p.stat().st_size for p in (REPO / "recipes/quickstart/base").rglob("*")) < 8e6
    assert all(row["choices"][row["answer"]] for row in skills.rows("test"))
