"""What a run's folder refuses before anything is read."""

from types import SimpleNamespace

import pytest

from llmkd.errors import UserError
from llmkd.output.run_folder import RunFolder


def test_a_folder_that_cannot_be_made_is_refused_at_once_and_one_that_can_leaves_nothing(tmp_path, monkeypatch):
    RunFolder(SimpleNamespace(output_dir=str(tmp_path / "a/b/c")), False).check()
    assert not list(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for name in ("relative", "relative/run"):  # that is there, and that is not
        (tmp_path / "relative").mkdir(exist_ok=True)
        RunFolder(SimpleNamespace(output_dir=name), False).check()
    assert not list((tmp_path / "relative").iterdir())
    for name in ("/proc/nowhere/run", "/proc/nowhere"):
        with pytest.raises(UserError, match=f"output_dir: {name} cannot be made"):
            RunFolder(SimpleNamespace(output_dir=name), False).check()
