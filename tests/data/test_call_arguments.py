"""The arguments of a call come out as the chat template means them, or are refused."""

import json

import pytest

from llmkd.config.recipe import Data
from llmkd.errors import UserError
from tests.kit.calls import CALLS, HEAD, TAIL, XML, calling, said
from tests.kit.data import END, encode, kept, tiny

ARGUMENTS = {"a": 3, "b": True, "note": 'an "owl" é', "of": [None, {"x": "y"}], "none": {}}


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
    # Written as JSON, with a text that looks like Python's word in the same call.
    row["messages"][1] = calling({"a": 3, "b": value, "c": python})["messages"][1]
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
