"""The file of answers: only added to, for one process alone, and nothing that is not its own is touched."""

import json
import os

import pytest

from llmkd.errors import UserError
from llmkd.files import lock_file
from llmkd.rollouts.answer_file import AnswerFile, Written, about_path, read_about

ABOUT = {"writer": {"part": "model", "model": "m", "weights": {}}, "learnt_from": []}
SETTINGS = {"temperature": 1.0, "top_k": None}


def row(key: str, targets: int = 2, finished: bool = True) -> dict:
    tokens = {"input_ids": [5] * (1 + targets), "loss_mask": [0] + [1] * targets, "tokenizer": "t"}
    return tokens | {"finished": finished, "answer": "é\n", "key": key}


@pytest.fixture
def file(tmp_path):
    return AnswerFile(tmp_path / "sub" / "a.jsonl", SETTINGS, ABOUT)


def test_what_is_added_is_read_again_and_kept_byte_for_byte(file):
    with file.open(["a", "b", "c"]):
        file.add([row("a"), row("b", 1, False)])
        then = file.path.read_bytes()
    assert then.count(b"\n") == 2 and "é" in then.decode()
    again = AnswerFile(file.path, SETTINGS, ABOUT)
    with again.open(["a", "b", "c"]):
        assert again.written == {"a": Written(2, True, 3), "b": Written(1, False, 2)}
        again.add([row("c")])
        again.complete()
    assert file.path.read_bytes().startswith(then)
    assert read_about(file.path) == ABOUT | {"settings": SETTINGS, "complete": True, "rows": [3, "000000000000000d"]}  # a ^ b ^ c


def test_a_part_of_a_last_line_is_removed_also_where_it_is_a_whole_object(file, capsys):
    with file.open(["a", "b"]):
        file.add([row("a")])
    whole = file.path.read_bytes()
    for part in (b'{"inp', json.dumps(row("b")).encode()):
        file.path.write_bytes(whole + part)
        again = AnswerFile(file.path, SETTINGS, ABOUT)
        with again.open(["a", "b"]):
            assert list(again.written) == ["a"] and file.path.read_bytes() == whole
        assert f"a.jsonl: {len(part)} bytes of an unfinished last line are removed" in capsys.readouterr().err


def test_what_cannot_be_gone_on_with_is_refused_and_left_as_it_is(file):
    with file.open(["a", "b"]):
        file.add([row("a"), row("b")])

    def refused(message: str, settings=SETTINGS, asked=("a", "b")) -> None:
        before = file.path.read_bytes()
        with pytest.raises(UserError, match=message), AnswerFile(file.path, settings, ABOUT).open(asked):
            pass
        assert file.path.read_bytes() == before

    refused("was written with temperature 1.0, not 0.5; name another file", {"temperature": 0.5, "top_k": None})
    refused("with top_k None, not 3", {"temperature": 1.0, "top_k": 3})
    refused("holds 1 answers that are not asked for", asked=("a", "c"))
    lines = file.path.read_bytes().splitlines(keepends=True)
    for column, other in (("input_ids", b"[5, 6, 5]"), ("loss_mask", b"[0, 0, 1]"), ("finished", b"false"), ("key", b'"c"')):
        now = json.dumps(json.loads(lines[0])[column]).encode()
        assert lines[0].count(b'"%s": %s' % (column.encode(), now)) == 1
        file.path.write_bytes(lines[0].replace(b'": ' + now, b'": ' + other) + lines[1])
        refused(r"a.jsonl:1 is damaged; delete the line")
    file.path.write_bytes(lines[0] + lines[0])
    refused(r"a.jsonl:2 repeats the answer of an earlier line")
    file.path.write_bytes(b'{"key": "a"}\n' + lines[1] + b"{")
    refused(r"a.jsonl:1 is damaged; delete the line")
    about_path(file.path).write_text("{}")
    refused("roll.json: is damaged or cannot be read")
    about_path(file.path).unlink()
    refused("was not written by llmkd roll")


def test_a_pipe_of_its_name_is_refused(file):
    file.path.parent.mkdir()
    os.mkfifo(file.path)
    with pytest.raises(UserError, match=r"a.jsonl cannot be written \(it is a pipe or a device, not a file\)"), file.open([]):
        pass


def test_two_processes_cannot_write_to_it(file):
    file.path.parent.mkdir()
    with lock_file(file.path), pytest.raises(UserError, match="another process writes to"), file.open([]):
        pass
