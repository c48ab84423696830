"""The arguments of tool calls: the forms in which a template may get them, and checks that its text shows them as JSON.

Templates that write each value by itself may write true, null and lists as Python does (Qwen3-Coder's, Nemotron's); LFM2's calls are Python on
purpose. `data.train.call_values` decides: such a row is refused, is kept as the template writes it, or each such value is given to the template
as JSON text. Runs in the process of `template_worker.py`.
"""

import json
from collections.abc import Iterator
from typing import Any

from .locate import TemplateProbe

#: The end of error messages: how to choose a spelling.
_FIX = "set call_values: template to train on that, or call_values: json to give such values to the template as JSON"


class NoObject(ValueError):
    """The arguments are text that is not a JSON object."""


def shaped(call: dict, form: str) -> dict:
    """A call {name, arguments} with its arguments in a form: "" as in the row, "objects", "text", or "values": an object in which values that
    are neither text nor numbers are JSON text."""
    given = call.get("arguments")
    if form in ("objects", "values") and isinstance(given, str):
        given = _object(given, call)
    if form == "values" and isinstance(given, dict):
        given = {key: json.dumps(value, ensure_ascii=False) if _in_words(value) else value for key, value in given.items()}
    if form == "text" and not isinstance(given, str):
        given = json.dumps(given, ensure_ascii=False)
    return call if given is call.get("arguments") else call | {"arguments": given}


def _in_words(value: Any) -> bool:
    """Whether Python may write the value differently from JSON."""
    return value is None or isinstance(value, bool | dict | list)


def _object(text: str, call: dict) -> dict:
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise NoObject(
            f"the arguments of a call of {call.get('name')!r} are text that is not a JSON object ({text[:40]!r}), and the chat template wants "
            "an object; fix the row"
        )
    return value


def function_of(call: dict) -> dict:
    return call["function"] if isinstance(call.get("function"), dict) else call


def refuse_arguments(i: int, call: dict, neutral: str, as_json: bool) -> None:
    """ValueError if the arguments of a call in messages[i] are shown in quotes, in part, or, with `as_json`, as Python writes them.

    `neutral`: the text with markers in place of all contents, so that it has the arguments only as arguments.
    """
    function = function_of(call)
    given, where = function.get("arguments"), f"the arguments of {function.get('name')!r} in messages[{i}]"
    if isinstance(given, str):
        text = given.strip()
        if not text or text not in neutral or any(json.dumps(given, ensure_ascii=ascii) in neutral for ascii in (True, False)):
            raise ValueError(f"the chat template does not show {where}, a text, as it is; write an object, or use another template")
        return
    for value in _containers(given) if as_json else ():
        if str(value) in neutral and str(value) != json.dumps(value, ensure_ascii=False):
            raise ValueError(f"the chat template writes {where} as Python does ({str(value)[:40]}), not as JSON; {_FIX}")
    if any(json.dumps(given, ensure_ascii=ascii) in neutral for ascii in (False, True)):
        return
    lost = next((leaf for leaf in _leaves(given) if not any(form in neutral for form in spellings(leaf))), None)
    if lost is not None:
        raise ValueError(f"the chat template does not show {str(lost)[:40]!r} of {where}; use a tokenizer whose template does")


def refuse_quoted_values(i: int, call: dict, neutral: str) -> None:
    """ValueError if a value that the template got as JSON text is shown as a quoted text."""
    name, objects, values = (
        function_of(call).get("name"),
        *(shaped(function_of(call), form)["arguments"] for form in ("objects", "values")),
    )
    for key in values if isinstance(values, dict) else ():
        text = values[key]
        if _in_words(objects[key]) and (text not in neutral or any(f"{quote}{text}{quote}" in neutral for quote in "\"'")):
            raise ValueError(
                f"the chat template writes {key!r} of the arguments of {name!r} in messages[{i}] as Python does, and as a text where it is given "
                f"the JSON {text[:40]}; set call_values: template"
            )


_WORDS = {"True": True, "False": False, "None": None}  # as Python writes them


def refuse_python_words(messages: list[dict], text: str, probe: TemplateProbe) -> None:
    """ValueError if the template writes true, false or null among the arguments of a call as Python does: without those values the text has fewer
    of Python's words."""
    for word in (word for word in _WORDS if word in text):
        i = next((i for i, message in enumerate(messages) if _has(message, _WORDS[word])), None)
        if i is None:
            continue
        without = probe.render([_without(message, _WORDS[word]) for message in messages])
        if without.count(word) < text.count(word):
            raise ValueError(
                f"the chat template writes {json.dumps(_WORDS[word])} in the arguments of a call in messages[{i}] as Python does ({word}); {_FIX}"
            )


def _has(message: dict, literal: bool | None) -> bool:
    given = [function_of(call).get("arguments") for call in message.get("tool_calls") or ()]
    return any(leaf is literal for one in given if isinstance(one, dict | list) for leaf in _leaves(one))


def _without(message: dict, literal: bool | None) -> dict:
    """The message with a text in place of one of JSON's literals (true, false, null) in the arguments of its calls."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(inner) for key, inner in value.items()}
        return [replaced(inner) for inner in value] if isinstance(value, list) else "x" if value is literal else value

    def of_call(call: dict) -> dict:
        function = function_of(call)
        function = (
            function | {"arguments": replaced(function["arguments"])} if isinstance(function.get("arguments"), dict | list) else function
        )
        return call | {"function": function} if function_of(call) is not call else function

    return message | {"tool_calls": [of_call(call) for call in message["tool_calls"]]} if message.get("tool_calls") else message


def _containers(value: Any) -> Iterator[dict | list]:
    """The objects and lists in a value that are not empty, the outermost first."""
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def _leaves(value: Any) -> Iterator[Any]:
    """Keys, texts and numbers, at any depth."""
    if isinstance(value, dict | list):
        for inner in value.items() if isinstance(value, dict) else value:
            yield from _leaves(list(inner) if isinstance(inner, tuple) else inner)
    elif value != "":
        yield value


def spellings(leaf: Any) -> tuple[str, ...]:
    """The ways in which a template may write a value."""
    as_json = json.dumps(leaf, ensure_ascii=False)
    if isinstance(leaf, str):
        return leaf, leaf.strip(), as_json[1:-1], json.dumps(leaf)[1:-1]
    return as_json, str(leaf)
