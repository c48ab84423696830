"""Rows of another shape: the refusal names the settings that read them, and these do; files of another shape, what to write instead."""

import json

import pytest
import yaml

MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
GIVEN = {"from": "human", "value": "q"}
NAMES = "fields: {messages: conversations, role: from, content: value}, roles: {user: human, assistant: gpt}"

ROWS = [
    ("alpaca", {"messages": MESSAGES}, "format: chat"),
    ("text", {"conversations": SHAREGPT}, f"format: chat, {NAMES}"),
    ("alpaca", {"conversations": SHAREGPT, "system": "s"}, f"format: chat, {NAMES}"),
    ("chat", {"conversations": [GIVEN]}, NAMES),
    ("chat", {"messages": SHAREGPT}, "fields: {role: from, content: value}, roles: {user: human, assistant: gpt}"),
    (
        "chat",
        {"turns": [{"speaker": "Customer", "text": "q"}, {"speaker": "Agent", "text": "a"}]},
        "fields: {messages: turns, role: speaker, content: text}, roles: {user: Customer, assistant: Agent}",
    ),
    ("chat", {"messages": [{"role": "human", "content": "q"}]}, "roles: {user: human, assistant: gpt}"),
    ("prompt_completion", {"instruction": "a", "input": "", "output": "b"}, "format: alpaca"),
    ("chat", {"instruction": "a", "input": "i", "output": "b", "system": "s"}, "format: alpaca, chat_template: true"),
    ("alpaca", {"question": "a", "answer": "b"}, "fields: {instruction: question, output: answer}"),
    ("alpaca", {"question": "a", "context": "c", "answer": "b"}, "fields: {instruction: question, input: context, output: answer}"),
    ("alpaca", {"question": "a", "passage": "c", "answer": "b"}, "fields: {instruction: question, input: passage, output: answer}"),
    ("prompt_completion", {"question": "a", "answer": "b", "id": 1}, "fields: {prompt: question, completion: answer}"),
    ("text", {"prompt": "a", "completion": "b"}, "format: prompt_completion"),
    ("alpaca", {"author": "bot", "question": "a", "answer": "b"}, "fields: {instruction: question, output: answer}"),
    (
        "chat",
        {"query": "a", "response": "b"},
        "format: prompt_completion, fields: {prompt: query, completion: response}, chat_template: true",
    ),
    ("alpaca", {"input": "a", "output": "b"}, "fields: {instruction: input}"),
    ("prompt_completion", {"prompt": "a", "chosen": "b", "rejected": "c"}, "fields: {completion: chosen}, ignore: [rejected]"),
    ("chat", {"chosen": MESSAGES, "rejected": MESSAGES}, "fields: {messages: chosen}, ignore: [rejected]"),
    ("alpaca", {"Instruction": "a", "Expected Output:": "b"}, 'fields: {instruction: Instruction, output: "Expected Output:"}'),
    ("alpaca", {"text": "a"}, "format: text"),
    ("chat", {"content": "a", "meta": {"n": 1}}, "format: text, fields: {text: content}"),
    ("alpaca", {"log": [{"from": "function_call", "value": "f"}], "messages": MESSAGES}, "format: chat"),
    ("text", {"on": "a"}, 'fields: {text: "on"}'),
    ("alpaca", {"task": "t", "inputs": "a", "targets": "b"}, "fields: {instruction: inputs, output: targets}"),
    ("alpaca", {"source": "a", "target": "b", "task": "t"}, "fields: {instruction: source, output: target}"),
    (
        "chat",
        {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": MESSAGES[1:]},
        "format: prompt_completion, fields: {completion: chosen}, ignore: [rejected], chat_template: true",
    ),
    ("alpaca", {"input": MESSAGES[:1], "output": "a"}, "format: prompt_completion, fields: {prompt: input, completion: output}"),
    (
        "alpaca",
        {"dialog": SHAREGPT + [GIVEN], "response": "a"},
        "format: prompt_completion, fields: {prompt: dialog, completion: response, role: from, content: value}, roles: {user: human, assistant: gpt}",
    ),
    ("alpaca", {"messages": [*MESSAGES, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]}, "format: chat"),
    ("alpaca", {"messages": [one | {"content": [{"type": "text", "text": "x"}]} for one in MESSAGES]}, "format: chat"),
    ("prompt_completion", {"conversations": SHAREGPT, "answer": "a"}, f"format: chat, {NAMES}"),
    ("alpaca", {"talk": json.dumps(MESSAGES)}, "format: chat, fields: {messages: talk}"),
    ("alpaca", {"article": "d", "highlights": "s"}, "format: prompt_completion, fields: {prompt: article, completion: highlights}"),
    ("prompt_completion", {"human": "q", "gpt": "a"}, "fields: {prompt: human, completion: gpt}"),
    ("alpaca", {"row": {"instruction": "a", "output": "b"}}, "fields: {instruction: row.instruction, output: row.output}"),
]


@pytest.mark.parametrize(("format", "row", "settings"), ROWS)
def test_the_settings_that_are_named_read_the_file(read, refused, format, row, settings):
    line = json.dumps(row) + "\n"
    problems = refused(line * 3, format=format)
    assert problems[0].endswith(f"; set {settings}") and problems[0].startswith("t.jsonl:1: ")
    assert len(problems) == 2 and problems[1].startswith("... and 2 more rows: ")
    said = yaml.safe_load(f"{{{settings}}}")
    assert len(read(line, **{"format": format, **said, "ignore": tuple(said.get("ignore", ()))}).rows) == 1


def test_a_parquet_file_of_another_shape_is_recognised_too(read, refused, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"id": 1, "conversations": SHAREGPT}]), tmp_path / "made.parquet")
    raw = (tmp_path / "made.parquet").read_bytes()
    assert refused(raw, "t.parquet")[0].endswith(f"set format: chat, {NAMES}")


