"""Every YAML under recipes/ loads, says what it needs, and names the other recipes' results rightly."""

import functools
import re
from pathlib import Path

import pytest

from llmkd.config import loader
from llmkd.config.fields import as_tuple
from llmkd.config.make import dump_make, load_make
from llmkd.planning.devices import held_on_gpu

REPO = Path(__file__).parents[1]
FILES = sorted(path for path in (REPO / "recipes").rglob("*") if path.suffix in (".yaml", ".yml") and path.parent.name != "accelerate")
README = (REPO / "recipes/README.md").read_text()


KINDS = ("recipe", "pipeline", "sweep", "make")
KIND_OF = {path: loader.file_kind(path) for path in FILES}
RECIPES, PIPELINES, SWEEPS, MAKES = ([path for path, kind in KIND_OF.items() if kind == one] for one in KINDS)
OF_THE_HUB = [
    path
    for path in RECIPES
    if path.parent.name
    not in (
        "recipes",
        "quickstart",
        "ablation_small",
        "features",
        "two_stage",
        "on_policy",
        "imitation_smollm2",
        "studies",
        "books",
        "classifier",
        "sounds",
        "digits",
        "whisper",
        "views",
        "sdft_toolalpaca",  # its rows are a file
        "qwen3_32b_to_8b",  # no revision of OpenThoughts3 could be verified
    )
]
#: Those with a table of their memory in recipes/README.md. The memory of others is in docs/evidence.md.
STAGED = [
    path
    for path in OF_THE_HUB
    if path.parent.name not in ("gpt2_1.5b_to_120m", "qwen3_8b_to_1.7b", "qwen3_8b_to_0.6b_base", "qwen3_4b_qad")
]


#: One check of a file serves all tests.
load_recipe = functools.cache(loader.load_recipe)
load_sweep = functools.cache(loader.load_sweep)


def named(path: Path) -> str:
    return str(path.relative_to(REPO))


def test_there_are_some():
    assert len(RECIPES) >= 20 and len(PIPELINES) >= 2 and len(SWEEPS) >= 2


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_recipe_loads_and_survives_a_round_trip(path, tmp_path):
    recipe = load_recipe(path)
    (tmp_path / "again.yaml").write_text(loader.dump(recipe))
    assert loader.load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize("path", MAKES, ids=named)
def test_a_file_of_make_loads_and_survives_a_round_trip(path, tmp_path):
    settings = load_make(path)
    (tmp_path / "again.yaml").write_text(dump_make(settings))
    assert load_make(tmp_path / "again.yaml") == settings


@pytest.mark.parametrize("path", PIPELINES, ids=named)
def test_a_pipeline_loads_and_its_stages_refer_to_earlier_ones(path, tmp_path):
    from llmkd.commands.pipeline import stage_recipes

    pipeline = loader.load_pipeline(path)
    done = []
    for name, recipe in stage_recipes(pipeline, path, {}).items():
        (tmp_path / "again.yaml").write_text(loader.dump(recipe))
        assert loader.load_recipe(tmp_path / "again.yaml") == recipe
        if recipe.teacher:
            assert recipe.teacher.model in [f"{pipeline.output_dir}/{stage}/adapter" for stage in done]
        done.append(name)


@pytest.mark.parametrize("path", SWEEPS, ids=named)
def test_a_sweep_loads_with_every_arm(path):
    """And what its arms start from is what its stages, or the recipes next to them, leave."""
    from llmkd.commands.sweep import SweepRecipes
    from llmkd.config.sweep import expand

    sweep = load_sweep(path)
    arms = SweepRecipes(sweep, path, {spec.name: spec for spec in expand(sweep)})
    recipes, stages = arms.recipes(), arms.stages()
    assert len(recipes) == len(expand(sweep)) and sweep.baseline in {spec.arm for spec in expand(sweep)}
    left = {f"{stage.output_dir}/{'adapter' if stage.student.method == 'lora' else 'model'}" for stage in stages.values()}
    left |= {f"{load_recipe(other).output_dir}/adapter" for other in RECIPES if not stages}
    for recipe in (*recipes.values(), *stages.values()):
        for model in (recipe.student.model, *(teacher.model for teacher in as_tuple(recipe.teacher))):
            assert not (model and model.startswith("runs/")) or model in left, model


@pytest.mark.parametrize("path", FILES, ids=named)
def test_the_first_three_lines_say_what_it_needs_what_it_does_and_the_command(path):
    needs, does, run = path.read_text().splitlines()[:3]
    assert re.match(r"# Needs: \S", needs) and re.search(r"\d GB", needs) and re.search("minute|hour", needs), needs
    assert re.match(r"# Does: \S", does)
    command = run.removeprefix("# Run: ")
    starts = ("llmkd train --config ", "llmkd sweep --config ", "llmkd make --config ")  # and nothing that a wheel lacks
    assert command in [start + named(path) for start in starts], run


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_a_stage_names_the_output_of_an_earlier_one(path):
    recipe = load_recipe(path)
    of_sweeps = [(load_sweep(other).output_dir, stage) for other in SWEEPS for stage in load_sweep(other).stages]
    left = [f"{folder}/stages/{stage}/{kind}" for folder, stage in of_sweeps for kind in ("adapter", "model")]
    for model in (recipe.student.model, *(teacher.model for teacher in as_tuple(recipe.teacher))):
        if model and model.startswith("runs/"):
            earlier = [
                load_recipe(other)
                for other in RECIPES
                if (other.parent == path.parent and other < path) or other.parent.name == "quickstart"
            ]
            assert model in left + [f"{e.output_dir}/{'adapter' if e.student.method == 'lora' else 'model'}" for e in earlier]


def test_no_two_recipes_write_the_same_folder():
    folders = [load_recipe(path).output_dir for path in RECIPES] + [loader.load_pipeline(path).output_dir for path in PIPELINES]
    folders += [load_sweep(path).output_dir for path in SWEEPS]
    assert not {folder for folder in folders if folders.count(folder) > 1}


@pytest.mark.parametrize("path", OF_THE_HUB, ids=named)
def test_what_comes_from_the_hub_is_an_id_with_the_data_pinned(path):
    recipe = load_recipe(path)
    assert recipe.output_dir == f"runs/{path.parent.name}/{path.stem}"
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.student.model) or recipe.student.model.startswith(f"runs/{path.parent.name}/")
    for source in (*as_tuple(recipe.data.train), *as_tuple(recipe.data.validation)):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.path) and re.fullmatch(r"[0-9a-f]{40}", source.revision)


@pytest.mark.parametrize("path", STAGED, ids=named)
def test_the_table_of_needs_adds_up_and_is_what_the_recipe_says(path):
    stage = path.stem[0]
    row = next(line for line in README.splitlines() if line.startswith(f"| `{path.parent.name}` {stage} |"))
    *parts, total = [float(cell.strip() or 0) for cell in row.strip("|").split("|")[1:]]
    student, trains, teacher, _ = parts
    least, most = (held_on_gpu(sum(parts) * 1e9, weights * 1e9) / 1e9 for weights in (student + teacher + trains, student + teacher))
    assert least - 0.2 < total < most + 0.2, "of what trains a part is weights, which do not move; each number is rounded"
    said = re.search(r"\(estimate (\d+) GB\)", path.read_text().splitlines()[0])
    assert int(said[1]) == round(total)
    listed = next(line for line in README.splitlines() if line.startswith(f"| `{path.parent.name}` |")).split("|")
    assert listed[int(stage) + 4].strip() == f"{round(total)} GB"
