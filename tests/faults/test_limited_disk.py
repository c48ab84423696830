"""A disk on which no file may grow beyond a limit: every command that writes says so in one line, and goes on where there is room."""

import contextlib
import json
import resource

import pytest

from llmkd.cli import main
from tests.conftest import plain_recipe, said
from tests.faults.jobs import names


@contextlib.contextmanager
def files_of_at_most(size: int):
    """Python ignores the signal that comes with it, so a longer write is an OSError (EFBIG), as on a full disk (ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def recipe(world, tmp_path) -> str:
    settings = plain_recipe(world, tmp_path / "out")
    settings["teacher"] |= {"cache": {"path": str(tmp_path / "cache"), "kind": "hidden"}}
    settings["data"] |= {"cache_dir": None}
    (tmp_path / "r.yaml").write_text(json.dumps(settings))
    return str(tmp_path / "r.yaml")


@pytest.mark.parametrize("command", ["train", "cache", "export"])
def test_a_file_that_may_not_grow_is_said_in_one_line_and_nothing_half_written_stays(recipe, tmp_path, capsys, command):
    words = {
        "train": ["train", "--config", recipe, "--teacher.cache", "null"],
        "cache": ["cache", "--config", recipe],
        "export": ["export", str(tmp_path / "out")],
    }
    if command == "export":
        assert main(words["train"]) == 0
    before = names(tmp_path)
    limit = {"train": 12_000, "cache": 12_000, "export": 20_000}[command]
    said(capsys)
    with files_of_at_most(limit):
        assert main(words[command]) == 1
    lines = [line for line in said(capsys).splitlines() if line.startswith("llmkd: ")]
    assert len(lines) == 1 and "bug" not in lines[0] and ("disk" in lines[0] or "too large" in lines[0].lower()), lines
    assert command != "train" or lines[0].endswith("then continue with --resume (from step 1: no checkpoint was written yet)")
    assert ".tmp-" not in names(tmp_path)
    if command == "export":
        assert names(tmp_path) == before
    again = [*words[command], "--resume"] if command == "train" else words[command]
    assert main(again) == 0
