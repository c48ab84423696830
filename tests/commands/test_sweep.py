"""Sweeps: arms side by side end as they would alone, to the last bit; kills, failures, and what is refused."""

import errno
import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
import yaml

from llmkd.cli import main
from llmkd.commands.sweep import group_arms, run_sweep
from llmkd.commands.sweep_state import SweepState
from llmkd.config import loader
from llmkd.config.sweep import expand
from llmkd.errors import UserError
from llmkd.files import read_sealed
from llmkd.output.run_folder import RunFolder
from llmkd.training import loop
from llmkd.training.run import run
from tests.conftest import distance, plain_recipe, weights
from tests.kit.processes import launch, train_on_two

GRID = {"loss.kd_ratio": [0, 0.5, 1.0], "optim.lr": [1e-2, 3e-3]}


@pytest.fixture
def sweep(world, tmp_path):
    """Write a sweep of the small world's recipe, and give the path of its file."""

    def make(recipe: dict | None = None, **changes) -> str:
        base = plain_recipe(world, tmp_path / "unused") | {"data": {"train": {"path": str(world / "train.jsonl")}, "max_length": 256}}
        base["optim"]["warmup_steps"] = 1
        base |= recipe or {}
        (tmp_path / "base.yaml").write_text(json.dumps(base))
        file = {"output_dir": str(tmp_path / "sweep"), "recipe": "base.yaml", "grid": GRID} | changes
        (tmp_path / "sweep.yaml").write_text(json.dumps(file))
        return str(tmp_path / "sweep.yaml")

    return make


def state(folder: Path) -> dict:
    return read_sealed(folder / "sweep.json")


def alone(folder: Path, name: str, out: Path) -> dict[str, torch.Tensor]:
    """The arm's own recipe, run by itself elsewhere."""
    run(loader.load_recipe(folder / "arms" / name / "recipe.yaml", {"output_dir": str(out)}))
    return weights(out)


HELD = {"validation": {"every": 2, "teacher_check": 4}, "checkpoint": {"every": 2}}


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
    folder = run_sweep(sweep(recipe, grid={}, arms=arms), {}, False)
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
        assert grad_norms(folder / "arms" / name) == grad_norms(tmp_path / "alone" / name) != [], name
    names = [list(weights(folder / "arms" / name)) for name in ("sft", "kd")]
    assert distance(weights(folder / "arms/sft"), weights(folder / "arms/kd")) > 1e-4 and not [n for n in names[0] if "arm" in n]
    assert "forward_kl" in json.loads((folder / "arms/sft/summary.json").read_text())["validation"]  # the others' teacher spoke anyway


def test_held_out_rows_are_kept_one_by_one_and_sum_to_the_figures(world, sweep, tmp_path):
    recipe = {"data": {"train": {"path": str(world / "train.jsonl")}, "validation_fraction": 0.2, "max_length": 256}}
    folder = run_sweep(sweep(recipe, grid={"loss.kd_ratio": [0, 1]}), {"train.max_steps": 2}, False)
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


def test_a_failed_arm_does_not_stop_the_rest(sweep, tmp_path, monkeypatch, capsys):
    from llmkd.training.distiller import Distiller

    real = Distiller.forward

    def forward(self, batch, signal):
        loss = real(self, batch, signal)
        return type(loss)(loss.total * float("nan"), loss.rows) if self.terms["ce"].objective.temperature == 4 else loss

    monkeypatch.setattr(Distiller, "forward", forward)
    arms = {
        "bad": {"loss.temperature": 4.0},
        "good": {},
        "worse": {"student.lora.target_modules": ["qproj"]},
        "late": {"optim.warmup_steps": 99},
    }
    path = sweep(grid={}, arms=arms)
    folder = run_sweep(path, {}, False)
    found = state(folder)["arms"]
    assert [found[name]["status"] for name in arms] == ["failed", "done", "failed", "failed"]
    assert "step 1: gradient is not finite" in found["bad"]["reason"] and "student.lora.target_modules" in found["worse"]["reason"]
    assert "optim.warmup_steps: found 99" in found["late"]["reason"]
    assert not (folder / "arms/bad/adapter").exists() and (folder / "arms/bad/nonfinite.json").exists()
    monkeypatch.undo()
    assert distance(weights(folder / "arms/good"), alone(folder, "good", tmp_path / "alone")) == 0
    run_sweep(path, {}, True)  # infinities would come again; the other may have been mended
    assert "[1/1] 2 arms side by side: worse, late\n" in capsys.readouterr().err and state(folder)["arms"]["bad"]["status"] == "failed"


