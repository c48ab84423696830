"""What a template is given, in the form that it shows, and what it does not show. For the process of `template_worker.py`.

Some templates want the arguments of tool calls as text, some as objects; those of vision models want lists of parts for a content. Forms
are tried until the template shows everything as what it is: arguments as JSON, or each by itself. No source of a template is read.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .locate import NotShown, TemplateProbe, no_spaces
from .template import REASONING, render

#: Keys of a message that are read elsewhere, or tie a tool's answer to its call: they mean nothing to the model beyond that.
_OTHERWISE = {"role", "content", *REASONING, "tool_calls", "tool_call_id", "id"}
_WHO = {"system": "a system message", "developer": "a system message", "tool": "a tool's answer", "user": "a user's turn"}
#: What was learned of a template: the roles whose content it shows as parts only, and whether it shows tools.
_PARTS: dict[str, frozenset[str]] = {}
_SHOWS_TOOLS: set[str] = set()
#: Of each template, the rows that it showed in no form. After some, lists of parts are no longer tried: there may be millions of such rows.
_FAILED: Counter[str] = Counter()
_TRIALS = 20


class _NoObject(ValueError):
    """Arguments are text that is no JSON object."""


@dataclass(frozen=True)
class Forms:
    """How messages are given to a template."""

    parts: frozenset[str] = frozenset()  # roles whose content is a list of parts
    arguments: str = ""  # of tool calls: "" as the row has them, or "objects", or "text"
    inside: bool = False  # a call's name and arguments are inside `function`

    def shape(self, message: dict) -> dict:
        if message["role"] in self.parts:
            message = message | {"content": [{"type": "text", "text": message["content"]}] if message["content"] else []}
        return self.shape_calls(message)

    def shape_calls(self, message: dict) -> dict:
        if (self.arguments or self.inside) and message.get("tool_calls"):
            message = message | {"tool_calls": [self.shape_call(call) for call in message["tool_calls"]]}
        return message

    def shape_call(self, call: dict) -> dict:
        if isinstance(call.get("function"), dict):
            return call | {"function": self._shape_arguments(call["function"])}
        call = self._shape_arguments(call)
        return {"type": "function", "function": call} if self.inside else call

    def _shape_arguments(self, call: dict) -> dict:
        given = call.get("arguments")
        if self.arguments == "objects" and (given is None or isinstance(given, str)):
            return call | {"arguments": _object(given or "", call)}
        if self.arguments == "text" and not isinstance(given, str):
            return call | {"arguments": json.dumps({} if given is None else given, ensure_ascii=False)}
        return call


def _object(text: str, call: dict) -> dict:
    try:
        value = json.loads(text) if text.strip() else {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise _NoObject(
            f"the arguments of a call of {call.get('name')!r} are text that is not a JSON object ({text[:40]!r}), and the chat template wants "
            "an object; fix the row"
        )
    return value


def settle(
    template: str, tokens: dict[str, str], messages: list[dict], tools: list[dict] | None, marker: str, control: re.Pattern, end: str
) -> tuple[TemplateProbe, str, list[tuple[int, str]]]:
    """The template with the forms in which it shows the conversation, the text of that, and (message, key) of what it does not show and
    that is no message of its own: keys of messages, and the tools (of message -1). ValueError where it does not show a message or a call,
    or shows arguments other than as JSON."""
    errors, hiding = [], None
    for forms in _attempts(template, messages):
        program = _program(template, tokens, tools, forms)
        probe = TemplateProbe(program, marker, control, end)
        try:
            text = program(messages)
            lacking = _compare(messages, text, probe, forms)
        except ValueError as error:
            errors.append(error)
            continue
        found = forms, probe, text, lacking
        if not any(key in ("content", "tool_calls") for _, key in lacking):
            break
        hiding = hiding or found  # earlier answers, say
    else:
        _FAILED[template] += 1
        if not hiding:
            raise next((error for error in errors if isinstance(error, _NoObject)), errors[0])
        found = hiding
    forms, probe, text, lacking = found
    _PARTS[template] = forms.parts
    lacking += _unused_keys(messages, text, probe.render)
    lacking += [(i, "content, whole and unchanged") for i in _changed(messages, text)]
    if tools and not _shows_tools(template, messages, tools, text, probe.render):
        lacking.append((-1, "tools"))
    return probe, text, lacking


def prompt(template: str, tokens: dict[str, str], messages: list[dict]) -> str:
    """The messages with the generation prompt; with lists of parts where only so the template shows all contents. ValueError if it raises."""
    found: list[str | ValueError] = []
    for parts in (frozenset(), frozenset(message["role"] for message in messages)):
        try:
            found.append(_program(template, tokens, None, Forms(parts))(messages, prompt=True))
        except ValueError as error:
            found.append(error)
            continue
        if not _changed([message | {"role": ""} for message in messages], found[-1]):
            return found[-1]
    first = next((text for text in found if isinstance(text, str)), found[0])
    if isinstance(first, ValueError):
        raise first
    return first


def _program(template: str, tokens: dict[str, str], tools: list[dict] | None, forms: Forms) -> Callable[..., str]:
    def program(messages: list[dict], prompt: bool = False, tools: list[dict] | None = tools) -> str:
        return render(template, tokens, [forms.shape(message) for message in messages], tools, prompt)

    return program


def _attempts(template: str, messages: list[dict]) -> Iterator[Forms]:
    known, roles = _PARTS.get(template, frozenset()), sorted({message["role"] for message in messages})
    others = (
        ()
        if _FAILED[template] > _TRIALS
        else (frozenset(some) for n in range(len(roles), 0, -1) for some in itertools.combinations(roles, n))
    )
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    given = [_function(call).get("arguments") for call in calls]
    texts = [isinstance(one, str) for one in given]
    arguments = [*(["objects"] if any(texts) else []), "", *([] if all(texts) else ["text"])]
    arguments += ["objects"] if None in given and not any(texts) else []
    for parts in itertools.chain([known], (known | some for some in others if not some <= known)):
        for inside in (False, True) if any(_function(call) is call for call in calls) else (False,):
            yield from (Forms(parts, form, inside) for form in arguments)


def _compare(messages: list[dict], text: str, probe: TemplateProbe, forms: Forms) -> list[tuple[int, str]]:
    """See `settle`."""
    neutral, lacking = probe.neutral(messages, text)
    for i, key in lacking:
        role = messages[i]["role"]
        if key == "content" and role != "assistant":
            raise NotShown(
                f"the chat template does not show messages[{i}], {_WHO[role]}; use a tokenizer whose template does, or remove it"
            )
    for i, message in enumerate(messages):
        for call in message.get("tool_calls") or () if (i, "tool_calls") in probe.found else ():
            _refuse_python(i, forms.shape_call(call), neutral)
    _refuse_python_words([forms.shape_calls(message) for message in messages], text, probe)
    return lacking


def _changed(messages: list[dict], text: str) -> list[int]:
    """The messages whose content, but for white space, is not in the text. Not answers: they are located, or their thinking is left out."""
    contents = [(i, message["content"].strip()) for i, message in enumerate(messages) if message["role"] != "assistant"]
    rest = [(i, content) for i, content in contents if not any(form in text for form in _spellings(content))]
    return [i for i, content in rest if no_spaces(content) not in no_spaces(text)]


def _unused_keys(messages: list[dict], text: str, program: Callable[..., str]) -> list[tuple[int, str]]:
    """(message, key) of other keys without which the text is the same."""
    keys = {key for message in messages for key in message.keys() - _OTHERWISE}

    def shown(*without: str) -> bool:
        return _differs(text, program, [{key: value for key, value in message.items() if key not in without} for message in messages])

    unused = (keys if not shown(*keys) else {key for key in keys if not shown(key)}) if keys else set()
    return [(i, key) for i, message in enumerate(messages) for key in message.keys() & unused]


def _shows_tools(template: str, messages: list[dict], tools: list[dict], text: str, program: Callable[..., str]) -> bool:
    """Whether the text would be another without each of the tools."""
    lacking = [i for i, name in enumerate(_function(tool).get("name") for tool in tools) if not (isinstance(name, str) and name in text)]
    if template not in _SHOWS_TOOLS:  # a tool's name may also be that of a call
        if not _differs(text, program, messages, tools=None):
            return False
        _SHOWS_TOOLS.add(template)
    return all(_differs(text, program, messages, tools=tools[:i] + tools[i + 1 :]) for i in lacking)


def _differs(text: str, program: Callable[..., str], messages: list[dict], **more) -> bool:
    try:
        return program(messages, **more) != text
    except ValueError:  # the template wants what is left out here
        return True


# ---- arguments of calls


def _function(call: dict) -> dict:
    return call["function"] if isinstance(call.get("function"), dict) else call


def _refuse_python(i: int, call: dict, neutral: str) -> None:
    """ValueError where the arguments of a call in messages[i] are shown in quotes, as Python writes an object, or in part.

    `neutral`: the text with markers in place of all contents, so that the arguments occur in it as arguments only.
    """
    function = _function(call)
    given, where = function.get("arguments"), f"the arguments of {function.get('name')!r} in messages[{i}]"
    if isinstance(given, str):
        text = given.strip()
        if not text or text not in neutral or any(json.dumps(given, ensure_ascii=ascii) in neutral for ascii in (True, False)):
            raise ValueError(f"the chat template does not show {where}, a text, as it is; write an object, or use another template")
        return
    for value in _containers(given):
        if str(value) in neutral and str(value) != json.dumps(value, ensure_ascii=False):
            raise ValueError(f"the chat template writes {where} as Python does ({str(value)[:40]}), not as JSON; fix the template")
    if given is None and "None" in neutral and "null" not in neutral:
        raise ValueError(f"the chat template writes {where}, null, as Python does; write {{}} for none, or fix the template")
    if given is None or any(json.dumps(given, ensure_ascii=ascii) in neutral for ascii in (False, True)):
        return
    lost = next((leaf for leaf in _leaves(given) if not any(form in neutral for form in _spellings(leaf))), None)
    if lost is not None:
        raise ValueError(f"the chat template does not show {str(lost)[:40]!r} of {where}; use a tokenizer whose template does")


_WORDS = {"True": True, "False": False, "None": None}  # as Python writes them


def _refuse_python_words(messages: list[dict], text: str, probe: TemplateProbe) -> None:
    """ValueError where the template writes a true, false or null among the arguments of a call by itself, as Python does: the text has fewer
    of Python's words without those values."""
    for word in (word for word in _WORDS if word in text):
        i = next((i for i, message in enumerate(messages) if _has(message, _WORDS[word])), None)
        if i is None:
            continue
        without = probe.render([_without(message, _WORDS[word]) for message in messages])
        if without.count(word) < text.count(word):
            as_json = json.dumps(_WORDS[word])
            raise ValueError(
                f"the chat template writes {as_json} in the arguments of a call in messages[{i}] as Python does ({word}), which is not read back as "
                f'{as_json}; write the text "{as_json}" instead, or fix the template'
            )


