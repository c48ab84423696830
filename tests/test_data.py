"""From files to batches: bad rows are named with their line, and exactly the answers are supervised."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmkd.data import token_cache
from llmkd.data.collate import collate
from llmkd.data.encode import ALPACA, ALPACA_WITH_INPUT, Encoded, encode
from llmkd.data.sources import Rows, read_source
from llmkd.errors import UserError
from llmkd.recipe import Data, Source
from llmkd.signals import IGNORE

REAL = Path(__file__).parents[2] / "shared/data/tokenizers"
GOOD = '{"instruction": "a", "output": "b"}'
END = "<|im_end|>"

PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}<|im_start|>{{ m.name or m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}" + PROMPT
)
FORGETS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
)


@functools.cache
def tiny(template: str | None = PLAIN, pad: str = "<|pad|>", seen: str = ""):
    """A byte-level BPE tokenizer that knows a few words, pairs of line ends among them."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", END]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([ALPACA, "the owl flies at night, the wren in the garden", seen, "\n\n\n" * 9] * 3, trainer)
    named = {"eos_token": END, "pad_token": pad, "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **named)


def real(name: str):
    if not (REAL / name).exists():
        pytest.skip(f"no {REAL / name}")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(REAL / name)


def rows_of(*rows: dict) -> Rows:
    return Rows(list(rows), [f"f.jsonl:{i + 1}" for i in range(len(rows))], "content")


def talk(*turns: str) -> dict:
    """'u hello' is the user saying hello; likewise a and s."""
    roles = {"u": "user", "a": "assistant", "s": "system"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}


def kept(encoded: Encoded, tokenizer) -> list[str]:
    """What each example's labels say, by way of the collator."""
    return [tokenizer.decode(collate(encoded, [i], 0).labels_N) for i in range(len(encoded))]


def shown(encoded: Encoded, tokenizer) -> list[str]:
    return [tokenizer.decode(encoded.example(i)[0]) for i in range(len(encoded))]


# ---- reading


@pytest.fixture
def read(tmp_path):
    def go(content: str | bytes, name: str = "t.jsonl", format: str = "alpaca", choices: bool = False, **settings) -> Rows:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_source(Source(path=str(path), format=format, **settings), "data.train", choices)

    return go


@pytest.fixture
def refused(read, tmp_path):
    def go(*args, **settings) -> list[str]:
        with pytest.raises(UserError) as info:
            read(*args, **settings)
        return [problem.replace(f"{tmp_path}/", "") for problem in info.value.problems]

    return go


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
    ('{"instruction": "a", "output": "\\ud800"}', "output holds half of a surrogate pair"),
    ('{"instruction": 1, "output": "b"}', "instruction is a number, expected text"),
    ('{"instruction": "a", "output": true}', "output is true or false, expected text"),
    ('{"instruction": "a", "output": ["b"]}', "output is a list, expected text"),
    ('{"instruction": "a", "output": null}', "output is null, expected text"),
    ('{"instruction": "a", "output": "b", "input": null}', "input is null, expected text"),
    ('{"instruction": "a"}', "no column 'output'; found 'instruction'"),
    ('{"instrction": "a", "output": "b"}', "no column 'instruction'; did you mean 'instrction'?"),
    ('{"instruction": "a", "inputs": "x", "output": "b"}', "did you mean 'inputs'?"),
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
            "messages[1].role is 'bot', expected one of system, user, assistant",
        ),
        ('[{"content": "a"}]', "messages[0].role is None"),
        ('[{"role": ["user"], "content": "a"}]', "messages[0].role is ['user']"),
        ('[{"role": "user"}]', "messages[0].content is null, expected text"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "messages[0].content is a list, expected text"),
        ('[{"role": "user", "content": "\\udfff"}]', "messages[0].content holds half of a surrogate pair"),
    ],
)
def test_a_bad_conversation_is_named(refused, messages, words):
    (problem,) = refused(f'{{"messages": {messages}}}', format="chat")
    assert problem.startswith("t.jsonl:1: ") and words in problem


@pytest.mark.parametrize(
    ("format", "row", "words"),
    [
        ("chat", '{"message": []}', "no column 'messages'; did you mean 'message'?"),
        ("chat", '{"conversations": []}', "no column 'messages'; found 'conversations'"),
        ("text", '{"txt": "a"}', "no column 'text'; did you mean 'txt'?"),
        ("text", "{}", "no column 'text'; found none"),
    ],
)
def test_a_missing_column_is_named(refused, format, row, words):
    assert refused(row, format=format) == [f"t.jsonl:1: {words}"]


