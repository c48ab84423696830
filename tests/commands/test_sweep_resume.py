"""A sweep that was stopped or killed goes on where it was, and ends as one that was not."""

import json
import os
import signal

import pytest

from llmkd.cli import main
from llmkd.commands.sweep import run_sweep
from llmkd.commands.sweep_state import SweepState
from llmkd.config import loader
from llmkd.config.sweep import expand
from llmkd.errors import UserError
from llmkd.training import loop
from tests.conftest import distance, weights
from tests.kit.processes import launch
from tests.kit.sweeps import HELD, state


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
    (tmp_path / "sweep/arms/a").mkdir(parents=True)
    (tmp_path / "sweep/arms/a/summary.json").touch()
    known = {"arms": {"a": arm, "gone": arm, "gone too": arm}, "groups": groups, "stages": {}}
    (tmp_path / "sweep/sweep.json").write_text(json.dumps(known))
    found = SweepState(tmp_path / "sweep", config, {spec.name: spec for spec in expand(config)}, resume=True).data
    assert found["groups"] == [{"arms": ["a"], "seconds": 4.0}] and found["arms"] == {"a": arm | {"group": 0}}


@pytest.mark.parametrize(("end", "file"), [({"status": "done"}, "summary.json"), ({"status": "failed", "final": True}, "nonfinite.json")])
def test_an_arm_whose_folder_was_removed_is_trained_again_with_what_the_file_says_now(sweep, tmp_path, capsys, end, file):
    config = loader.load_sweep(sweep(grid={}, arms={"a": {"optim.lr": 1e-2}, "b": {}}))
    arms = {name: {"seconds": 4.0, "group": 0, "changes": {"optim.lr": 1.0}, "folder": f"arms/{name}"} | end for name in "ab"}
    (tmp_path / "sweep/arms/b").mkdir(parents=True)
    (tmp_path / "sweep/arms/b" / file).touch()
    (tmp_path / "sweep/sweep.json").write_text(json.dumps({"arms": arms, "groups": [{"arms": ["a", "b"], "seconds": 8.0}], "stages": {}}))
    found = SweepState(tmp_path / "sweep", config, {spec.name: spec for spec in expand(config)}, resume=True)
    assert found.is_waiting("a") and found.data["arms"]["a"]["changes"] == {"optim.lr": 1e-2} and not found.is_waiting("b")
    assert "what 1 arm had left in " in (said := capsys.readouterr().err) and "is gone: a; trained again" in said


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
