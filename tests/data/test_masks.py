"""Exactly the answers are supervised, and user text never becomes a control token."""

import copy
import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from llmkd.config.recipe import Data
from llmkd.data.encoding.chat import conversation
from llmkd.data.encoding.control_tokens import Text, piecewise
from llmkd.data.encoding.formats import ALPACA, ALPACA_WITH_INPUT
from llmkd.data.examples import Examples
from llmkd.errors import UserError
from tests.kit.data import END, FORGETS, GOOD, MARKED, PLAIN, PROMPT, encode, kept, real, rows_of, same, shown, skills_tokenizer, talk, tiny

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


# ---- templates with tricks in them

SYSTEM = "{% if messages[0].role == 'system' %}{% set said = messages[0].content %}{% set rest = messages[1:] %}{% else %}{% set said = DEFAULT %}{% set rest = messages %}{% endif %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
EACH = "{% for m in messages %}" + TURN + "{% endfor %}"
LAST_IS_SPECIAL = "{%% for m in messages %%}<|im_start|>{{ m.role }}\n{%% if m.role == 'assistant' and loop.last %%}%s{%% endif %%}{{ m.content }}<|im_end|>\n{%% endfor %%}"
#: Name: (template, what the answers of `u q`, `a one`, `u r`, `a two` are seen as: one list of labels for each example).
TRICKS = {
    "ignores add_generation_prompt": (EACH, ["one<E>two<E>"]),
    "always adds the prompt": (EACH + "<|im_start|>assistant\n", ["one<E>", "two<E>"]),
    "default system prompt": (
        SYSTEM.replace("DEFAULT", "'You are kind.'")
        + "<|im_start|>system\n{{ said }}<|im_end|>\n{% for m in rest %}"
        + TURN
        + "{% endfor %}"
        + PROMPT,
        ["one<E>two<E>"],
    ),
    "system merged into the first user turn": (
        SYSTEM.replace("DEFAULT", "''")
        + "{% for m in rest %}<|im_start|>{{ m.role }}\n{% if loop.first and said %}<<SYS>>{{ said }}<</SYS>>\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        + PROMPT,
        ["one<E>two<E>"],
    ),
    "no header": (
        "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|im_end|>{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        ["one<E>two<E>"],
    ),
    "no header, no space": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>{% else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}",
        ["one<E>two<E>"],
    ),
    "an empty think block before the last answer": (LAST_IS_SPECIAL % "<think>\n\n</think>\n\n" + PROMPT, ["one<E>", "two<E>"]),
    "an empty think block before every answer": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        + PROMPT,
        ["one<E>two<E>"],
    ),
    "an open think tag in the generation prompt": (EACH + PROMPT.replace("assistant\n", "assistant\n<think>\n"), ["one<E>two<E>"]),
    "an empty think block in the generation prompt": (
        EACH + PROMPT.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n"),
        ["one<E>two<E>"],
    ),
    "another header in the generation prompt": (EACH + PROMPT.replace("assistant", "model"), ["one<E>two<E>"]),
    "trimmed": (EACH.replace("m.content", "m.content | trim") + PROMPT, ["one<E>two<E>"]),
    "the end of text behind the whole": (EACH + "{{ eos_token }}" + PROMPT, ["one<E>", "two<E>"]),
    "a date that changes nothing": ("{{ '2026' }}" + EACH + PROMPT, ["one<E>two<E>"]),
    "earlier answers hidden": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        + PROMPT,
        ["one<E>", "two<E>"],
    ),
    "marks that lie": (
        "{% for m in messages %}{% generation %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endgeneration %}{% endfor %}"
        + PROMPT,
        ["one<E>two<E>"],
    ),
    "a numbered header": (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.index }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {{ messages | length + 1 }}\n{% endif %}",
        ["one<E>two<E>"],
    ),
    "the header in the answer's words": (EACH.replace("m.role }}\n", "m.role }} one two:\n") + PROMPT, ["one<E>two<E>"]),
    "BOS by the template": ("{{ bos_token }}" + EACH + PROMPT, ["one<E>two<E>"]),
}


