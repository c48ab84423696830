"""`--json` of the evaluation's commands: what their tables round, with keys that say what it is."""

import json

import pytest

pytest.importorskip("lm_eval")
from llmkd.cli import main
from tests.kit.questions import hellaswag, write_rows
from tests.kit.sweep_report import TWO


def test_report_and_compare_write_every_number_unrounded(made, capsys):
    folder = made(TWO)
    assert main(["report", str(folder), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "report.html" in err and found["baseline"] == "sft"
    assert [(run["name"], run["status"], run["before"]["ce"], run["changes"]) for run in found["runs"]] == [
        ("sft", "done", 3.0, {"loss.kd_ratio": 0}),
        ("kd", "done", 3.0, {}),
    ]
    assert {(one["best"]["task"], one["best"]["metric"], one["best"]["arm"]) for one in found["best"]} >= {
        ("quiz", "acc", "kd"),
        ("held_out", "ce", "kd"),
    }
    arms = [f"{name}={folder}/arms/{name}" for name in ("sft", "kd")]
    assert main(["compare", *arms, "--json", str(folder / "new/c.json")]) == 0
    rows = json.loads((folder / "new/c.json").read_text())["rows"]
    assert (
        sorted(map(json.dumps, rows)) == sorted(map(json.dumps, found["rows"]))
        and {"value", "difference", "interval", "p", "p_adjusted", "verdict"} <= rows[0].keys()
    )
    (kd,) = [row for row in rows if (row["task"], row["metric"], row["arm"]) == ("quiz", "acc", "kd")]
    assert f"{kd['value']:.4f}" in capsys.readouterr().out and kd["difference"] > 0


def test_tasks_and_their_data_as_json(tmp_path, capsys):
    write_rows(tmp_path / "data/one.jsonl", [hellaswag(i) for i in range(3)])
    assert main(["tasks", str(tmp_path / "data"), "--to", str(tmp_path / "to"), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == [
        {"task": "hellaswag", "file": str(tmp_path / "to/hellaswag.yaml"), "data": [str(tmp_path / "data/one.jsonl")]}
    ]
    assert "hellaswag.yaml" in err


def test_what_a_sweep_did_is_there_also_when_a_run_of_it_failed(world, tmp_path, capsys):
    """The exit code says that it failed, and the file what the others found."""
    recipe = {
        "student": {"model": str(world / "student"), "lora": {"rank": 2}},
        "data": {"train": {"path": str(world / "train.jsonl")}, "max_length": 256},
    }
    recipe |= {
        "output_dir": "out",
        "train": {"max_steps": 1, "batch_size": 4},
        "data": recipe["data"] | {"validation": {"path": str(world / "held.jsonl")}},
    }
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    arms = {"good": {}, "bad": {"optim.lr": 1000, "student.dtype": "float16", "train.max_steps": 3}}
    (tmp_path / "s.json").write_text(json.dumps({"output_dir": str(tmp_path / "sweep"), "recipe": "r.json", "arms": arms}))
    assert main(["sweep", "--config", str(tmp_path / "s.json"), "--json", str(tmp_path / "out.json")]) == 2
    runs = {run["name"]: run for run in json.loads((tmp_path / "out.json").read_text())["runs"]}
    assert (runs["good"]["status"], runs["bad"]["status"]) == ("done", "failed") and runs["bad"]["reason"]
    assert runs["good"]["validation"]["ce"] > 0 and runs["bad"]["validation"] is None