def sweep_until(step: int, number: int, words: list[str]) -> int:
    """`llmkd sweep` that gets a signal when the first student has moved in that step."""
    real, sent = loop.optimizer_step, []

    def move(learner, at, *rest):
        real(learner, at, *rest)
        if at == step and not sent:
            sent.append(at)
            os.kill(os.getpid(), number)

    loop.optimizer_step = move
    return main(["sweep", *words])


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(sweep, world, tmp_path):
    """Stopped by SIGKILL at one step, by SIGTERM at another, then whole: bit for bit the sweep that was not."""
    recipe = {
        **HELD,
        "data": {"train": {"path": str(world / "train.jsonl")}, "validation": {"path": str(world / "held.jsonl")}, "max_length": 256},
    }
    path = sweep(recipe, grid={"loss.kd_ratio": [0.25, 0.75]}, seeds=[0, 1])
    whole = run_sweep(path, {"output_dir": str(tmp_path / "whole")}, False)
    for number, step, code, flags in ((signal.SIGKILL, 3, -9, []), (signal.SIGTERM, 4, 75, ["--resume"])):
        done = launch(1, sweep_until, step, number, ["--config", path, *flags])
        assert done.returncode == code, done.stderr[-2000:]
    folder = run_sweep(path, {}, True)
    for name in state(whole)["arms"]:
        assert distance(weights(whole / "arms" / name), weights(folder / "arms" / name)) == 0, name
        logs = [[json.loads(x) for x in (f / "arms" / name / "metrics.jsonl").read_text().splitlines()] for f in (whole, folder)]
        assert [(r["step"], r.get("loss")) for r in logs[0]] == [(r["step"], r.get("loss")) for r in logs[1]]
    assert {arm["status"] for arm in state(folder)["arms"].values()} == {"done"}


@pytest.mark.slow
def test_arms_at_different_steps_go_on_from_one_that_all_have(sweep, world, capsys):
    import shutil

    data = {"train": {"path": str(world / "train.jsonl")}, "validation": {"path": str(world / "held.jsonl")}, "max_length": 256}
    path = sweep({**HELD, "data": data}, grid={"loss.kd_ratio": [0.25, 0.75]})
    folder = run_sweep(path, {}, False)
    whole = {name: weights(folder / "arms" / name) for name in state(folder)["arms"]}
    for name, step in (("kd_ratio-0.25", 5), ("kd_ratio-0.75", 4)):  # killed between two saves of step 5
        for gone in ("summary.json", "adapter", *(["checkpoints/step-5"] if step == 4 else [])):
            target = folder / "arms" / name / gone
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    data = state(folder)
    for arm in data["arms"].values():
        arm["status"] = "waiting"
    (folder / "sweep.json").write_text(json.dumps(data))
    capsys.readouterr()
    run_sweep(path, {}, True)
    assert "resuming after step 4 of 5" in (said := capsys.readouterr().err) and "damaged" not in said
    for name in data["arms"]:
        assert distance(whole[name], weights(folder / "arms" / name)) == 0