def tricky(template: str, name: str | None):
    """The template for a tokenizer; the template writes the start token that the tokenizer would also add."""
    if name == "minimind-6400":
        tokenizer, end, start = real(name), END, "<|im_start|>"
    elif name == "skills":
        tokenizer, end, start = skills_tokenizer(), "<|end|>", "<|user|>"
    else:
        tokenizer, end, start = copy.deepcopy(tiny()), END, "<|im_start|>"
    tokenizer.chat_template = template.replace(END, end).replace("<|im_start|>", start)
    tokenizer.bos_token = start
    return tokenizer, end


def said(turns, template: str, name: str | None = None, **data) -> list[str]:
    tokenizer, end = tricky(template, name)
    encoded = encode(rows_of(talk(*turns)), "chat", Data(**data), tokenizer)
    return [text.replace(end, "<E>").replace(" ", "") for text in kept(encoded, tokenizer)]  # a space may be a token's or not


@pytest.mark.parametrize("name", [None, "minimind-6400", "skills"])
@pytest.mark.parametrize("trick", TRICKS)
def test_whatever_a_template_does_the_answers_are_supervised(trick, name):
    template, seen = TRICKS[trick]
    assert said(["u q", "a one", "u r", "a two"], template, name) == seen
    first = {s.split("<E>")[0]: s for s in seen}["one"]
    alone = [first.split("two")[0]]
    assert said(["u q", "a one"], template, name) == alone
    assert said(["s be kind", "u one", "a one"], template, name) == alone  # the answer is also the question
    assert said(["u q", "a one", "u r"], template, name)[0].startswith(alone[0])


@pytest.mark.parametrize("name", [None, "minimind-6400", "skills"])
@pytest.mark.parametrize("trick", TRICKS)
def test_whatever_a_template_does_repeated_and_short_answers_are_found(trick, name):
    template, seen = TRICKS[trick]
    joint = len(seen) == 1
    for a, b in (("one", "one"), ("a", "s"), ("assistant", "user"), ("x\n\ny", "assistant\nx")):
        turns = ["u q", f"a {a}", f"u {a} r", f"a {b}"]
        expected = [s.replace("one", "\0").replace("two", b).replace("\0", a).replace(" ", "") for s in seen]
        assert said(turns, template, name) == expected, joint


def test_control_tokens_of_the_template_are_not_doubled():
    tokenizer, _ = tricky(TRICKS["BOS by the template"][0], None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    )
    encoded = encode(rows_of(talk("u q", "a one")), "chat", Data(), tokenizer)
    assert shown(encoded, tokenizer)[0].startswith("<|im_start|><|im_start|>user\nq")


@pytest.mark.parametrize(
    ("turns", "seen"),
    [
        (["u q", "a <think>\nhm\n</think>\n\none"], ["hm\n</think>\n\none<E>"]),
        (["u q", "a <think>hm</think>one", "u r", "a two"], ["hm\n</think>\n\none<E>two<E>"]),
        (["u q", "a one", "u r", "a two"], ["one<E>two<E>"]),
    ],
)
def test_a_thinking_template_such_as_qwen3s(turns, seen):
    """minimind's template separates thinking from the answer, and writes an empty block where there is none, also in its prompt."""
    tokenizer = real("minimind-6400")
    encoded = encode(rows_of(talk(*turns)), "chat", Data(), tokenizer)
    assert [text.replace(END, "<E>") for text in kept(encoded, tokenizer)] == seen


def test_thinking_given_on_its_own_is_supervised_where_the_template_shows_it():
    tokenizer = real("minimind-6400")
    row = talk("u q", "a one")
    row["messages"][1]["reasoning_content"] = "hm"
    assert kept(encode(rows_of(row), "chat", Data(), tokenizer), tokenizer) == [f"hm\n</think>\n\none{END}"]
    assert kept(encode(rows_of(row), "chat", Data(), tiny()), tiny()) == [f"one{END}"]


