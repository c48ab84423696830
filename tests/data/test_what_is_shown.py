"""Turns that call are supervised as the chat template means them; what it does not show is refused or counted."""

import json

import pytest

from llmkd.config.recipe import Data
from llmkd.errors import UserError
from tests.kit.calls import CALLS, HEAD, TAIL, calling, notes, said
from tests.kit.data import END, PLAIN, PROMPT, encode, kept, made, rows_of, shown, talk

MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] ["
    "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}]{{ eos_token }}{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("given", [{"a": 3}, '{"a": 3}'])
@pytest.mark.parametrize("begins", ["[TOOL_CALLS] [", " [TOOL_CALLS] [", "<|im_start|>[", " <|pad|>["])
def test_calls_that_begin_otherwise_than_answers_are_supervised_from_there(given, begins):
    call = begins + '{"name": "mul", "arguments": {"a": 3}}]'
    assert "".join(said(calling(given), MISTRAL.replace("[TOOL_CALLS] [", begins))) == f"{call.lstrip()}{END}one{END}"


def test_calls_that_begin_with_a_prompt_that_is_always_there_are_supervised_behind_it():
    """Command R7B's: its prompt has an empty thought, with which calls begin and answers do not."""
    prompt = "<|im_start|>assistant\n<think></think>"
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}<think>{{ m.reasoning_content }}</think>{% for c in m.tool_calls %}"
        + CALLS["tojson"]
        + "{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        + prompt
    )
    call = '{"name": "mul", "arguments": {"a": 3}}' + END
    assert said(calling({"a": 3}), template) == [call, f"one{END}"]
    assert said(calling({"a": 3}, reasoning_content="hm"), template) == [f"hm</think>{call}", f"one{END}"]


THOUGHTFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}" + CALLS["tojson"] + TAIL.replace("assistant\n", "assistant\n<think>\n")
)


def test_calls_without_a_thought_are_supervised_behind_the_empty_one_as_answers_are():
    call = '{"name": "mul", "arguments": {"a": 3}}' + END
    assert said(calling({"a": 3}), THOUGHTFUL) == [f"{call}one{END}"]
    assert said(calling({"a": 3}, content="hm"), THOUGHTFUL) == [f"hm{call}one{END}"]
    assert said(calling({"a": 3}, reasoning_content="hm"), THOUGHTFUL) == [f"hm\n</think>\n\n{call}one{END}"]
    assert said(calling({"a": 3}, content="</think>hm"), THOUGHTFUL)[0].endswith(f"</think>hm{call}one{END}")


TWICE = (
    "{% for m in messages %}{% if m.tool_calls %}<|im_start|>assistant\n{% for c in m.tool_calls %}"
    + CALLS["tojson"]
    + "{% endfor %}<|im_end|>{% endif %}{% if m.content is not none %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    + PROMPT
)


@pytest.mark.parametrize("content", [None, ""])
def test_a_turn_that_only_calls_has_a_content_of_null_where_a_template_asks_for_it(read, content):
    """DeepSeek R1's template writes an empty turn behind the calls where the content is an empty text."""
    row = calling({"a": 3})
    row["messages"][1]["content"] = content
    rows, call = read(json.dumps(row), format="chat"), '{"name": "mul", "arguments": {"a": 3}}' + END
    for template, shows in (
        (TWICE, f"{call}one{END}"),
        (HEAD + CALLS["tojson"] + TAIL, f"{call}one{END}"),  # writes None for null
        (HEAD.replace("m.content", "m.content + ''") + CALLS["tojson"] + TAIL, f"{call}one{END}"),  # takes texts only
    ):
        tokenizer = made(template)
        for _ in "once", "with what was learned of the template":
            assert kept(encode(rows, "chat", Data(max_length=4096), tokenizer), tokenizer) == [shows]


def test_a_content_beside_calls_that_would_be_a_turn_of_its_own_is_refused():
    """The header between the two would be supervised. It is not taken for null as those of the row's other calls are."""
    row = calling({"a": 3})
    row["messages"] += calling({"a": 4}, content="hm")["messages"]
    with pytest.raises(
        UserError, match=r"the tool calls of messages\[5\] and the rest of it as turns of their own; make two messages of it"
    ):
        said(row, TWICE)


def test_calls_before_the_content_of_their_turn_are_supervised():
    for prompt in ("", PROMPT):
        template = HEAD.replace("{{ m.content }}", "") + CALLS["tojson"] + "{% endfor %}{{ m.content }}<|im_end|>\n{% endfor %}" + prompt
        assert said(calling({"a": 3}, content="hm"), template) == ['{"name": "mul", "arguments": {"a": 3}}hm' + f"{END}one{END}"]


def test_a_content_that_is_not_shown_beside_calls_is_refused():
    template = HEAD.replace("{{ m.content }}", "{% if not m.tool_calls %}{{ m.content }}{% endif %}") + CALLS["tojson"] + TAIL
    with pytest.raises(
        UserError, match=r"^f.jsonl:1: the chat template does not show the content of messages\[1\] next to its tool calls; remove it"
    ):
        said(calling({"a": 3}, content="hm"), template)