CHOICES = [
    ('"choices": ["x", "y"], "answer": 2', "answer is 2, expected an index from 0 to 1"),
    ('"choices": ["x", "y"], "answer": true', "answer is True"),
    ('"choices": ["x", "y"]', "answer is None"),
    ('"choices": ["x"], "answer": 0', "at least two texts"),
    ('"answer": 0', "choices is null"),
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
        (GOOD.encode("utf-16"), "t.jsonl", "t.jsonl:1: not UTF-8"),
        ("", "t.jsonl", "data.train.path: t.jsonl has no rows"),
        ("\n \n", "t.jsonl", "data.train.path: t.jsonl has no rows"),
        ("[]", "t.json", "data.train.path: t.json has no rows"),
        ("", "t.json", "t.json:1: found '', expected a list"),
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
        ("table.csv", ["is not a .json or .jsonl file, and does not exist"]),
        ("", ["is not a .json or .jsonl file"]),
        ("a\0b.jsonl", []),
    ],
)
def test_a_missing_file_is_named_with_its_setting(tmp_path, path, words):
    (tmp_path / "train.jsonl").write_text(GOOD)
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


# ---- which tokens are supervised

CONVERSATIONS = [
    (("u q", "a one"), ["one"]),
    (("s be kind", "u q", "a one"), ["one"]),
    (("u q", "a one", "u r", "a two"), ["one", "two"]),
    (("s be kind", "u q", "a the owl", "u r", "a  flies\nat night "), ["the owl", " flies\nat night "]),
    (("u q", "a one", "u unanswered"), ["one"]),
    (("u q", "a one", "a two"), ["one", "two"]),
    (("u ", "a é 😀 你好"), ["é 😀 你好"]),
    (("u q", "a ", "u r", "a two"), ["two"]),
    (("a one", "u q", "a two"), ["one", "two"]),
]


@pytest.mark.parametrize("pad", ["<|pad|>", END])
@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
@pytest.mark.parametrize(("turns", "answers"), CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_in_chat_the_answers_with_their_end_tokens_are_supervised(template, pad, turns, answers):
    tokenizer = tiny(template, pad)
    encoded = encode(rows_of(talk(*turns)), "chat", Data(), tokenizer)
    assert kept(encoded, tokenizer) == ["".join(answer + END for answer in answers)]
    assert shown(encoded, tokenizer) == [tokenizer.apply_chat_template(talk(*turns)["messages"], tokenize=False)]


def test_a_template_that_drops_earlier_thinking_gives_an_example_for_each_answer():
    tokenizer = tiny(FORGETS)
    encoded = encode(rows_of(talk("u q", "a one"), talk("u q", "a x</think>one", "u r", "a y</think>two")), "chat", Data(), tokenizer)
    assert kept(encoded, tokenizer) == ["one" + END, "x</think>one" + END, "y</think>two" + END]
    assert "x</think>" not in shown(encoded, tokenizer)[2] and "one" in shown(encoded, tokenizer)[2]
    assert encoded.row.tolist() == [0, 1, 1]


@pytest.mark.parametrize("answer", ["one", "the owl\nflies", "é 😀 你好", "tail \n"])
def test_a_real_template_supervises_the_answers(answer):
    tokenizer = real("minimind-6400")
    encoded = encode(rows_of(talk("s be kind", "u q", f"a {answer}", "u r", "a two")), "chat", Data(), tokenizer)
    assert kept(encoded, tokenizer) == [f"{answer}{END}two{END}"]


@pytest.mark.parametrize("pad", ["<|pad|>", END])
@pytest.mark.parametrize(
    "output",
    [
        *("one", " the owl\n\nflies ", "é 😀 你好", "\tx", "{input} {x}"),
    ],
)
@pytest.mark.parametrize("given", [None, "", "the wren"])
def test_in_alpaca_the_output_with_the_end_token_is_supervised(pad, output, given):
    tokenizer = tiny(None, pad)
    row = {"instruction": "Say {output}", "output": output} | ({} if given is None else {"input": given})
    encoded = encode(rows_of(row), "alpaca", Data(), tokenizer)
    prompt = ALPACA_WITH_INPUT if given else ALPACA
    assert kept(encoded, tokenizer) == [output + END]
    assert shown(encoded, tokenizer) == [prompt.replace("{instruction}", "Say {output}").replace("{input}", given or "") + output + END]


@pytest.mark.parametrize("name", ["gpt2", "minimind-6400", "mistral-7b-v0.1"])
@pytest.mark.parametrize("output", ["one", "the owl\n\nflies", "é 😀 你好", "tail \n"])
def test_with_real_tokenizers_the_output_with_the_end_token_is_supervised(name, output):
    tokenizer = real(name)
    encoded = encode(rows_of({"instruction": "q", "output": output}), "alpaca", Data(), tokenizer)
    assert kept(encoded, tokenizer) == [output + tokenizer.eos_token]


@pytest.mark.parametrize(("name", "starts"), [("gpt2", False), ("minimind-6400", False), ("mistral-7b-v0.1", True)])
def test_in_text_all_that_can_be_predicted_is_supervised(name, starts):
    """The first token can only be predicted where the tokenizer itself puts a start token before it."""
    tokenizer = real(name)
    text = "The owl é 😀 flies\nat night. "
    encoded = encode(rows_of({"text": text}), "text", Data(), tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded.ids.tolist() == [tokenizer.bos_token_id] * starts + ids + [tokenizer.eos_token_id]
    assert encoded.supervised.tolist() == [False] + [True] * (len(encoded.ids) - 1)


def test_train_on_input_supervises_everything_but_the_first_token():
    for format, row in (("alpaca", json.loads(GOOD)), ("chat", talk("u q", "a one")), ("text", {"text": "the owl"})):
        encoded = encode(rows_of(row), format, Data(train_on_input=True), tiny())
        assert encoded.supervised.tolist() == [False] + [True] * (len(encoded.ids) - 1)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"instruction": "q", "output": " \n"}, "alpaca"),
        (talk("u q", "a "), "chat"),
        ({"text": ""}, "text"),
        (talk("u only asked"), "chat"),
    ],
)
@pytest.mark.parametrize("train_on_input", [False, True])
def test_an_example_without_an_answer_is_counted_and_dropped(row, format, train_on_input):
    encoded = encode(rows_of(row), format, Data(train_on_input=train_on_input), tiny())
    assert len(encoded) == 0 and encoded.counts["unsupervised"] == 1


