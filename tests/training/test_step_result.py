"""What a step did, heard when somebody asks; and values that are not finite, which move nothing."""

import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from llmkd.cli import main
from llmkd.data.batch_source import Step
from llmkd.errors import NonFinite, UserError
from llmkd.losses import ratio
from llmkd.teachers.live import LiveTeacher
from llmkd.training import loop, trainer
from llmkd.training.distiller import Distiller
from llmkd.training.run import run
from llmkd.training.step_result import Accumulated, StepResult
from tests.conftest import distance, plain_recipe, weights
from tests.kit.processes import launch

SHORT = {"train__max_steps": 2}


@pytest.fixture
def moves(monkeypatch):
    """What the optimizer holds after each of its steps: every parameter, its moments and its count of steps."""
    found, real = [], torch.optim.AdamW.step

    def step(self):
        real(self)
        held = [p for group in self.param_groups for p in group["params"]]
        found.append([x.detach().clone() for p in held for x in (p, *self.state[p].values())])

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return found


@pytest.fixture
def poisoned(monkeypatch, moves):
    """From the second step on the teacher is NaN on one example of each micro-batch, until `moves` has `heal` steps."""
    real = LiveTeacher.__call__

    def go(heal: int = 99) -> None:
        def call(self, batch):
            signal = real(self, batch)
            if 0 < len(moves) < heal:
                signal.hidden_NH[batch.example_N == batch.example_N.min()] = float("nan")
            return signal

        monkeypatch.setattr(LiveTeacher, "__call__", call)

    return go


@pytest.mark.parametrize("log_every, heal", [(1, 99), (5, 99), (5, 2)])
def test_a_nan_stops_the_run_before_the_weights(command, tmp_path, poisoned, moves, log_every, heal):
    """The teacher turns NaN on one example in the second step: exit 3, that example named, one optimizer step done.

    Where nobody asks for a step's metrics it is heard of one step later, and by then the next step too has left everything as it was.
    """
    poisoned(heal)
    code, lines = command("--train.log_every", str(log_every))
    assert code == 3 and len(lines) == 1 and len(moves) == (2 if log_every == 1 else 3)
    assert moves[0][0].isfinite().all() and all(torch.equal(a, b) for later in moves[1:] for a, b in zip(moves[0], later, strict=True))
    report = json.loads((tmp_path / "out/nonfinite.json").read_text())
    term = "teacher logits" if heal == 99 else "kd"  # it is asked again to tell
    assert report["step"] == 2 and report["term"] == term and all("train.jsonl:" in e for e in report["examples"])
    assert f"step 2: {term}" in lines[0] and report["examples"][0] in lines[0]
    assert not (tmp_path / "out/adapter").exists()


def test_a_failure_that_was_passed_is_forgotten(command, tmp_path, poisoned):
    poisoned(heal=2)
    assert command()[0] == 3 and (tmp_path / "out/nonfinite.json").exists()
    assert command("--resume")[0] == 0 and not (tmp_path / "out/nonfinite.json").exists()


@pytest.mark.parametrize("log_every", [1, 2])
def test_the_steps_before_a_failure_are_saved_and_the_run_goes_on_from_them(command, trained, tmp_path, poisoned, log_every):
    """Also where the failure is noticed one step later, by when the step after it has run."""
    poisoned(heal=2)
    code, lines = command("--train.log_every", str(log_every))
    saved = tmp_path / "out/checkpoints/step-1"
    assert code == 3 and lines[0].endswith(f"the weights are as they were before it, and {saved} holds them")
    assert [path.name for path in saved.parent.iterdir()] == ["step-1"]
    assert all(value.isfinite().all() for value in load_file(saved / "student.safetensors").values())
    assert command("--resume")[0] == 0
    assert distance(weights(tmp_path / "out"), trained("whole")) == 0


@pytest.mark.parametrize(("step", "term"), [(3, "ce"), (5, "a weight after the update")])
def test_weights_that_are_not_finite_are_neither_saved_nor_the_result(command, tmp_path, monkeypatch, step, term):
    """An update may leave them after a step whose loss was finite: the third, or the last."""
    real = loop.optimizer_step

    def optimizer_step(student, number, *rest):
        real(student, number, *rest)
        if number == step:
            next(iter(student.parameters.values())).data.flatten()[0] = float("inf")

    monkeypatch.setattr(loop, "optimizer_step", optimizer_step)
    code, lines = command("--checkpoint.every", "1", "--checkpoint.keep", "2")
    assert code == 3 and len(lines) == 1 and f": {term} is not finite" in lines[0]
    assert sorted(path.name for path in (tmp_path / "out/checkpoints").iterdir()) == [f"step-{step - 2}", f"step-{step - 1}"]
    assert not (tmp_path / "out/adapter").exists() and not (tmp_path / "out/summary.json").exists()


def test_an_infinite_gradient_stops_the_run(make_recipe, monkeypatch):
    real, before, after = Distiller.forward, {}, {}

    def forward(self, batch, signal):
        loss = real(self, batch, signal)
        after.update(self.trainable())
        before.update({name: p.detach().clone() for name, p in after.items() if name not in before})
        return type(loss)(loss.total + 0 * loss.total * (loss.total - loss.total).sqrt(), loss.rows)

    monkeypatch.setattr(Distiller, "forward", forward)
    with pytest.raises(NonFinite, match="step 1: gradient is not finite"):
        run(make_recipe())
    assert before and all(torch.equal(p, before[name]) for name, p in after.items()), "the weights moved"


