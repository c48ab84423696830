"""Rows of token ids: their spellings, packed rows, what is refused, and that they give the examples of the text that they were made of."""

import dataclasses
import json

import numpy as np
import pytest

from llmkd.config.data import data_contradictions
from llmkd.config.recipe import Data, Source
from llmkd.data.dataset import read_data
from llmkd.data.encoding import encode as encoding
from llmkd.data.encoding.token_rows import vocabulary_hash
from llmkd.data.prompt_files import read_prompts
from llmkd.data.reading.sources import read_source
from llmkd.data.reading.token_columns import row_checksum
from llmkd.data.stream import StreamSource
from llmkd.errors import UserError
from tests.kit.data import encode, rows_of, same, talk, tiny

DATA = Data(max_length=64)
IDS = [5, 6, 7, 8, 9]


@pytest.fixture
def read(tmp_path):
    """Examples of a file of rows of tokens."""

    def go(*rows: dict, name: str = "t.jsonl", data: Data = DATA, tokenizer=None, **source):
        path = tmp_path / name
        if name.endswith(".parquet"):
            import pyarrow as pa
            import pyarrow.parquet

            pa.parquet.write_table(pa.Table.from_pylist(list(rows)), path)
        elif name.endswith(".csv"):
            quoted = [f'"{json.dumps(value)}"' for value in rows[0].values()]
            path.write_text(f"{','.join(rows[0])}\n{','.join(quoted)}\n")
        else:
            path.write_text(json.dumps(list(rows)) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows))
        made_of = Source(path=str(path), format="tokens", **source)
        return encoding.encode(read_source(made_of, "data.train"), made_of, data, tokenizer or tiny())

    return go


def targets(examples) -> list[tuple[list[int], list[int]]]:
    """Of each example its ids and the places of its targets."""
    return [(ids.tolist(), np.flatnonzero(mask).tolist()) for ids, mask in map(examples.example, range(len(examples)))]


