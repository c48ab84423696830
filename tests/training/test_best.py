"""checkpoint.best_by where the best is a step in the middle: what is kept, what a resumed run remembers, and what is exported."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llmkd.cli import main
from llmkd.files import read_jsonl
from llmkd.training.run import run
from llmkd.training.student_run import StudentRun

#: The metric at steps 1 to 6, of which step 3 is the best and the last is not; the values of step 4 and 6 are the same.
VALUES = {"ce": [5.0, 4.0, 3.0, 3.5, 4.5, 3.5], "top1_agreement": [0.1, 0.2, 0.5, 0.4, 0.2, 0.4]}


class Killed(Exception):
    pass


@pytest.mark.parametrize("by", VALUES)
def test_the_best_step_is_in_the_middle_and_outlives_a_kill(make_recipe, world, monkeypatch, tmp_path, capsys, by):
    killed_at, real, out = [5], StudentRun.record_validation, tmp_path / "out"

    def scripted(self, step, held_out):
        """The values of the table; before step 5 is measured the run is killed, once."""
        if step in killed_at:
            killed_at.clear()
            raise Killed
        values = held_out.metrics() | ({by: VALUES[by][step - 1]} if step else {})
        return real(self, step, SimpleNamespace(**vars(held_out), metrics=lambda: values))

    monkeypatch.setattr(StudentRun, "record_validation", scripted)
    held = {"data__validation__path": str(world / "held.jsonl"), "validation__every": 1, "validation__teacher_check": 0}
    recipe = make_recipe(**held, train__max_steps=6, checkpoint__best_by=by, checkpoint__keep=1)
    with pytest.raises(Killed):
        run(recipe)
    assert steps(out) == {3, 4}
    shutil.copytree(out / "checkpoints/step-3", tmp_path / "third")
    assert run(recipe, resume=True)["best"] == {"by": by, "step": 3, "value": VALUES[by][2]}
    assert f"{by} was best at step 3 ({VALUES[by][2]:.4f}), and {out / 'adapter'} holds the last step" in capsys.readouterr().err
    assert steps(out) == {3, 6}
    summary = json.loads((out / "summary.json").read_text())
    first = next(record["validation"] for record in read_jsonl(out / "metrics.jsonl") if "validation" in record)
    assert summary["validation"][by] == VALUES[by][5] and summary["before"] == first and first[by] not in VALUES[by]
    assert main(["export", str(out), "--checkpoint", "best"]) == 0
    base, third = load_file(world / "student/model.safetensors"), load_file(tmp_path / "third/student.safetensors")
    merged, lora = load_file(out / "merged-best/model.safetensors"), recipe.student.lora
    for name, a in third.items():
        if ".lora_A." in name:
            own = name.removeprefix("base_model.model.").replace(".lora_A.default", "")
            base[own] = base[own] + lora.alpha / lora.rank * third[name.replace("lora_A", "lora_B")] @ a
    assert merged.keys() == base.keys() and all((merged[name] - base[name]).abs().max() < 1e-12 for name in base)
    last = load_file(out / "adapter/adapter_model.safetensors")
    assert any(not torch.equal(last[name.replace(".default", "")], value) for name, value in third.items())


def steps(out: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in (out / "checkpoints").iterdir()}


def test_a_best_step_that_is_the_last_is_not_mentioned(make_recipe, world, capsys):
    held = {"data__validation__path": str(world / "held.jsonl"), "validation__every": 1, "validation__teacher_check": 0}
    found = run(make_recipe(**held, train__max_steps=1, optim__warmup_steps=0, checkpoint__best_by="ce"))
    assert found["best"]["step"] == 1 and "holds the last step" not in capsys.readouterr().err


@pytest.mark.parametrize("by", VALUES)
def test_a_value_that_is_no_number_is_not_the_best(by):
    recipe = SimpleNamespace(checkpoint=SimpleNamespace(best_by=by), validation=SimpleNamespace(samples=0))
    student = SimpleNamespace(recipe=recipe, best=None, validated=None, main=False)
    for step, value in enumerate((math.nan, 0.5, math.nan, 0.5), 1):
        StudentRun.record_validation(student, step, SimpleNamespace(metrics=lambda value=value: {by: value}))
    assert student.best == {"by": by, "step": 2, "value": 0.5}
