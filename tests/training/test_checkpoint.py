"""A checkpoint that is not whole, not of this run or not of the step in its name is passed over by name, and the next older one is taken."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmkd.errors import UserError, exit_code
from llmkd.files import Damaged, read_sealed, sha256_file, write_sealed
from llmkd.training import checkpoint

RUN, OTHER = {"settings": "a", "data or models": "b"}, {"settings": "x", "data or models": "b"}
STATE = {"best": None, "validated": None}


def save(folder, step: int, run: dict = RUN, state: dict = STATE) -> None:
    folder.mkdir(exist_ok=True)
    weights = torch.nn.Parameter(torch.full((4,), float(step)))
    checkpoint.save(folder, step, checkpoint.snapshot({"w": weights}, torch.optim.SGD([weights], lr=0.1)), state, run)


def test_too_little_room_for_a_checkpoint_is_a_full_disk_and_the_one_before_stays(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=19))
    assert exit_code(lambda: save(tmp_path, 2)) == 1  # 16 bytes, and a fifth more
    assert "llmkd: the disk is full (" in (said := capsys.readouterr().err) and "0.0 MB needed for a checkpoint" in said
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=20))
    save(tmp_path, 2)


def reseal(path, **changes) -> None:
    """A manifest that is whole and says something else."""
    write_sealed(path / "manifest.json", read_sealed(path / "manifest.json") | changes)


def with_state(path, content: str) -> None:
    """A state that the manifest is made of."""
    (path / "state.json").write_text(content)
    about = {"bytes": len(content), "sha256": sha256_file(path / "state.json")}
    reseal(path, files=read_sealed(path / "manifest.json")["files"] | {"state.json": about})


def as_folder(path) -> None:
    path.unlink()
    path.mkdir()


FAULTS = {
    "of another run": (lambda p: (shutil.rmtree(p), save(p.parent, 3, OTHER)), "it belongs to another run, which differs in settings"),
    "of other data": (lambda p: (shutil.rmtree(p), save(p.parent, 3, RUN | {"data or models": "?"})), "which differs in data or models"),
    "renamed": (lambda p: (shutil.rmtree(p), shutil.copytree(p.with_name("step-1"), p)), "it was written as step-1"),
    "name with zeros": (lambda p: p.rename(p.with_name("step-03")), "manifest.json: no such file"),
    "empty": (lambda p: [one.unlink() for one in p.iterdir()], "manifest.json: no such file"),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("")), "not a directory"),
    "no files named": (lambda p: reseal(p, files={}), "cannot be used"),
    "files is a list": (lambda p: reseal(p, files=[]), "names no step, run and files"),
    "files is null": (lambda p: reseal(p, files=None), "names no step, run and files"),
    "no run": (lambda p: reseal(p, run=None), "names no step, run and files"),
    "entry without size": (lambda p: reseal(p, files={"student.safetensors": {}}), "cannot be used"),
    "state of another step": (lambda p: with_state(p, json.dumps(STATE | {"step": 2})), "state.json does not belong to that step"),
    "state without best": (lambda p: with_state(p, json.dumps({"step": 3})), "state.json cannot be used: 'best'"),
    "odd best": (lambda p: with_state(p, json.dumps(STATE | {"step": 3, "best": {"by": "ce"}})), "state.json cannot be used: 'step'"),
    "state is a list": (lambda p: with_state(p, "[]"), "it holds a list, expected an object"),
    "state is empty": (lambda p: with_state(p, ""), "it is empty"),
    "manifest empty": (lambda p: (p / "manifest.json").write_text(""), "it is empty"),
    "manifest is a list": (lambda p: (p / "manifest.json").write_text("[]"), "it holds a list"),
    "manifest is a folder": (lambda p: as_folder(p / "manifest.json"), "is a directory"),
    "weights missing": (lambda p: (p / "student.safetensors").unlink(), "student.safetensors: no such file"),
    "weights are a folder": (lambda p: as_folder(p / "student.safetensors"), "student.safetensors"),
    "arrays of nothing": (
        lambda p: (
            (p / "state.npz").write_text("no"),
            reseal(
                p, files=read_sealed(p / "manifest.json")["files"] | {"state.npz": {"bytes": 2, "sha256": sha256_file(p / "state.npz")}}
            ),
        ),
        "state.npz holds no arrays",
    ),
    "moments cut": (lambda p: os.truncate(p / "optimizer.safetensors", 9), "optimizer.safetensors has 9 bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_cannot_be_used_is_passed_over_by_name(tmp_path, fault):
    folder, said = tmp_path / "checkpoints", []
    for step in (1, 2, 3):
        save(folder, step)
    spoil, words = FAULTS[fault]
    spoil(folder / "step-3")
    (found,) = checkpoint.newest([folder], [RUN], 9, said.append)
    assert (found.step, found.path) == (2, folder / "step-2")
    (line,) = said
    assert line.startswith(f"passing over the checkpoint {folder}/step-3 (") and words in line
    checkpoint.drop_after(folder, 2)
    assert sorted(path.name for path in folder.iterdir()) in (["step-1", "step-2"], ["step-03", "step-1", "step-2"])


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "student.safetensors", "optimizer.safetensors", "state.npz"])
def test_every_byte_of_a_checkpoint_counts(tmp_path, name):
    folder = tmp_path / "checkpoints"
    save(folder, 1, state=STATE | ({"a": np.arange(3)} if name == "state.npz" else {}))
    path = folder / "step-1" / name
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        try:
            found = checkpoint.verified(folder / "step-1", RUN)
        except checkpoint.Unusable:
            continue
        assert name == "manifest.json" and found.state == {"step": 1} | STATE  # a blank, or the name of the checksum


def test_one_beyond_the_last_step_is_passed_over(tmp_path):
    folder, said = tmp_path / "checkpoints", []
    for step in (4, 5):
        save(folder, step)
    assert checkpoint.newest([folder], [RUN], 4, said.append)[0].step == 4
    assert "beyond the run's last step, 4" in said[0]


def test_students_side_by_side_take_the_newest_step_that_is_usable_for_all(tmp_path):
    folders, said = [tmp_path / name for name in "ab"], []
    for folder, run in zip(folders, (RUN, OTHER), strict=True):
        for step in (1, 2):
            save(folder, step, run)
    reseal(folders[1] / "step-2", run=RUN)
    found = checkpoint.newest(folders, [RUN, OTHER], 9, said.append)
    assert [one.path for one in found] == [folder / "step-1" for folder in folders]
    assert said == [f"passing over the checkpoint {folders[1]}/step-2 (it belongs to another run, which differs in settings)"]


def test_students_of_whose_own_no_step_is_usable_are_named_one_by_one(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder, run in zip(folders, (RUN, OTHER, OTHER), strict=True):
        for step in (1, 2):
            save(folder, step, run)
    reseal(folders[0] / "step-2", run=OTHER)
    with pytest.raises(UserError) as refused:
        checkpoint.newest(folders, [RUN] * 3, 9)
    assert refused.value.student == 1 and all(str(folders[1]) in problem for problem in refused.value.problems)
    with pytest.raises(UserError) as refused:
        checkpoint.newest(folders[1:], [RUN] * 2, 9)
    assert not hasattr(refused.value, "student") and len(refused.value.problems) == 5


def test_a_step_that_one_student_has_not_reached_is_none_to_resume_from(tmp_path):
    folders, said = [tmp_path / name for name in "ab"], []
    for folder, steps in zip(folders, [(1, 2), (1,)], strict=True):
        for step in steps:
            save(folder, step, RUN)
    assert [one.step for one in checkpoint.newest(folders, [RUN, RUN], 9, said.append)] == [1, 1] and said == []


def test_where_none_can_be_used_each_is_named(tmp_path):
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        save(folder, step, OTHER)
    with pytest.raises(UserError) as refused:
        checkpoint.newest([folder], [RUN], 9)
    assert [step for step in (2, 1) if any(f"step-{step} (it belongs to another run" in one for one in refused.value.problems)] == [2, 1]
    assert refused.value.problems[-1].endswith("start again in another output_dir")


def test_a_checkpoint_does_not_bring_back_a_run_that_was_removed(tmp_path):
    weights = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "gone/checkpoints", 1, checkpoint.Snapshot({"w": weights}, {}), STATE, RUN)
    assert not (tmp_path / "gone").exists()


def test_a_sealed_file_of_an_earlier_version_is_read_and_a_changed_one_is_not(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, {"b": 1, 2: (3,), "ä": None})
    assert read_sealed(path) == {"b": 1, "2": [3], "ä": None}
    path.write_text(path.read_text().replace("1", "2", 1))
    with pytest.raises(Damaged, match='does not match its checksum; after a change of your own delete the "checksum"'):
        read_sealed(path)
    path.write_text('{"b": 2}')
    assert read_sealed(path) == {"b": 2}
