"""`llmkd make` as a command, and as a stage of a sweep or a pipeline, whose later runs train on what it wrote."""

import json

import pytest

from llmkd.cli import main
from llmkd.commands.make import make_of_stage
from llmkd.commands.pipeline import stage_makes, stage_recipes
from llmkd.commands.plan_runs import runs_of
from llmkd.commands.recipes import copy_recipe
from llmkd.commands.sweep import run_sweep
from llmkd.config import loader
from llmkd.config.sweep import Stage
from llmkd.errors import UserError
from tests.conftest import plain_recipe
from tests.kit.making import lines


@pytest.fixture
def files(world, tmp_path):
    """Files of a make, of a recipe and of what runs both: the writer is the world's adapter."""
    writer = {"model": str(world / "adapter"), "dtype": "float32", "max_new_tokens": 6}
    seeds = {"path": str(world / "train.jsonl"), "limit": 6}
    make = {"output_dir": str(tmp_path / "made"), "writer": writer, "seeds": seeds, "stages": [{"do": "answer"}]}
    recipe = plain_recipe(world, tmp_path / "unused")
    recipe["optim"]["warmup_steps"] = 1
    for name, content in (("make", make), ("recipe", recipe)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))

    def write(name: str, **content) -> str:
        (tmp_path / f"{name}.yaml").write_text(json.dumps(content))
        return str(tmp_path / f"{name}.yaml")

    return write


def test_a_sweep_makes_its_data_and_trains_on_them(files, tmp_path, capsys):
    answered = {"data.train": {"path": "{output_dir}/stages/data/train.jsonl", "format": "chat"}, "train.batch_size": 6}
    stage = {"make": "make.yaml", "set": {"seed": 3, "writer.max_new_tokens": 5}}
    config = files(
        "sweep", output_dir=str(tmp_path / "sweep"), recipe="recipe.yaml", stages={"data": stage}, arms={"seqkd": answered, "data": {}}
    )
    planned = runs_of(config, {"train.max_steps": 1})
    assumed = {name: one.found.data.assumed for one in planned.runs for name in one.arms}
    assert (
        planned.made == {"data": "make"} and "is made by the stage data, which has not run yet" in assumed["seqkd"] and not assumed["data"]
    )
    folder = run_sweep(config, {"train.max_steps": 1}, False)
    assert len(lines(folder / "stages/data/train.jsonl")) == 6
    said = capsys.readouterr().err
    assert "train: 6 examples" in said and "columns that are not read" not in said
    before = (folder / "stages/data/answers.jsonl").read_bytes()
    run_sweep(config, {"train.max_steps": 1}, True)
    assert (folder / "stages/data/answers.jsonl").read_bytes() == before and "0 new answers of 6" in capsys.readouterr().err


def test_a_pipeline_checks_the_files_of_all_its_stages_first_and_gives_each_its_settings(files, tmp_path):
    given = {"teacher": "first", "students": ["first"], "output_dir": str(tmp_path / "pipe")}
    source = {"path": "{output_dir}/data/train.jsonl", "format": "chat"}
    recipe = {"recipe": "recipe.yaml", "set": {"data.train": source, "data.validation": source}}
    config = files("pipe", stages={"data": {"make": "make.yaml"}, "first": recipe}, **given)
    pipeline, overrides = loader.load_pipeline(config), {"optim.lr": 1e-3, "seed": 4, "writer.max_new_tokens": 9}
    (made,), (run,) = (of(pipeline, tmp_path / "pipe.yaml", overrides).values() for of in (stage_makes, stage_recipes))
    assert (made.make.output_dir, made.make.seed, made.make.writer.max_new_tokens) == (str(tmp_path / "pipe/data"), 4, 9)
    assert (run.data.train.path, run.seed, run.optim.lr) == (str(tmp_path / "pipe/data/train.jsonl"), 4, 1e-3)
    for stages, message in (
        ({"first": recipe, "data": {"make": "no.yaml"}}, "stages.data.make: there is no file"),
        ({"first": recipe, "data": {}}, "stages.data: a stage has a recipe, or in its place a file of llmkd make"),
        ({"first": {"make": "make.yaml"}}, "teacher: found first, which is a stage of llmkd make, and trains no model"),
    ):
        with pytest.raises(UserError, match=message):
            loader.load_pipeline(files("pipe", stages=stages, **given))
    bad = loader.load_pipeline(
        files("pipe", stages={"first": recipe, "data": {"make": "make.yaml", "set": {"writer.modle": "x"}}}, **given)
    )
    with pytest.raises(UserError, match="stage data: .*did you mean writer.model"):
        stage_makes(bad, tmp_path / "pipe.yaml", {})


