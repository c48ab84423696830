"""Columns that are not read are listed once with their count; those with a meaning are read, or refused with the lines that fix it."""

import json

import pytest

from llmkd.commands.preview_data import preview
from llmkd.config.recipe import Data, Source
from llmkd.data.batching import Batching
from llmkd.data.stream import StreamSource
from llmkd.training.prepare import prepare
from tests.kit.data import encode, rows_of, shown, tiny
from tests.kit.sources import write

ANSWER = {"instruction": "q", "output": "a"}
PAIR = {"prompt": "q", "completion": "a"}
TALK = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
SHAREGPT = {
    "format": "chat",
    "fields": {"messages": "conversations", "role": "from", "content": "value"},
    "roles": {"user": "human", "assistant": "gpt"},
}


@pytest.mark.parametrize(
    ("settings", "row", "fix"),
    [
        ({}, ANSWER | {"history": [["q", "a"]]}, "write them as messages (format: chat), or set ignore: [history]"),
        ({}, ANSWER | {"system": "Be brief."}, "set chat_template: true, or ignore: [system]"),
        ({}, ANSWER | {"context": "c"}, "set fields: {input: context}, or set ignore: [context]"),
        ({}, ANSWER | {"document": "c"}, "set fields: {input: document}, or set ignore: [document]"),
        ({"format": "prompt_completion"}, PAIR | {"passage": "c"}, "write it into the prompt, or use format: alpaca with"),
        ({"format": "prompt_completion"}, PAIR | {"bad_output": "c"}, "llmkd does not train on preferences; set ignore: [bad_output]"),
        (SHAREGPT, TALK | {"conversation_b": ["c"]}, "llmkd does not train on preferences; set ignore: [conversation_b]"),
        ({"format": "prompt_completion"}, PAIR | {"response_1": "b"}, "llmkd does not train on preferences; set ignore: [response_1]"),
        (SHAREGPT, TALK | {"context": "c"}, "it may hold what the answers rely on; write it into a message, or set ignore: [context]"),
        (SHAREGPT, TALK | {"developer_prompt": "s"}, "content: value, system: developer_prompt}, or set ignore: [developer_prompt]"),
        (SHAREGPT, TALK | {"message_history": "h"}, "write them as messages (format: chat), or set ignore: [message_history]"),
        ({}, ANSWER | {"tools": "[]x"}, "write the row as format: chat with tools, or set ignore: [tools]"),
        ({}, ANSWER | {"Complex_CoT": "c"}, "write it as reasoning_content of an assistant message (format: chat)"),
        (
            SHAREGPT,
            TALK | {"system_prompt": "s"},
            "set fields: {messages: conversations, role: from, content: value, system: system_prompt}, or",
        ),
        (SHAREGPT, TALK | {"functions": [{"name": "f"}]}, "content: value, tools: functions}, or set ignore: [functions]"),
        (SHAREGPT, TALK | {"rejected": "b"}, "llmkd does not train on preferences; set ignore: [rejected]"),
        (SHAREGPT, TALK | {"images": ["a.png"]}, "llmkd reads text only; set ignore: [images]"),
        (
            {"format": "prompt_completion"},
            PAIR | {"label": False},
            "set where: {label: true} to train on the others alone, or set ignore: [label]",
        ),
        (
            {"format": "prompt_completion"},
            PAIR | {"input": "x"},
            "write it into the prompt, or use format: alpaca with fields: {input: input}",
        ),
        ({"format": "prompt_completion"}, PAIR | {"system": "s"}, "set chat_template: true, or ignore: [system]"),
        ({"format": "text"}, {"text": "t", "chosen": "c"}, "set ignore: [chosen]"),
        ({"format": "text"}, {"text": "t", "images": ["a.png"]}, "llmkd reads text only; set ignore: [images]"),
    ],
)
def test_a_column_with_a_meaning_is_refused_with_the_lines_that_fix_it(read, refused, settings, row, fix):
    (problem,) = refused("\n".join([json.dumps(row)]), **settings)
    assert problem.startswith("t.jsonl:1: ") and fix in problem
    (name,) = row.keys() - ANSWER.keys() - PAIR.keys() - TALK.keys() - {"text"}
    assert name not in read(json.dumps(row), **settings, ignore=(name,)).rows[0]
    empty = "" if isinstance(row[name], str) else []
    read(json.dumps(row | {name: empty}), **settings)  # nothing is lost


def test_the_rows_of_a_file_with_such_a_column_are_counted_in_one_line(refused):
    assert refused("\n".join([json.dumps(PAIR | {"rejected": "b"})] * 30), format="prompt_completion")[1:] == [
        "... and 29 more rows: column 'rejected' is not read"
    ]