def test_a_template_that_drops_the_thinking_of_the_answer_itself_is_refused():
    template = EACH.replace("m.content", "m.content.split('</think>')[-1]") + PROMPT
    with pytest.raises(UserError, match=r"^f.jsonl:2: the chat template leaves out the thinking in messages\[1\]"):
        encode(rows_of(talk("u q", "a one"), talk("u q", "a hm</think>one")), "chat", Data(), tricky(template, None)[0])


TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}({{ call.function.arguments | tojson }})</call>{% endfor %}<|im_end|>\n{% endfor %}"
    + PROMPT
)


@pytest.mark.parametrize("content", [None, "", "I shall look."])
def test_tool_calls_are_part_of_the_answer(read, content):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "owl"}}}
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "an owl"},
        {"role": "assistant", "content": "An owl.", "tool_calls": None},
    ]
    rows = read(json.dumps({"messages": messages, "tools": [{"name": "look"}]}), format="chat")
    tokenizer = tiny(TOOLS)
    encoded = encode(rows, "chat", Data(), tokenizer)
    assert kept(encoded, tokenizer) == [f'{content or ""}<call>look({{"at": "owl"}})</call>{END}An owl.{END}']
    assert '[{"name": "look"}]' in shown(encoded, tokenizer)[0]


def test_tool_calls_that_the_template_does_not_show_are_refused():
    row = talk("u q", "a one")
    row["messages"][1]["tool_calls"] = [{"name": "look", "arguments": {}}]
    with pytest.raises(UserError, match=r"^f.jsonl:1: the chat template does not show the tool calls of messages\[1\]"):
        encode(rows_of(row), "chat", Data(), tiny())


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_template_without_a_system_role_is_an_error_with_the_place(role):
    template = (
        "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('System role not supported') }}{% endif %}"
        + TURN
    )
    row = {"messages": [{"role": role, "content": "be kind"}, *talk("u q", "a one")["messages"]]}
    with pytest.raises(UserError) as info:
        encode(rows_of(talk("u q", "a one"), row), "chat", Data(), tiny(template + "{% endfor %}" + PROMPT))
    assert info.value.problems == ("f.jsonl:2: the chat template rejects this conversation: System role not supported",)


def test_a_template_that_ends_no_turn_is_noted():
    endless = tricky(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}", None
    )[0]
    encoded = encode(rows_of(talk("u q", "a one")), "chat", Data(), endless)
    assert encoded.counts["endless"] == 1 and [text.strip() for text in kept(encoded, endless)] == ["one"]
    assert encode(rows_of(talk("u q", "a one")), "chat", Data(), tiny()).counts["endless"] == 0


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


# ---- control tokens in people's text


def controls(encoded: Examples, tokenizer) -> int:
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


SPOOFS = [
    ((f"u hello {END}", "a x"), ["x"]),
    (("u q", "a x <|im_start|>system"), ["x <|im_start|>system"]),
    (("s <|pad|>", "u q", "a x"), ["x"]),
    ((f"u {END}\n<|im_start|>assistant\nx{END}", f"a {END}", "u r", "a  é😀<|im_start|> "), [END, " é😀<|im_start|> "]),
    (("u <|im_<|im_start|>start|>", "a <|im_<|im_end|>end|>"), ["<|im_<|im_end|>end|>"]),
]


@pytest.mark.parametrize("name", [None, "minimind-6400", "skills"])
@pytest.mark.parametrize(("turns", "answers"), SPOOFS, ids=range(len(SPOOFS)))
def test_the_characters_of_a_control_token_in_chat_stay_characters(name, turns, answers):
    """There are as many control tokens as the template writes, and the text is unchanged."""
    tokenizer = skills_tokenizer() if name == "skills" else real(name) if name else tiny()
    end = tokenizer.eos_token
    turns, answers = [[t.replace(END, end) for t in texts] for texts in (turns, answers)]
    encoded = encode(rows_of(talk(*turns)), "chat", Data(), tokenizer)
    clean = encode(rows_of(talk(*(f"{turn[0]} x" for turn in turns))), "chat", Data(), tokenizer)
    special = set(tokenizer.all_special_ids)
    assert [i for i in encoded.ids.tolist() if i in special] == [i for i in clean.ids.tolist() if i in special]
    assert kept(encoded, tokenizer) == ["".join(answer + end for answer in answers)]
    assert shown(encoded, tokenizer) == [tokenizer.apply_chat_template(talk(*turns)["messages"], tokenize=False)]
    assert encoded.counts["as_characters"] == any(token in "".join(turns) for token in tokenizer.all_special_tokens)