def test_paths_of_stages_in_a_studys_changes_are_relative_to_the_study(tmp_path):
    """As all others there; those of the file of make to that, and of the command line to the working folder."""
    (tmp_path / "recipes").mkdir()
    stages = [{"do": "evolve", "prompt": "own.txt"}, {"do": "keep", "refusals": True}]
    (tmp_path / "recipes" / "make.yaml").write_text(
        json.dumps({"output_dir": "o", "writer": {"model": "m"}, "seeds": {"path": "s.jsonl"}, "stages": stages})
    )

    def loaded(changes: dict, overrides: dict | None = None):
        stage = Stage(make=str(tmp_path / "recipes" / "make.yaml"), set=changes)
        return [one.settings for one in make_of_stage(stage, tmp_path / "study.yaml", "runs/s", "runs/s/d", overrides or {}, False).stages]

    evolve = {"do": "evolve", "prompt": "p.txt"}
    assert loaded({})[0].prompt == str(tmp_path / "recipes/own.txt")
    assert loaded({"stages": [evolve]})[0].prompt == loaded({"stages.0.prompt": "p.txt"})[0].prompt == str(tmp_path / "p.txt")
    assert loaded({"stages.0": evolve})[0].prompt == str(tmp_path / "p.txt")
    rows = {"do": "keep", "contamination": {"path": "{output_dir}/stages/a/train.jsonl"}}
    assert loaded({"stages": [rows]})[0].contamination.path == "runs/s/stages/a/train.jsonl"
    assert loaded({"stages.1.contamination": {"path": "t.jsonl"}})[1].contamination.path == str(tmp_path / "t.jsonl")
    assert loaded({}, {"stages": [evolve]})[0].prompt == loaded({}, {"stages.0.prompt": "p.txt"})[0].prompt == "p.txt"
    with pytest.raises(UserError, match="names no stage"):
        loaded({"stages": ["evolve"]})
    with pytest.raises(UserError, match="NO_SUCH is not set"):
        loaded({"stages": [{"do": "evolve", "prompt": "$NO_SUCH/p.txt"}]})


def test_a_copied_recipe_begins_with_the_sweep_that_makes_its_data(tmp_path):
    assert copy_recipe("evolve", tmp_path)[1] == f"llmkd train --config {tmp_path}/evolve/study.yaml"


def test_the_command_tells_a_file_of_stages_from_a_recipe(files, tmp_path, capsys):
    config = str(tmp_path / "make.yaml")
    assert main(["make", "--config", config, "--dry_run", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["file"], found["stages"][0]["asks"], found["stages"][0]["tokens"]) == (None, 6, 36) and not (tmp_path / "made").exists()
    for words, message in (
        (["train", "--config", config], "is a file of llmkd make, and no recipe; run it by llmkd make"),
        (["make", "--config", str(tmp_path / "recipe.yaml")], "is a recipe, and holds no list of stages"),
        (["make", "--config", config, "--resume"], "--resume: make has no such option"),
        (["make", "--config", config, "--writer.model", "./no"], "writer.model: there is no folder"),
        (["make", "--config", config, "--limit_token", "5"], "did you mean limit_tokens?"),
    ):
        assert main(words) == 2 and message in capsys.readouterr().err, words