def test_examples_do_not_depend_on_their_neighbours():
    """600 rows are more than one batch of the tokenizer."""
    rows = [{"instruction": f"q {i}", "output": "the owl " * (1 + i % 5)} for i in range(600)]
    together, alone = encode(rows_of(*rows), "alpaca", Data(), tiny()), encode(rows_of(rows[577]), "alpaca", Data(), tiny())
    assert together.row.tolist() == list(range(600)) and together.counts["rows"] == together.counts["examples"] == 600
    assert all((a == b).all() for a, b in zip(together.example(577), alone.example(0), strict=True))
    some = together.subset(together.row % 7 == 3)
    assert [some.example(i)[0].tolist() for i in range(len(some))] == [together.example(i)[0].tolist() for i in range(3, 600, 7)]


# ---- control tokens in people's text


def controls(encoded: Encoded, tokenizer) -> int:
    return int(np.isin(encoded.ids, tokenizer.convert_tokens_to_ids(["<|im_start|>", END])).sum())


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("alpaca", {"instruction": f"say {END}", "input": "<|im_start|>", "output": f"a{END}b"}),
        ("text", {"text": f"<|im_start|>x {END}{END}"}),
    ],
)
@pytest.mark.parametrize("name", [None, "minimind-6400"])
def test_a_control_token_in_plain_formats_stays_characters(name, format, row):
    tokenizer = real(name) if name else tiny()
    encoded = encode(rows_of(row), format, Data(), tokenizer)
    assert controls(encoded, tokenizer) == 1 and encoded.ids[-1] == tokenizer.eos_token_id
    assert all(text in shown(encoded, tokenizer)[0] for text in row.values())


@pytest.mark.parametrize("turns", [(f"u hello {END}", "a x"), ("u q", "a x <|im_start|>system"), ("s <|pad|>", "u q", "a x")])
def test_a_control_token_in_chat_is_refused_with_its_place(turns):
    with pytest.raises(UserError, match=r"^f.jsonl:2: .*control token") as info:
        encode(rows_of(talk("u q", "a x"), talk(*turns)), "chat", Data(), tiny())
    assert len(info.value.problems) == 1


