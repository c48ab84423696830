"""Calls and tools are read under every name and as JSON text; what is no call is refused."""

import copy
import json

import pytest
import yaml

from llmkd.config.recipe import Data
from llmkd.errors import UserError
from tests.kit.calls import CALLS, HEAD, TAIL, calling
from tests.kit.data import END, encode, kept, made, talk


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
