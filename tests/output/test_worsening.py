"""A run that ends worse than it began says so, with reasons that fit its records."""

import json

import pytest

from llmkd.config.loader import load_recipe
from llmkd.config.recipe import Loss, Optim
from llmkd.output.worsening import sentences, worsened
from llmkd.training.run import run
from tests.conftest import plain_recipe

FELL, ROSE = [3.0, 2.5, 2.0], [3.0, 3.5, 4.0]


def told(ce: list[float], losses: list[float], kl: list[float] | None = None, teacher_ce: float = 1.0, kd_ratio: float = 0.5) -> list[str]:
    """The sentences of a run with held-out metrics at steps 0, 10, ..."""
    records = [{"step": 10 * i, "validation": {"ce": value, "teacher_ce": teacher_ce} | ({"forward_kl": kl[i]} if kl else {})} for i, value in enumerate(ce)]  # fmt: skip
    records += [{"step": i + 1, "loss": value} for i, value in enumerate(losses)]
    return list(sentences(records, Loss(kd_ratio=kd_ratio), Optim(lr=0.5)))


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(ce=[2.0, 3.0], losses=ROSE), "CE on the held-out rows rose from 2.0000 to 3.0000: the training loss did not fall either: the learning rate (0.5)"),
        (dict(ce=[2.0, 1.5, 2.5], losses=FELL), "it was 1.5000 at step 10, so the run was too long for this data; checkpoint.best_by: ce"),
        (dict(ce=[2.0, 2.1, 2.5], losses=FELL), "the held-out rows are unlike the training rows"),
        (dict(ce=[2.0, 2.5], losses=FELL, teacher_ce=2.0), "the teacher's CE there (2.0000) is no better than the student's was"),
        (dict(ce=[2.0, 2.5], losses=FELL, kl=[1.0, 0.5]), "the student did come closer to the teacher, whose CE is 1.0000"),
        (dict(ce=[2.0, 1.5], losses=FELL, kl=[1.0, 1.5]), "KL to the teacher on the held-out rows rose from 1.0000 to 1.5000"),
        (dict(ce=[2.0, float("nan")], losses=FELL), "rose from 2.0000 to nan"),
    ],
)  # fmt: skip
def test_a_rise_is_said_with_a_reason(given, words):
    (line,) = told(**given)
    assert words in line


def test_of_a_few_steps_no_reason_is_given():
    held_out = [{"step": step, "validation": {"ce": ce}} for step, ce in ((0, 2.0), (2, 3.0))]
    (line,) = sentences([*held_out, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}], Loss(kd_ratio=0.0), Optim(lr=0.5))
    assert line.endswith("to 3.0000: 2 steps are too few to tell why; train for more, and if it still rises, lower the learning rate (0.5)")


def test_nothing_is_said_where_the_validation_before_training_is_lost():
    held_out = [{"step": step, "validation": {"ce": ce}} for step, ce in ((10, 2.0), (20, 3.0))]
    assert not list(sentences([*held_out, {"step": 1, "loss": 3.0}], Loss(kd_ratio=0.0), Optim(lr=0.5)))


def test_nothing_is_said_of_a_run_that_improved_or_was_measured_once():
    assert not told([2.0, 1.5], FELL, [1.0, 0.5]) and not told([2.0, 2.0], FELL) and not told([2.0], ROSE)
    assert not worsened({"ce": 2.0, "forward_kl": 1.0}, {"ce": 1.0, "forward_kl": 2.0}, Loss(kd_ratio=0))  # it never followed the teacher


def test_a_run_with_a_rate_far_too_high_says_so_at_its_end(world, tmp_path, capsys):
    recipe = plain_recipe(world, tmp_path / "run") | {"student": {"model": str(world / "student"), "method": "full"}}
    recipe["data"]["validation_fraction"], recipe["train"]["max_steps"], recipe["optim"] = 0.2, 3, {"lr": 3.0}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    summary = run(load_recipe(tmp_path / "r.yaml"))
    said = capsys.readouterr().err
    assert summary["warnings"][0].startswith("worse than before training: CE ") and all(
        f"run: {text}\n" in said for text in summary["warnings"]
    )
