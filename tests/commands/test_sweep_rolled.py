"""A stage of a sweep or a pipeline that writes a model's answers, a cache of the teacher on them, and arms that train on both."""

import json
from pathlib import Path

import pytest

from llmkd.commands.doctor import doctor
from llmkd.commands.pipeline import run_pipeline
from llmkd.commands.plan_runs import runs_of
from llmkd.commands.roll import roll
from llmkd.commands.roll_stage import refuse_unrollable, roll_stage
from llmkd.commands.sweep import SweepRecipes, run_sweep
from llmkd.config.loader import load_recipe, load_sweep
from llmkd.errors import Stopped, UserError
from llmkd.rollouts.answer_file import read_about
from llmkd.rollouts.sampling import Sampling

WRITES = {"on_policy": {"share": 1, "samples": 2, "max_new_tokens": 5, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02}}


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
    roll("student", expected, tmp_path / "by_hand.jsonl", Sampling(0.7, 5, 3, 0.9, 20, 0.02), samples=2)
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


def pipeline_with_rows(world, folder: Path, **more) -> str:
    """A pipeline whose student trains on what its start writes. Expects base.yaml in the folder."""
    rows = {"path": "{output_dir}/rolled/train.jsonl", "format": "tokens"}
    kd = {"data.train": rows, "train.max_steps": 1, "data.validation": {"path": str(world / "held.jsonl")}}
    stages = {"rolled": {"roll": "base.yaml", "set": WRITES | {"data.train.limit": 3}}, "kd": {"recipe": "base.yaml", "set": kd}}
    spec = {"output_dir": str(folder / "p"), "stages": stages, "teacher": "kd", "students": ["kd"]}
    (folder / "pipeline.yaml").write_text(json.dumps(spec | more))
    return str(folder / "pipeline.yaml")


def test_a_pipeline_has_such_stages_too(world, sweep, tmp_path):
    """The doctor examines its student once the rows are there."""
    sweep()  # writes base.yaml
    path = pipeline_with_rows(world, tmp_path)
    (found,) = doctor(path, {})
    assert (found.status, found.stage) == ("not asked", "kd") and "is written by the stage rolled" in found.found
    run_pipeline(path, {}, False)
    assert len(rows(tmp_path / "p/rolled/train.jsonl")) == 6
    assert len(doctor(path, {}, 4)) > 1
    with pytest.raises(UserError, match="teacher: found rolled, which is a stage of llmkd roll, and trains no model"):
        run_pipeline(pipeline_with_rows(world, tmp_path, teacher="rolled"), {}, False)


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
        ({"on_policy": {"share": 1, "replay": {}}}, "on_policy.replay: given, and it is about training alone"),
        ({"on_policy": {"share": {"from": 0, "to": 1}}}, "found a schedule and 0.0"),
        (WRITES | {"student": {"architecture": {"model_type": "llama"}}}, "stage rolled: .*new random weights"),
        (WRITES | {"student.layers": {"count": 1, "by": "block_influence"}}, "which layers the student keeps is chosen when it trains"),
    ],
)
def test_mistakes_are_refused_before_a_stage_runs(sweep, tmp_path, changes, message):
    stages = {"start": {"recipe": "base.yaml"}, "rolled": {"roll": "base.yaml", "set": changes}}
    with pytest.raises(UserError, match=message):
        run_sweep(sweep(stages=stages, output_dir=str(tmp_path / "no")), {}, False)
    assert not (tmp_path / "no").exists()


def test_a_stage_that_has_begun_keeps_its_settings(sweep, tmp_path):
    """Other answers under runs that have trained on the first ones would be compared with them. Nothing is written or trained."""
    stages = {"rolled": {"roll": "base.yaml", "set": WRITES | {"data.train.limit": 2}}}
    spec = {"stages": stages, "arms": {"kd": {}}, "grid": {}}
    folder = run_sweep(sweep(**spec), {"train.max_steps": 1}, False)
    before = (folder / "stages/rolled/train.jsonl").read_bytes()
    for setting, found, now in (("on_policy.samples", 2, 3), ("on_policy.temperature", 0.7, 0.5), ("data.train.limit", 2, 3)):
        stages["rolled"]["set"] = WRITES | {"data.train.limit": 2, setting: now}
        with pytest.raises(UserError, match=rf"stage rolled: {setting}: {found} in the run that is to be resumed and {now} now"):
            run_sweep(sweep(**spec), {"train.max_steps": 1}, True)
    assert (folder / "stages/rolled/train.jsonl").read_bytes() == before


def test_several_processes_use_what_one_has_written(sweep, tmp_path, monkeypatch):
    stages = {"rolled": {"roll": "base.yaml", "set": WRITES | {"data.train.limit": 2}}}
    path = sweep(stages=stages, arms={"kd": {}}, grid={})
    (recipe,) = SweepRecipes(load_sweep(path), Path(path), {}).rolled().values()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match="train.jsonl is not complete, and a stage writes answers in one process; run this without accelerate launch"
    ):
        refuse_unrollable(recipe)
    monkeypatch.delenv("WORLD_SIZE")
    roll_stage(recipe)
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse_unrollable(recipe)
    roll_stage(recipe)


def test_a_stop_says_how_the_sweep_or_pipeline_goes_on(world, sweep, tmp_path, monkeypatch):
    def stopped(*_):
        raise Stopped("stopped by a signal, and the same command goes on")

    monkeypatch.setattr("llmkd.commands.sweep.roll_stage", stopped)
    monkeypatch.setattr("llmkd.commands.pipeline.roll_stage", stopped)
    with pytest.raises(Stopped, match="stopped by a signal in stage rolled; what it has written is kept; continue with --resume"):
        run_sweep(sweep(stages={"rolled": {"roll": "base.yaml", "set": WRITES}}, arms={"kd": {}}, grid={}), {}, False)
    with pytest.raises(Stopped, match="in stage rolled; .* continue with --resume"):
        run_pipeline(pipeline_with_rows(world, tmp_path), {}, False)


def test_a_plan_refuses_a_stage_that_cannot_roll(sweep):
    with pytest.raises(UserError, match="stage rolled: on_policy: not given"):
        runs_of(str(sweep(stages={"rolled": {"roll": "base.yaml"}}, arms={"kd": {}}, grid={})), {})


def test_a_student_in_a_folder_that_is_no_run_of_this_version_rolls(make_recipe, world, tmp_path, caplog):
    """Its teachers are not known, which is said."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old/recipe.yaml").write_text("of: another program")
    (tmp_path / "old/model").symlink_to(world / "student")
    recipe = make_recipe(student__model=str(tmp_path / "old/model"), data__train__limit=1)
    roll("student", recipe, tmp_path / "r.jsonl", Sampling(0.0, 2))
    assert "its recipe cannot be read" in caplog.text and read_about(tmp_path / "r.jsonl")["learnt_from"] == []


def test_a_stage_of_another_kind_of_file_is_refused(sweep):
    with pytest.raises(UserError, match="stages.one: a stage has a recipe, or .*; keep one"):
        load_sweep(sweep(stages={"one": {"roll": "base.yaml", "recipe": "base.yaml"}}))
    for key, wanted in (("roll", "a recipe"), ("cache", "a recipe"), ("make", "a file of llmkd make")):
        path = sweep(stages={"one": {key: "sweep.yaml"}})
        with pytest.raises(UserError, match=f"stages.one.{key}: .*sweep.yaml is a sweep, expected {wanted}; name one"):
            load_sweep(path)
