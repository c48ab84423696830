"""Tool calls in a conversation, and the tools that it may call, in the form of OpenAI or in an equivalent one.

A turn's `tool_calls` is a list of {function: {name, arguments}} or {name, arguments}. Other names for it are read too: a message's
`function_call`, and ShareGPT's turns of role function_call, whose content is the call as JSON.
"""

import json
from typing import Any

from ...config.data import Source
from .problems import ErrorCollector
from .values import as_yaml, kind, parsed, plain, surrogate

#: Names of roles and message keys that hold tool calls.
_CALLS = set("functioncall functioncalls toolcall toolcalls tooluse tooluses toolinvocation toolinvocations".split())
#: Other names for a call's arguments.
_ARGUMENTS = ("parameters", "params", "args", "kwargs", "input", "inputs", "argument", "parameter")
#: Keys of a call without further content: its name, its arguments, and the keys that tie it to an answer.
OF_CALL = {"name", "id", "type", "index", "function", "call_id", "tool_call_id", "arguments"}


def is_call(name: str) -> bool:
    """Whether a role or a key of a message has a name for tool calls."""
    return plain(name) in _CALLS


def read_call_turn(content: Any, where: str, role: str, problems: ErrorCollector) -> list[dict] | None:
    """The calls of a turn whose content is one call or a list of them; None, and a problem, for any other content."""
    calls = parsed(content)
    calls = [calls] if isinstance(calls, dict) else calls
    if not isinstance(calls, list) or not calls:
        problems.add(
            f"{where} is {kind(content)} that is no call, and a turn of {role!r} is one: expected {{name, arguments}}, or a list of such, as JSON",
            alike=f"turns of {role!r} that are no call",
        )
        return None
    return read_calls(calls, where, problems)


def with_calls(message: dict, role: str, source: Source, where: str, problems: ErrorCollector) -> dict | None:
    """The message with its calls under the name `tool_calls`, whatever their own name (such as OpenAI's older function_call).

    None, and a problem, for calls that the model would not see, such as a user's, and for values that are not calls.
    """
    given = [key for key in message if is_call(key) and key not in source.ignore and message[key] not in (None, "", [], {})]
    rest = {key: value for key, value in message.items() if key in source.ignore or not is_call(key)}
    if not given:
        return rest
    if role != "assistant" or len(given) > 1:
        why = f"{' and '.join(given)} both hold calls" if role == "assistant" else "calls are an assistant's"
        problems.add(
            f"{where}.{given[-1]} is a call that the model would not see: {why}; set ignore: {as_yaml([*source.ignore, given[-1]])} to train without it",
            alike=f"{given[-1]} of a turn of role {role}",
        )
        return None
    (name,), calls = given, parsed(message[given[0]])
    calls = read_calls([calls] if isinstance(calls, dict) and name != "tool_calls" else calls, f"{where}.{name}", problems)
    return calls and rest | {"tool_calls": calls}


def read_calls(calls: Any, where: str, problems: ErrorCollector) -> list[dict] | None:
    """The calls of a turn: a list of objects with a name, or of {function: {name, arguments}}, or such a list as JSON text, as in many tables.

    Null or absent arguments become {}, as for a function without parameters: columnar files have no empty object.
    """
    if isinstance(calls, str):
        try:
            calls = json.loads(calls) if calls.strip() else None
        except (ValueError, RecursionError):
            problems.add(f"{where} is text that is not JSON, expected a list of objects, or the same as JSON text")
            return None
    if calls is not None and not isinstance(calls, list):
        problems.add(f"{where} is {kind(calls)}, expected a list of objects")
        return None
    calls = calls and [*calls]
    for j, call in enumerate(calls or []):
        function = call.get("function") if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            problems.add(f"{where}[{j}] is {kind(call)} without the name of a function, expected {{function: {{name, arguments}}}}")
            return None
        if problem := _no_arguments(call, function):
            problems.add(f"{where}[{j}] {problem}", alike=f"calls that {problem}")
            return None
        given = function.get("arguments")
        if given is None or (isinstance(given, str) and given.strip() in ("", "null")):
            function = function | {"arguments": {}}
            calls[j] = call | {"function": function} if isinstance(call.get("function"), dict) else function
    return calls or None


def _no_arguments(call: dict, function: dict) -> str | None:
    """The problem with the arguments of a call; None if it has arguments, or has none and no other key that may hold them."""
    given, outside = function.get("arguments"), {} if call is function else call
    if given is not None:
        return (
            None
            if isinstance(given, dict | str)
            else f"has {kind(given)} for its 'arguments', expected an object, or the same as JSON text"
        )
    if outside.get("arguments") is not None:
        return "has its 'arguments' outside 'function'; put them into it"
    others = {key: value for key, value in {**outside, **function}.items() if value is not None and key not in OF_CALL}
    if other := next((key for key in _ARGUMENTS if key in others), None):
        return f"has its arguments under {other!r}; rename the key to 'arguments'"
    if others:
        return f"has no key 'arguments', and others ({', '.join(others)}), expected {{function: {{name, arguments}}}}; write {{}} for none"
    return None


def are_tools(value: Any) -> bool:
    """Whether `read_tools` reads a value as functions: a list of objects, each of which, or all, may be JSON text."""
    tools = parsed(value)
    return isinstance(tools, list) and bool(tools) and all(isinstance(parsed(tool), dict) for tool in tools)


def read_tools(tools: Any, name: str, place: str, problems: ErrorCollector) -> Any:
    """The functions that a conversation may call: a list of objects, such a list as JSON text (as in many tables), or null."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            problems.add(f"{place}: {name} is text that is not JSON, expected a list of objects, or the same as JSON text")
            return None
    if isinstance(tools, list):  # some tables have each tool as JSON text
        tools = [parsed(tool) for tool in tools]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        problems.add(f"{place}: {name} is {kind(tools)}, expected a list of objects")
        return None
    for i, tool in enumerate(tools or []):
        function = tool["function"] if isinstance(tool.get("function"), dict) else tool
        if isinstance(function.get("parameters"), str):
            try:
                function["parameters"] = json.loads(function["parameters"])
            except (ValueError, RecursionError):
                problems.add(f"{place}: {name}[{i}].parameters is text that is not JSON, expected an object, or the same as JSON text")
    if surrogate(tools) is not None:
        problems.add(f"{place}: {name} contains half of a surrogate pair, which is not a character; fix the file's encoding")
    return tools or None
