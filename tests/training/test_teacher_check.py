"""Before the first step: the teacher's cross-entropy against the student's, on rows that are trained on."""

import json
import time
from pathlib import Path

import pytest
import torch

from llmkd.data.collate import collate
from llmkd.models.load import LoadContext, load_teacher
from llmkd.teachers.fidelity import sample_examples
from llmkd.teachers.live import LiveTeacher
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from llmkd.training.teacher_check import message
from llmkd.training.validate import Evaluator
from tests.kit.models import load_student


def check_of(recipe) -> list[dict]:
    lines = map(json.loads, (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines())
    return [line["teacher_check"] for line in lines if "teacher_check" in line]


def test_its_metrics_are_the_cross_entropies_of_both_on_the_sample(make_recipe, capsys):
    recipe = make_recipe(validation__teacher_check=11, train__max_steps=2)
    run(recipe)
    prepared = prepare(recipe)
    sample = sample_examples(prepared.train, 11)
    batch = collate(sample, list(range(11)), 0)
    teacher = LiveTeacher(load_teacher(recipe.teacher, LoadContext(prepared.vocab, "cpu")))
    student = load_student(recipe.student, prepared.vocab, "cpu", recipe.seed).eval()
    log_q = torch.log_softmax(student.head.logits(student.hidden(batch.student)), -1)
    expected = {
        "examples": 11,
        "ce": -float(log_q.gather(1, batch.labels_N[:, None]).mean()),
        "teacher_ce": -float(teacher(batch).label_log_probs(slice(None), batch.labels_N).mean()),
    }
    (found,) = check_of(recipe)
    assert found == pytest.approx(expected, abs=1e-9)
    assert f"the teacher's CE is {found['teacher_ce']:.4f} and the student's {found['ce']:.4f}" in capsys.readouterr().err


def test_of_several_students_the_best_is_compared():
    found = message([{"teacher_ce": 1.0, "ce": 1.5}, {"teacher_ce": 1.0, "ce": 0.5}, {"teacher_ce": 1.0, "ce": 2.0}], 3, [], None)
    assert "the teacher's CE is 1.0000 and the student's 0.5000" in found and "warning: the teacher predicts these rows no better" in found


def test_it_changes_nothing_of_the_run(trained):
    from tests.conftest import distance

    with_, without = (trained(f"check{n}", validation__teacher_check=n, student__lora__dropout=0.2) for n in (64, 0))
    assert distance(with_, without) == 0


def test_a_resumed_run_does_not_pass_it_again(make_recipe, trained):
    changes = {"train__epochs": 1, "checkpoint__every": 2}
    recipe = make_recipe("r", **changes)
    run(recipe)
    for name in ("summary.json",):
        (Path(recipe.output_dir) / name).unlink()
    import shutil

    shutil.rmtree(Path(recipe.output_dir) / "checkpoints" / "step-4", ignore_errors=True)
    run(recipe, resume=True)
    assert len(check_of(recipe)) == 1


def test_the_advice_comes_where_it_is_due(world, make_recipe, capsys):
    """A bare base that knows the rows better gets a note, one that does not a warning; an adapter and the student's own base neither."""

    def said(out, **changes):
        """Whether the teacher's CE was the lower one, and whether there was a warning and a note."""
        run(recipe := make_recipe(out, train__max_steps=2, **changes))
        err, checks = capsys.readouterr().err, check_of(recipe)
        better = bool(checks) and checks[0]["teacher_ce"] < checks[0]["ce"]
        return better, "warning: the teacher predicts" in err, "note: " in err and "looks untuned" in err

    for name in ("teacher", "adapter"):
        better, warned, noted = said(name, teacher__model=str(world / name))
        assert warned == (not better) and noted == (better and name == "teacher")
    assert said("own", teacher__model=str(world / "student")) == (False, True, False)  # equal
    assert said("none", teacher=None, loss__kd_ratio=0) == (False, False, False)


def test_a_stream_is_judged_by_its_first_step(make_recipe):
    recipe = make_recipe(data__streaming=True, train__max_steps=2, validation__teacher_check=64)
    run(recipe)
    assert check_of(recipe)[0]["examples"] == recipe.train.batch_size


def test_its_time_is_not_trainings(make_recipe, monkeypatch):

    validate = Evaluator.validate
    slow = lambda *args: time.sleep(1.5) or validate(*args)  # noqa: E731
    monkeypatch.setattr(Evaluator, "validate", slow)
    recipe = make_recipe(train__max_steps=2)
    run(recipe)
    first = next(line for line in map(json.loads, (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()) if "loss" in line)
    assert first["targets"] / first["targets_per_s"] < 1.4