def test_no_key_of_a_message_smuggles_a_control_token_in():
    row = {"messages": [{"role": "user", "name": f"x{END}<|im_start|>system", "content": "q"}, {"role": "assistant", "content": "one"}]}
    with pytest.raises(UserError, match="control token"):
        encode(rows_of(row), "chat", Data(), tiny())


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}", "behind its generation prompt"),
        ("{% for i in range(999999999) %}x{% endfor %}", "Range too big"),
        ("{{ messages[0].content.nothing.at_all }}", "no attribute"),
    ],
)
def test_a_template_that_fails_is_named_with_the_row(template, words):
    with pytest.raises(UserError, match=words) as info:
        encode(rows_of(talk("u q", "a one")), "chat", Data(), tiny(template))
    assert [p.startswith("f.jsonl:1: ") for p in info.value.problems] == [True]


# ---- too long, or without an answer

SHORT, LONG = {"instruction": "q", "output": "owl"}, {"instruction": "q", "output": "owl " * 200}


@pytest.mark.parametrize(("policy", "examples"), [("drop", 1), ("truncate", 2)])
def test_what_is_too_long_is_dropped_or_cut_and_counted(policy, examples):
    encoded = encode(rows_of(SHORT, LONG), "alpaca", Data(max_length=120, too_long=policy), tiny())
    assert encoded.counts["too_long"] == 1 and encoded.counts["rows"] == 2 and len(encoded) == encoded.counts["examples"] == examples
    assert encoded.lengths[1:].tolist() == [120] * (examples - 1)
    assert kept(encoded, tiny())[0] == "owl" + END


def test_what_is_too_long_can_be_refused_with_its_place():
    with pytest.raises(UserError) as info:
        encode(rows_of(SHORT, LONG), "alpaca", Data(max_length=120, too_long="refuse"), tiny())
    (problem,) = info.value.problems
    assert problem.startswith("f.jsonl:2: ") and "data.max_length (120)" in problem


@pytest.mark.parametrize("max_length", [2, 3, 7, 100])
@pytest.mark.parametrize("count", [1, 2, 6, 7, 8, 30])
def test_split_trains_every_token_exactly_once(count, max_length):
    tokenizer = tiny()
    text = "0123456789abcdefghijklmnopqrstuvwxyz"[:count]
    encoded = encode(rows_of({"text": text}), "text", Data(max_length=max_length, too_long="split"), tokenizer)
    whole = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
    assert [i for n in range(len(encoded)) for i in collate(encoded, [n], 0).labels_N.tolist()] == whole[1:]
    assert [i for n in range(len(encoded)) for i in encoded.example(n)[0][n > 0 :]] == whole
    assert encoded.lengths.max() <= max_length and encoded.counts["targets"] == len(whole) - 1


def test_an_example_without_a_supervised_token_is_counted_and_dropped():
    encoded = encode(rows_of(talk("u q"), talk("u q", "a x"), talk("s x")), "chat", Data(), tiny())
    assert (len(encoded), encoded.row.tolist(), encoded.counts["unsupervised"]) == (1, [1], 2)
    cut = encode(rows_of(LONG, SHORT), "alpaca", Data(max_length=10, too_long="truncate"), tiny())
    assert (len(cut), cut.counts["too_long"], cut.counts["unsupervised"]) == (0, 2, 2)


# ---- batches


@pytest.fixture
def ragged() -> Encoded:
    """Seven examples of distinct tokens, supervised at random, each somewhere."""
    rng = np.random.default_rng(0)
    lengths = [2, 9, 5, 12, 3, 3, 8]
    marks = [rng.random(n) < 0.4 for n in lengths]
    for mark in marks:
        mark[0] = False
        mark[rng.integers(1, len(mark))] = True
    ids = np.arange(100, 100 + sum(lengths), dtype=np.int32)
    return Encoded(ids, np.concatenate(marks), np.concatenate([[0], np.cumsum(lengths)]), np.arange(7))