SPELLINGS = [
    {"loss_mask": [0, 0, 1, 1, 0]},
    {"loss_mask": [False, False, True, True, False]},
    {"loss_mask": [0.0, 0.0, 1.0, 1.0, 0.0]},
    {"completion_mask": [0, 0, 1, 1, 0]},
    {"assistant_masks": [0, 0, 1, 1, 0], "attention_mask": [1, 1, 1, 1, 1]},
    {"labels": [-100, -100, 7, 8, -100]},
    {"labels": [-100, -100, 7, 8, -100], "loss_mask": [0, 0, 1, 1, 0], "position_ids": [0, 1, 2, 3, 4], "seq_lengths": [5]},
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_marks_the_same_targets(read, spelling):
    assert targets(read({"input_ids": IDS, **spelling})) == [(IDS, [2, 3])]


@pytest.mark.parametrize("name", ["t.json", "t.parquet", "t.csv"])
def test_every_kind_of_file_has_them(read, name):
    assert targets(read({"input_ids": IDS, "labels": [-100, -100, 7, 8, -100]}, name=name)) == [(IDS, [2, 3])]


def test_the_files_own_names_are_given_in_fields(read):
    row = {"tokens": IDS, "mask": [0, 0, 1, 1, 0]}
    assert targets(read(row, fields={"input_ids": "tokens", "loss_mask": "mask"})) == [(IDS, [2, 3])]


@pytest.mark.parametrize("text", [talk("u hello", "a the owl"), talk("u hello", "a the owl", "u and", "a the wren")])
def test_rows_of_tokens_are_the_examples_of_the_text_that_they_were_made_of(read, text):
    of_text = encode(rows_of(text), "chat", DATA, tiny())
    ids, mask = of_text.example(0)
    again = read({"input_ids": ids.tolist(), "loss_mask": mask.tolist(), "tokenizer": vocabulary_hash(tiny())})
    assert same(dataclasses.replace(of_text, counts={}), dataclasses.replace(again, counts={}))
    assert again.content_hash(0) == of_text.content_hash(0), "so a cache made of one answers the other"
    assert again.counts["unnamed"] == 0


PACKED = [
    {"seq_lengths": [3, 2]},
    {"position_ids": [0, 1, 2, 0, 1]},
    {"attention_mask": [1, 1, 1, 2, 2]},
    {"seq_lengths": [3, 2], "position_ids": [0, 1, 2, 0, 1], "attention_mask": [1, 1, 1, 2, 2]},
    {"seq_lengths": [3, 2], "attention_mask": [1, 1, 1, 1, 1]},
]


@pytest.mark.parametrize("packed", PACKED)
def test_a_packed_row_is_its_examples_and_no_first_token_is_a_target(read, packed):
    examples = read({"input_ids": IDS, "loss_mask": [0, 1, 1, 1, 1], **packed}, {"input_ids": [4, 5], "loss_mask": [0, 1]})
    assert targets(examples) == [([5, 6, 7], [1, 2]), ([8, 9], [1]), ([4, 5], [1])]
    assert examples.row.tolist() == [0, 0, 1]


def test_padding_at_the_ends_is_left_out_with_what_belongs_to_it(read):
    row = {"input_ids": [0, *IDS, 0, 0], "labels": [-100, -100, 6, 7, -100, 9, -100, -100], "attention_mask": [0, 1, 1, 1, 2, 2, 0, 0]}
    row["position_ids"] = [1, 0, 1, 2, 0, 1, 1, 1]  # as transformers numbers padding
    assert targets(read(row | {"seq_lengths": [3, 2]})) == [([5, 6, 7], [1, 2]), ([8, 9], [1])]


def test_without_a_mask_all_tokens_are_trained_on_only_where_that_is_asked_for(read):
    whole = dataclasses.replace(DATA, train_on_input=True)
    assert targets(read({"input_ids": IDS}, data=whole)) == [(IDS, [1, 2, 3, 4])]
    assert targets(read({"input_ids": IDS, "loss_mask": [0, 0, 1, 0, 0]}, data=whole)) == [(IDS, [1, 2, 3, 4])]
    with pytest.raises(UserError, match=r"t.jsonl:1: no column says which tokens are targets .*train_on_input: true(.|\n)*and 1 more rows"):
        read({"input_ids": IDS}, {"input_ids": IDS})


@pytest.mark.parametrize(
    ("too_long", "expected"),
    [("drop", [([4, 5], [1])]), ("truncate", [([5, 6, 7], [2]), ([4, 5], [1])])],
)
def test_long_rows_are_dropped_or_cut_as_texts_are(read, too_long, expected):
    rows = {"input_ids": IDS, "loss_mask": [0, 0, 1, 1, 0]}, {"input_ids": [4, 5], "loss_mask": [0, 1]}
    examples = read(*rows, data=Data(max_length=3, too_long=too_long))
    assert targets(examples) == expected and examples.counts["too_long"] == 1
    with pytest.raises(UserError, match="t.jsonl:1: 5 tokens, more than data.max_length"):
        read(*rows, data=Data(max_length=3, too_long="refuse"))


def test_rows_with_nothing_supervised_and_marked_ones_are_counted(read):
    rows = {"input_ids": IDS, "loss_mask": [1, 0, 0, 0, 0]}, {"input_ids": [], "loss_mask": []}
    examples = read(*rows, {"input_ids": IDS, "loss_mask": [0, 1, 1, 1, 1], "train": False})
    assert (len(examples), examples.counts["unsupervised"], examples.counts["marked"], examples.counts["unnamed"]) == (0, 2, 1, 3)


WRONG = [
    ({"input_ids": "5 6"}, "input_ids is text, expected a list of whole numbers"),
    ({"input_ids": None}, "input_ids is null, expected a list"),
    ({"input_ids": [5, 6.5, 7, 8, 9]}, r"input_ids\[1\] is 6.5, expected a whole number"),
    ({"input_ids": [5, 6.0, 7, 8, 9]}, r"input_ids\[1\] is 6.0, expected"),
    ({"input_ids": [5, True, 7, 8, 9]}, r"input_ids\[1\] is true or false"),
    ({"input_ids": [5, 1.0, 7, 8, 9]}, r"input_ids\[1\] is 1.0, expected"),
    ({"input_ids": [5, None, 7, 8, 9]}, r"input_ids\[1\] is null"),
    ({"input_ids": [[5, 6, 7, 8, 9]]}, r"input_ids\[0\] is a list.*each list of the batch as a row"),
    ({"input_ids": [5, -1, 7, 8, 9]}, r"input_ids\[1\] is -1, expected a token id"),
    ({"input_ids": [5, 2**31, 7, 8, 9]}, r"input_ids\[1\] is 2147483648, expected"),
    ({"input_ids": [5, 2**70, 7, 8, 9]}, "holds a number that is no token id"),
    ({"input_ids": [5, 6, 7, 8, 100_000]}, r"input_ids\[4\] is 100000, and the student's tokenizer has no such token \(its ids are below "),
    ({"loss_mask": [0, 1]}, "loss_mask has 2 entries and input_ids 5"),
    ({"loss_mask": [0, 0, 2, 0, 0]}, r"loss_mask\[2\] is 2, expected 1 for a target"),
    ({"loss_mask": [0, 0, 0.5, 0, 0]}, r"loss_mask\[2\] is 0.5"),
    ({"labels": [-100, -100, 8, 9, -100]}, r"labels are moved by one \(labels\[2\] is input_ids\[3\]\)"),
    ({"labels": [-100, -100, 7, 9, 4]}, r"labels\[3\] is 9 and input_ids\[3\] is 8; a label is the token itself, or -100"),
    ({"labels": [-1, -1, 7, 8, -1]}, r"labels\[0\] is -1"),
    ({"labels": [-100, -100, 7, 8, 9]}, "loss_mask and labels disagree about token 4"),
    ({"attention_mask": [1, 1, 0, 1, 1]}, r"attention_mask\[2\] is 0, expected 1, or 1, 2, 3"),
    ({"attention_mask": [2, 2, 2, 2, 2]}, r"attention_mask\[0\] is 2"),
    ({"attention_mask": [1, 1, 3, 3, 3]}, r"attention_mask\[2\] is 3"),
    ({"attention_mask": [1, 1, 1, 0, 0]}, "token 3 is a target, and attention_mask says that it is padding"),
    ({"position_ids": [0, 1, 3, 4, 5]}, r"position_ids\[2\] is 3, expected 2, or 0 where the next example begins"),
    ({"position_ids": [1, 2, 3, 4, 5]}, r"position_ids\[0\] is 1"),
    ({"seq_lengths": [3, 3]}, "seq_lengths add up to 6, expected 5"),
    ({"seq_lengths": [6, -1]}, "seq_lengths add up to 5, expected 5, the tokens of the row, from lengths of 1 or more"),
    ({"seq_lengths": [3, 2], "position_ids": [0, 1, 2, 3, 4]}, "position_ids and seq_lengths begin examples at other places"),
    ({"cu_seqlens": [0, 3, 5]}, "cu_seqlens.*where the examples of a packed row begin; write the tokens of each example as seq_lengths"),
    ({"train_mask": [0, 0, 1, 1, 0]}, "set fields: {loss_mask: train_mask}"),
    ({"token_weights": [0, 0, 1, 0.5, 0]}, "token_weights may say which parts of the row are trained on"),
    ({"teacher_context": "the answer is 3"}, "what only the teacher reads, which rows of tokens cannot have"),
    ({"pixel_values": [1.0]}, "something else than text"),
    ({"tokenizer": 3}, "tokenizer is a number, expected text"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_row_that_is_wrong_is_named_with_what_was_found(read, change, message):
    good = {"input_ids": IDS, "loss_mask": [0, 0, 1, 1, 0]}
    with pytest.raises(UserError, match=f"t.jsonl:2: .*{message}"):
        read(good, good | change, good)


def test_ids_of_another_tokenizer_are_refused_where_the_row_names_it(read):
    row = {"input_ids": IDS, "loss_mask": [0, 0, 1, 1, 0], "tokenizer": vocabulary_hash(tiny(seen="blackbird blackbird"))}
    own = vocabulary_hash(tiny())
    with pytest.raises(UserError, match=f"made by the tokenizer '{row['tokenizer']}', and the student's is '{own}'"):
        read(row, row)
    assert len(read(row, row, ignore=("tokenizer",))) == 2
    other = vocabulary_hash(tiny(template="{{ messages }}", pad=None))
    assert other == own, "the template and the named tokens do not change what an id is"


def test_an_id_between_the_entries_of_a_vocabulary_is_refused(read):
    from llmkd.data.reading import skills

    tokenizer = skills.tokenizer()
    gap = max(tokenizer.get_vocab().values()) + 5
    tokenizer.backend_tokenizer.add_tokens(["owl" * 3])
    vocab = tokenizer.get_vocab() | {"owl" * 3: gap}
    tokenizer.get_vocab = lambda: vocab
    with pytest.raises(UserError, match=rf"input_ids\[1\] is {gap - 1}, and the student's tokenizer has no such token"):
        read({"input_ids": [5, gap - 1], "loss_mask": [0, 1]}, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher_context": "x"}, "cannot be used with format: tokens"),
        ({"too_long": "split"}, "found split, which works with format: text only"),
        ({"choices": Source(path="c", format="tokens")}, "found tokens, which has no answer that choices could replace"),
    ],
)
def test_settings_that_tokens_cannot_follow_are_refused(settings, words):
    data = dataclasses.replace(Data(train=Source(path="t", format="tokens"), max_length=9), **settings)
    assert any(words in problem for _, problem in data_contradictions(data, None, 1))


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"input_ids": IDS, "labels": IDS}, "set format: tokens"),
        (
            {"token_ids": IDS, "response_mask": [0, 0, 1, 1, 0]},
            "set format: tokens, fields: {input_ids: token_ids, loss_mask: response_mask}",
        ),
        ({"input_ids": IDS, "completion_mask": IDS, "answer": "x"}, "the nearest is format: tokens"),
    ],
)
def test_rows_of_tokens_are_recognised(tmp_path, row, settings):
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="; " + settings.replace("{", r"\{")):
        read_source(Source(path=str(tmp_path / "t.jsonl"), format="alpaca"), "data.train")


