"""The arms that the file of a sweep has: their names, seeds, stages to start from, and mistakes."""

import json
import shlex
from pathlib import Path

import pytest
import yaml

from llmkd.commands.sweep import group_arms, run_sweep
from llmkd.config import loader
from llmkd.config.sweep import expand
from llmkd.errors import UserError
from tests.conftest import plain_recipe


def test_seeds_make_groups_of_their_own_and_names(sweep):
    file = loader.load_sweep(sweep(seeds=[1, 2], baseline="kd_ratio-0_lr-0.01"))
    specs = expand(file)
    assert len(specs) == 12 and specs[0].name == "kd_ratio-0_lr-0.01_seed-1" and specs[0].arm == "kd_ratio-0_lr-0.01"
    from llmkd.commands.sweep import SweepRecipes

    recipes = SweepRecipes(file, Path(file.recipe), {s.name: s for s in specs})
    recipes.config = Path(sweep())
    groups = group_arms(recipes.recipes())
    assert sorted(len(g.arms) for g in groups) == [6, 6] and all(len({n[-1] for n in g.arms}) == 1 for g in groups)
    four = group_arms(recipes.recipes(), students_per_teacher=4)
    assert [len(g.arms) for g in four] == [3, 3, 3, 3] and all(sum("kd_ratio-0_" in n for n in g.arms) == 1 for g in four)
    one = group_arms(recipes.recipes(), students_per_teacher=1)
    assert len(one) == 12 and {g.why for g in one} == {"students_per_teacher: 1"}
    assert [g.arms[0][-1] for g in one] == ["1"] * 6 + ["2"] * 6  # what is stopped early has compared all arms of a seed


def test_an_arm_whose_base_cannot_be_found_is_named(make_recipe, world):
    recipes = {"good": make_recipe(), "bad": make_recipe(**{"student.model": str(world / "nothing")})}
    with pytest.raises(UserError, match="^arm bad: student.model: "):
        group_arms(recipes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"grid": {}}, "grid: not given; give values to combine"),
        ({"grid": {"loss.kd_ratio": 0.5}}, "grid.loss.kd_ratio: found 0.5, expected a list of values"),
        ({"grid": {"loss.kd_ratio": [0.5, 0.5]}}, "has a value twice"),
        (
            {"grid": {"loss.kd_ratoi": [0.5, 1]}},
            "arm kd_ratoi-0.5: --loss.kd_ratoi: unknown setting; did you mean loss.kd_ratio? (and in 1 more arm)",
        ),
        ({"grid": {"loss.kd_ratio": [0.5, 2]}}, "arm kd_ratio-2: --loss.kd_ratio: found 2, expected a number >= 0, <= 1"),
        ({"baseline": "kd_ratio-9"}, "baseline: found kd_ratio-9, which is no arm; the arms are kd_ratio-0_lr-0.01"),
        ({"baseline": "kd_ratio=1,lr=0.01"}, "baseline: found kd_ratio=1,lr=0.01, which is now kd_ratio-1_lr-0.01"),
        ({"seeds": [1, 1]}, "seeds: has a seed twice"),
        ({"seeds": [1], "grid": {"seed": [1, 2]}}, "seeds: given together with seed in grid"),
        ({"arms": {"a/b": {}}}, "a name has letters, digits"),
        ({"arms": {"a=b,c": {}}}, "a name has letters, digits"),
        (
            {"grid": {"student.model": ["a", "a_dtype-b"], "student.dtype": ["c", "b_dtype-c"]}},
            "two runs would be called model-a_dtype-b_dtype-c; give the arms other names under arms:",
        ),
        ({"arms": {"kd_ratio-1_lr-0.01": {}}}, "is also the name of an arm of the grid"),
        ({"arms": {"a": {"seed": 3}}, "seeds": [1]}, "has a seed of its own, but seeds are given for all arms"),
        ({"set": {"output_dir": "x"}}, "set: changes output_dir"),
        ({"grdi": {}}, "grdi: unknown setting; did you mean grid?"),
        ({"stages": {"a": {"recipe": "nowhere.yaml"}}}, "nowhere.yaml; did you mean"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(sweep, tmp_path, changes, words):
    with pytest.raises(UserError) as info:
        run_sweep(sweep(**changes), {}, False)
    assert words in str(info.value) and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    "grid, names",
    [
        ({"teacher.model": ["runs/t1/adapter", "runs/t2/adapter"]}, ["model-runs-t1-adapter", "model-runs-t2-adapter"]),
        ({"teacher.model": ["runs/t1", "runs/t2"]}, ["model-t1", "model-t2"]),
        ({"optim.lr": [1e-4, 1.0000001e-4]}, ["lr-0.0001", "lr-0.00010000001"]),
        ({"data.x": [-1, 1]}, ["x--1", "x-1"]),
        ({"data.x": ["é", "è"]}, ["x-none-1", "x-none-2"]),
        ({"seed": [1, 2]}, ["recipe_seed-1", "recipe_seed-2"]),
    ],
)
def test_names_of_a_grids_arms_tell_them_apart(sweep, grid, names):
    assert [spec.name for spec in expand(loader.load_sweep(sweep(grid=grid)))] == names
    for name in names:  # as it stands, in a shell and in YAML
        assert shlex.quote(name) == name and yaml.safe_load(f"{{model: arms/{name}/model}}") == {"model": f"arms/{name}/model"}


def test_an_arm_may_start_from_what_a_stage_made_with_its_seed(sweep):
    of_seed = {
        "two": {"student.model": "{output_dir}/stages/first_seed-{seed}/adapter", "student.lora": None},
        "plain": {"data.train.seed": "{seed}"},
    }
    file = loader.load_sweep(sweep(grid={}, arms=of_seed, seeds=[3, 4], baseline="plain"))
    models = {spec.name: spec.changes.get("student.model") for spec in expand(file)}
    assert models["two_seed-3"] == "{output_dir}/stages/first_seed-3/adapter" and models["two_seed-4"].endswith("first_seed-4/adapter")
    assert models["plain_seed-3"] is None
    drawn = [spec.changes["data.train.seed"] for spec in expand(file) if spec.arm == "plain"]
    assert drawn == [3, 4] and {type(one) for one in drawn} == {int}  # a setting that is a number, and no text
    alone = loader.load_sweep(sweep(grid={}, arms=of_seed, seeds=[], baseline="plain"))
    assert [spec.changes.get("student.model") for spec in expand(alone)] == [of_seed["two"]["student.model"], None]  # refused as a path


def test_a_seed_has_no_meaning_in_a_recipe(world, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    with pytest.raises(UserError, match=r"where \{seed\} has no meaning.*\{seed\} is for the arms of a sweep with seeds"):
        loader.load_recipe(path, {"student.model": "runs/a_{seed}/adapter"})
