"""What a row says comes out as the chat template means it, or is refused or counted: tool calls, parts, names, tools, rendered texts."""

import copy
import json
import re

import pytest
import yaml

from llmkd.config.recipe import Data
from llmkd.data.encoding.template_process import rendered
from llmkd.data.examples import merge
from llmkd.data.notes import example_notes
from llmkd.errors import UserError
from tests.data.test_templates import made
from tests.kit.data import END, PLAIN, PROMPT, encode, kept, rows_of, shown, talk, tiny

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
TAIL = "{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT
CALLS = {
    "tojson": '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}',
    "verbatim": '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments }}}',
    "joined": """{{ '{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments + '}' }}""",
    "either": '{"name": "{{ c.function.name }}", "arguments": {% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}{% endif %}}',
    "whole": "{{ c.function | tojson }}",
    "escaped": '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson(ensure_ascii=True) }}}',
}
XML = "{{ c.function.name }}{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v if v is string else v | tojson }}</{{ k }}>{% endfor %}"
ARGUMENTS = {"a": 3, "b": True, "note": 'an "owl" é', "of": [None, {"x": "y"}], "none": {}}


def calling(*given, content: str = "", **more) -> dict:
    calls = [{"type": "function", "function": {"name": "mul", "arguments": one}} for one in given]
    turn = {"role": "assistant", "content": content, "tool_calls": calls} | more
    tool = {"role": "tool", "content": "54 {'a': 3}"}  # an echo of a call, as Python writes it
    return {"messages": [*talk("u q")["messages"], turn, tool, *talk("a one")["messages"]]}


def said(row: dict, template: str, **settings) -> list[str]:
    tokenizer = made(template)
    return kept(encode(rows_of(row), "chat", Data(max_length=4096), tokenizer, **settings), tokenizer)


@pytest.mark.parametrize("form", ["object", "text"])
@pytest.mark.parametrize("name", CALLS)
def test_arguments_are_the_json_that_the_template_means(name, form):
    given = ARGUMENTS if form == "object" else json.dumps(ARGUMENTS, ensure_ascii=False)
    (text,) = said(calling(given, given), HEAD + CALLS[name] + "\n" + TAIL)
    first, second, end = text.split("\n")
    assert json.loads(first) == json.loads(second) == {"name": "mul", "arguments": ARGUMENTS} and end == f"{END}one{END}"
    assert ("\\u00e9" in text) == (name == "escaped")


@pytest.mark.parametrize("form", ["object", "text"])
def test_arguments_that_a_template_takes_one_by_one(form):
    given = ARGUMENTS if form == "object" else json.dumps(ARGUMENTS)
    shows = '<a>3</a><b>true</b><note>an "owl" é</note><of>[null, {"x": "y"}]</of><none>{}</none>'
    assert said(calling(given), HEAD + XML + TAIL) == [f"mul{shows}{END}one{END}"]


@pytest.mark.parametrize("given", [{"a": 3}, '{"a": 3}'])
@pytest.mark.parametrize(
    "code", [CALLS["tojson"], CALLS["verbatim"], CALLS["whole"], CALLS["tojson"].replace("c.function", "(c.function or c)")]
)
def test_calls_without_an_object_of_the_function(code, given):
    row = calling(given)
    row["messages"][1]["tool_calls"] = [row["messages"][1]["tool_calls"][0]["function"]]
    assert said(row, HEAD + code + TAIL) == ['{"name": "mul", "arguments": {"a": 3}}' + f"{END}one{END}"]


