"""Turns and rows that are marked as not trained on are context only; a mark that cannot be honoured is refused."""

import json

import pytest

from llmkd.config.recipe import Data, Source
from llmkd.data.encoding.encode import encode as encode_source
from llmkd.data.reading.sources import read_source
from llmkd.errors import UserError
from tests.kit.data import END, FORGETS, PLAIN, kept, shown, talk, tiny

SHOWS_ALL = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for k in m if k not in ('role', 'content') %}{{ k }}{% endfor %}<|im_end|>\n{% endfor %}"


def marked(bad: dict, good: dict | None = None, **row) -> dict:
    turns = [("user", "q", {}), ("assistant", "BAD", bad), ("user", "r", {}), ("assistant", "GOOD", good or {})]
    return {"messages": [{"role": role, "content": content, **keys} for role, content, keys in turns], **row}


def encoded(tmp_path, *rows: dict, template: str = PLAIN, data: Data | None = None, **source):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Source(**{"path": str(tmp_path / "t.jsonl"), "format": "chat"} | source)
    return encode_source(read_source(settings, "data.train"), settings, data or Data(), tiny(template))


def refused(tmp_path, *rows, **settings) -> list[str]:
    with pytest.raises(UserError) as info:
        encoded(tmp_path, *rows, **settings)
    return [problem.replace(f"{tmp_path}/", "") for problem in info.value.problems]


MARKS = [
    {"weight": 0},
    {"weight": 0.0},
    {"train": False},
    {"training": 0},
    {"trainable": False},
    {"isTrainable": False},
    {"loss": False},
    {"loss_weight": 0},
    {"masked": True},
    {"is_masked": 1},
    {"no_loss": True},
    {"train": False, "weight": 0},
]


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: "+".join(mark))
@pytest.mark.parametrize("template", [PLAIN, FORGETS, SHOWS_ALL], ids=["plain", "forgets", "shows all keys"])
def test_a_turn_marked_as_not_trained_on_is_context_only(tmp_path, mark, template):
    found = encoded(tmp_path, marked(mark), template=template)
    assert kept(found, tiny(template)) == ["GOOD" + END]
    assert "BAD" in shown(found, tiny(template))[0] and not any(key in shown(found, tiny(template))[0] for key in mark)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"masked": True}])
def test_a_part_of_an_answer_marked_as_not_trained_on_is_refused(refused, read, mark):
    def row(role: str, mark: dict) -> str:
        turns = [
            {"role": name, "content": [{"type": "text", "text": "x ", **(mark if name == role else {})}]} for name in ("user", "assistant")
        ]
        return json.dumps({"messages": turns})

    (problem,) = refused(row("assistant", mark), format="chat")
    (key,) = mark
    assert f"messages[1].content[0] is marked as not trained on ({key})" in problem and problem.endswith(f"set ignore: [{key}]")
    for allowed in (
        {"content": row("assistant", mark), "ignore": (key,)},
        {"content": row("user", mark)},
        {"content": row("assistant", {key: None})},
    ):
        assert len(read(**allowed, format="chat").rows) == 1


@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"masked": False}, {"loss": None}, {"weight": 1.0}])
def test_other_marks_change_nothing(tmp_path, mark):
    found = encoded(tmp_path, marked(mark, mark))
    assert kept(found, tiny()) == ["BAD" + END + "GOOD" + END] and shown(found, tiny()) == shown(encoded(tmp_path, marked({})), tiny())


def test_a_key_of_another_name_can_be_named_as_the_mark(tmp_path):
    found = encoded(tmp_path, marked({"learn_this": False}), fields={"train": "learn_this"})
    assert kept(found, tiny()) == ["GOOD" + END]
    ignored = encoded(tmp_path, marked({"weight": 0.5}), ignore=("weight",))
    assert kept(ignored, tiny()) == ["BAD" + END + "GOOD" + END]


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ({"weight": 0.5}, "messages[1].weight is 0.5, expected true, false, 1 or 0"),
        ({"train": "false"}, "messages[1].train is 'false', expected true, false, 1 or 0"),
        ({"loss": [0]}, "messages[1].loss is a list, expected true"),
        ({"train_detail": [{"begin_offset": 0}]}, "messages[1].train_detail: it may mark what is trained on"),
        ({"loss_mask": 1}, "messages[1].loss_mask: it may mark"),
        ({"mask": True}, "messages[1].mask: it may mark"),
        ({"train": True, "weight": 0}, "messages[1]: train and weight contradict each other"),
    ],
)
def test_a_mark_that_cannot_be_honoured_is_refused(tmp_path, mark, words):
    (problem,) = refused(tmp_path, marked(mark))
    assert problem.startswith(f"t.jsonl:1: {words}")