def test_calls_in_a_long_turn_of_their_own_are_refused():
    """What a turn that answers has before its answer is no header of this length."""
    with pytest.raises(UserError, match=r"the chat template changes the assistant's answer in messages\[1\]"):
        said(calling({"a": 3}), MISTRAL.replace(" {{ m.content }}", " " + "header " * 20 + "{{ m.content }}"))


@pytest.mark.parametrize(("role", "who"), [("system", "a system message"), ("tool", "a tool's answer"), ("user", "a user's turn")])
def test_a_message_that_the_template_does_not_show_is_refused(role, who):
    row = calling({"a": 3})
    row["messages"].insert(0, {"role": "system", "content": "be"})
    i = next(i for i, message in enumerate(row["messages"]) if message["role"] == role)
    template = "{% for m in messages if m.role != 'ROLE' %}" + (HEAD + CALLS["tojson"] + TAIL).partition("%}")[2]
    with pytest.raises(UserError) as caught:
        said(row, template.replace("ROLE", role))
    assert caught.value.problems == (
        f"f.jsonl:1: the chat template does not show messages[{i}], {who}; use a tokenizer whose template does, or remove it",
    )


def test_what_a_template_does_not_show_of_a_message_is_counted():
    row, template = calling({"a": 3}, reasoning_content="hm"), HEAD + CALLS["tojson"] + TAIL
    row["messages"][0]["name"], row["messages"][2]["name"], row["messages"][2]["tool_call_id"] = "bob", "mul", "1"
    row["tools"] = [{"type": "function", "function": {"name": "mul"}}]  # a name that the text has, as that of the call
    said_of = "note: not shown by the chat template, with the rows that have it, of 1 row: "
    assert notes(row, template) == [said_of + "messages[].name (1), messages[].reasoning_content (1), tools (1)"]
    shows = "{% for t in tools %}{{ t | tojson }}{% endfor %}"
    assert notes(row, shows + template.replace("{{ m.role }}", "{{ m.role }} {{ m.name }} {{ m.reasoning_content }}")) == []
    row["tools"].append({"type": "function", "function": {"name": "div"}})
    assert notes(row, "{{ tools[0] }}" + template)[0].endswith("tools (1)")
    assert notes(row, shows.replace(" in tools", " in tools or []") + template)[0].endswith("messages[].reasoning_content (1)")
    assert "tools" not in notes(row, shows + template)[0]


def test_what_a_template_does_not_show_of_a_call_is_counted():
    row, plain = calling({"a": 3}), HEAD + CALLS["tojson"] + TAIL
    call = row["messages"][1]["tool_calls"][0]
    call |= {"id": "1", "index": 0, "thought_signature": "s", "extra": None}
    call["function"]["strict"] = True
    listed = "messages[].tool_calls[].function.strict (1), messages[].tool_calls[].thought_signature (1)"
    assert notes(row, plain) == ["note: not shown by the chat template, with the rows that have it, of 1 row: " + listed]
    shows = plain.replace("{{ c.function.name }}", "{{ c.function.name }} {{ c.thought_signature }}")
    assert notes(row, shows)[0].endswith("of 1 row: messages[].tool_calls[].function.strict (1)")
    assert "strict" not in "".join(notes(row, HEAD + CALLS["whole"] + TAIL))
    call["function"]["strict"] = None
    assert notes(row, shows) == []


def test_a_content_that_is_cut_or_changed_is_counted():
    row = talk("s  be\tkind ", 'u say "a\n b"', "a one")
    assert (
        notes(row, PLAIN)
        == notes(row, PLAIN.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'user' else m.content | trim }}"))
        == []
    )
    for change in ("[:5]", " | upper", ".split('a')[0]"):
        assert notes(row, PLAIN.replace("{{ m.content }}", f"{{{{ m.content if m.role == 'assistant' else m.content{change} }}}}"))[
            0
        ].endswith("of 1 row: messages[].content, whole and unchanged (1)")


def test_tools_beside_a_prompt_of_text(read):
    line = json.dumps(row := {"prompt": "q", "completion": "one", "tools": [{"name": "mul"}]})
    tokenizer = made("{% for t in tools %}{{ t | tojson }}{% endfor %}" + PLAIN)
    encoded = encode(rows_of(row), "prompt_completion", Data(), tokenizer, chat_template=True)
    assert shown(encoded, tokenizer)[0].startswith('{"name": "mul"}<|im_start|>user')
    assert notes(row, PLAIN, "prompt_completion", chat_template=True)[0].endswith("of 1 row: tools (1)")
    with pytest.raises(
        UserError, match=":1: tools is a list of tools, for which a prompt without a chat template has no place; set chat_template: true"
    ):
        read(line, format="prompt_completion")
    for settings in ({"chat_template": True}, {"ignore": ("tools",)}):
        assert len(read(line, format="prompt_completion", **settings).rows) == 1


def test_a_templates_wish_for_a_key_is_no_fault():
    row = talk("u q", "a one")
    row["messages"][0]["name"] = "bob"
    assert notes(row, "{% if not messages[0].name %}{{ raise_exception('no name') }}{% endif %}" + PLAIN.replace("m.name or ", "")) == []