@pytest.mark.slow
def test_an_arm_that_joins_a_sweep_that_was_stopped_does_not_take_the_others_back(sweep, capsys):
    import shutil

    grid = {"loss.kd_ratio": [0.25, 0.75]}
    path = sweep({"checkpoint": {"every": 1}}, grid=grid)
    folder = run_sweep(path, {}, False)
    whole = {name: weights(folder / "arms" / name) for name in state(folder)["arms"]}
    data = state(folder)
    for name, arm in data["arms"].items():
        arm["status"] = "waiting"
        for gone in ("summary.json", "adapter", "checkpoints/step-5"):
            target = folder / "arms" / name / gone
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    (folder / "sweep.json").write_text(json.dumps(data))
    capsys.readouterr()
    run_sweep(sweep({"checkpoint": {"every": 1}}, grid={"loss.kd_ratio": [0.25, 0.75, 1.0]}), {}, True)
    assert "resuming after step 4 of 5" in capsys.readouterr().err
    assert {arm["status"] for arm in state(folder)["arms"].values()} == {"done"}
    for name in data["arms"]:
        assert distance(whole[name], weights(folder / "arms" / name)) == 0


def test_arms_that_the_file_has_no_more_are_left_out_of_the_groups(sweep, tmp_path):
    """Of a group of two that cost 8 seconds the one that is left has 4; a group of none is gone."""
    config = loader.load_sweep(sweep(grid={}, arms={"a": {"optim.lr": 1e-2}}))
    arm = {"status": "done", "seconds": 4.0, "group": 1, "folder": "arms/a"}
    groups = [{"arms": ["gone"], "seconds": 3.0}, {"arms": ["a", "gone too"], "seconds": 8.0}]
    (tmp_path / "sweep").mkdir()
    known = {"arms": {"a": arm, "gone": arm, "gone too": arm}, "groups": groups, "stages": {}}
    (tmp_path / "sweep/sweep.json").write_text(json.dumps(known))
    found = SweepState(tmp_path / "sweep", config, {spec.name: spec for spec in expand(config)}, resume=True).data
    assert found["groups"] == [{"arms": ["a"], "seconds": 4.0}] and found["arms"] == {"a": arm | {"group": 0}}


@pytest.mark.slow
def test_two_processes_share_a_teacher_too(sweep, tmp_path):
    path = sweep(grid={"loss.kd_ratio": [0, 1.0]})
    one = run_sweep(path, {"output_dir": str(tmp_path / "one")}, False)
    done = train_on_two(["--config", path, "--output_dir", str(tmp_path / "two")])
    assert done.returncode == 0, done.stderr[-3000:]
    for name in state(one)["arms"]:
        assert distance(weights(one / "arms" / name), weights(tmp_path / "two/arms" / name)) < 1e-12