@pytest.mark.parametrize(
    ("format", "row", "end"),
    [
        (
            "alpaca",
            {"conversations": [*SHAREGPT, {"from": "function_call", "value": "f"}]},
            f"; the nearest is format: chat, {NAMES}",
        ),
        (
            "alpaca",
            {"log": {"row": {"instruction": "a", "output": "b"}}},
            "; set fields: {instruction: NAME, output: NAME} if the file has other names",
        ),
        (
            "chat",
            {"data": [{"messages": MESSAGES}], "n": 1},
            "; 'data' is a list of objects with columns: write each as a row of its own, or a talk as messages of role and content",
        ),
        ("alpaca", {"instruction": "a"}, "; found 'instruction'"),
        (
            "alpaca",
            {"instruction": "a", "text": "b"},
            "; found 'instruction', 'text'; set fields: {output: text} if the file has other names",
        ),
        (
            "alpaca",
            {"table": "d", "caption": "s"},
            "; found 'table', 'caption'; set fields: {instruction: NAME, output: NAME} if the file has other names",
        ),
        ("chat", {"prompt": "q"}, "; found 'prompt'"),
        (
            "chat",
            {"id": 1, "data": ["q", "a"]},
            "; in 'data' the turns are texts without roles: write a list of {role, content} (format: chat)",
        ),
        (
            "alpaca",
            {"talk": [["q", "a"], ["r", "b"]]},
            "; in 'talk' the turns are texts without roles: write a list of {role, content} (format: chat)",
        ),
        (
            "chat",
            {"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}},
            "messages is an object, expected a list of {role, content}; the turns are a list for each of 'role', 'content': write a list of {role, content} (format: chat)",
        ),
        ("alpaca", MESSAGES, '; write {"messages": [...]} on each line'),
        ("alpaca", [{"instruction": "a", "output": "b"}], "; a file that is one list of rows has the ending .json"),
        ("chat", "a", '; write {"text": ...} and set format: text'),
        (
            "chat",
            {"messages": str(MESSAGES)},
            "; it is a list as Python writes it: write it as JSON, in a .jsonl, .json or .parquet file",
        ),
        (
            "alpaca",
            {"conversations": [GIVEN], "chosen": SHAREGPT[1], "rejected": SHAREGPT[1]},
            f"; the nearest is format: chat, {NAMES}",
        ),
        (
            "alpaca",
            {"conversation_a": MESSAGES, "conversation_b": MESSAGES, "winner": "a"},
            "; the nearest is format: chat, fields: {messages: conversation_a}",
        ),
    ],
)
def test_what_no_setting_reads_is_described(refused, format, row, end):
    (problem,) = refused(json.dumps(row), format=format)
    assert problem.endswith(end)


def test_names_that_the_recipe_gives_are_not_talked_over(refused):
    talk = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]})
    (problem,) = refused(talk, format="chat", roles={"assistant": "gpt"})
    assert problem.endswith(
        "expected one of system, developer, user, gpt, tool; set roles: {assistant: bot}, or write 'gpt' for it in the file"
    )
    (problem,) = refused('{"questoin": "a", "answer": "b"}', fields={"instruction": "question", "output": "answer"})
    assert problem.endswith("no column 'question'; did you mean 'questoin'?")
    (problem,) = refused('{"instruction": "a", "output": "b"}', fields={"output": "answer"})
    assert problem.endswith("set fields: {output: output}")  # and not fields: {}