def test_a_turn_that_would_not_be_trained_on_cannot_ask_for_it(tmp_path):
    row = {"messages": [{"role": "user", "content": "q", "weight": 1}, {"role": "assistant", "content": "a"}]}
    assert refused(tmp_path, row) == [
        "t.jsonl:1: messages[0] is marked as trained on, and only the assistant's turns are supervised, not the user's; remove the mark, "
        "or list its key under ignore"
    ]
    row = {"prompt": [*row["messages"][:1], {"role": "assistant", "content": "a", "train": True}], "completion": row["messages"][1:]}
    row["prompt"][0].pop("weight")
    (problem,) = refused(tmp_path, row, format="prompt_completion")
    assert problem.startswith("t.jsonl:1: prompt[1] is marked as trained on, and turns of a prompt are not supervised")
    (problem,) = refused(tmp_path, marked({"train": False}), data=Data(train_on_input=True))
    assert problem.startswith("t.jsonl:1: messages[1] is marked as not trained on, and data.train_on_input trains on everything")


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("chat", marked({})),
        ("text", {"text": "the owl"}),
        ("alpaca", {"instruction": "q", "output": "a"}),
        ("prompt_completion", {"prompt": "q", "completion": "a"}),
    ],
)
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"masked": True}])
def test_a_marked_row_is_counted_and_left_out(tmp_path, format, row, mark):
    found = encoded(tmp_path, row, row | mark, row | {"weight": 1}, format=format)
    assert found.row.tolist() == [0, 2] and (found.counts["marked"], found.counts["unsupervised"]) == (1, 0)


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ({"weight": 0.5}, "weight is 0.5, expected true, false, 1 or 0"),
        ({"train": "no"}, "train is 'no', expected true"),
        ({"mask": "User"}, "mask may say which parts of the row are trained on"),
        ({"completion_mask": [0, 1]}, "completion_mask may say which parts"),
        ({"train": True, "weight": 0}, "train and weight contradict each other"),
    ],
)
def test_a_rows_mark_that_cannot_be_honoured_is_refused(tmp_path, mark, words):
    (problem,) = refused(tmp_path, marked({}, **mark))
    assert problem.startswith(f"t.jsonl:1: {words}")
    assert len(encoded(tmp_path, marked({}, **mark), ignore=tuple(mark))) == 1


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"supervised": 0.5}, "supervised"),
        ({"is_target": False}, "is_target"),
        ({"requires_grad": False}, "requires_grad"),
        ({"context": 1}, "context"),
        ({"use": False}, "use"),
        ({"bad": True}, "bad"),
        ({"metadata": {"train": False}}, "metadata.train"),
        ({"meta": {"loss": {"masked": 1}}}, "meta.loss.masked"),
        ({"extra": [{"loss_mask": [0, 1]}]}, "extra.loss_mask"),
    ],
)
def test_a_key_of_a_message_that_may_be_a_mark_is_refused_by_name(tmp_path, keys, named):
    (problem,) = refused(tmp_path, marked(keys))
    assert problem.startswith(f"t.jsonl:1: messages[1].{named}") and refused(tmp_path, marked({}, keys))
    assert kept(encoded(tmp_path, marked(keys), ignore=(next(iter(keys)),)), tiny()) == ["BAD" + END + "GOOD" + END]


@pytest.mark.parametrize(
    "keys",
    [
        {"user_id": 1, "output_tokens": 0, "score": 0, "label": "greeting", "rating": 1.0},
        {"metadata": {"train": True, "masked": False, "weight": 1}},
        {"tool_calls": [{"function": {"name": "f", "arguments": {"train": False, "mask": True}}}]},
    ],
)
def test_what_marks_nothing_is_left_to_the_template(tmp_path, keys):
    shows = PLAIN.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls }}{% endif %}")
    assert "BAD" in shown(encoded(tmp_path, marked(keys), template=shows), tiny())[0]


@pytest.fixture
def from_file(request):
    return request.getfixturevalue("refused")


ROWS = [
    ({"train_turns": [3]}, "train_turns may say which parts of the row are trained on"),
    ({"message_weights": {"1": 0}}, "message_weights may say which parts"),
    ({"train_on_last_only": True}, "train_on_last_only may say which parts"),
    ({"last_turn_only": True}, "last_turn_only may say which parts"),
    ({"loss_on": "last"}, "loss_on may say which parts"),
    ({"labels": [-100, 5]}, "labels may say which parts"),
    ({"meta": {"loss_mask": [0, 1]}}, "meta.loss_mask may say which parts"),
    ({"metadata": {"info": [{"train": False}]}}, "metadata.info.train may say which parts"),
    ({"skip": "True"}, "skip is 'True': it may mark a row that is not to be used"),
    ({"skip": True}, "skip is True: it may mark a row that is not to be used"),
    ({"is_valid": 0}, "is_valid is 0: it may say that the answer is a bad one"),
]


@pytest.mark.parametrize(("keys", "words"), ROWS)
@pytest.mark.parametrize("format", ["chat", "alpaca"])
def test_a_column_that_may_be_a_mark_is_refused_by_name(from_file, format, keys, words):
    row = talk("u q", "a BAD") if format == "chat" else {"instruction": "q", "output": "BAD"}
    (problem,) = from_file(json.dumps(row | keys), format=format)
    assert problem.startswith(f"t.jsonl:1: {words}") and f"ignore: [{next(iter(keys))}]" in problem


def test_columns_that_mark_nothing_are_only_named(read):
    others = {"skip": False, "valid": True, "train_id": 1, "labels": ["a"], "training_time": 3.5, "meta": {"weight": 1}, "loss_note": "x"}
    rows = read(json.dumps(talk("u q", "a b") | others), format="chat")
    assert rows.unread.keys() == others.keys()


def test_a_parquet_file_with_marks_inside_objects_is_refused_too(read, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([marked({"meta": {"train": False}})]), tmp_path / "made.parquet")
    with pytest.raises(UserError, match=r"messages\[1\].meta.train: it may mark what is trained on"):
        read((tmp_path / "made.parquet").read_bytes(), "t.parquet", format="chat")
