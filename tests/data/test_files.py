"""Files are read strictly: errors name the place of every bad row and file."""

import gzip
import json
import os
import sys

import pytest

from llmkd.config.recipe import Source
from llmkd.data.reading.sources import read_source
from llmkd.errors import UserError
from tests.kit.data import GOOD

BAD_LINES = [
    ("{bad", "not valid JSON"),
    (GOOD + " x", "not valid JSON"),
    (GOOD + GOOD, "not valid JSON"),
    (GOOD[:-1], "not valid JSON"),
    ("[" * 100_000, "not valid JSON"),
    ('{"instruction": "a", "output": "\x01"}', "not valid JSON"),
    ('{"instruction": "a", "output": NaN}', "NaN is not JSON"),
    ('{"instruction": "a", "output": "b", "score": -Infinity}', "-Infinity is not JSON"),
    ('{"instruction": "a", "output": "b", "output": "c"}', "the key 'output' is given twice"),
    ('{"instruction": "a", "output": "b", "more": {"x": 1, "x": 2}}', "the key 'x' is given twice"),
    ('{"instruction": "a", "output": "\\ud800"}', "output contains half of a surrogate pair"),
    ('{"instruction": 1, "output": "b"}', 'instruction is a number, expected text; put it in quotes: "1"'),
    ('{"instruction": "a", "output": true}', "output is true or false, expected text"),
    ('{"instruction": "a", "output": ["b"]}', "output is a list, expected text"),
    ('{"instruction": "a", "output": null}', "output is null, expected text"),
    ('{"instruction": "a", "output": "b", "input": 1}', "input is a number, expected text"),
    ('{"instruction": "a"}', "no column 'output'; found 'instruction'"),
    ('{"instrction": "a", "output": "b"}', "no column 'instruction'; did you mean 'instrction'?"),
    ('{"instruction": "a", "inputs": "x", "output": "b"}', "set fields: {input: inputs}, or set ignore: [inputs]"),
    ('{"instruction": "a", "output": "b", "n": ' + "9" * 5000 + "}", "not valid JSON (a number of 5000 digits)"),
    ("[1]", "found a list, expected an object"),
    ("null", "found null, expected an object"),
    ('"text"', "found text, expected an object"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named(refused, line, words):
    (problem,) = refused(f"{GOOD}\n\n{line}\n{GOOD}\n")
    assert problem.startswith("t.jsonl:3: ") and words in problem
    assert len(problem.splitlines()) == 1


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("[]", "messages is empty"),
        ("null", "messages is null, expected a list"),
        ('"hello"', "messages is text, expected a list"),
        ("[1]", "messages[0] is a number"),
        (
            '[{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]',
            "messages[1].role is 'bot', expected one of system, developer, user, assistant, tool",
        ),
        ('[{"content": "a"}]', "messages[0] has no 'role', expected one of"),
        ('[{"role": ["user"], "content": "a"}]', "messages[0].role is ['user']"),
        ('[{"role": "user"}]', "messages[0] has no 'content'; found 'role'"),
        ('[{"role": "user", "content": null}]', "messages[0].content is null, expected text"),
        ('[{"role": "user", "text": "x"}]', "messages[0] has no 'content'; found 'role', 'text'; set fields: {content: text}"),
        (
            '[{"role": "user", "content": [{"type": "text"}]}]',
            "messages[0].content[0] is a part of type 'text', expected {type: text, text: ...}",
        ),
        ('[{"role": "user", "content": "\\udfff"}]', "messages[0].content contains half of a surrogate pair"),
    ],
)
def test_a_bad_conversation_is_named(refused, messages, words):
    (problem,) = refused(f'{{"messages": {messages}}}', format="chat")
    assert problem.startswith("t.jsonl:1: ") and words in problem


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        ("chat", '{"message": []}', "no column 'messages'; did you mean 'message'?"),
        (
            "chat",
            '{"conversations": []}',
            "no column 'messages'; found 'conversations'; set fields: {messages: conversations} if the file has other names",
        ),
        (
            "chat",
            '{"talk": [{"from": "human", "value": "a"}], "id": 1}',
            "no column 'messages'; found 'talk', 'id'; set fields: {messages: talk, role: from, content: value}, roles: {user: human, "
            "assistant: gpt}",
        ),
        (
            "chat",
            '{"instruction": "a", "output": "b"}',
            "no column 'messages'; found 'instruction', 'output'; set format: alpaca, chat_template: true",
        ),
        ("text", '{"txt": "a"}', "no column 'text'; found 'txt'; set fields: {text: txt}"),
        ("text", "{}", "no column 'text'; found none"),
    ],
)
def test_a_missing_column_is_named(refused, format, row, words):
    assert refused(row, format=format) == [f"t.jsonl:1: {words}"]