@pytest.mark.parametrize(
    ("format", "row", "settings"),
    [
        ("chat", {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, {}),
        ("prompt_completion", PAIR, {"chat_template": True}),
        ("prompt_completion", {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, {}),
        ("alpaca", ANSWER, {"chat_template": True}),
    ],
)
def test_a_system_column_is_the_systems_message(format, row, settings):
    (with_system, without, empty) = shown(
        encode(rows_of(row | {"system": "Be brief."}, row, row | {"system": " "}), format, Data(), tiny(), **settings), tiny()
    )
    assert with_system == "<|im_start|>system\nBe brief.<|im_end|>\n" + without and empty == without


def test_a_system_column_beside_a_system_message(read, refused):
    talk = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (problem,) = refused(json.dumps(talk | {"system": "t"}), format="chat")
    assert "system and the first message are two system messages" in problem
    same = read(json.dumps(talk | {"system": "s"}), format="chat")
    assert shown(encode(same, "chat", Data(), tiny()), tiny()) == shown(encode(rows_of(talk), "chat", Data(), tiny()), tiny())


def test_an_optional_column_that_is_null_is_absent(read):
    assert read(json.dumps(ANSWER | {"input": None, "teacher_context": None, "system": None})).rows == [ANSWER]


def test_tools_may_be_json_text(read, refused):
    tools, talk = [{"type": "function", "function": {"name": "f"}}], {"messages": [{"role": "user", "content": "q"}]}
    assert read(json.dumps(talk | {"tools": json.dumps(tools)}), format="chat").rows[0]["tools"] == tools
    assert read(json.dumps(talk | {"tools": ""}), format="chat").rows[0]["tools"] is None
    assert "tools is text that is not JSON, expected a list of objects" in refused(json.dumps(talk | {"tools": "f(x)"}), format="chat")[0]
    assert "tools is an object, expected a list of objects" in refused(json.dumps(talk | {"tools": "{}"}), format="chat")[0]


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.parquet", "t.arrow"])
def test_unread_columns_are_listed_once_by_a_run_and_by_data(make_recipe, tmp_path, capsys, name):
    rows = [{"instruction": "Say", "output": f"Yes {i}."} | {"id": str(i), "source": "web"} for i in range(6)]
    held = write(tmp_path / f"held/{name}", [{**rows[0], "note": "x"}])
    recipe = make_recipe(data__train={"path": str(write(tmp_path / f"train/{name}", rows))}, data__validation={"path": str(held.parent)})
    train = f"note: data.train ({tmp_path}/train/{name}): columns that are not read, with the rows that have them, of 6 rows: id (6), source (6)"
    validation = f"note: data.validation ({held.parent}): columns that are not read, with the rows that have them, of 1 row: id (1), source (1), note (1)"
    for use in (prepare, preview):
        use(recipe)
        notes = [line for line in capsys.readouterr().err.splitlines() if "columns that are not read" in line]
        assert notes == [train, validation]


def test_keys_of_messages_beside_those_that_fields_names_are_listed(read):
    talk = {
        "conversations": [{"from": "user", "value": "q", "role": "x", "content": "y"}, {"from": "assistant", "value": "a", "content": "z"}]
    }
    rows = read(json.dumps(talk), format="chat", fields=SHAREGPT["fields"])
    assert rows.unread == {"conversations[].content": 1, "conversations[].role": 1}


def test_what_a_message_holds_beside_text_is_refused(read, refused):
    talk = [{"role": "user", "content": "q", "images": ["x.png"], "audio": None}, {"role": "assistant", "content": "a", "audio": {}}]
    row = json.dumps({"messages": talk})
    (line,) = refused(row, format="chat")
    assert line.endswith(
        "messages[0].images: it may hold something else than text, and llmkd reads text only; set ignore: [images] to train without it"
    )
    assert "images" not in str(read(row, format="chat", ignore=("images",)).rows)


def test_a_stream_lists_them_too_and_new_ones_when_they_come(tmp_path, capsys):
    rows = [ANSWER | {"id": 1}] * 4 + [ANSWER | {"late": 1}] * 4
    source = Source(path=str(write(tmp_path / "t.jsonl", rows)))
    stream = StreamSource(source, Data(shuffle_buffer=4), tiny(), Batching(0, 4, 4, max_steps=4))
    assert len(list(stream.schedule())) == 4
    first, second = [line for line in capsys.readouterr().err.splitlines() if "not read" in line]
    assert first.endswith("of the first 4 rows: id (4)") and second.endswith(": late (4)")


def test_ignored_columns_are_not_listed_and_a_column_that_is_read_cannot_be_ignored(read, refused):
    assert read(json.dumps(ANSWER | {"id": 1}), ignore=("id",)).unread == {}
    content = read(json.dumps(ANSWER | {"id": 1})).content
    assert read(json.dumps(ANSWER | {"id": 1}), ignore=("id",)).content != content  # tokens of the two are not confused