def test_a_stream_reads_them_as_a_file_is_read(read, tmp_path):
    from llmkd.data.batching import Batching

    rows = [{"input_ids": [i, *IDS], "loss_mask": [0, 0, 1, 1, 0, 1]} for i in range(4, 8)]
    whole = read(*rows)
    source = Source(path=str(tmp_path / "t.jsonl"), format="tokens")
    stream = StreamSource(source, dataclasses.replace(DATA, train=source, streaming=True), tiny(), Batching(0, 4, 2, max_steps=1))
    assert sorted(targets(stream.examples)) == sorted(targets(whole))


def test_a_file_of_prompts_may_be_tokens_and_texts_are_refused_where_the_run_has_none(tmp_path):
    path, tokens = tmp_path / "p.jsonl", Source(path="t.jsonl", format="tokens")

    def ask(row: dict, *sources: Source):
        path.write_text(json.dumps(row) + "\n")
        return read_prompts(path, sources, DATA, tiny())

    (prompt,) = ask({"input_ids": IDS, "labels": [-100, -100, 7, 8, 9]}, tokens)
    assert prompt.ids.tolist() == [5, 6] and prompt.reference == tiny().decode([7, 8, 9])
    assert ask({"input_ids": IDS}, tokens)[0].ids.tolist() == IDS
    with pytest.raises(UserError, match="the run's data are tokens, and how a prompt becomes them is not known; write rows of input_ids"):
        ask({"prompt": "hello"}, tokens)
    with pytest.raises(UserError, match="a packed row of 2 examples"):
        ask({"input_ids": IDS, "seq_lengths": [2, 3]}, tokens)
    (prompt,) = ask({"prompt": "hello"}, tokens, Source(path="c.jsonl", format="prompt_completion"))
    assert tiny().decode(prompt.ids) == "hello"