def test_a_file_of_another_format_is_named_once_with_the_setting_that_fits(refused):
    rows = "\n".join(['{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'] * 30)
    assert refused(rows, format="alpaca") == [
        "t.jsonl:1: no columns 'instruction' and 'output'; found 'messages'; set format: chat",
        "... and 29 more rows: no columns 'instruction' and 'output' in t.jsonl",
    ]
    rows = "\n".join(['{"question": "a", "answer": "b"}'] * 2)
    assert refused(rows, format="prompt_completion")[:1] == [
        "t.jsonl:1: no columns 'prompt' and 'completion'; found 'question', 'answer'; set fields: {prompt: question, completion: answer}",
    ]


@pytest.fixture(params=[1000, 20_000])
def recursion_limit(request):
    """The interpreter's own, which any library may raise. Reading does not depend on it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(request.param)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize("levels", [101, 700])
def test_what_is_nested_too_deeply_is_named(levels, refused, recursion_limit):
    text = '{"x": ' * levels + "1" + "}" * levels
    deep = json.loads(text)
    talk = [{"role": "user", "content": "q"} | deep, {"role": "assistant", "content": "a"}]
    words = ["t.jsonl:1: nested too deeply; give it at most 100 levels"]
    assert refused(json.dumps({"messages": talk}), format="chat") == words
    assert refused(json.dumps({"messages": talk[1:], "tools": [deep]}), format="chat") == words
    assert refused(json.dumps({"messages": talk[1:], "tools": f"[{text}]"}), format="chat") == words


def test_a_hundred_levels_are_read_and_one_more_is_not(read, refused):
    """The row, its list of tools, and 98 levels in a tool."""
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tool = {"name": "f", "x": json.loads('{"x": ' * 97 + "1" + "}" * 97)}
    assert read(json.dumps({"messages": talk, "tools": [tool]}), format="chat")
    assert refused(json.dumps({"messages": talk, "tools": [{"name": "f", "x": tool["x"] | {"y": tool["x"]}}]}), format="chat")


def test_half_a_surrogate_pair_in_tools_is_named(refused):
    row = '{"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "\\ud800"}]}'
    assert refused(row, format="chat") == [
        "t.jsonl:1: tools contains half of a surrogate pair, which is not a character; fix the file's encoding"
    ]


CHOICES = [
    ('"choices": ["x", "y"], "answer": 2', "answer is 2, expected an index from 0 to 1"),
    ('"choices": ["x", "y"], "answer": true', "answer is True"),
    ('"choices": ["x", "y"]', "no column 'answer'"),
    ('"choices": ["x"], "answer": 0', "at least two texts"),
    ('"answer": 0', "no column 'choices'"),
    ('"choices": ["x", "\\ud800"], "answer": 0', "surrogate"),
]


@pytest.mark.parametrize(("columns", "words"), CHOICES)
def test_a_bad_question_is_named(refused, columns, words):
    (problem,) = refused(f'{{"instruction": "a", {columns}}}', choices=True)
    assert problem.startswith("t.jsonl:1: ") and words in problem


@pytest.mark.parametrize(
    ("content", "name", "start"),
    [
        (b"\xef\xbb\xbf" + GOOD.encode(), "t.jsonl", "t.jsonl:1: starts with a byte order mark"),
        (b"\xef\xbb\xbf[]", "t.json", "t.json:1: starts with a byte order mark"),
        (GOOD.encode() + b'\n{"instruction": "caf\xe9"}', "t.jsonl", "t.jsonl:2: not UTF-8 (byte 0xe9)"),
        (GOOD.encode("utf-16"), "t.jsonl", "t.jsonl:1: the file is UTF-16; save it as plain UTF-8"),
        (GOOD.encode("utf-16-le"), "t.jsonl", "t.jsonl:1: the file has zero bytes, as UTF-16 has; save it as plain UTF-8"),
        (gzip.compress(GOOD.encode(), mtime=0), "t.jsonl", "t.jsonl:1: the file is compressed (gzip); unpack it"),
        (b"PK\x03\x04xl", "t.csv", "t.csv:1: the file is a zip archive; unpack it"),
        (b"PAR1\x15", "t.json", "t.json:1: the file is parquet; give it the ending .parquet"),
        ("version https://git-lfs.github.com/spec/v1\noid", "t.parquet", "t.parquet:1: the file is a pointer of Git LFS and not the data"),
        ("version https://git-lfs.github.com/spec/v1\noid", "t.jsonl", "t.jsonl:1: the file is a pointer of Git LFS and not the data"),
        (b"\n<!DOCTYPE html><html>", "t.arrow", "t.arrow:1: the file is a web page or XML; download the data itself"),
        ("", "t.jsonl", "data.train.path: t.jsonl has no rows"),
        ("\n \n", "t.jsonl", "data.train.path: t.jsonl has no rows"),
        ("[]", "t.json", "data.train.path: t.json has no rows"),
        ("", "t.json", "t.json:1: the file is empty, expected a list"),
        (f"\n{GOOD}\n{GOOD}", "t.json", "t.json:2: found"),
        (f"[{GOOD},\n\n{GOOD},\n]", "t.json", "t.json:4: not valid JSON"),
        (f"[{GOOD}\n{GOOD}]", "t.json", "t.json:2: not valid JSON"),
        (f"[{GOOD},,{GOOD}]", "t.json", "t.json:1: not valid JSON"),
        (f"[{GOOD},\n", "t.json", "t.json:2: not valid JSON"),
        (f"[\n{GOOD}\n", "t.json", "t.json:3: not valid JSON"),
        (f"[{GOOD}]\nmore", "t.json", "t.json:1: text after the end of the list ('more')"),
        (f'[{GOOD},\n{{"instruction": "x",\n "output": }}]', "t.json", "t.json:3: not valid JSON"),
        (f'[{GOOD},\n{{"instruction": "x", "output": NaN}}]', "t.json", "t.json:2: not valid JSON (NaN is not JSON)"),
        ("[1]", "t.json", "t.json:1: found a number, expected an object"),
        ("[" * 100_000, "t.json", "t.json:1: not valid JSON"),
        ('[{"n": ' + "9" * 5000 + "}]", "t.json", "t.json:1: not valid JSON (a number of 5000 digits)"),
        ('[{"x": NaN, "y": ' + "[" * 100_000 + "]" * 100_000 + "}]", "t.json", "t.json:1: not valid JSON (NaN is not JSON)"),
    ],
)
def test_a_bad_file_is_named(refused, content, name, start):
    (problem,) = refused(content, name)
    assert problem.startswith(start), problem


def test_the_lines_of_a_json_list_are_those_its_rows_start_on(refused, read):
    text = '\n[\n {\n "instruction": "a",\n "output": "b"},\n\n {"instruction": "a",\n "output": null}\n,{"output": "x"}\n]\n'
    assert [p.split(" ")[0] for p in refused(text, "t.json")] == ["t.json:7:", "t.json:9:"]
    places = read(text.replace("null", '"y"').replace('{"output"', '{"instruction": "", "output"'), "t.json").places
    assert [place.rsplit(":", 1)[1] for place in places] == ["3", "7", "9"]


def test_the_first_twenty_problems_are_shown_and_the_rest_counted(refused):
    problems = refused("\n".join([GOOD] + ['{"instruction": "a"}'] * 30))
    assert [p.split(" ")[0] for p in problems[:20]] == [f"t.jsonl:{n}:" for n in range(2, 22)]
    assert problems[20:] == ["... and 10 more problems like these"]


def test_problems_come_in_the_order_of_the_file(refused):
    problems = refused("\n".join(["{bad", '{"instruction": "a"}'] * 15))
    assert [p.split(" ")[0] for p in problems[:20]] == [f"t.jsonl:{n}:" for n in range(1, 21)]


def test_a_bad_value_in_a_json_list_hides_no_later_row(refused):
    assert len(refused('[{"instruction": "a", "output": NaN},\n{"instruction": 3, "output": "b"}]', "t.json")) == 2


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("tain.jsonl", ["No such file", "did you mean", "train.jsonl?"]),
        ("train.json", ["No such file", "did you mean", "train.jsonl?"]),
        ("nowhere/train.jsonl", ["No such file"]),
        ("table.csv", ["No such file"]),
        ("tain", ["does not exist", ".csv", "or a folder"]),
        ("notes.txt", ["is not a file of a known kind (.json, .jsonl, .csv, .parquet, .arrow)"]),
        ("", ["is not a file of a known kind", "has no data file"][1:]),
        ("a\0b.jsonl", []),
        ("pipe.jsonl", ["is a pipe or a device; save what it gives to a file"]),
        ("pipe", ["is a pipe or a device"]),
    ],
)
def test_a_missing_file_is_named_with_its_setting(tmp_path, path, words):
    (tmp_path / "train.jsonl").write_text(GOOD)
    (tmp_path / "notes.txt").write_text("x")
    path = path or "empty"
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError) as info:
        read_source(Source(path=f"{tmp_path}/{path}"), "data.train")
    (problem,) = info.value.problems
    assert problem.startswith("data.train.path: ") and all(word in problem for word in words), problem


def test_the_home_folder_of_an_unknown_user_is_a_missing_file():
    with pytest.raises(UserError):
        read_source(Source(path="~nobody-of-this-name/t.jsonl"), "data.train")


def test_good_rows_are_read_as_they_are(read):
    text = f'{GOOD}\r\n\n{{"instruction": "é 😀 \\u2028", "input": "", "output": "", "extra": [1.5, null]}}\r\n'
    rows = read(text)
    assert rows.rows == [json.loads(line) for line in text.split("\n") if line.strip()]
    assert [place.rsplit(":", 1)[1] for place in rows.places] == ["1", "3"]
    assert len(read(text, limit=1).rows) == 1
    assert read("[" + ",\n".join([GOOD] * 3) + "]", "t.json").rows == [json.loads(GOOD)] * 3