@pytest.mark.slow
def test_a_folder_that_one_process_cannot_have_does_not_leave_the_others_waiting(sweep, tmp_path):
    """Only the first process takes folders. The arm is left out on both, and the others train, also in the group that follows."""
    import fcntl

    path = sweep(grid={}, arms={"held": {}, "free": {"optim.lr": 1e-3}, "later": {"train.batch_size": 4}})
    (tmp_path / "sweep/arms/held").mkdir(parents=True)
    (tmp_path / "sweep/stages").mkdir()
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"arms": {}, "groups": [], "stages": {}}))
    with open(tmp_path / "sweep/arms/held/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = train_on_two(["--config", path, "--train.max_steps", "2", "--resume"])
    found = state(tmp_path / "sweep")["arms"]
    assert [arm["status"] for arm in found.values()] == ["failed", "done", "done"], done.stderr[-3000:]
    assert "is in use by" in found["held"]["reason"]
    assert (tmp_path / "sweep/report.md").exists() and done.returncode != 0


def test_a_folder_that_cannot_be_had_leaves_the_other_arms_to_a_second_try(sweep, tmp_path):
    """The first try had begun the folder of an arm before it."""
    import fcntl

    path, held = sweep(grid={}, arms={"before": {}, "held": {"optim.lr": 1e-3}, "after": {"optim.lr": 2e-3}}), tmp_path / "sweep/stages"
    held.mkdir(parents=True)
    real = RunFolder.claim

    def claim(self, identity):
        if self.path.name == "held":
            self.path.mkdir(exist_ok=True, parents=True)
            with open(self.path / ".lock", "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                return real(self, identity)
        return real(self, identity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "claim", claim)
        folder = run_sweep(path, {"train.max_steps": 2}, False)
    found = state(folder)["arms"]
    assert [arm["status"] for arm in found.values()] == ["done", "failed", "done"], found
    assert "is in use by" in found["held"]["reason"]


def test_stages_come_first_and_arms_may_start_from_what_they_leave(sweep, world, tmp_path):
    stage = {"recipe": "base.yaml", "set": {"teacher": None, "train.max_steps": 1}}
    arms = {"plain": {}, "tuned": {"student.model": "{output_dir}/stages/first/adapter", "student.lora": None}}
    folder = run_sweep(sweep(stages={"first": stage}, grid={}, arms=arms), {"train.max_steps": 1}, False)
    found = state(folder)
    assert (folder / "stages/first/adapter").is_dir() and [g["arms"] for g in found["groups"]] == [["plain", "tuned"]]
    assert distance(weights(folder / "arms/plain"), weights(folder / "arms/tuned")) > 1e-4


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


def test_another_sweeps_folder_is_not_gone_on_with(sweep, tmp_path):
    path = sweep(grid={"loss.kd_ratio": [0.5]})
    run_sweep(path, {"train.max_steps": 1}, False)
    with pytest.raises(UserError, match="holds a sweep; continue it with --resume"):
        run_sweep(path, {"train.max_steps": 1}, False)
    with pytest.raises(UserError, match="is not empty and holds no sweep"):
        run_sweep(path, {"output_dir": str(tmp_path)}, False)
    known = state(tmp_path / "sweep")["base"]
    run_sweep(path, {"train.max_steps": 1}, True)
    assert known["train.max_steps"] == 1 and state(tmp_path / "sweep")["base"] == known
    more = sweep(grid={"loss.kd_ratio": [0.5, 1.0]})  # an arm more is welcome
    assert set(state(run_sweep(more, {"train.max_steps": 1}, True))["arms"]) == {"kd_ratio-0.5", "kd_ratio-1"}
    for changes in ({"optim.lr": 5e-4}, {"seeds": [3]}):
        with pytest.raises(UserError, match="arm kd_ratio-0.5: (optim.lr|seed): .* in the run that is to be resumed"):
            run_sweep(more, {"train.max_steps": 1, **changes}, True)


@pytest.mark.slow
def test_a_failure_that_a_kill_kept_from_the_list_is_known_and_the_others_go_on(sweep):
    """Their last common step would be long gone."""
    import shutil

    path = sweep({"checkpoint": {"every": 1}}, grid={"loss.kd_ratio": [0.25, 0.75, 1.0]})
    folder = run_sweep(path, {}, False)
    data = state(folder)
    whole = {name: weights(folder / "arms" / name) for name in data["arms"]}
    for name, arm in data["arms"].items():  # as they were when the first was given up at step 2, and the sweep killed at step 5
        arm["status"] = "waiting"
        for gone in ("summary.json", "adapter"):
            target = folder / "arms" / name / gone
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    bad = folder / "arms/kd_ratio-0.25"
    shutil.rmtree(bad / "checkpoints")
    (bad / "nonfinite.json").write_text('{"step": 2, "term": "kd", "examples": []}')
    (folder / "sweep.json").write_text(json.dumps(data))
    run_sweep(path, {}, True)
    found = state(folder)["arms"]
    assert [arm["status"] for arm in found.values()] == ["failed", "done", "done"]
    assert found["kd_ratio-0.25"]["reason"] == "step 2: kd is not finite"
    for name in ("kd_ratio-0.75", "kd_ratio-1"):
        assert distance(whole[name], weights(folder / "arms" / name)) == 0
        assert (folder / f"arms/{name}/metrics.jsonl").read_text().count('"loss"') == 5


@pytest.mark.slow
def test_a_signal_in_the_last_step_does_not_lose_the_last_validation(sweep, world, tmp_path, monkeypatch):
    from llmkd.errors import Stopped
    from llmkd.training import loop, trainer

    recipe = {"data": {"train": {"path": str(world / "train.jsonl")}, "validation": {"path": str(world / "held.jsonl")}, "max_length": 256}}
    path, real, sessions = sweep(recipe, grid={"loss.kd_ratio": [0.5, 1.0]}), loop.optimizer_step, []
    steps = {"train.max_steps": 2}
    whole = run_sweep(path, {"output_dir": str(tmp_path / "whole"), **steps}, False)
    real_init = trainer.Trainer.__init__
    monkeypatch.setattr(trainer.Trainer, "__init__", lambda self, *a: sessions.append(self) or real_init(self, *a))

    def move(learner, step, *rest):
        real(learner, step, *rest)
        sessions[-1].stop.asked = step == 2

    monkeypatch.setattr(loop, "optimizer_step", move)
    with pytest.raises(Stopped):
        run_sweep(path, steps, False)
    monkeypatch.undo()
    folder = run_sweep(path, steps, True)
    for name in state(folder)["arms"]:
        one, other = (json.loads((f / "arms" / name / "summary.json").read_text()) for f in (whole, folder))
        assert one["validation"] == other["validation"]


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


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), True),
        (MemoryError(), False),
        (ValueError("a bug"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_the_machine_ends_the_sweep_and_is_no_arms_failure(sweep, tmp_path, monkeypatch, error, ends):
    """All groups would meet it. Out of memory may be one group's alone."""
    from llmkd.commands import sweep as sweep_command

    def fail(*_):
        raise error

    monkeypatch.setattr(sweep_command, "train_together", fail)
    path = sweep(grid={"loss.kd_ratio": [0, 1.0]})
    if ends:
        with pytest.raises(type(error)):
            run_sweep(path, {}, False)
    else:
        run_sweep(path, {}, False)
    assert {arm["status"] for arm in state(tmp_path / "sweep")["arms"].values()} == {"waiting" if ends else "failed"}


def test_a_full_disk_behind_a_refusal_is_the_machines_too(sweep, tmp_path, monkeypatch):
    from llmkd.commands import sweep as sweep_command

    def fail(*_):
        raise UserError("output_dir: x cannot be created") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sweep_command, "train_together", fail)
    with pytest.raises(UserError, match="cannot be created"):
        run_sweep(sweep(grid={"loss.kd_ratio": [0, 1.0]}), {}, False)
    assert {arm["status"] for arm in state(tmp_path / "sweep")["arms"].values()} == {"waiting"}


def test_an_arm_may_start_from_what_a_stage_made_with_its_seed(sweep):
    of_seed = {"two": {"student.model": "{output_dir}/stages/first_seed-{seed}/adapter", "student.lora": None}, "plain": {}}
    file = loader.load_sweep(sweep(grid={}, arms=of_seed, seeds=[3, 4], baseline="plain"))
    models = {spec.name: spec.changes.get("student.model") for spec in expand(file)}
    assert models["two_seed-3"] == "{output_dir}/stages/first_seed-3/adapter" and models["two_seed-4"].endswith("first_seed-4/adapter")
    assert models["plain_seed-3"] is None
    alone = loader.load_sweep(sweep(grid={}, arms=of_seed, seeds=[], baseline="plain"))
    assert [spec.changes.get("student.model") for spec in expand(alone)] == [of_seed["two"]["student.model"], None]  # refused as a path


def test_a_seed_has_no_meaning_in_a_recipe(world, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    with pytest.raises(UserError, match=r"where \{seed\} has no meaning.*\{seed\} is for the arms of a sweep with seeds"):
        loader.load_recipe(path, {"student.model": "runs/a_{seed}/adapter"})