def _has(message: dict, literal: bool | None) -> bool:
    given = [_function(call).get("arguments") for call in message.get("tool_calls") or ()]
    return any(leaf is literal for one in given if isinstance(one, dict | list) for leaf in _leaves(one))


def _without(message: dict, literal: bool | None) -> dict:
    """The message with a text in place of one of JSON's words in the arguments of its calls."""

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replaced(inner) for key, inner in value.items()}
        return [replaced(inner) for inner in value] if isinstance(value, list) else "x" if value is literal else value

    def of_call(call: dict) -> dict:
        function = _function(call)
        function = (
            function | {"arguments": replaced(function["arguments"])} if isinstance(function.get("arguments"), dict | list) else function
        )
        return call | {"function": function} if _function(call) is not call else function

    return message | {"tool_calls": [of_call(call) for call in message["tool_calls"]]} if message.get("tool_calls") else message


def _containers(value: Any) -> Iterator[dict | list]:
    """The objects and lists in a value, the outermost first, that are not empty."""
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


def _spellings(leaf: Any) -> tuple[str, ...]:
    as_json = json.dumps(leaf, ensure_ascii=False)
    if isinstance(leaf, str):
        return leaf, leaf.strip(), as_json[1:-1], json.dumps(leaf)[1:-1]
    return as_json, str(leaf)