@pytest.mark.parametrize(
    ("role", "hint"),
    [
        ("observation", "set roles: {user: human, assistant: gpt, tool: observation}"),
        ("gtp", "did you mean 'gpt'?"),
    ],
)
def test_a_role_beside_those_that_the_recipe_names(read, refused, role, hint):
    row = json.dumps({"conversations": [*SHAREGPT, {"from": role, "value": "f"}]})
    named = yaml.safe_load(f"{{{NAMES}}}")
    problems = refused(f"{row}\n{row}", format="chat", **named)
    assert f"; {hint}" in problems[0] and problems[1] == f"... and 1 more rows: role {role!r}" and len(problems) == 2
    if hint.startswith("set "):
        assert len(read(row, **{"format": "chat", **named, **yaml.safe_load(f"{{{hint[4:]}}}")}).rows) == 1


def test_rows_of_one_turn_each_lose_no_role(refused):
    """oasst's: as plain text they would lose who said it."""
    turn = {"message_id": "1", "parent_id": None, "text": "q", "role": "prompter", "lang": "en"}
    problems = refused("\n".join(json.dumps(turn | {"role": role}) for role in ("prompter", "assistant")), format="alpaca")
    assert "set format: text" not in problems[0] and problems[0].endswith(
        "; a row is one turn: write the turns of each conversation as one row, {messages: [{role, content}, ...]} (format: chat)"
    )
    assert len(problems) == 2
    assert refused(json.dumps(turn), format="chat")[0].endswith(problems[0].partition("; found")[2])
    assert refused(json.dumps(turn), format="text") == [
        "t.jsonl:1: column 'role' is not read: it may hold who says it, so that a row is one turn; write the turns of each conversation as one row, "
        "{messages: [{role, content}, ...]} (format: chat), or set ignore: [role] to train without it"
    ]


def test_questions_without_their_columns_are_named_once(refused):
    rows = "\n".join([json.dumps({"instruction": "q", "output": "a", "answer": 1})] * 3)
    problems = refused(rows, format="alpaca", choices=True)
    assert problems == [
        "t.jsonl:1: no column 'choices'; found 'instruction', 'output', 'answer'; set fields: {choices: NAME} if the file has other names",
        "... and 2 more rows: no column 'choices'",
    ]


def test_a_slip_in_a_role_is_named(refused):
    (problem,) = refused(json.dumps({"messages": [MESSAGES[0], {"role": "asistant", "content": "a"}]}), format="chat")
    assert problem.endswith("; did you mean 'assistant'?")


@pytest.mark.parametrize(
    ("format", "settings"),
    [
        ("alpaca", "fields: {choices: options, answer: label, instruction: question}"),
        ("prompt_completion", "fields: {choices: options, answer: label, prompt: question}"),
        ("chat", "format: prompt_completion, fields: {choices: options, answer: label, prompt: question}, chat_template: true"),
    ],
)
def test_questions_need_no_answer_column(read, refused, format, settings):
    row, named = json.dumps({"question": "a", "options": ["b", "c"], "label": 1}), {"choices": "options", "answer": "label"}
    (problem,) = refused(row, format=format, choices=True, fields=named)
    assert problem.endswith(f"; set {settings}")
    assert len(read(row, **{"format": format, "choices": True, **yaml.safe_load(f"{{{settings}}}")}).rows) == 1


