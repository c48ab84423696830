"""A stage of a sweep or a pipeline that writes a model's answers, a cache of the teacher on them, and arms that train on both."""

import json

import pytest

from llmkd.commands.pipeline import run_pipeline
from llmkd.commands.roll import roll
from llmkd.commands.roll_stage import refuse_unrollable, roll_stage
from llmkd.commands.sweep import run_sweep
from llmkd.config.loader import load_recipe
from llmkd.errors import UserError
from llmkd.rollouts.answer_file import read_about
from llmkd.rollouts.sampling import Sampling

WRITES = {"on_policy": {"share": 1, "samples": 2, "max_new_tokens": 5, "temperature": 0.7, "top_k": 20}}


def rows(path) -> list:
    return sorted(json.loads(line)["input_ids"] for line in path.read_text().splitlines())


def test_a_stage_writes_the_answers_that_a_cache_and_an_arm_read(world, sweep, tmp_path):
    """One file: a start is tuned, answers, the teacher scores the answers, and a student learns from the scores. A second time nothing is written."""
    start = {"student.model": "{output_dir}/stages/start/adapter", "teacher.dtype": "float32"}
    tokens = {"path": "{output_dir}/stages/rolled/train.jsonl", "format": "tokens"}
    read = start | {"data.train": tokens, "teacher.cache": {"path": "{output_dir}/stages/cached", "kind": "topk", "k": 8}}
    stages = {
        "start": {"recipe": "base.yaml", "set": {"train.max_steps": 2, "loss.kd_ratio": 0.5}},
        "rolled": {"roll": "base.yaml", "set": start | WRITES | {"data.train.limit": 3, "seed": 3}},
        "cached": {"cache": "base.yaml", "set": read},
    }
    spec = {"stages": stages, "arms": {"rolled": {}}, "grid": {}, "set": read | {"loss.kd_ratio": 1}}
    folder = run_sweep(sweep(**spec), {"train.max_steps": 2}, False)
    written, about = folder / "stages/rolled/train.jsonl", read_about(folder / "stages/rolled/train.jsonl")
    expected = load_recipe(
        folder / "stages/start/recipe.yaml", {"data.train.limit": 3, "student.model": str(folder / "stages/start/adapter")}
    )
    roll("student", expected, tmp_path / "by_hand.jsonl", Sampling(0.7, 5, 3, top_k=20), samples=2)
    assert len(rows(written)) == 6 and rows(written) == rows(tmp_path / "by_hand.jsonl") and about["complete"]
    assert [one["model"] for one in about["learnt_from"]] == [expected.teacher.model], "the stage's run, whose teacher training is told of"
    losses = [json.loads(line) for line in (folder / "arms/rolled/metrics.jsonl").read_text().splitlines()]
    assert any(one.get("kd") for one in losses)
    before = written.stat().st_mtime_ns
    run_sweep(sweep(**spec), {"train.max_steps": 2}, True)
    assert written.stat().st_mtime_ns == before and len(rows(written)) == 6


def test_a_teacher_writes_where_the_recipe_says_so(make_recipe, tmp_path):
    says = {"on_policy.share": 0, "on_policy.teacher_writes": 1, "on_policy.max_new_tokens": 4, "data.train.limit": 2}
    recipe = make_recipe(output_dir=str(tmp_path / "rolled"), **says)
    refuse_unrollable(recipe)
    roll_stage(recipe)
    assert read_about(tmp_path / "rolled/train.jsonl")["writer"]["part"] == "teacher"


def test_a_pipeline_has_such_stages_too(world, sweep, tmp_path):
    sweep()  # writes base.yaml
    tokens = {"path": "{output_dir}/rolled/train.jsonl", "format": "tokens"}
    stages = {
        "rolled": {"roll": "base.yaml", "set": WRITES | {"data.train.limit": 3}},
        "kd": {
            "recipe": "base.yaml",
            "set": {"data.train": tokens, "train.max_steps": 1, "data.validation": {"path": str(world / "held.jsonl")}},
        },
    }
    spec = {"output_dir": str(tmp_path / "p"), "stages": stages, "teacher": "kd", "students": ["kd"]}
    (tmp_path / "pipeline.yaml").write_text(json.dumps(spec))
    run_pipeline(str(tmp_path / "pipeline.yaml"), {}, False)
    assert len(rows(tmp_path / "p/rolled/train.jsonl")) == 6
    (tmp_path / "pipeline.yaml").write_text(json.dumps(spec | {"teacher": "rolled"}))
    with pytest.raises(UserError, match="teacher: found rolled, which is a stage of llmkd roll, and trains no model"):
        run_pipeline(str(tmp_path / "pipeline.yaml"), {}, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "stage rolled: on_policy: not given; give it"),
        ({"on_policy": {"share": 0.5}}, r"found 0.5 and 0.0, and one of them writes all answers of a stage; set one to 1"),
        ({"on_policy": {"share": 1, "teacher_writes": 1}}, "on_policy"),
        (
            {"on_policy": {"share": 1, "engine": {"server": "http://x:1"}}},
            "on_policy.engine: given, and a stage writes with the model in this process",
        ),
        (
            {"on_policy": {"share": 1, "long_horizon": {"teacher_mix": 0.2}}, "loss.divergence": "reverse_kl"},
            "teacher_mix: given, .* set it to 0",
        ),
    ],
)
def test_mistakes_are_refused_before_a_stage_runs(sweep, tmp_path, changes, message):
    stages = {"start": {"recipe": "base.yaml"}, "rolled": {"roll": "base.yaml", "set": changes}}
    with pytest.raises(UserError, match=message):
        run_sweep(sweep(stages=stages, output_dir=str(tmp_path / "no")), {}, False)
    assert not (tmp_path / "no").exists()
