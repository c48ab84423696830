"""Sweeps: arms side by side end as they would alone, to the last bit; groups, stages, and what is measured."""

import json
from pathlib import Path

import pytest

from llmkd.commands.sweep import group_arms, run_sweep
from llmkd.config import loader
from llmkd.config.sweep import expand
from llmkd.files import read_sealed
from llmkd.training.run import run
from llmkd.training.validate import Evaluator
from tests.conftest import distance, weights
from tests.kit.processes import train_on_two
from tests.kit.sweeps import HELD, alone, state


def grad_norms(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["grad_norm"] for record in records if "grad_norm" in record]


@pytest.mark.slow
def test_every_arm_ends_as_it_would_alone_to_the_last_bit(world, sweep, tmp_path):
    """Dropout, validation, clipping, other ranks, targets, an adapter on the head, a copy of it, another divergence, a given adapter."""
    given = tmp_path / "given"
    run(loader.load_recipe(sweep() and tmp_path / "base.yaml", {"output_dir": str(given), "teacher": None, "student.lora.rank": 3}))
    lora = {"rank": 4, "dropout": 0.2}
    arms = {
        "sft": {"loss.kd_ratio": 0, "teacher": None},
        "kd": {"loss.kd_ratio": 0.5},
        "states": {"loss.features": {"layers": "last"}, "loss.kd_ratio": 0},
        "jsd": {"loss.divergence": "generalized_jsd", "loss.temperature": 2.0, "optim.lr": 3e-3, "optim.max_grad_norm": 0.1},
        "list": {"student.lora": {"rank": 2, "dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}},
        "head": {"student.lora": {"rank": 4, "target_modules": ["up_proj", "lm_head"]}},
        "copy": {"student.lora": {"rank": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
        "dora": {"student.lora": {"rank": 3, "dora": True, "rslora": True}, "optim.schedule": "linear"},
        "maps": {"loss.attention": {"weight": 0.5}, "loss.kd_ratio": 0},
        "relations": {"loss.attention": {"layers": "uniform", "what": "relations", "relation_heads": 4}},
        "given": {"student.model": str(given / "adapter"), "student.lora": None},
    }
    recipe = {"student": {"model": str(world / "student"), "lora": lora}, **HELD}
    recipe["data"] = {"train": {"path": str(world / "train.jsonl")}, "validation": {"path": str(world / "held.jsonl")}, "max_length": 256}
    folder = run_sweep(sweep(recipe, grid={}, arms=arms), {"train.max_steps": 3}, False)
    found = state(folder)
    assert (
        [len(group["arms"]) for group in found["groups"]] == [9, 1, 1]
        and [group["arms"] for group in found["groups"][1:]] == [["relations"], ["copy"]]
        and {arm["status"] for arm in found["arms"].values()} == {"done"}
    )
    for name in arms:
        assert distance(weights(folder / "arms" / name), alone(folder, name, tmp_path / "alone" / name)) == 0, name
        mine, other = (
            json.loads((out / "adapter/adapter_config.json").read_text()) for out in (folder / "arms" / name, tmp_path / "alone" / name)
        )
        assert {k: sorted(v) if isinstance(v, list) else v for k, v in mine.items()} == {
            k: sorted(v) if isinstance(v, list) else v for k, v in other.items()
        }
        together, apart = (json.loads((out / "summary.json").read_text()) for out in (folder / "arms" / name, tmp_path / "alone" / name))
        assert together["train"] == apart["train"] and together["validation"]["ce"] == apart["validation"]["ce"]
        assert together["before"]["ce"] == apart["before"]["ce"], name
        assert grad_norms(folder / "arms" / name) == grad_norms(tmp_path / "alone" / name) != [], name
    names = [list(weights(folder / "arms" / name)) for name in ("sft", "kd")]
    assert distance(weights(folder / "arms/sft"), weights(folder / "arms/kd")) > 1e-4 and not [n for n in names[0] if "arm" in n]
    assert "forward_kl" in json.loads((folder / "arms/sft/summary.json").read_text())["validation"]  # the others' teacher spoke anyway


def test_held_out_rows_are_kept_one_by_one_and_sum_to_the_figures(world, sweep, tmp_path, monkeypatch):
    """Before the first step both students are their base, and are measured as one; after the last they are two."""
    recipe = {"data": {"train": {"path": str(world / "train.jsonl")}, "validation_fraction": 0.2, "max_length": 256}}
    asked, validate = [], Evaluator.validate
    monkeypatch.setattr(Evaluator, "validate", lambda self, students, *rest: asked.append(len(students)) or validate(self, students, *rest))
    folder = run_sweep(sweep(recipe, grid={"loss.kd_ratio": [0, 1]}), {"train.max_steps": 2, "validation.teacher_check": 0}, False)
    assert asked == [1, 2]
    alone(folder, "kd_ratio-1", tmp_path / "alone")
    before = [
        json.loads((out / "summary.json").read_text())["before"] for out in (*sorted((folder / "arms").iterdir()), tmp_path / "alone")
    ]
    assert before[0] == before[1] == before[2] and asked == [1, 2, 1, 1]
    tables = []
    for name in ("kd_ratio-0", "kd_ratio-1"):
        lines = [json.loads(line) for line in (folder / "arms" / name / "held_out.jsonl").read_text().splitlines()]
        metrics = json.loads((folder / "arms" / name / "summary.json").read_text())["validation"]
        assert sum(line["targets"] for line in lines) == metrics["targets"]
        for figure in ("ce", "forward_kl", "top1_agreement"):
            assert sum(line["sums"][figure] for line in lines) / metrics["targets"] == pytest.approx(metrics[figure], rel=1e-12)
        assert all("train.jsonl:" in line["place"] for line in lines) and len(lines) == 7
        tables.append([(line["id"], line["hash"], line["place"], line["targets"]) for line in lines])
    assert tables[0] == tables[1] and len({line[1] for line in tables[0]}) == 7


@pytest.mark.slow
def test_arms_that_cannot_share_run_alone(sweep, world, tmp_path, capsys):
    arms = {
        "a": {},
        "b": {"optim.lr": 1e-3},
        "full": {"student.method": "full", "student.lora": None},
        "fewer": {"train.batch_size": 4},
        "untuned": {"teacher.model": str(world / "teacher")},
    }
    folder = run_sweep(sweep(grid={}, arms=arms), {"train.max_steps": 1}, False)
    found = state(folder)
    assert [group["arms"] for group in found["groups"]] == [["a", "b"], ["fewer"], ["untuned"], ["full"]]
    assert found["groups"][3]["why"] == "full fine-tuning changes the base"
    assert (folder / "arms/full/model/model.safetensors").exists()
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert "2 arms side by side (a, b): about " in said and "\narm full alone (full fine-tuning changes the base): about " in said
    assert next(line for line in lines if line.startswith("in all about ")).endswith(
        " (estimates) for 5 arms; 4 passes of the teacher over the data (5 if every arm trained alone)"
    )
    assert [line for line in lines if line.startswith("[")] == [
        "[1/4] 2 arms side by side: a, b",
        "[2/4] arm fewer",
        "[3/4] arm untuned",
        "[4/4] arm full",
    ]


def test_arms_that_do_not_distil_are_measured_against_the_teacher_however_they_train(world, sweep):
    """In full, where no teacher is shared; kept by KL; and an arm that names no teacher against that of the others."""
    data = {"train": {"path": str(world / "train.jsonl")}, "validation_fraction": 0.2, "max_length": 256}
    recipe = {"data": data, "student": {"model": str(world / "student"), "method": "full"}, "checkpoint": {"best_by": "forward_kl"}}
    arms = {"plain": {"teacher": None, "loss.kd_ratio": 0, "checkpoint.best_by": "ce"}}
    folder = run_sweep(sweep(recipe, grid={"loss.kd_ratio": [0, 1]}, arms=arms), {"train.max_steps": 1}, False)
    found = {name: json.loads((folder / "arms" / name / "summary.json").read_text()) for name in ("kd_ratio-0", "kd_ratio-1", "plain")}
    assert all(one["validation"].keys() == found["kd_ratio-1"]["validation"].keys() for one in found.values())
    assert found["kd_ratio-0"]["best"] == {"by": "forward_kl", "step": 1, "value": found["kd_ratio-0"]["validation"]["forward_kl"]}
    assert found["plain"]["validation"] == found["kd_ratio-0"]["validation"] != found["kd_ratio-1"]["validation"]


def test_an_arm_that_does_not_distil_joins_those_of_its_own_teacher(world, sweep, tmp_path):
    from llmkd.commands.sweep import SweepRecipes

    path = sweep(grid={"loss.kd_ratio": [0, 1], "teacher.model": [str(world / "teacher"), str(world / "student")]})
    file = loader.load_sweep(path)
    recipes = SweepRecipes(file, Path(path), {spec.name: spec for spec in expand(file)}).recipes()
    assert [sorted(group.arms) for group in group_arms(recipes)] == [
        [f"kd_ratio-{k}_model-{name}" for k in (0, 1)] for name in ("teacher", "student")
    ]


@pytest.mark.slow
def test_two_processes_share_a_teacher_too(sweep, tmp_path):
    path = sweep(grid={"loss.kd_ratio": [0, 1.0]})
    one = run_sweep(path, {"output_dir": str(tmp_path / "one")}, False)
    done = train_on_two(["--config", path, "--output_dir", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-3000:]
    for name in state(one)["arms"]:
        assert distance(weights(one / "arms" / name), weights(tmp_path / "two/arms" / name)) < 1e-12


def test_stages_come_first_and_arms_may_start_from_what_they_leave(sweep, world, tmp_path):
    stage = {"recipe": "base.yaml", "set": {"teacher": None, "train.max_steps": 1}}
    arms = {"plain": {}, "tuned": {"student.model": "{output_dir}/stages/first/adapter", "student.lora": None}}
    folder = run_sweep(sweep(stages={"first": stage}, grid={}, arms=arms), {"train.max_steps": 1}, False)
    found = state(folder)
    assert (folder / "stages/first/adapter").is_dir() and [g["arms"] for g in found["groups"]] == [["plain", "tuned"]]
    assert distance(weights(folder / "arms/plain"), weights(folder / "arms/tuned")) > 1e-4


@pytest.mark.slow
def test_an_arm_without_a_teacher_is_measured_against_the_others_even_alone(sweep, world, tmp_path):
    data = {"train": {"path": str(world / "train.jsonl")}, "validation": {"path": str(world / "held.jsonl")}, "max_length": 256}
    arms = {"sft": {"teacher": None, "loss.kd_ratio": 0}, "kd": {}}
    together = run_sweep(sweep({"data": data}, grid={}, arms=arms), {"train.max_steps": 2}, False)
    apart = run_sweep(
        sweep({"data": data}, grid={}, arms=arms, students_per_teacher=1),
        {"train.max_steps": 2, "output_dir": str(tmp_path / "apart")},
        False,
    )
    for name in arms:
        one, other = (read_sealed(f / "arms" / name / "summary.json") for f in (together, apart))
        assert {**one, "files": None} == {**other, "files": None} and "forward_kl" in one["validation"], name
    assert "kd" not in json.loads((apart / "arms/sft/summary.json").read_text())["train"]