ROW = {"instruction": "a", "output": "b"}
WRITE = "write that list alone (jq"


@pytest.mark.parametrize(
    ("name", "content", "end"),
    [
        (
            "t.json",
            {"version": "1", "data": [ROW]},
            f"found an object, expected a list of objects; the rows are the list in data: {WRITE} .data FILE)",
        ),
        ("t.json", {"data": {"train": [ROW]}}, f"the rows are the list in data.train: {WRITE} .data.train FILE)"),
        (
            "t.json",
            {"train": [ROW], "test": [ROW]},
            "its lists of rows are in train, test: write each to a file of its own (jq .train FILE)",
        ),
        (
            "t.json",
            {"rows": [{"row_idx": 0, "row": ROW}]},
            "the rows are in rows, each under 'row': write these as a list (jq '[.rows[].row]' FILE)",
        ),
        ("t.json", {"instruction": ["a"], "output": ["b"]}, "it holds columns: write one object for each row, with these keys"),
        ("t.json", {"0": ROW, "1": ROW}, "its rows are under keys: write them as a list (jq '[.[]]' FILE)"),
        ("t.json", ROW, "it is one row: put it between [ and ], or on one line of a .jsonl file"),
        ("t.json", {"messages": MESSAGES}, "it is one row: put it between [ and ], or on one line of a .jsonl file"),
        (
            "t.json",
            json.dumps(ROW) + "\n" + json.dumps(ROW),
            "found several objects, expected a list of objects; one object per line needs the ending .jsonl",
        ),
        (
            "t.json",
            json.dumps(ROW, indent=1) * 2,
            "found several objects, expected a list of objects; put the objects between [ and ], with commas between them",
        ),
        (
            "t.json",
            "instruction,output",
            "found 'instructio', expected a list of objects; a file with one object per line needs the ending .jsonl",
        ),
        (
            "t.jsonl",
            json.dumps({"data": [ROW]}, indent=1),
            f"the file is one object over several lines; the rows are the list in data: {WRITE} .data FILE)",
        ),
        ("t.jsonl", json.dumps([ROW], indent=1), "the file is one list over several lines; give it the ending .json"),
        (
            "t.jsonl",
            json.dumps(ROW, indent=1) * 2,
            "an object goes over several lines; write each on one line, or give the file the ending .json and put the objects between [ and ], with "
            "commas between them",
        ),
        ("t.jsonl", json.dumps(ROW) + ",", "not valid JSON (Extra data); remove the comma at its end"),
        (
            "t.csv",
            '"instruction"\t"output"\na\tb\n',
            'columns are separated by \'\\t\' here ("instruction"\\t"output"), expected commas (the delimiter of csv): save the file with commas',
        ),
        (
            "t.csv",
            "instruction|out,put|x\na|b|c\n",
            "columns are separated by '|' here (instruction|out,put|x), expected commas (the delimiter of csv): save the file with commas",
        ),
    ],
)
def test_a_file_of_another_shape_is_named_in_one_line(refused, name, content, end):
    (problem,) = refused(content if isinstance(content, str) else json.dumps(content), name)
    assert problem.startswith(f"{name}:1: ") and problem.endswith(end)


@pytest.mark.parametrize("content", ['{"instruction": "a",\n', '{"instruction": "a"\n{"instruction": "a", "output": "b"}\n'])
def test_a_line_that_is_broken_is_named_as_such(refused, content):
    assert "not valid JSON" in refused(content)[0]


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("t.tsv", "save it with commas, as .csv"),
        ("t.txt", "with format: text"),
        ("t.ndjson", "rename it to .jsonl"),
        ("t.jsonl.gz", "unpack it"),
    ],
)
def test_a_file_of_another_kind_says_what_to_make_of_it(refused, name, fix):
    (problem,) = refused("a", name)
    assert problem.endswith(fix)