def test_text_arguments_are_objects_wherever_the_template_takes_them():
    either, verbatim = (said(calling('{"a":3}'), HEAD + CALLS[name] + TAIL)[0] for name in ("either", "verbatim"))
    assert '"arguments": {"a": 3}' in either and '"arguments": {"a":3}' in verbatim
    assert '"arguments": 3 * 18' in said(calling("3 * 18"), HEAD + CALLS["verbatim"] + TAIL)[0]
    assert '"arguments": {}' in said(calling(""), HEAD + CALLS["tojson"] + TAIL)[0]  # no arguments, in OpenAI's way
    assert '"arguments": {}' in said(calling("{}"), HEAD + CALLS["tojson"] + TAIL)[0]


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ("3 * 18", CALLS["tojson"], "the arguments of a call of 'mul' are text that is not a JSON object ('3 * 18')"),
        ("[3]", XML, "the arguments of a call of 'mul' are text that is not a JSON object ('[3]')"),
        (
            {"a": {"b": True}},
            XML.replace(" | tojson", ""),
            "the chat template writes the arguments of 'mul' in messages[1] as Python does ({'b': True})",
        ),
        (
            {"a": 3, "b": "owl"},
            "{{ c.function.name }}({{ c.function.arguments.a }})",
            "the chat template does not show 'b' of the arguments of 'mul'",
        ),
        ({"a": 3}, "{{ c.type }}", "the chat template does not show the tool calls of messages[1]"),
        (
            {"a": 3},
            "{% if loop.first %}" + CALLS["tojson"] + "{% endif %}",
            "the chat template does not show the tool calls of messages[1]",
        ),
    ],
)
def test_arguments_that_do_not_come_out_are_refused(given, code, words):
    with pytest.raises(UserError) as caught:
        said(calling(given, given), HEAD + code + TAIL)
    assert caught.value.problems[0].startswith(f"f.jsonl:1: {words}") and len(caught.value.problems) == 1


STRINGS = XML.replace("v if v is string else v | tojson", "v | string")  # as Qwen3-Coder's


@pytest.mark.parametrize(("value", "python", "as_json"), [(True, "True", "true"), (False, "False", "false"), (None, "None", "null")])
@pytest.mark.parametrize("form", ["object", "text"])
def test_values_that_come_out_in_python_spelling_are_refused(value, python, as_json, form):
    row = calling({"a": 3, "b": value} if form == "object" else json.dumps({"a": 3, "b": value}))
    row["messages"][0]["content"] = "True, False or None?"
    with pytest.raises(UserError) as caught:
        said(row, HEAD + STRINGS + TAIL)
    assert caught.value.problems[0] == (
        f"f.jsonl:1: the chat template writes {as_json} in the arguments of a call in messages[1] as Python does ({python}); set call_values: template "
        "to train on that, or call_values: json to give such values to the template as JSON"
    )
    assert said(row, HEAD + STRINGS + TAIL, call_values="template")[0].startswith(f"mul<a>3</a><b>{python}</b>")
    assert said(row, HEAD + STRINGS + TAIL, call_values="json")[0].startswith(f"mul<a>3</a><b>{as_json}</b>")
    row["messages"][1] = calling({"a": 3, "b": as_json, "c": "True, False or None"})["messages"][1]
    assert said(row, HEAD + STRINGS + TAIL)[0].startswith(f"mul<a>3</a><b>{as_json}</b><c>True, False or None</c>")
    row["messages"][1] = calling({"a": 3, "b": value, "c": python})["messages"][
        1
    ]  # written as JSON, beside a text that looks like Python's word
    assert f"<b>{as_json}</b><c>{python}</c>" in said(row, HEAD + XML + TAIL)[0]


PYTHON = HEAD + "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ VALUE }};{% endfor %})" + TAIL
MIXED_VALUES = {"a": 3, "n": 0.5, "b": True, "of": [None, {"x": "it's"}], "t": "True"}


@pytest.mark.parametrize("form", ["object", "text"])
@pytest.mark.parametrize(
    ("call_values", "shown"),
    [
        ("template", """a=3;n=0.5;b=True;of=[None, {'x': "it's"}];t=True;"""),
        ("json", """a=3;n=0.5;b=true;of=[null, {"x": "it's"}];t=True;"""),
    ],
)
def test_values_that_a_template_writes_as_python_does_come_out_as_the_source_says(call_values, shown, form):
    row = calling(MIXED_VALUES if form == "object" else json.dumps(MIXED_VALUES), {"a": 3})
    assert said(row, PYTHON.replace("VALUE", "v"), call_values=call_values) == [f"mul({shown})mul(a=3;){END}one{END}"]
    for template in (HEAD + XML + TAIL, HEAD + CALLS["verbatim"] + "\n" + TAIL):  # those that write JSON do so whatever the setting
        assert said(row, template, call_values=call_values) == said(row, template)


