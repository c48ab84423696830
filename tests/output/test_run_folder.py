"""What a run's folder refuses before anything is read."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmkd.cli import main
from llmkd.commands.outputs import check_file
from llmkd.errors import UserError
from llmkd.files import read_sealed
from llmkd.output.metrics import MetricsLog, read_metrics
from llmkd.output.run_folder import RunFolder, lock_folder
from llmkd.training.build import lock_folders
from tests.conftest import said


def test_a_folder_that_cannot_be_made_is_refused_at_once_and_one_that_can_leaves_nothing(tmp_path, monkeypatch):
    RunFolder(SimpleNamespace(output_dir=str(tmp_path / "a/b/c")), False).check()
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for name in ("relative", "relative/run"):  # that is there, and that is not
        (tmp_path / "relative").mkdir(exist_ok=True)
        RunFolder(SimpleNamespace(output_dir=name), False).check()
    assert not list((tmp_path / "relative").iterdir())
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="output_dir: .*link is a link that leads nowhere; name a folder"):
        RunFolder(SimpleNamespace(output_dir=str(tmp_path / "link")), False).check()
    for name in ("/proc/nowhere/run", "/proc/nowhere"):
        with pytest.raises(UserError, match=f"output_dir: {name} cannot be created"):
            RunFolder(SimpleNamespace(output_dir=name), False).check()


def test_what_is_tried_has_another_name_than_the_folder(tmp_path, monkeypatch):
    """Else another process of the same run would find a folder that is gone a moment later."""
    made, real = [], Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda self, *options, **more: (made.append(self), real(self, *options, **more)))
    RunFolder(SimpleNamespace(output_dir=str(tmp_path / "a/b")), False).check()
    check_file(str(tmp_path / "a/f.json"), "--json")
    assert len({str(path) for path in made}) == 2 and all(path.parent == tmp_path and path.name != "a" for path in made)


@pytest.mark.parametrize("done", ["removed", "renamed", "replaced"])
def test_a_folder_that_is_moved_under_its_run_ends_it_with_one_line_and_is_not_made_again(command, tmp_path, monkeypatch, done):
    """Also where another run's folder has taken its place, which stays as it is."""
    real, out = MetricsLog.step, tmp_path / "out"

    def step(self, number, *rest):
        if number == 2:
            out.rename(tmp_path / "moved")
            if done == "removed":
                shutil.rmtree(tmp_path / "moved")
            if done == "replaced":
                (out / "checkpoints").mkdir(parents=True)
                (out / "metrics.jsonl").write_text("theirs\n")
                (out / ".lock").write_text("process 1 on another")
        real(self, number, *rest)

    monkeypatch.setattr(MetricsLog, "step", step)
    code, lines = command("--checkpoint.every", "1")
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith("llmkd: a file or folder is gone (") and f"{out}/.lock" in lines[0]
    assert lines[0].endswith("put it back, then continue with --resume (after step 1)")
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*")) if out.exists() else []
    assert left == ([".lock", "checkpoints", "metrics.jsonl"] if done == "replaced" else [])
    if done == "renamed":
        (tmp_path / "moved").rename(out)
        monkeypatch.setattr(MetricsLog, "step", real)
        assert command("--resume")[0] == 0


def test_metrics_that_are_gone_end_a_run_after_a_checkpoint(command, tmp_path, monkeypatch, capsys):
    """Not silently with a summary that lacks what was before."""
    real = MetricsLog.step

    def step(self, number, *rest):
        if number == 3:
            self.path.unlink()
        real(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "step", step)
        code, lines = command()
    assert code == 1 and "metrics.jsonl" in lines[0]
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["step-3"]
    capsys.readouterr()
    assert main(["train", "--config", str(tmp_path / "r.yaml"), "--resume"]) == 0
    assert "metrics.jsonl is missing, so loss.png and the report lack" in said(capsys)
    summary = read_sealed(tmp_path / "out/summary.json")
    assert summary["before"] == {} and "kd" in summary["train"]