def train_poisoned(recipe: str, shard: str, term: str) -> int:
    real, calls = Distiller.forward, [0]

    def forward(self, batch, signal):
        loss = real(self, batch, signal)
        calls[0] += 1
        if os.environ["RANK"] == "1" and calls[0] == 3:
            loss.rows[term][0] = float("nan")
            loss = type(loss)(loss.total * float("nan"), loss.rows)
        return loss

    Distiller.forward = forward
    return main(["train", "--config", recipe, "--train.micro_batch_size", "2", "--train.shard", shard])


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "term"), [("none", "ce"), ("full", "kd")])
def test_a_nan_on_one_rank_stops_them_all(world, tmp_path, shard, term):
    """Both processes look for its cause, since a sharded teacher answers to all of them together; and save the step before."""
    (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    done = launch(2, train_poisoned, str(tmp_path / "r.yaml"), shard, term)
    saved = tmp_path / "out/checkpoints/step-1/student.safetensors"
    assert done.returncode == 3 and all(value.isfinite().all() for value in load_file(saved).values()), done.stderr[-3000:]
    report = json.loads((tmp_path / "out/nonfinite.json").read_text())
    assert report["step"] == 2 and report["term"] == term and len(report["examples"]) == 1
    assert done.stderr.count(f"llmkd: step 2: {term} is not finite") == 1


class Waits(TorchDispatchMode):
    """Counts the operations for which a host waits for its device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        picks = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += picks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("packing", [True, False])
def test_the_host_waits_for_the_device_only_where_somebody_asks(make_recipe, monkeypatch, packing):
    """Of eight steps every fourth is logged; of the others it is heard in the step after."""
    waits, real, now = [], trainer.train, [1]
    monkeypatch.setattr(ratio, "applies", lambda *_: False)  # on a CPU alone, which waits for nothing

    def train(*args, **options):
        steps = real(*args, **options)
        while True:
            with Waits() as here:
                progress = next(steps, None)
            if progress is None:
                return
            waits.append((progress.step, here.count))
            now[0] = progress.step + 1
            yield progress

    read, reads = loop.StepResult.read, []
    monkeypatch.setattr(loop.StepResult, "read", lambda self, active: (reads.append((self.step.number, now[0])), read(self, active))[1])
    monkeypatch.setattr(trainer, "train", train)
    run(make_recipe(train__max_steps=8, train__epochs=None, train__log_every=4, train__batch_size=8, data__packing=packing))
    assert waits == [(step, 0) for step in range(1, 9)]
    assert reads == [(1, 2), (2, 3), (3, 4), (4, 4), (5, 6), (6, 7), (7, 8), (8, 8)]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_when_metrics_are_asked_for_changes_nothing(trained, optimizer):
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    changes = {"train__batch_size": 8, "student__dtype": "float32", "optim__name": optimizer, **SHORT}
    assert distance(trained("each", **changes), trained("some", train__log_every=3, **changes)) == 0


def test_a_nan_moves_nothing_by_an_optimizer_that_hears_of_it_on_the_host_either(make_recipe, monkeypatch):
    pytest.importorskip("bitsandbytes")
    held, move = [], loop.optimizer_step

    def watched(learner, step, norm, taint):
        before = [p.detach().clone() for p in learner.parameters.values()]
        move(learner, step, norm, taint * float("nan") if step == 2 else taint)
        held.append(all(torch.equal(a, b) for a, b in zip(before, learner.parameters.values(), strict=True)))

    monkeypatch.setattr(loop, "optimizer_step", watched)
    run(make_recipe(student__dtype="float32", optim__name="adamw_8bit", **SHORT))
    assert held == [False, True]


def test_an_error_after_a_step_that_nobody_heard_of_leaves_no_checkpoint(make_recipe, tmp_path, moves, monkeypatch):
    """It may have failed: a checkpoint under its number would hold the weights of the one before."""
    real = LiveTeacher.__call__

    def call(self, batch):
        if len(moves) == 2:
            raise UserError("teacher.cache.path: torn")
        signal = real(self, batch)
        if len(moves) == 1:
            signal.hidden_NH[:] = float("nan")
        return signal

    monkeypatch.setattr(LiveTeacher, "__call__", call)
    with pytest.raises(UserError, match="torn"):
        run(make_recipe(train__log_every=9))
    assert not list((tmp_path / "out/checkpoints").glob("step-*"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_step_knows_how_many_targets_it_has(make_recipe, monkeypatch, streaming):
    """They come of the plan, and divide the loss: nobody counts them again."""
    seen, gradients = [], loop.accumulate_gradients

    def counted(seed, step, counts, active, teacher, accelerator, micro_batches):
        seen.append((step.num_targets, counts.targets, sum(micro.num_targets for micro in micro_batches)))
        return gradients(seed, step, counts, active, teacher, accelerator, micro_batches)

    monkeypatch.setattr(loop, "accumulate_gradients", counted)
    run(make_recipe(train__max_steps=3, train__epochs=None, train__batch_size=7, data__streaming=streaming))
    assert len(seen) == 3 and all(stated == divisor == there > 0 for stated, divisor, there in seen)


@pytest.mark.parametrize("bad", [0, 1])
def test_a_student_fails_by_its_own_values_alone(bad):
    rows = {k: [{"ce": torch.tensor([math.nan if k == bad else 1.0]), "kd": torch.tensor([2.0])}] for k in (0, 1)}
    norms = {k: torch.tensor(3.0) for k in (0, 1)}
    result = StepResult(Step(1, 0), Accumulated([], None, 1.0, rows, {}), norms, {}, False, SimpleNamespace(num_processes=1))
    assert [math.isnan(result.nonfinite[k]) for k in (0, 1)] == [k == bad for k in (0, 1)] and result.nonfinite[1 - bad] == 0
