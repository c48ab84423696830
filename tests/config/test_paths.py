"""What a recipe reads is relative to its file, what it writes to the working folder, whatever both are; the hub's names stay."""

import os
import shutil
from pathlib import Path

import pytest

from llmkd import cli
from llmkd.commands.sweep import SweepRecipes
from llmkd.config import loader
from llmkd.config.fields import as_tuple
from llmkd.config.paths import place_changes
from llmkd.config.sweep import expand
from llmkd.errors import UserError

REPO = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder beside a folder of recipes, and a function that writes a recipe there and loads it."""
    work, recipes = tmp_path / "work", tmp_path / "recipes"
    for folder in (work / "runs/t/adapter", recipes / "models/base", recipes / "sub"):
        folder.mkdir(parents=True)
    (recipes / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(work)

    def go(text: str = "", overrides=None, name="../recipes/r.yaml", **options):
        base = {"output_dir": "runs/x", "student": "{model: models/base}", "data": "{train: {path: rows.jsonl}}"}
        given = {line.partition(":")[0] for line in text.splitlines()}
        rows = [f"{key}: {value}" for key, value in base.items() if key not in given]
        Path(name).write_text("\n".join([*rows, *text.splitlines()]) + "\n")
        return loader.load_recipe(name, overrides, **options)

    return go


def problem(call, *arguments, **options) -> str:
    with pytest.raises(UserError) as info:
        call(*arguments, **options)
    (found,) = info.value.problems
    return found


def test_what_is_read_is_beside_the_recipe_and_what_is_written_in_the_working_folder(place):
    recipe = place("teacher: {model: models/base, cache: {path: runs/cache}}")
    assert recipe.student.model == recipe.teacher.model == "../recipes/models/base"
    assert recipe.data.train.path == "../recipes/rows.jsonl"
    assert (recipe.output_dir, recipe.teacher.cache.path) == ("runs/x", "runs/cache")


def test_an_absolute_config_gives_absolute_paths(place, tmp_path):
    recipe = place("teacher: [{model: models/base}, {model: sub/../models/base}]", name=str(tmp_path / "recipes/r.yaml"))
    assert {recipe.student.model, *(one.model for one in recipe.teacher)} == {str(tmp_path / "recipes/models/base")}


def test_the_working_folder_by_name(place):
    assert place('teacher: {model: "{cwd}/runs/t/adapter"}').teacher.model == "runs/t/adapter"
    assert place('output_dir: "{cwd}/runs/y"').output_dir == "runs/y"


def test_overrides_are_relative_to_the_working_folder(place, tmp_path):
    assert place(overrides={"teacher.model": "runs/t/adapter"}).teacher.model == "runs/t/adapter"
    assert place(overrides={"data.train": {"path": "x.jsonl"}}).data.train.path == "x.jsonl"
    assert place(overrides={"student.model": str(tmp_path / "recipes/models/base")}).student.model == str(tmp_path / "recipes/models/base")


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M"])
def test_names_of_the_hub_stay(place, name):
    recipe = place(f"student: {{model: {name}, tokenizer: builtin:skills}}\ndata: {{train: {{path: {name}}}}}", check_inputs=True)
    assert (recipe.student.model, recipe.data.train.path, recipe.student.tokenizer) == (name, name, "builtin:skills")


def test_what_looks_like_a_name_of_the_hub_is_a_folder_where_there_is_one(place):
    Path("../recipes/gpt2").mkdir()
    assert place("student: {model: gpt2}").student.model == "../recipes/gpt2"
    assert place("student: {model: models/missing}").student.model == "../recipes/models/missing"  # beside models/base


def test_what_exists_only_in_the_working_folder_is_refused(place, tmp_path):
    found = problem(place, "teacher: {model: runs/t/adapter}")
    assert found == (
        f"../recipes/r.yaml:4: teacher.model: found runs/t/adapter, which exists only relative to the working folder {tmp_path / 'work'}; "
        'paths in a recipe are relative to its file: write ../work/runs/t/adapter, or "{cwd}/runs/t/adapter"'
    )
    assert os.path.samefile(place("teacher: {model: ../work/runs/t/adapter}").teacher.model, "runs/t/adapter")


def test_home_and_variables_are_expanded(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ROWS", str(tmp_path / "recipes"))
    recipe = place('output_dir: ~/runs/x\ndata: {train: {path: "${ROWS}/rows.jsonl"}, cache_dir: $ROWS/cache}')
    assert recipe.output_dir == str(tmp_path / "home/runs/x")
    assert recipe.data.train.path == str(tmp_path / "recipes/rows.jsonl") and recipe.data.cache_dir == str(tmp_path / "recipes/cache")
    assert place(overrides={"data.train.path": "$ROWS/rows.jsonl"}).data.train.path == str(tmp_path / "recipes/rows.jsonl")


def test_a_variable_has_a_default_as_in_a_shell(place, tmp_path, monkeypatch):
    monkeypatch.delenv("SMALL", raising=False)
    written = "student: {model: '${SMALL:-owner/small}'}\ndata: {train: {path: '${ROWS:-./rows.jsonl}'}}"
    assert place(written).student.model == "owner/small"  # of the hub
    assert os.path.samefile(place(written).data.train.path, tmp_path / "recipes/rows.jsonl")  # a default is relative to the recipe
    monkeypatch.setenv("SMALL", "")
    assert place(written).student.model == "owner/small"
    monkeypatch.setenv("SMALL", str(tmp_path / "recipes/models/base"))
    assert place(written).student.model == str(tmp_path / "recipes/models/base")


@pytest.mark.parametrize("path", ["output_dir", "student.model", "data.train.path", "data.cache_dir"])
def test_a_home_that_is_not_known_is_refused(place, path):
    text = problem(place, overrides={path: "~no-such-user/x"})
    assert text == f"--{path}: found ~no-such-user/x, and no home folder of that name is known; set HOME, or write the path out"


def test_a_variable_that_is_not_set_is_named_with_its_line(place, monkeypatch):
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    found = problem(place, 'data: {train: {path: "$NO_SUCH_FOLDER/rows.jsonl"}}')
    assert found == (
        "../recipes/r.yaml:3: data.train.path: found $NO_SUCH_FOLDER/rows.jsonl, and the environment variable NO_SUCH_FOLDER is not set; "
        "set it, or write the path out"
    )
    assert problem(place, overrides={"output_dir": "${NO_SUCH_FOLDER}"}).startswith(
        "--output_dir: found ${NO_SUCH_FOLDER}, and the environ"
    )


@pytest.mark.parametrize("text, word", [("{cdw}/x", "{cdw}"), ("{output_dir}/x", "{output_dir}"), ("x/{cwd}", "{cwd}")])
def test_other_placeholders_are_refused(place, text, word):
    assert f"where {word} has no meaning; a path may begin with {{cwd}}" in problem(place, f'teacher: {{model: "{text}"}}')


def test_missing_inputs_are_named_with_line_and_absolute_path(place, tmp_path):
    with pytest.raises(UserError) as info:
        place("student: {model: models/bose}\ndata: {train: {path: row.jsonl}}\nteacher: {model: ./t}", check_inputs=True)
    folder = tmp_path / "recipes"
    assert list(info.value.problems) == [
        f"../recipes/r.yaml:2: student.model: there is no folder {folder}/models/bose; did you mean base?",
        f"../recipes/r.yaml:4: teacher.model: there is no folder {folder}/t; check the path",
        f"../recipes/r.yaml:3: data.train.path: there is no file or folder {folder}/row.jsonl; did you mean rows.jsonl?",
    ]
    assert place("teacher: {model: ./t}\nloss: {kd_ratio: 0}", check_inputs=True)  # no teacher is loaded


def test_a_link_that_leads_nowhere_is_called_so(place, tmp_path):
    for name, to in (("nowhere", "gone"), ("loop", "loop")):
        (tmp_path / "recipes" / name).symlink_to(to)
        found = problem(place, f"teacher: {{model: ./{name}}}", check_inputs=True)
        assert found == (
            f"../recipes/r.yaml:4: teacher.model: {tmp_path}/recipes/{name} is a link that leads nowhere; fix it, or name what it should lead to"
        )


def test_an_earlier_stage_that_was_not_run_is_named(place, tmp_path):
    place("output_dir: runs/first", name="../recipes/1_teacher.yaml")
    text = 'teacher: {model: "{cwd}/runs/first/adapter"}'
    found = problem(place, text, check_inputs=True)
    assert found == (
        f"../recipes/r.yaml:4: teacher.model: there is no folder {tmp_path}/work/runs/first/adapter; ../recipes/1_teacher.yaml writes it, so run "
        "that first: llmkd train --config ../recipes/1_teacher.yaml"
    )
    assert place(text, check_inputs=True, written_later="runs/first").teacher.model == "runs/first/adapter"


def test_the_command_line_says_it_before_anything_is_loaded(place, capsys):
    place("student: {model: models/bose}")
    assert cli.main(["train", "--config", "../recipes/r.yaml"]) == 2
    assert "r.yaml:3: student.model: there is no folder" in capsys.readouterr().err and not Path("runs/x").exists()


def test_a_written_recipe_reads_the_same_files_from_anywhere(place, tmp_path, monkeypatch):
    recipe = place('teacher: {model: "{cwd}/runs/t/adapter"}\noptim: {name: adamw}')
    out = Path("runs/x")
    out.mkdir()
    (out / "recipe.yaml").write_text(loader.dump(recipe, out))
    (tmp_path / "again.yaml").write_text(loader.dump(recipe))
    assert loader.load_recipe(out / "recipe.yaml") == loader.load_recipe(tmp_path / "again.yaml") == recipe
    assert loader.read_placed(out / "recipe.yaml")["student"]["model"] == recipe.student.model
    monkeypatch.chdir(tmp_path)
    moved = loader.load_recipe("work/runs/x/recipe.yaml")
    assert (moved.student.model, moved.teacher.model) == ("recipes/models/base", "work/runs/t/adapter")
    same = {key: value for key, value in loader.comparable(moved).items() if key != "output_dir"}
    monkeypatch.chdir(tmp_path / "work")
    assert {key: value for key, value in loader.comparable(recipe).items() if key != "output_dir"} == same


def test_the_changes_of_a_pipeline_are_relative_to_its_file(place):
    changes = {"teacher.model": "models/base", "data.train": {"path": "rows.jsonl"}, "student.model": "{output_dir}/t/adapter", "seed": 3}
    assert place_changes(changes, "../recipes", "runs/p") == {
        "teacher.model": "../recipes/models/base",
        "data.train": {"path": "../recipes/rows.jsonl"},
        "student.model": "runs/p/t/adapter",
        "seed": 3,
    }
    assert changes["data.train"] == {"path": "rows.jsonl"}
    several = place_changes({"teacher": [{"model": "gpt2"}, {"model": "models/base"}], "teacher.0.base": "models/base"}, "../recipes")
    assert several["teacher"] == [{"model": "gpt2"}, {"model": "../recipes/models/base"}] and several["teacher.0.base"].startswith("..")
    assert problem(place_changes, {"teacher.model": "runs/t/adapter"}, "../recipes").startswith(
        "--teacher.model: found runs/t/adapter, which"
    )


def test_a_sweep_on_the_command_line_is_relative_to_the_working_folder(place, tmp_path):
    Path("../recipes/r.yaml").touch()
    Path("../recipes/s.yaml").write_text("output_dir: runs/s\nrecipe: r.yaml\ngrid: {optim.lr: [1, 2]}\neval: {tasks_dir: models}\n")
    sweep = loader.load_sweep("../recipes/s.yaml", {"teacher.model": "runs/t/adapter", "student.model": "gpt2"})
    assert (sweep.recipe, sweep.eval.tasks_dir, sweep.output_dir) == ("../recipes/r.yaml", "../recipes/models", "runs/s")
    assert sweep.set == {"teacher.model": str(tmp_path / "work/runs/t/adapter"), "student.model": "gpt2"}


@pytest.mark.parametrize("name", ["1_teacher", "2_distill", "3_from_cache", "4_context", "5_mixture"])
def test_a_copy_of_the_quickstart_reads_its_own_files_from_any_folder(tmp_path, monkeypatch, name):
    shutil.copytree(REPO / "recipes/quickstart", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    recipe = loader.load_recipe(f"mine/{name}.yaml")
    for model in (recipe.student.model, *(one.model for one in as_tuple(recipe.teacher))):
        assert model.startswith("runs/quickstart/") or Path(model).is_dir() and model.startswith("mine/base/")


@pytest.mark.parametrize("overrides", [{"data.train.path": "{cwd}/runs/rows.jsonl"}, {"data.train": {"path": "{cwd}/runs/rows.jsonl"}}])
def test_the_working_folder_by_name_in_a_sweeps_override(place, overrides):
    Path("runs/rows.jsonl").write_text("{}\n")
    assert {Path(one.data.train.path).resolve() for one in arms(place, overrides)} == {Path("runs/rows.jsonl").resolve()}


def test_a_sweeps_override_that_is_a_name_of_the_hub_is_no_folder_beside_the_sweep(place, tmp_path):
    (tmp_path / "recipes/gpt2").mkdir()
    assert {one.student.model for one in arms(place, {"student.model": "gpt2"})} == {"gpt2"}


def test_folders_may_have_braces_and_dollar_signs_in_their_names(place, tmp_path, monkeypatch):
    odd = tmp_path / "a{b} $c"
    shutil.copytree(tmp_path / "recipes", odd / "recipes")
    monkeypatch.chdir(odd)
    (odd / "rows.jsonl").write_text("{}\n")
    for overrides in ({}, {"data.train.path": "rows.jsonl"}):
        found = arms(place, overrides, str(odd / "recipes/r.yaml"))
        assert {Path(one.data.train.path) for one in found} == {odd / "recipes/rows.jsonl" if not overrides else odd / "rows.jsonl"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text(loader.dump(found[0], tmp_path / "run"))
    assert loader.comparable(loader.load_recipe(tmp_path / "run/recipe.yaml")) == loader.comparable(found[0])


def test_a_folder_beside_a_written_recipe_is_not_taken_for_a_hub_id_when_it_is_gone(place, tmp_path):
    recipe = place()
    (tmp_path / "recipes/again.yaml").write_text(loader.dump(recipe, tmp_path / "recipes"))
    shutil.rmtree(tmp_path / "recipes/models")
    again = loader.load_recipe("../recipes/again.yaml")
    assert again == recipe
    assert "there is no folder" in problem(loader.load_recipe, "../recipes/again.yaml", check_inputs=True)


@pytest.mark.parametrize("start", ["~", "$DATA", "{cwd}"])
def test_what_begins_a_path_keeps_its_meaning_where_a_folder_has_that_name(place, tmp_path, monkeypatch, start):
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("DATA", str(home))
    for folder in (home, tmp_path / "recipes" / start, Path()):
        folder.mkdir(exist_ok=True)
        (folder / "rows.jsonl").write_text("{}\n")
    found = place(f'data: {{train: {{path: "{start}/rows.jsonl"}}}}').data.train.path
    assert Path(found).resolve() == (Path() if start == "{cwd}" else home).resolve() / "rows.jsonl"


def arms(place, overrides: dict, recipe: str = "../recipes/r.yaml") -> list:
    """The recipes of a sweep that lies beside that recipe."""
    place(name=recipe)
    file = Path(recipe).with_name("s.yaml")
    file.write_text("output_dir: runs/s\nrecipe: r.yaml\ngrid: {optim.lr: [0.1, 0.2]}\n")
    sweep = loader.load_sweep(file, overrides)
    return list(SweepRecipes(sweep, file, {spec.name: spec for spec in expand(sweep)}).recipes().values())
