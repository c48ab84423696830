"""Accelerate's trackers get what metrics.jsonl gets, and can never end a run."""

import json

import pytest

from llmkd.cli import main
from llmkd.errors import UserError
from llmkd.files import read_jsonl
from llmkd.output import trackers
from llmkd.training.run import run
from tests.training.test_resume import unfinish

LONG = {"train__max_steps": 6, "validation__every": 2, "checkpoint__every": 1, "checkpoint__keep": 9, "report_to": ["tensorboard"]}


def curves(folder) -> dict[str, dict[int, float]]:
    """Every scalar of the event files, by name and step; a step that is there twice is an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "trackers/tensorboard"), size_guidance={"scalars": 0}).Reload()
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert all(len(points) == len(dict(points)) for points in found.values()), found
    return {name: dict(points) for name, points in found.items()}


def recorded(folder) -> dict[str, dict[int, float]]:
    """The same of metrics.jsonl."""
    found: dict[str, dict[int, float]] = {}
    for record in read_jsonl(folder / "metrics.jsonl"):
        group = next((name for name in ("validation", "teacher_check") if name in record), "train")
        values = record.get(group, record)
        for name, value in values.items():
            if name != "step":
                found.setdefault(f"{group}/{name}", {})[record["step"]] = value
    return found


def same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=1e-6), name


def test_tensorboard_has_what_metrics_jsonl_has(make_recipe, world, tmp_path):
    pytest.importorskip("tensorboard")
    run(make_recipe(data__validation__path=str(world / "held.jsonl"), **LONG))
    found = curves(tmp_path / "out")
    assert {
        "train/loss",
        "train/ce",
        "train/kd",
        "train/lr",
        "train/grad_norm",
        "train/targets_per_s",
        "validation/ce",
        "teacher_check/teacher_ce",
    } <= found.keys()
    assert set(found["train/loss"]) == {1, 2, 3, 4, 5, 6} and set(found["validation/forward_kl"]) == {0, 2, 4, 6}
    same(found, recorded(tmp_path / "out"))
    config = next((tmp_path / "out/trackers/tensorboard").glob("*/hparams.yml")).read_text()
    assert "student.lora.rank: 4" in config and "loss.kd_ratio: 0.5" in config


def test_a_resumed_run_goes_on_in_the_same_curve(make_recipe, world, tmp_path):
    pytest.importorskip("tensorboard")
    recipe = make_recipe(data__validation__path=str(world / "held.jsonl"), **LONG)
    run(recipe)
    unfinish(tmp_path / "out", 3)
    run(recipe, resume=True)
    same(curves(tmp_path / "out"), recorded(tmp_path / "out"))
    assert set(curves(tmp_path / "out")["train/loss"]) == {1, 2, 3, 4, 5, 6}
    unfinish(tmp_path / "out", 0)
    run(recipe, resume=True)
    same(curves(tmp_path / "out"), recorded(tmp_path / "out"))


@pytest.mark.parametrize("method", ["start", "store_init_configuration", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_with_one_note(make_recipe, tmp_path, capsys, monkeypatch, method):
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    def fail(self, *args, **kwargs):
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(TensorBoardTracker, method, fail)
    run(make_recipe(report_to=["tensorboard"], train__max_steps=3))
    said = [line for line in capsys.readouterr().err.splitlines() if "tensorboard" in line]
    assert said == [
        "note: tensorboard failed (ConnectionError: no route to host); the run continues without it, and metrics.jsonl has everything"
    ]
    assert (
        len([record for record in read_jsonl(tmp_path / "out/metrics.jsonl") if "loss" in record]) == 3
        and (tmp_path / "out/adapter").is_dir()
    )


def test_trackers_are_finished_when_a_run_ends_badly(make_recipe, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from accelerate.tracking import TensorBoardTracker

    from llmkd.training import trainer as session

    finished = []
    real = TensorBoardTracker.finish
    monkeypatch.setattr(TensorBoardTracker, "finish", lambda self: finished.append(1) or real(self))
    monkeypatch.setattr(session, "train", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError):
        run(make_recipe(report_to=["tensorboard", "tensorboard"]))
    assert finished == [1]


def test_a_missing_package_is_one_line_before_anything_is_read(make_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as info:
        run(make_recipe(report_to=["wandb", "mlflow"], data__train__path="nowhere.jsonl"))
    assert info.value.problems == tuple(
        f"report_to: {name} is not installed; pip install {name}, or leave it out" for name in ("wandb", "mlflow")
    )
    assert not (tmp_path / "out").exists()


def test_an_unknown_tracker_is_refused(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(
        json.dumps({"output_dir": "x", "student": {"model": "m"}, "data": {"train": {"path": "t.jsonl"}}, "report_to": ["tensorbord"]})
    )
    assert main(["train", "--config", str(tmp_path / "r.yaml")]) == 2
    assert "did you mean tensorboard?" in capsys.readouterr().err


def test_wandb_offline_holds_the_figures(make_recipe, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(make_recipe(report_to=["wandb"], train__max_steps=2))
    stored = next((tmp_path / "out/trackers").rglob("*.wandb")).read_bytes()
    assert b"train/loss" in stored and b"student.lora.rank" in stored


def test_mlflow_holds_the_figures(make_recipe, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    run(make_recipe(report_to=["mlflow"], train__max_steps=2))
    found = mlflow.search_runs(experiment_names=["llmkd"], output_format="list")
    assert len(found) == 1 and found[0].info.status == "FINISHED"
    last = read_jsonl(tmp_path / "out/metrics.jsonl")[-1]
    assert found[0].data.metrics["train/loss"] == pytest.approx(last["loss"])
    assert found[0].data.params["student.lora.rank"] == "4"


def test_trackio_holds_the_figures(make_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    run(make_recipe(report_to=["trackio"], train__max_steps=2))
    assert b"train/loss" in b"".join(p.read_bytes() for p in (tmp_path / "trackio").rglob("llmkd*") if p.is_file())
