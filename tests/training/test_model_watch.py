"""Files of models that change between the check and the loading, or while a run uses them, are noticed by name."""

import re
import shutil
from pathlib import Path

import pytest

from llmkd.errors import ChangedFiles, UserError
from llmkd.output.run_folder import RunFolder
from llmkd.training import checkpoint
from llmkd.training.model_watch import ModelWatch
from llmkd.training.prepare import prepare
from llmkd.training.run import run
from tests.conftest import distance, weights


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("student/model.safetensors", "the student's base (model.safetensors)"),
        ("student/config.json", "the student's base (config.json)"),
        ("teacher/model.safetensors", "the teacher's base (model.safetensors)"),
        ("adapter/adapter_model.safetensors", "the teacher's adapter (adapter_model.safetensors)"),
        ("adapter/adapter_config.json", "the teacher's adapter (adapter_config.json)"),
    ],
)
def test_one_bit_of_any_model_file_is_noticed_by_name(make_recipe, world, tmp_path, file, named):
    for name in ("student", "teacher", "adapter"):
        shutil.copytree(world / name, tmp_path / name)
    teacher = {"model": str(tmp_path / "adapter"), "base": str(tmp_path / "teacher")}
    recipe = make_recipe(teacher=teacher, student__model=str(tmp_path / "student"))
    prepared, folder = prepare(recipe), RunFolder(recipe, True)
    folder.claim(prepared.identity)
    folder.release()
    watch = ModelWatch(prepared)
    (tmp_path / file).touch()
    assert watch.changed(every=0) is None
    content = bytearray((tmp_path / file).read_bytes())
    at = content.index(b"rms_norm_eps") + 15 if b"rms_norm_eps" in content else content.index(b'"r":') + 5 if b'"r":' in content else -1
    content[at] ^= 1
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(named)} has changed since the run in .* was started"):
        folder.claim(prepare(recipe).identity)
    with pytest.raises(ChangedFiles, match=f"^{re.escape(named)} was changed while the run was starting"):  # between check and loading
        ModelWatch(prepared)
    assert watch.changed(every=3600) is None
    assert watch.changed(every=0) == f"{named} was changed while the run was using it"
    (tmp_path / file).unlink()
    assert f"{Path(file).name}" in watch.changed(every=0)


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_a_model_file_that_is_rewritten_under_a_run_ends_it_with_all_that_it_has_learnt(make_recipe, world, tmp_path, monkeypatch, model):
    for name in ("student", "teacher"):
        shutil.copytree(world / name, tmp_path / name)
    models = {"student__model": str(tmp_path / "student"), "teacher": {"model": str(tmp_path / "teacher")}}
    settings = models | {"train__max_steps": 4, "optim__warmup_steps": 0, "checkpoint__every": 2, "checkpoint__keep": 9}
    run(make_recipe("whole", **settings))
    path = tmp_path / model / "model.safetensors"
    before, save = path.read_bytes(), checkpoint.save

    def overwrite(*arguments):
        """As `cp` does it: cut short first, then filled with something else; the same file all the while."""
        with open(path, "r+b") as file:
            file.truncate(100)
            file.truncate(len(before))
        return save(*arguments)

    monkeypatch.setattr(ModelWatch.changed, "__defaults__", (0.0,))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", overwrite)
        with pytest.raises(
            ChangedFiles, match="were changed while the run was using them .*the run is saved after step 3: restore the file"
        ):
            run(make_recipe("out", **settings))
    assert ChangedFiles.exit_code == 1
    path.write_bytes(before)
    run(make_recipe("out", **settings), resume=True)
    assert distance(weights(tmp_path / "out"), weights(tmp_path / "whole")) == 0
