"""teacher.ema: the teacher is the moving average of the student's own trainable weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llmkd.commands.sweep import why_alone
from llmkd.config import loader
from llmkd.errors import UserError
from llmkd.models.average import Average
from llmkd.models.load import LoadContext, load_models
from llmkd.models.shared_weights import storage_bytes
from llmkd.training.prepare import prepare, student_files
from tests.conftest import distance, weights
from tests.training.one_and_two import assert_two_processes_are_one

DECAY = 0.8


@pytest.fixture
def rows(tmp_path):
    """Rows whose teacher reads more than the student."""
    path = tmp_path / "c.jsonl"
    rows = [{"instruction": f"Say {i}", "output": "Yes. " * (1 + i % 3), "teacher_context": f"You know {i}."} for i in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def settings(rows, **more) -> dict:
    changes = {"teacher": {"ema": DECAY}, "data__train": rows, "checkpoint__every": 1, "checkpoint__keep": 9, "train__max_steps": 4}
    return changes | {"on_policy__share": 0.5, "on_policy__max_new_tokens": 6, "loss__kd_ratio": 1.0, "student__lora__dropout": 0.1} | more


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_it_is_the_average_of_the_checkpoints_and_is_resumed_bit_for_bit(trained, rows, tmp_path, method):
    more = {"student__method": method, "student__lora": None} if method == "full" else {}
    whole = trained("whole", **settings(rows, **more))
    steps = [load_file(tmp_path / "whole" / "checkpoints" / f"step-{n}" / "student.safetensors") for n in (1, 2, 3, 4)]
    own = [name for name in steps[0] if not name.startswith("teacher.")]
    assert {f"teacher.{name}" for name in own} == steps[0].keys() - {*own} and len(own) > 10
    moved = 0.0
    for before, after in zip(steps, steps[1:], strict=False):
        for name in own:
            expected = DECAY * before[f"teacher.{name}"].double() + (1 - DECAY) * after[name].double()
            found = after[f"teacher.{name}"].double()
            assert (found - expected).abs().max() <= 1e-6 * max(1e-3, expected.abs().max())
            moved = max(moved, (found - after[name].double()).abs().max().item())
    assert moved > 1e-3, "it is not the student"
    card = tmp_path / "whole" / ("adapter" if method == "lora" else "model") / "README.md"
    assert f"as the moving average of the student itself ({DECAY})" in card.read_text()
    trained("part", **settings(rows, **more, train__max_steps=4, checkpoint__every=2))
    for name in ("adapter", "model", "summary.json", "checkpoints/step-4"):
        gone = tmp_path / "part" / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink(missing_ok=True)
    assert distance(trained("part", True, **settings(rows, **more, checkpoint__every=2)), whole) == 0
    again = load_file(tmp_path / "part" / "checkpoints" / "step-4" / "student.safetensors")
    assert all(torch.equal(again[name], steps[3][name]) for name in again)
    assert not any("teacher" in name for name in weights(tmp_path / "part"))


def test_the_base_is_in_memory_once_and_the_teacher_begins_as_the_student(make_recipe, rows):
    recipe = make_recipe(**settings(rows))
    (student,), (teacher,) = load_models([recipe.student], [("teacher", recipe.teacher)], LoadContext(96, "cpu"))
    alone, both = (sum(storage_bytes(*models).values()) for models in ([student], [student, teacher]))
    own = sum(p.numel() * p.element_size() for p in student.trainable().values())
    assert both - alone == own < 0.2 * alone
    theirs = dict(teacher.model.named_parameters())
    for name, p in student.trainable().items():
        assert torch.equal(p, theirs[name]) and p.data_ptr() != theirs[name].data_ptr() and not theirs[name].requires_grad
    assert student.training and not teacher.training
    assert why_alone(recipe, student_files(recipe.student)) == "a part of its data is written while it trains"


def test_a_step_that_is_skipped_changes_nothing(make_recipe):
    weight = torch.nn.Linear(2, 2)

    class Model:
        model = torch.nn.Linear(2, 2)

        def trainable(self):
            return dict(weight.named_parameters())

    for fused in (True, False):
        optimizer = torch.optim.AdamW(weight.parameters(), fused=fused)
        average = Average(Model(), Model, 0.9)
        average.follow(optimizer)
        for skip in (1.0, 0.0):
            before = {name: value.clone() for name, value in average.weights.items()}
            for p in weight.parameters():
                p.grad = torch.ones_like(p)
            if fused:
                optimizer.found_inf, optimizer.grad_scale = torch.tensor(skip), None
            if fused or not skip:
                optimizer.step()
            for name, value in average.weights.items():
                new = before[name] if skip else 0.9 * before[name] + 0.1 * dict(weight.named_parameters())[name]
                assert torch.equal(value, before[name]) if skip else torch.allclose(value, new, atol=1e-7)
                assert skip or not torch.equal(value, before[name])


def test_weights_in_16_bit_are_refused(make_recipe):
    recipe = make_recipe(student__method="full", student__lora=None, student__dtype="bfloat16", teacher={"ema": 0.999})
    with pytest.raises(UserError, match="teacher.ema: .* tensors, such as .* train in 16 bit, where an average loses small steps"):
        load_models([recipe.student], [("teacher", recipe.teacher)], LoadContext(96, "cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": {"ema": 1.0}}, "teacher.ema: found 1.0, expected"),
        ({"teacher": {"ema": 0.9, "model": "other"}}, "teacher.model: found .*other with ema, the average of the student's own weights"),
        ({"teacher": [{"ema": 0.9}, {"model": "b"}]}, "teacher.0.ema: set with several teachers"),
        ({"teacher": {"ema": 0.9, "server": "http://a:1"}}, "teacher.server: set with ema"),
        ({"teacher": {"ema": 0.9, "cache": {"path": "c"}}}, "teacher.cache: set with ema"),
        ({"teacher": {"ema": 0.9, "dtype": "float32"}}, "teacher.dtype: set with ema, where it is the student's"),
    ],
)
def test_what_contradicts_it_is_refused(make_recipe, tmp_path, changes, message):
    make_recipe()
    with pytest.raises(UserError, match=message):
        loader.load_recipe(tmp_path / "recipe.yaml", changes)
    assert make_recipe(teacher={"ema": 0.9}).teacher.model == make_recipe().student.model


def test_a_student_that_would_learn_nothing_is_refused(make_recipe, rows):
    with pytest.raises(UserError, match="teacher.ema: set with loss.kd_ratio 1 and rows without a teacher_context"):
        prepare(make_recipe(teacher={"ema": 0.9}, loss__kd_ratio=1.0))
    prepare(make_recipe(teacher={"ema": 0.9}, loss__kd_ratio=0.9))


@pytest.mark.slow
def test_two_processes_have_the_average_of_one(trained, world, rows, tmp_path):
    changes = {"teacher": {"ema": DECAY}, "data__train": rows, "train__max_steps": 3, "checkpoint__every": 3}
    assert_two_processes_are_one(trained, world, tmp_path, changes | {"on_policy__share": 0.5, "on_policy__max_new_tokens": 6})
    found = [load_file(tmp_path / name / "checkpoints" / "step-3" / "student.safetensors") for name in ("one", "two")]
    assert any(name.startswith("teacher.") for name in found[0]) and distance(*found) < 1e-12