def test_damaged_lines_of_metrics_are_named_and_the_lines_after_them_are_read(tmp_path):
    records = [
        {"step": 1, "loss": 3.0},
        {"step": 1, "validation": {"ce": 2.0}},
        {"step": 2, "loss": float("nan")},
        {"step": 3, "loss": 1.0},
    ]
    lines = [json.dumps(record).encode() for record in records]
    foreign = [b"", b"[]", b"null", b"\xff\xfe", b'{"step": 2, "lo', b'{"loss": 1.0}', b'{"step": "2", "loss": 1.0}', b'{"step": 2}']
    foreign += [b'{"step": 2, "validation": 3}', b'{"step": 2, "validation": {"ce": "x"}}', b'{"step": 2, "loss": null}', b"[" * 100_000]
    for bad in foreign:
        for at in range(len(lines)):
            said = []
            (tmp_path / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in (*lines[:at], bad, *lines[at:])))
            assert str(read_metrics(tmp_path, said.append)) == str(records), bad[:50]
            assert len(said) == 1 and "metrics.jsonl" in said[0] and "is damaged and left out (" in said[0]
    for joined, left in ((lines[0][:20] + lines[1], records[1:]), (lines[0] + b"\x0b" + lines[1], records), (lines[0] + lines[1], records)):
        said = []
        (tmp_path / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in (joined, *lines[2:])))
        assert str(read_metrics(tmp_path, said.append)) == str(left) and len(said) == 1
    said = []
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(line + b"\n" for line in lines) + b'{"step": 4, "lo')
    assert len(read_metrics(tmp_path, said.append)) == 4 and not said  # a kill's, which is no damage
    (tmp_path / "metrics.jsonl").unlink()
    assert read_metrics(tmp_path, said.append) == [] and "is missing" in said[0]


def test_what_killed_commands_left_goes_with_the_next(command, tmp_path):
    leftovers = ("metrics.jsonl", "loss.png", "held_out.jsonl", "recipe.yaml", "merged")
    assert command("--train.max_steps", "1", "--optim.warmup_steps", "0")[0] == 0
    (tmp_path / "out/summary.json").unlink()
    for name in leftovers:
        (tmp_path / f"out/{name}.tmp-1-0123abcd").mkdir() if name == "merged" else (tmp_path / f"out/{name}.tmp-1-0123abcd").write_text("x")
    (tmp_path / "out/mine.tmp").write_text("the user's")
    assert command("--resume", "--train.max_steps", "1", "--optim.warmup_steps", "0")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir() if ".tmp" in path.name] == ["mine.tmp"]


def test_a_machine_whose_name_is_no_text_locks_its_folders_too(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: os.fsdecode(b"caf\xe9"))
    with lock_folder(tmp_path / "run"), pytest.raises(UserError, match=r"in use by process \d+ on caf\?"):
        lock_folder(tmp_path / "run")


def test_no_folder_is_claimed_before_every_process_has_looked_at_it():
    order = []
    folder = SimpleNamespace(claim=lambda identity: order.append("claimed") or identity)
    student = SimpleNamespace(folder=folder, prepared=SimpleNamespace(identity={"a": "b"}))
    lock_folders([student], SimpleNamespace(wait_for_everyone=lambda: order.append("all are here"), is_main_process=True, num_processes=1))
    assert order == ["all are here", "claimed"] and folder.run == {"a": "b"}


def test_a_file_that_is_gone_since_a_run_was_started_is_missed(make_recipe):
    folder, named = RunFolder(make_recipe(), True), "the student's base (generation_config.json)"
    before = folder.claim({"the training data": "1", named: "2"})
    folder.release()
    with pytest.raises(UserError, match=rf"^{re.escape(named)} is gone since the run in .* was started; restore it"):
        folder.claim({"the training data": "1"})
    folder.release()
    assert folder.claim({"the training data": "1", named: "2"}) == before
    folder.release()
