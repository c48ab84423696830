"""Exactly the answers are supervised, in every format."""

import json

import pytest

from llmkd.config.recipe import Data
from llmkd.data.encoding.formats import ALPACA, ALPACA_WITH_INPUT
from tests.kit.data import END, FORGETS, GOOD, MARKED, PLAIN, encode, kept, real, rows_of, same, shown, talk, tiny

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
    assert encoded.loss_mask.tolist() == [False] + [True] * (len(encoded.ids) - 1)


def test_train_on_input_supervises_everything_but_the_first_token():
    for format, row in (("alpaca", json.loads(GOOD)), ("chat", talk("u q", "a one")), ("text", {"text": "the owl"})):
        encoded = encode(rows_of(row), format, Data(train_on_input=True), tiny())
        assert encoded.loss_mask.tolist() == [False] + [True] * (len(encoded.ids) - 1)


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


# ---- the other formats


def test_prompt_and_completion():
    tokenizer = tiny()
    encoded = encode(
        rows_of({"prompt": "q: ", "completion": "one"}, {"prompt": "", "completion": "two"}), "prompt_completion", Data(), tokenizer
    )
    assert kept(encoded, tokenizer) == ["one" + END, "wo" + END]
    assert shown(encoded, tokenizer) == [f"q: one{END}", f"two{END}"]


@pytest.mark.parametrize(
    ("format", "row", "asked"),
    [
        ("alpaca", {"instruction": "q", "input": "x", "output": "one"}, ALPACA_WITH_INPUT.format(instruction="q", input="x")),
        ("alpaca", {"instruction": "q", "input": "", "output": "one"}, ALPACA.format(instruction="q")),
        ("prompt_completion", {"prompt": "q\n\nx", "completion": "one"}, "q\n\nx"),
    ],
)
def test_plain_formats_through_the_chat_template(format, row, asked):
    tokenizer = tiny()
    encoded = encode(rows_of(row), format, Data(), tokenizer, chat_template=True)
    assert same(encoded, encode(rows_of(talk(f"u {asked}", "a one")), "chat", Data(), tokenizer))


def test_a_conversation_as_prompt_and_completion_supervises_the_completion_only():
    messages = talk("s be kind", "u q", "a one", "u r", "a two")["messages"]
    encoded = encode(rows_of({"prompt": messages[:4], "completion": messages[4:]}), "prompt_completion", Data(), tiny())
    assert kept(encoded, tiny()) == ["two" + END]
    assert shown(encoded, tiny()) == [tiny().apply_chat_template(messages, tokenize=False)]
