"""`--json`: there for every command that prints a table, whole numbers of it, alone on stdout, and refused early where it cannot be written."""

import contextlib
import io
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from llmkd import cli
from llmkd.commands import arguments
from llmkd.commands.outputs import check_file, json_results, plain, write_file
from llmkd.errors import UserError
from llmkd.files import NotAFile, write_atomic


def test_every_command_that_prints_a_table_takes_json():
    with_json = {command.name for command in arguments.COMMANDS if any(option.flag == "--json" for option in command.options)}
    others = {"export", "init", "completion"}  # they print a path or a script
    assert with_json == set(cli.COMMANDS) - others


def test_values_become_plain_json():
    @dataclass
    class Point:
        x: float
        where: Path

    assert plain({"a": [Point(np.float64(0.1), Path("a/b")), (1, True, None)], 2: {"n": float("nan"), "i": float("-inf")}}) == {
        "a": [{"x": 0.1, "where": "a/b"}, [1, True, None]],
        "2": {"n": None, "i": None},
    }


def test_a_dash_leaves_stdout_to_json_and_a_file_leaves_it_to_the_table(tmp_path):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with json_results("-") as write:
            print("table")
            write({"x": 1 / 3})
        with json_results(str(tmp_path / "new" / "f.json")) as write:
            print("second")
            write([])
        with json_results(None) as write:
            write({"nowhere": 1})
    text, found = out.getvalue(), json.loads((tmp_path / "new/f.json").read_text())
    assert json.loads(text.removesuffix("second\n")) == {"x": 1 / 3} and err.getvalue() == "table\n" and found == []


def test_a_file_that_cannot_be_written_is_refused_before_the_command_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "recipes", lambda *_: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "f.json", "/proc/none/f.json", ""):
        assert cli.main(["recipes", "--json", str(path)]) == 2 and "--json: " in capsys.readouterr().err
    with pytest.raises(UserError), json_results(str(tmp_path)):
        pass
    with pytest.raises(UserError, match="--to: - is no file name; only --json writes to stdout"):
        check_file("-", "--to")


def test_a_pipe_is_written_to_and_a_link_stays_one(tmp_path):
    """A file that is renamed to /dev/null, by root, would take its place."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("file")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("pipe", "link"):
        check_file(str(tmp_path / name), "--json")
        write_file(str(tmp_path / name), name)
    assert os.read(reader, 99) == b"pipe" and stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)
    assert (tmp_path / "file").read_text() == "link" and os.readlink(tmp_path / "link") == "file"
    with pytest.raises(NotAFile):
        write_atomic(tmp_path / "pipe", "x")
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)
    os.close(reader)


def test_a_file_that_a_process_has_open_is_not_replaced(tmp_path):
    with open(tmp_path / "a", "w") as file, pytest.raises(UserError, match="is a file that is open already; name a file of its own"):
        check_file(f"/dev/fd/{file.fileno()}", "--json")


def test_recipes_and_data_as_json(world, tmp_path, capsys):
    assert cli.main(["recipes", "--json", "-"]) == 0
    assert "quickstart/2_distill.yaml" in [one["path"] for one in json.loads(capsys.readouterr().out)["quickstart"]]
    recipe = {
        "output_dir": "out",
        "student": {"model": str(world / "student")},
        "data": {"train": {"path": str(world / "train.jsonl")}, "max_length": 256},
    }
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    assert cli.main(["data", "--config", str(tmp_path / "r.json"), "--json", "-"]) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["data.train"]
    assert (row["rows"], row["examples"]) == (37, 37) and row["supervised"] == row["targets"] / row["tokens"]
    assert f"{row['supervised']:.1%}" in err and f"{row['tokens']:,}" in err and "example " in err
