"""An arm that fails does not stop the others; an error of the machine stops all."""

import errno
import json

import pytest

from llmkd.commands.sweep import run_sweep
from llmkd.errors import UserError
from llmkd.output.run_folder import RunFolder
from tests.conftest import distance, weights
from tests.kit.processes import train_on_two
from tests.kit.sweeps import alone, state


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
    run_sweep(path, {}, True)  # infinities would come again; the others may have been corrected
    assert "[1/1] 2 arms side by side: worse, late\n" in capsys.readouterr().err and state(folder)["arms"]["bad"]["status"] == "failed"


def test_an_arm_whose_own_loss_its_data_do_not_carry_leaves_the_others(sweep):
    """The first of a group is what the data are read for. With 2 rows there are too few targets for a map of hidden states."""
    arms = {"few": {"loss.features.weight": 0.5}, "plain": {}, "last": {"optim.lr": 1e-3}}
    path = sweep(grid={}, arms=arms, set={"data.train.limit": 2, "train.batch_size": 2, "train.max_steps": 1})
    found = state(run_sweep(path, {}, False))["arms"]
    assert [found[name]["status"] for name in arms] == ["failed", "done", "done"]
    assert found["few"]["reason"].startswith("loss.features.init: found least_squares, but a map")


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
