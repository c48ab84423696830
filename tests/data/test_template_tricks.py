"""Whatever a chat template does, exactly the answers are supervised, or the row is refused with its place."""

import copy
import json

import pytest
from tokenizers import processors

from llmkd.config.recipe import Data
from llmkd.errors import UserError
from tests.kit.data import END, PROMPT, encode, kept, real, rows_of, shown, skills_tokenizer, talk, tiny

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