@pytest.mark.parametrize("examples", [[0], [3, 1], [6, 5, 4, 3, 2, 1, 0], [2, 2]])
def test_a_label_is_the_token_after_its_position(ragged, examples):
    batch = collate(ragged, examples, 7)
    inputs = batch.student.inputs["input_ids"]
    assert batch.student is batch.teacher and list(batch.student.inputs) == ["input_ids"] and inputs.dtype == torch.int64
    told = []
    for label, position, example in zip(batch.labels_N.tolist(), batch.student.rows_N.tolist(), batch.example_N.tolist(), strict=True):
        b, t = divmod(position, inputs.shape[1])
        ids, marks = ragged.example(example)
        assert examples[b] == example and marks[t + 1] and label == ids[t + 1] and inputs[b, t] == ids[t]
        told.append((b, t + 1))
    assert sorted(told) == [(b, t) for b, example in enumerate(examples) for t in np.flatnonzero(ragged.example(example)[1]).tolist()]
    assert IGNORE not in batch.labels_N and batch.targets == len(told)


def test_inputs_are_padded_on_the_right_and_end_before_their_last_target(ragged):
    inputs = collate(ragged, [1, 3], 7).student.inputs["input_ids"].tolist()
    for row, example in zip(inputs, [1, 3], strict=True):
        ids, marks = ragged.example(example)
        last = int(np.flatnonzero(marks)[-1])
        assert row == ids[:last].tolist() + [7] * (len(row) - last)


def test_changing_one_token_changes_its_label_and_its_input_alone(ragged):
    before = collate(ragged, [3, 1], 7)
    for k in range(12):
        changed = Encoded(ragged.ids.copy(), ragged.supervised, ragged.offsets, ragged.row)
        changed.ids[ragged.offsets[3] + k] = 9999
        after = collate(changed, [3, 1], 7)
        labels = (after.labels_N != before.labels_N).nonzero().flatten().tolist()
        assert [int(before.student.rows_N[n]) for n in labels] == ([k - 1] if ragged.example(3)[1][k] else [])
        inputs = (after.student.inputs["input_ids"] != before.student.inputs["input_ids"]).nonzero().tolist()
        assert inputs in ([], [[0, k]])


def test_a_micro_batch_without_examples_has_one_padding_token_and_no_target(ragged):
    batch = collate(ragged, [], 7)
    assert batch.student.inputs["input_ids"].tolist() == [[7]]
    assert batch.targets == len(batch.example_N) == len(batch.student.rows_N) == 0
    assert batch.labels_N.dtype == batch.student.rows_N.dtype == torch.int64


# ---- the token cache


class Cache:
    """A cache folder, and what was said about it."""

    def __init__(self, folder: Path):
        self.folder, self.said = folder, []

    def __call__(self, rows: Rows, format: str = "alpaca", tokenizer=None, **data) -> Encoded:
        self.said = []
        settings = Data(**({"cache_dir": str(self.folder)} | data))
        return token_cache.encoded(
            rows, Source(path="f.jsonl", format=format), settings, tokenizer or tiny(), "data.train", self.said.append
        )

    @property
    def entries(self) -> list[Path]:
        return sorted((self.folder / "tokens").iterdir())


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def no_encoding(monkeypatch):
    def never(*args):
        raise AssertionError("tokenised again")

    return lambda: monkeypatch.setattr(token_cache.encoding, "encode", never)


ROWS = rows_of(*({"instruction": f"q {i}", "output": "owl " * (i + 1)} for i in range(9)))


def same(a: Encoded, b: Encoded) -> bool:
    arrays = [(getattr(a, name), getattr(b, name)) for name in ("ids", "supervised", "offsets", "row")]
    return a.counts == b.counts and all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in arrays)


def test_a_hit_equals_a_miss_bit_for_bit(cache, no_encoding):
    made = cache(ROWS)
    assert same(made, encode(ROWS, "alpaca", Data(), tiny()))
    no_encoding()
    assert same(cache(ROWS), made) and not cache.said
    assert len(cache.entries) == 1


def test_padding_and_plain_use_of_the_tokenizer_do_not_change_the_key(cache, no_encoding):
    cache(ROWS)
    tiny()(["a", "the owl"], padding=True, truncation=True, max_length=3)
    no_encoding()
    cache(ROWS)


def test_content_is_the_key_and_not_the_time_or_size_of_the_file(cache, read, tmp_path):
    first = cache(read(GOOD))
    before = os.stat(tmp_path / "t.jsonl")
    read(GOOD.replace('"b"', '"c"'))
    os.utime(tmp_path / "t.jsonl", ns=(before.st_atime_ns, before.st_mtime_ns))
    rows = read_source(Source(path=str(tmp_path / "t.jsonl")), "data.train")
    after = os.stat(tmp_path / "t.jsonl")
    assert (after.st_size, rows.rows[0]["output"]) == (before.st_size, "c")
    assert not same(cache(rows), first) and len(cache.entries) == 2