def test_json_that_a_template_would_write_in_quotes_is_refused():
    """LFM2's calls are Python on purpose: a JSON text in them is a text."""
    row, template = calling(MIXED_VALUES), PYTHON.replace("VALUE", '"\'" + v + "\'" if v is string else v')
    with pytest.raises(UserError) as caught:
        said(row, template, call_values="json")
    assert caught.value.problems[0] == (
        "f.jsonl:1: the chat template writes 'b' of the arguments of 'mul' in messages[1] as Python does, and as a text where it is given the JSON "
        "true; set call_values: template"
    )
    assert said(row, template, call_values="template")[0].startswith("mul(a=3;n=0.5;b=True;of=[None")


@pytest.mark.parametrize("call_values", ["template", "json"])
def test_what_is_no_matter_of_spelling_is_refused_as_ever(call_values):
    for given, code in (({"a": 3, "b": "owl"}, "{{ c.function.arguments.a }}"), ("3 * 18", CALLS["tojson"])):
        with pytest.raises(UserError) as plain:
            said(calling(given), HEAD + code + TAIL)
        with pytest.raises(UserError) as other:
            said(calling(given), HEAD + code + TAIL, call_values=call_values)
        assert other.value.problems == plain.value.problems


@pytest.mark.parametrize("call", [{"arguments": None}, {}, {"arguments": "null"}, {"arguments": " "}, {"arguments": {}}], ids=str)
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_call_whose_arguments_are_null_or_absent_has_none(read, call, wrapped):
    """None are {} in every template: not null, and not Python's None. A parquet file has no other way to say so."""
    row, call = calling({}), {"name": "mul", **call}
    row["messages"][1]["tool_calls"] = [{"type": "function", "function": call} if wrapped else call]
    rows = read(json.dumps(row), format="chat")
    for name in ("tojson", "verbatim", "joined", "either"):
        texts = kept(encode(rows, "chat", Data(), tiny(HEAD + CALLS[name] + TAIL)), tiny())
        assert texts[0].startswith('{"name": "mul", "arguments": {}}' + END)


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
        UserError, match=r"^f.jsonl:1: the chat template does not show the content of messages\[1\] beside its tool calls; remove it"
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


def notes(row: dict, template: str, format: str = "chat", **source) -> list[str]:
    return example_notes(encode(rows_of(row), format, Data(max_length=4096), made(template), **source).counts)


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


# ---- parts

PARTS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
MIXED = PARTS.replace("{% for p in m.content", "{% if m.role == 'assistant' %}{{ m.content + '' }}{% else %}{% for p in m.content").replace(
    "{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>"
)
BOTH = PARTS.replace("{% for p in m.content", "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content").replace(
    "{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>"
)


ALL_BUT_SYSTEM = PARTS.replace(
    "{% for p in m.content", "{% if m.role == 'system' %}{{ m.content + '' }}{% else %}{% for p in m.content"
).replace("{% endfor %}<|im_end|>", "{% endfor %}{% endif %}<|im_end|>")


@pytest.mark.parametrize(
    "template", [ALL_BUT_SYSTEM, PARTS, PARTS + PROMPT, PARTS.replace("p.text", "p['text'] | trim"), MIXED, MIXED + PROMPT, BOTH, PLAIN]
)
def test_templates_of_parts_get_parts_and_others_text(template):
    tokenizer, row = made(template), talk("s be", "u q", "a one", "u r", "a two")
    for _ in "once", "with what was learned of the template":
        encoded = encode(rows_of(row), "chat", Data(), tokenizer)
        assert "".join(kept(encoded, tokenizer)) == f"one{END}two{END}" and all(
            part in shown(encoded, tokenizer)[-1] for part in ("be", "q", "r")
        )