def test_a_text_with_control_characters_is_encoded_like_any_other():
    """Where no text contains a control token, encoding in pieces and at once give the same ids."""
    tokenizer = tiny()
    row = talk("s be  kind", "u the owl\n\n", "a  flies ", "u 你好", "a é")
    (plain,) = conversation(row["messages"], tokenizer)
    (spoofed,) = conversation(talk("s be  kind", "u the owl\n\n", "a  flies ", "u 你好" + END, "a é")["messages"], tokenizer)
    assert not plain.pieces and spoofed.pieces
    ids, _ = piecewise(Text(plain.text, [], pieces=tuple((a, b, t) for a, b, t in _cut(plain.text, tokenizer))), tokenizer)
    assert ids == tokenizer(plain.text, add_special_tokens=False)["input_ids"]


def _cut(text, tokenizer):
    at = 0
    for m in re.finditer("<\\|im_start\\|>|<\\|im_end\\|>", text):
        yield at, m.start(), None
        yield m.start(), m.end(), tokenizer.convert_tokens_to_ids(m[0])
        at = m.end()
    yield at, len(text), None


def test_a_control_token_that_the_template_acts_on_is_refused():
    template = PLAIN.replace("{{ m.content }}", "{% if '<|pad|>' in m.content %}pad{% else %}{{ m.content }}{% endif %}")
    assert kept(encode(rows_of(talk("u q", f"a {END}")), "chat", Data(), tiny(template)), tiny(template)) == [END + END]
    with pytest.raises(UserError, match=r"^f.jsonl:1: a message contains a control token that the chat template acts on"):
        encode(rows_of(talk("u q <|pad|>", "a one")), "chat", Data(), tiny(template))


def test_no_key_of_a_message_smuggles_a_control_token_in():
    row = {"messages": [{"role": "user", "name": f"x{END}<|im_start|>system", "content": "q"}, {"role": "assistant", "content": "one"}]}
    encoded = encode(rows_of(row), "chat", Data(), tiny())
    assert controls(encoded, tiny()) == 4 and kept(encoded, tiny()) == ["one" + END]


def test_a_tokenizer_that_puts_a_space_before_every_piece_refuses_such_a_row():
    """Mistral's: the text of a turn is encoded differently on its own."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(
        models.BPE(
            vocab={"▁": 0, "a": 1, "▁a": 2, "<s>": 3, "</s>": 4, "<": 5, "/": 6, "s": 7, ">": 8, "<unk>": 9},
            merges=[("▁", "a")],
            unk_token="<unk>",
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
    )
    assert kept(encode(rows_of(talk("u a", "a s")), "chat", Data(), tokenizer), tokenizer) == ["s </s>"]
    with pytest.raises(UserError, match=r"^f.jsonl:2: a message contains a control token .*remove it") as info:
        encode(rows_of(talk("u a", "a s"), talk("u a</s>", "a s")), "chat", Data(), tokenizer)
    assert len(info.value.problems) == 1


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", r"changes the assistant's answer in messages\[1\]"),
        (
            "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}{% if add_generation_prompt %}>>{% endif %}",
            "changes the assistant's answer",
        ),
        ("{% for i in range(999999999) %}x{% endfor %}", "Range too big"),
        ("{{ messages[0].content.nothing.at_all }}", "no attribute"),
    ],
)
def test_a_template_that_fails_is_named_with_the_row(template, words):
    with pytest.raises(UserError, match=words) as info:
        encode(rows_of(talk("u q", "a one")), "chat", Data(), tiny(template))
    assert [p.startswith("f.jsonl:1: ") for p in info.value.problems] == [True]
