"""A sweep from its file to its report, by the command line."""

import json

import pytest

pytest.importorskip("lm_eval")
from llmkd_eval.harness import record_files

from llmkd.cli import main
from tests.conftest import plain_recipe
from tests.kit.questions import base, tasks_dir  # noqa: F401 fixtures


@pytest.fixture
def file(world, tmp_path, base, tasks_dir):  # noqa: F811
    recipe = plain_recipe(world, tmp_path / "unused")
    recipe["student"]["model"], recipe["optim"]["warmup_steps"] = str(base), 0
    recipe["data"]["validation_fraction"], recipe["train"]["max_steps"] = 0.2, 1
    (tmp_path / "base.yaml").write_text(json.dumps(recipe))
    sweep = {
        "output_dir": str(tmp_path / "sweep"),
        "recipe": "base.yaml",
        "grid": {"loss.kd_ratio": [0, 1.0]},
        "seeds": [1, 2],
        "eval": {"tasks": ["hellaswag"], "tasks_dir": str(tasks_dir), "batch_size": 4},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    return str(tmp_path / "sweep.yaml")


@pytest.mark.slow
def test_every_arm_is_measured_compared_and_reported(file, tmp_path, capsys):
    assert main(["sweep", "--config", file]) == 0, capsys.readouterr().err
    out = tmp_path / "sweep"
    assert str(out / "report.html") in capsys.readouterr().out
    text = (out / "report.md").read_text()
    for name in ("kd_ratio-0_seed-1", "kd_ratio-1_seed-2"):
        items = record_files.read_items(out / "arms" / name, "hellaswag")
        record = record_files.read_record(out / "arms" / name, "hellaswag")
        assert len(items) == 9 and record["metrics"]["acc"]["value"] == pytest.approx(sum(i["metrics"]["acc"] for i in items) / 9)
    assert "kd_ratio-1" in text and "hellaswag" in text
    written = (out / "arms/kd_ratio-0_seed-1/eval/hellaswag.json").stat().st_mtime_ns
    assert main(["sweep", "--config", file, "--resume"]) == 0
    assert (out / "arms/kd_ratio-0_seed-1/eval/hellaswag.json").stat().st_mtime_ns == written
    assert "every arm is done" in capsys.readouterr().err
    runs = [f"{arm}={','.join(str(out / f'arms/{arm}_seed-{s}') for s in (1, 2))}" for arm in ("kd_ratio-0", "kd_ratio-1")]
    assert main(["compare", *runs]) == 0
    assert "held_out ce" in (said := capsys.readouterr().out) and "hellaswag acc" in said
    changed = out / "arms/kd_ratio-1_seed-2/eval/hellaswag.jsonl"
    changed.write_text(changed.read_text().replace('"acc": 0.0', '"acc": 1.0', 1))
    assert main(["compare", *runs, "--tasks", "hellaswag"]) == 2
    assert f"{changed}: is not what hellaswag.json was made of" in capsys.readouterr().err


def test_a_failed_arm_is_said_at_the_end_and_the_others_are_measured(file, tmp_path, capsys, monkeypatch):
    from llmkd.training.distiller import Distiller

    real = Distiller.forward

    def forward(self, batch, signal):
        loss = real(self, batch, signal)
        return type(loss)(loss.total * float("nan"), loss.rows) if self.terms["ce"].objective.kd_ratio else loss

    monkeypatch.setattr(Distiller, "forward", forward)
    assert main(["sweep", "--config", file, "--seeds", "[1]"]) == 2
    assert "llmkd: arm kd_ratio-1: step 1: gradient is not finite" in capsys.readouterr().err
    assert record_files.read_record(tmp_path / "sweep/arms/kd_ratio-0", "hellaswag")
    assert "not finite" in (tmp_path / "sweep/report.md").read_text()


@pytest.mark.parametrize(
    "change, words",
    [
        (["--eval.tasks", "[hellaswg]"], "eval.tasks: hellaswg"),
        (["--eval.tasks_dir", "/nowhere"], "/nowhere is no folder"),
        (["--eval.limit", "0"], "--eval.limit: found 0, expected a whole number >= 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_trained(file, tmp_path, capsys, change, words):
    assert main(["sweep", "--config", file, *change]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "sweep").exists()