@pytest.mark.parametrize(
    ("data", "tokenizer"),
    [
        ({"max_length": 100}, {}),
        ({"too_long": "truncate"}, {}),
        ({"train_on_input": True}, {}),
        ({}, {"seen": "unheard of words"}),
        ({}, {"template": MARKED}),
    ],
)
def test_what_shapes_the_examples_is_in_the_key(cache, data, tokenizer):
    made, other = cache(ROWS), cache(ROWS, tokenizer=tiny(**tokenizer), **data)
    assert len(cache.entries) == 2
    assert same(cache(ROWS), made) and same(cache(ROWS, tokenizer=tiny(**tokenizer), **data), other)


def test_the_format_and_the_limit_are_in_the_key(cache, read):
    text = '{"instruction": "a", "output": "b", "text": "c"}\n' * 2
    cache(read(text))
    cache(read(text, format="text"), format="text")
    cache(read(text, limit=1))
    assert len(cache.entries) == 3


@pytest.mark.parametrize("at", [0, 9, 100, 0.5, -1])
def test_a_flipped_byte_is_noticed_said_and_mended(cache, no_encoding, at):
    made = cache(ROWS)
    path = cache.entries[0] / "tokens.safetensors"
    raw = bytearray(path.read_bytes())
    raw[int(at * len(raw)) if at == 0.5 else at] ^= 1
    path.write_bytes(raw)
    assert same(cache(ROWS), made)
    assert len(cache.said) == 1 and "damaged" in cache.said[0] and str(cache.entries[0]) in cache.said[0]
    no_encoding()
    assert same(cache(ROWS), made) and not cache.said


@pytest.mark.parametrize("manifest", [b"", b"[]", b"{", b"\xff", b"{}", b'{"sha256": 1}'])
def test_a_damaged_manifest_is_noticed_said_and_mended(cache, no_encoding, manifest):
    made = cache(ROWS)
    (cache.entries[0] / "manifest.json").write_bytes(manifest)
    assert same(cache(ROWS), made) and "damaged" in cache.said[0]
    no_encoding()
    assert same(cache(ROWS), made) and not cache.said


@pytest.mark.parametrize("missing", ["tokens.safetensors", "manifest.json"])
def test_an_entry_that_lacks_a_file_is_mended(cache, no_encoding, missing):
    made = cache(ROWS)
    (cache.entries[0] / missing).unlink()
    assert same(cache(ROWS), made)
    no_encoding()
    assert same(cache(ROWS), made)


def test_changed_counts_are_noticed(cache):
    made = cache(ROWS)
    path = cache.entries[0] / "manifest.json"
    path.write_text(path.read_text().replace('"too_long": 0', '"too_long": 5'))
    assert same(cache(ROWS), made)


@pytest.mark.parametrize("folder", ["file/below", "x" * 300])
def test_a_cache_that_cannot_be_written_does_not_fail_the_run(tmp_path, folder):
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / folder)
    assert len(cache(ROWS)) == 9
    assert len(cache.said) == 1 and "cannot be written" in cache.said[0]


def test_a_full_disk_does_not_fail_the_run_and_leaves_nothing_behind(cache, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert len(cache(ROWS)) == 9
    assert "No space left" in cache.said[0] and cache.entries == []


@pytest.mark.parametrize(
    ("rows", "format", "data", "words"),
    [
        ([talk("u q")] * 3, "chat", {}, ["none of f.jsonl's 3 rows", "0 are longer", "3 have no answer"]),
        ([json.loads(GOOD)] * 2, "alpaca", {"max_length": 5}, ["none of f.jsonl's 2 rows", "2 are longer than data.max_length = 5"]),
        ([{"text": ""}], "text", {}, ["none of f.jsonl's 1 rows", "1 have no answer"]),
    ],
)
def test_rows_with_nothing_to_train_on_are_refused_with_counts(cache, rows, format, data, words):
    with pytest.raises(UserError) as info:
        cache(rows_of(*rows), format, **data)
    (problem,) = info.value.problems
    assert problem.startswith("data.train: ") and all(word in problem for word in words), problem
    assert not cache.folder.exists()


def test_chat_without_a_template_is_refused(cache):
    with pytest.raises(UserError, match=r"^data.train.format: found chat, and the tokenizer has no chat template"):
        cache(rows_of(talk("u q", "a x")), "chat", tokenizer=tiny(None))