def test_prompts_alone_are_shown_too():
    messages = talk("s be", "u q", "a one", "u r")["messages"]
    for template in (PARTS, PLAIN, "{% if messages[0].content is string %}{{ raise_exception('') }}{% endif %}" + PARTS):
        text = rendered(template + PROMPT, {}, messages)
        assert [line for line in text.replace("<", "\n").split("\n") if line in ("be", "q", "one", "r")] == ["be", "q", "one", "r"]
    assert "be" not in rendered(PLAIN.replace("{{ m.content }}", "{{ m.content if m.role != 'system' }}"), {}, messages)
    with pytest.raises(ValueError, match="the chat template rejects this conversation: no$"):
        rendered("{{ raise_exception('no' if messages[0].content is string else 'yes') }}", {}, messages)


def part(text: str) -> dict:
    return {"type": "text", "text": text}


def test_rows_with_parts_are_the_rows_with_their_text(read):
    talks = [
        {
            "messages": [
                {"role": "user", "content": [part("q "), part("r") | {"image": None}]},
                {"role": "assistant", "content": [part("one")]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": ["q ", {"text": "r"}]},
                {"role": "assistant", "content": [part("one") | {"cache_control": {}}]},
            ]
        },
    ]
    rows = read("\n".join(map(json.dumps, talks)), format="chat")
    assert rows.rows == [talk("u q r", "a one")] * 2 and rows.unread == {"messages[].content[].cache_control": 1}
    for template in (PARTS, PLAIN):
        assert kept(encode(rows, "chat", Data(), made(template)), made(template)) == [f"one{END}"] * 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            [part("q"), {"type": "image", "image": "x"}],
            "messages[0].content[1] is a part of type 'image', expected {type: text, text: ...}; llmkd reads",
        ),
        ([{"functionCall": {}}], "messages[0].content[0] is a part with 'functionCall', expected {type: text, text: ...}"),
        ([{"type": "text"}], "messages[0].content[0] is a part of type 'text', expected {type: text, text: ...}"),
        ([3], "messages[0].content[0] is a number"),
        ([part("q"), part("r")], "messages[0].content is 2 texts without white space between them"),
    ],
)
def test_parts_that_are_no_text_are_refused(read, content, words):
    with pytest.raises(UserError) as caught:
        read(json.dumps({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}), format="chat")
    assert caught.value.problems[0].partition(":1: ")[2].startswith(words)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"tool_calls": "[{"}, "tool_calls is text that is not JSON"),
        ({"tool_calls": {"name": "f"}}, "tool_calls is an object, expected a list of objects"),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "tool_calls[0] is an object without the name of a function"),
        ({"tool_calls": ["f"]}, "tool_calls[0] is text without the name of a function"),
        ({"tool_calls": [{"name": "f", "arguments": 3}]}, "tool_calls[0] has a number for its 'arguments', expected an object"),
        ({"tool_calls": [{"name": "f", "arguments": [3]}]}, "tool_calls[0] has a list for its 'arguments', expected an object"),
        ({"tool_calls": [{"function": {"name": "f"}, "arguments": {}}]}, "tool_calls[0] has its 'arguments' outside 'function'; put them"),
        ({"tool_calls": [{"function": {"name": "f"}, "input": {}}]}, "tool_calls[0] has its arguments under 'input'; rename the key"),
        ({"content": "x", "toolCalls": "f(x)"}, "toolCalls is text that is not JSON, expected a list of objects"),
        (
            {"content": "x", "function_call": {"name": "f", "arguments": "{}"}, "tool_calls": [{"name": "f", "arguments": {}}]},
            "tool_calls is a call that the model would not see: function_call and tool_calls both hold calls; set ignore: [tool_calls] to train",
        ),
        (
            {"role": "user", "content": "x", "function_call": {"name": "f", "arguments": {}}},
            "function_call is a call that the model would not see: calls are an assistant's; set ignore: [function_call] to train",
        ),
        (
            {"role": "user", "content": "x", "tool_calls": [{"name": "f", "arguments": {}}]},
            "tool_calls is a call that the model would not see: calls are an assistant's; set ignore: [tool_calls] to train",
        ),
        (
            {"tool_calls": [{"function": {"name": "f", "parameters": {}}}]},
            "tool_calls[0] has its arguments under 'parameters'; rename the key to 'arguments'",
        ),
        ({"tool_calls": [{"name": "f", "arguments": None, "args": "{}"}]}, "tool_calls[0] has its arguments under 'args'; rename"),
        (
            {"tool_calls": [{"name": "f", "argumets": {"a": 3}}]},
            "tool_calls[0] has no key 'arguments', and others (argumets), expected {function: {name, arguments}}; write {} for none",
        ),
    ],
)
def test_tool_calls_that_are_none_are_refused(read, turn, words):
    with pytest.raises(UserError) as caught:
        read(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": None} | turn]}), format="chat")
    assert caught.value.problems[0].partition(":1: messages[1].")[2].startswith(words)


@pytest.mark.parametrize(
    "turn",
    [
        {"function_call": {"name": "f", "arguments": '{"a": 3}'}},
        {"functionCall": '{"name": "f", "arguments": "{\\"a\\": 3}"}', "tool_calls": None},
        {"toolCalls": [{"name": "f", "arguments": '{"a": 3}'}], "function_call": {}},
        {"tool_calls": '[{"name": "f", "arguments": "{\\"a\\": 3}"}]', "content": None},
        {"role": "function_call", "content": '{"name": "f", "arguments": "{\\"a\\": 3}"}'},
        {"role": "tool-call", "content": [{"name": "f", "arguments": '{"a": 3}'}]},
    ],
)
def test_calls_under_other_names_are_tool_calls(read, turn):
    (row,) = read(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant"} | turn]}), format="chat").rows
    assert row["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"a": 3}'}]}


GLAIVE = [
    {"from": "human", "value": "q"},
    {"from": "function_call", "value": '{"name": "mul", "arguments": {"a": 3}}', "weight": 1},
    {"from": "observation", "value": "54"},
    {"from": "function_call", "value": '[{"name": "mul", "arguments": {"a": 4}}, {"name": "mul", "arguments": {"a": 5}}]', "loss": False},
    {"from": "observation", "value": "55"},
    {"from": "gpt", "value": "one"},
]


def test_turns_of_sharegpt_that_are_calls(read, refused):
    row = {"conversations": GLAIVE, "tools": json.dumps([{"name": "mul"}])}
    names = "fields: {messages: conversations, role: from, content: value}, roles: {user: human, assistant: gpt, tool: observation}"
    assert refused(json.dumps(row), format="chat")[0].endswith(f"; set {names}")
    rows = read(json.dumps(row), format="chat", **yaml.safe_load(f"{{{names}}}"))
    tokenizer = made(
        "{% for t in tools %}{{ t | tojson }}{% endfor %}" + HEAD.replace("m.content", "m.content or ''") + CALLS["tojson"] + TAIL
    )
    assert kept(encode(rows, "chat", Data(max_length=4096), tokenizer), tokenizer) == [
        '{"name": "mul", "arguments": {"a": 3}}' + f"{END}one{END}"
    ]
    row["conversations"] = [GLAIVE[0], GLAIVE[1] | {"value": "mul(3)"}]
    assert refused(json.dumps(row), format="chat", **yaml.safe_load(f"{{{names}}}")) == [
        "t.jsonl:1: conversations[1].value is text that is no call, and a turn of 'function_call' is one: expected {name, arguments}, or a list of "
        "such, as JSON"
    ]


def test_calls_that_are_ignored_or_empty_are_no_fault(read):
    answer = {"role": "assistant", "content": "x", "function_call": {"name": "f"}, "tool_call": {}}
    answer["tool_calls"] = [{"name": "f", "arguments": {}, "input": "something else"}]
    row = {"messages": [{"role": "user", "content": "q", "tool_calls": [], "function_call": None}, answer]}
    assert read(json.dumps(row), format="chat", ignore=("function_call",)).rows[0]["messages"][1]["content"] == "x"


def test_parameters_of_tools_as_json_text(read):
    tool, shape = {"type": "function", "function": {"name": "mul", "parameters": {"type": "object"}}}, json.dumps({"type": "object"})
    row = talk("u q", "a one") | {"tools": [tool, tool["function"]]}
    written = talk("u q", "a one") | {
        "tools": [{**tool, "function": {"name": "mul", "parameters": shape}}, {"name": "mul", "parameters": shape}]
    }
    assert read(json.dumps(written), format="chat").rows == [row] == read(json.dumps(row), format="chat").rows
    written["tools"] = [json.dumps(tool) for tool in written["tools"]]  # each as text
    assert read(json.dumps(written), format="chat").rows == [row]
    written["tools"] = [{"name": "mul", "parameters": {}}, {"name": "mul", "parameters": "{"}]
    with pytest.raises(UserError, match=r":1: tools\[1\].parameters is text that is not JSON"):
        read(json.dumps(written), format="chat")


def test_tool_calls_as_json_text(read):
    row = calling({"a": 3})
    written = copy.deepcopy(row)
    written["messages"][1]["tool_calls"] = json.dumps(row["messages"][1]["tool_calls"])
    assert read(json.dumps(written), format="chat").rows == [row]


# ---- texts that were rendered already

RENDERED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"


@pytest.mark.parametrize(
    ("format", "row", "token"),
    [
        ("text", {"text": RENDERED}, "<|im_start|>"),
        ("text", {"text": "[INST] q [/INST] a"}, "[INST]"),
        ("text", {"text": "q<|pad|>"}, "<|pad|>"),
        ("text", {"text": "q</s>"}, "</s>"),
        ("prompt_completion", {"prompt": "<start_of_turn>user\nq", "completion": "a"}, "<start_of_turn>"),
        ("alpaca", {"instruction": "q", "output": f"a{END}"}, END),
        ("chat", talk("u <|start_header_id|>user", "a one"), "<|start_header_id|>"),
        ("text", {"text": "<｜begin▁of▁sentence｜>q"}, "<｜begin▁of▁sentence｜>"),
        ("text", {"text": "q<|a_family_of_tomorrow|>a"}, "<|a_family_of_tomorrow|>"),
        ("text", {"text": "[|user|]q"}, "[|user|]"),
        ("text", {"text": "[SYSTEM_PROMPT]s[/SYSTEM_PROMPT]q"}, "[SYSTEM_PROMPT]"),
    ],
)
def test_texts_that_were_rendered_already_are_warned_of_where_most_are(format, row, token):
    plain = encode(rows_of({key: "q" for key in row} if format != "chat" else talk("u q", "a one")), format, Data(), tiny())
    encoded = encode(rows_of(row), format, Data(), tiny())
    assert example_notes(plain.counts) == []
    assert example_notes(encoded.counts)[0].startswith(
        f"warning: 1 of 1 row hold control tokens as text ('{token}'), as if a chat template had rendered"
    )
    assert example_notes(merge([encoded, plain]).counts)[0].startswith("warning: 1 of 2 rows")
    few = example_notes(merge([encoded, plain, plain]).counts)
    assert few == ["note: 1 with the characters of a control token, which stay characters"] * (token in tiny().all_special_tokens)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A chat. USER: q ASSISTANT: a", "USER:"),
        ("### Instruction:\nq\n\n### Response:\na", "### Instruction"),
        ("Human: q\n\nAssistant: a", "Human:"),
        ("**User:** q\n**Assistant:** a", "**User:"),
        ("<human>: q\n<bot>: a".replace("bot", "assistant"), "<human>:"),
        ("Q: q\nA: a", "Q:"),
        ("### Human: q### Assistant: a", "### Human"),
        ("Human: q Assistant: a", "Human:"),
        ("用户：q\n助手：a", "用户："),
        ("User: q\nModel: a", "User:"),
    ],
)
def test_conversations_in_words_are_warned_of_where_most_texts_hold_them(text, words):
    held, plain = (
        encode(rows_of({"text": one}), "text", Data(), tiny())
        for one in (text, "The user: a human. Answer it, assistant. f <| x |> g; [|1; 2|]; a<|b; <|>")
    )
    assert example_notes(merge([held, plain]).counts)[0].startswith(f"warning: 1 of 2 rows hold a conversation as text ({words!r}), as if")
    assert example_notes(merge([held, plain, plain]).counts) == [] == example_notes(plain.counts)
    row = {"prompt": text, "completion": "b"}
    assert example_notes(encode(rows_of(row), "prompt_completion", Data(), tiny()).counts) == []


@pytest.mark.parametrize(
    "text", [json.dumps(talk("u q", "a one")["messages"]), str(talk("u q", "a one")["messages"]), '[ {"from": "human"}]']
)
def test_lists_of_messages_as_text_are_warned_of_where_most_rows_hold_them(text):
    rows = {"prompt": text, "completion": "a"}, {"prompt": "q", "completion": "[{'x': 1}]", "notes": text}
    held, plain = (encode(rows_of(row), "prompt_completion", Data(max_length=4096), tiny()) for row in rows)
    assert example_notes(merge([held, plain]).counts) == [
        "warning: 1 of 2 rows hold a list of messages as text (prompt), which is read as the text that it is; write the list itself, in a .jsonl, .json or "
        ".parquet file"
    ]
    assert example_notes(merge([held, plain, plain]).counts) == [] == example_notes(plain.counts)


# ---- long talks

FORGETS = PLAIN.replace("{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}")
TALK = talk("u q", "a one", "u r", "a two", "u s", "a three")


def test_rows_that_a_template_takes_apart_are_counted_with_the_factor():
    tokenizer = made(FORGETS)
    encoded = encode(rows_of(TALK), "chat", Data(), tokenizer)
    assert kept(encoded, tokenizer) == [f"one{END}", f"two{END}", f"three{END}"]
    (note,) = example_notes(encoded.counts)
    last = int(encoded.lengths[-1])
    assert note.startswith("note: 1 row taken apart into 3 examples, one for each answer") and note.endswith(
        "answers: last trains on these alone"
    )
    assert f"{encoded.lengths.sum()} tokens, {encoded.lengths.sum() / last:.1f} times those of the last examples alone ({last})" in note
    assert notes(TALK, PLAIN) == []
    named = copy.deepcopy(TALK)
    named["messages"][0]["name"] = "bob"
    assert notes(named, FORGETS.replace("m.name or ", ""))[0].endswith("of 1 row: messages[].name (1)")


def test_a_row_of_many_examples_is_said_at_once(capsys):
    long = {"messages": TALK["messages"] * 11}
    encode(rows_of(TALK, long, long), "chat", Data(max_length=4096), made(FORGETS))
    assert capsys.readouterr().err.splitlines() == [
        "note: f.jsonl:2: the chat template makes 33 examples of it, one for each answer; answers: last makes one"
    ]


def test_a_row_that_takes_long_is_said_at_once(capsys, monkeypatch):
    monkeypatch.setattr("llmkd.data.encoding.encode._SLOW", 0.0)
    encode(rows_of(TALK, TALK), "chat", Data(), made(PLAIN))
    encode(rows_of({"text": "q"}), "text", Data(), made(PLAIN))
    assert re.fullmatch(r"note: f\.jsonl:1: the chat template takes \d\.\d s for this row\n", capsys.readouterr().err)


@pytest.mark.parametrize("template", [FORGETS, PLAIN])
def test_the_last_answer_alone(template):
    assert said(TALK, template, answers="last") == [f"three{END}"]
    assert notes(TALK, template, answers="last") == []
    context_only = copy.deepcopy(TALK)
    context_only["messages"][-1]["train"] = False
    assert said(context_only, template, answers="last") == []
    asked = {"messages": [*TALK["messages"], *talk("u t")["messages"]]}
    assert said(asked, template, answers="last") == [f"three{END}"]


def test_the_last_answer_of_a_completion():
    prompt, completion = TALK["messages"][:3], TALK["messages"][3:]
    row = {"prompt": prompt, "completion": completion}
    every, last = (encode(rows_of(row), "prompt_completion", Data(), made(PLAIN), answers=answers) for answers in ("all", "last"))
    assert kept(every, made(PLAIN)) == [f"two{END}three{END}"] and kept(last, made(PLAIN)) == [f"three{END}"]