def test_the_same_rows_in_training_and_held_out_are_warned_of(tmp_path, capsys):
    long = [*IDS, *range(5, 60)] * 20
    rows = [{"input_ids": [*long], "labels": [*long], "bird": bird} for bird in ("owl", "wren")]
    rows[0]["input_ids"][600] = rows[0]["labels"][600] = 4  # numpy would print the middle of 1,200 numbers as dots
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = (
        Source(path=str(tmp_path / "a.jsonl"), format="tokens", where={"bird": bird}, ignore=("bird",)) for bird in ("owl", "wren")
    )
    read_data(Data(train=one, validation=other, max_length=2000))
    assert "are the same data" not in capsys.readouterr().err
    read_data(Data(train=one, validation=one, max_length=2000))
    assert "are the same data" in capsys.readouterr().err


def rolled(**changes) -> dict:
    """A row as `llmkd roll` writes it, and what was changed of it since."""
    row = {"prompt": "a", "answer": "b", "finished": True, "key": "c", "tokenizer": "t", "input_ids": IDS, "loss_mask": [0, 0, 1, 1, 0]}
    return row | {"row_checksum": row_checksum(row)} | changes


def test_what_llmkd_itself_writes_beside_the_tokens_is_not_listed_as_unread(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps(rolled(topic="d")) + "\n")
    assert dict(read_source(Source(path=str(tmp_path / "t.jsonl"), format="tokens"), "data.train").unread) == {"topic": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"input_ids": [*IDS[:-1], IDS[-1] + 1]},
        {"loss_mask": [0, 1, 1, 1, 0]},
        {"finished": False},
        {"key": "d"},
        {"row_checksum": "0" * 16},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_row_that_changed_since_it_was_rolled_is_refused_until_that_is_said_to_be_meant(tmp_path, changes):
    def found(row: dict, **source) -> list[dict]:
        (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
        return read_source(Source(path=str(tmp_path / "t.jsonl"), format="tokens", **source), "data.train").rows

    with pytest.raises(UserError, match=r"t.jsonl:1: the row is not what llmkd roll wrote \(another row_checksum\); remove it"):
        found(rolled(**changes))
    assert found(rolled(**changes), ignore=("row_checksum",))
    assert found(rolled(prompt="other", answer=None)), "what is for people alone"
    shorter = rolled(**changes)
    del shorter["prompt"], shorter["row_checksum"]
    assert found(shorter)
