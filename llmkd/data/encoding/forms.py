"""Finds the form of messages that a template shows, and what it does not show. Runs in the process of `template_worker.py`.

Some templates want the arguments of tool calls as text, some as objects; those of vision models want a list of parts as
content. Forms are tried until the template shows everything as it is: arguments as JSON, or each by itself. The source of a template is not
read.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..reading.calls import OF_CALL
from .call_arguments import NoObject, function_of, refuse_arguments, refuse_python_words, refuse_quoted_values, shaped, spellings
from .locate import NotShown, TemplateProbe, no_spaces
from .template import REASONING, render

#: Keys of a message that are handled elsewhere, or only tie a tool's answer to its call.
_OTHERWISE = {"role", "content", *REASONING, "tool_calls", "tool_call_id", "id"}
_WHO = {"system": "a system message", "developer": "a system message", "tool": "a tool's answer", "user": "a user's turn"}
#: What is known about templates: the roles whose content must be a list of parts, those that show tools, and the answers of `_wants_null`.
_PARTS: dict[str, frozenset[str]] = {}
_SHOWS_TOOLS: set[str] = set()
_NULL: dict[str, bool] = {}
#: For each template, the number of rows that it showed in no form. After _TRIALS lists of parts are no longer tried: there may be millions
#: of such rows.
_FAILED: Counter[str] = Counter()
_TRIALS = 20


@dataclass(frozen=True)
class Forms:
    """The form in which a template gets its messages."""

    parts: frozenset[str] = frozenset()  # roles whose content is a list of parts
    arguments: str = ""  # of tool calls, see `call_arguments.shaped`
    inside: bool = False  # a call's name and arguments are inside `function`
    as_json: bool = True  # arguments must come out as JSON
    null: bool = False  # the content of a turn that only calls tools is null

    def shape(self, message: dict) -> dict:
        if self.null and _only_calls(message):
            message = message | {"content": None}
        elif message["role"] in self.parts:
            message = message | {"content": [{"type": "text", "text": message["content"]}] if message["content"] else []}
        return self.shape_calls(message)

    def shape_calls(self, message: dict) -> dict:
        if (self.arguments or self.inside) and message.get("tool_calls"):
            message = message | {"tool_calls": [self.shape_call(call) for call in message["tool_calls"]]}
        return message

    def shape_call(self, call: dict) -> dict:
        if isinstance(call.get("function"), dict):
            return call | {"function": shaped(call["function"], self.arguments)}
        call = shaped(call, self.arguments)
        return {"type": "function", "function": call} if self.inside else call


def _only_calls(message: dict) -> bool:
    return bool(message.get("tool_calls")) and not message["content"].strip()


def settle(
    template: str,
    tokens: dict[str, str],
    messages: list[dict],
    tools: list[dict] | None,
    marker: str,
    control: re.Pattern,
    end: str,
    call_values: str = "refuse",
) -> tuple[TemplateProbe, str, list[tuple[int, str]]]:
    """(probe, text, unshown): the template with the form in which it shows the conversation, the rendered text, and the (message, key) pairs
    that it does not show, besides whole messages; tools are (-1, "tools").

    ValueError if it does not show a message or a call, or shows arguments other than as JSON unless `call_values` is "template".
    """
    errors, hiding, null = [], None, _wants_null(template, tokens, messages, tools)
    for forms in _attempts(template, messages, call_values, null):
        program = _program(template, tokens, tools, forms)
        probe = TemplateProbe(program, marker, control, end)
        try:
            text = program(messages)
            lacking = _compare(messages, text, probe, forms)
        except ValueError as error:
            errors.append((forms, error))
            continue
        found = forms, probe, text, lacking
        if not any(key in ("content", "tool_calls") for _, key in lacking):
            break
        hiding = hiding or found  # earlier answers, say
    else:
        _FAILED[template] += 1
        if not hiding:
            telling = (error for forms, error in errors if isinstance(error, NoObject) or forms.arguments == "values")
            raise next(telling, errors[0][1])
        found = hiding
    forms, probe, text, lacking = found
    _PARTS[template] = forms.parts
    lacking += _unused_keys(messages, text, probe.render)
    lacking += _unused_keys_of_calls(messages, text, probe.render)
    lacking += [(i, "content, whole and unchanged") for i in _changed(messages, text)]
    if tools and not _shows_tools(template, messages, tools, text, probe.render):
        lacking.append((-1, "tools"))
    return probe, text, lacking


def prompt(template: str, tokens: dict[str, str], messages: list[dict]) -> str:
    """The rendered messages with the generation prompt, given as lists of parts if the template shows all contents only then. ValueError if the
    template raises."""
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


def _wants_null(template: str, tokens: dict[str, str], messages: list[dict], tools: list[dict] | None) -> bool:
    """Whether the content of a turn that only calls tools should be null, as in OpenAI's rows: the text differs, and does not get a "None".

    DeepSeek R1's template writes a second, empty turn for an empty text.
    """
    if not any(map(_only_calls, messages)):
        return False
    if template not in _NULL:
        empty, null = (_rendered(_program(template, tokens, tools, Forms(null=null)), messages) for null in (False, True))
        if empty is None and null is None:
            return False
        _NULL[template] = null is not None and (empty is None or (null != empty and null.count("None") <= empty.count("None")))
    return _NULL[template]


def _rendered(program: Callable[..., str], messages: list[dict]) -> str | None:
    try:
        return program(messages)
    except ValueError:
        return None


def _attempts(template: str, messages: list[dict], call_values: str, null: bool) -> Iterator[Forms]:
    known, roles = _PARTS.get(template, frozenset()), sorted({message["role"] for message in messages})
    others = (
        ()
        if _FAILED[template] > _TRIALS
        else (frozenset(some) for n in range(len(roles), 0, -1) for some in itertools.combinations(roles, n))
    )
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    given = [function_of(call).get("arguments") for call in calls]
    texts = [isinstance(one, str) for one in given]
    arguments = [*(["objects"] if any(texts) else []), "", *([] if all(texts) else ["text"])]
    forms = [(form, True) for form in arguments]
    forms += {"template": [(form, False) for form in arguments], "json": [("values", True)]}.get(call_values, []) if calls else []
    for parts in itertools.chain([known], (known | some for some in others if not some <= known)):
        for inside in (False, True) if any(function_of(call) is call for call in calls) else (False,):
            yield from (Forms(parts, form, inside, strict, null) for form, strict in forms)


def _compare(messages: list[dict], text: str, probe: TemplateProbe, forms: Forms) -> list[tuple[int, str]]:
    """The (message, key) pairs that the template does not show. ValueError as `settle` raises it."""
    neutral, lacking = probe.neutral(messages, text)
    for i, key in lacking:
        role = messages[i]["role"]
        if key == "content" and role != "assistant":
            raise NotShown(
                f"the chat template does not show messages[{i}], {_WHO[role]}; use a tokenizer whose template does, or remove it"
            )
    for i, message in enumerate(messages):
        for call in message.get("tool_calls") or () if (i, "tool_calls") in probe.found else ():
            refuse_arguments(i, forms.shape_call(call), neutral, forms.as_json)
            if forms.arguments == "values":
                refuse_quoted_values(i, call, neutral)
    if forms.as_json:
        refuse_python_words([forms.shape_calls(message) for message in messages], text, probe)
    return lacking


def _changed(messages: list[dict], text: str) -> list[int]:
    """The messages whose content, white space aside, is not in the text. Answers do not count: they are located, or lose their thinking."""
    contents = [(i, message["content"].strip()) for i, message in enumerate(messages) if message["role"] != "assistant"]
    rest = [(i, content) for i, content in contents if not any(form in text for form in spellings(content))]
    return [i for i, content in rest if no_spaces(content) not in no_spaces(text)]


def _unused_keys(messages: list[dict], text: str, program: Callable[..., str]) -> list[tuple[int, str]]:
    """The (message, key) pairs of other keys that the text does not depend on."""
    keys = {key for message in messages for key in message.keys() - _OTHERWISE}

    def shown(*without: str) -> bool:
        return _differs(text, program, [{key: value for key, value in message.items() if key not in without} for message in messages])

    unused = (keys if not shown(*keys) else {key for key in keys if not shown(key)}) if keys else set()
    return [(i, key) for i, message in enumerate(messages) for key in message.keys() & unused]


def _unused_keys_of_calls(messages: list[dict], text: str, program: Callable[..., str]) -> list[tuple[int, str]]:
    """The same for other keys of calls, and of the `function` inside a call."""

    def others(call: dict) -> set[str]:
        inside = call["function"] if isinstance(call.get("function"), dict) else {}
        paths = call | {f"function.{key}": value for key, value in inside.items()}
        return {path for path, value in paths.items() if value is not None and path.removeprefix("function.") not in OF_CALL}

    def shown(path: str) -> bool:
        return _differs(text, program, [_without(message, path) for message in messages])

    of = {i: set().union(*map(others, message.get("tool_calls") or ())) for i, message in enumerate(messages)}
    unused = {path for path in set().union(*of.values()) if not shown(path)}
    return [(i, f"tool_calls[].{path}") for i, paths in of.items() for path in paths & unused]


def _without(message: dict, path: str) -> dict:
    """The message without a key of its calls, such as `strict` or `function.strict`."""
    if not message.get("tool_calls"):
        return message
    inside, key = path.startswith("function."), path.removeprefix("function.")

    def left(call: dict) -> dict:
        if inside and isinstance(call.get("function"), dict):
            return call | {"function": {name: value for name, value in call["function"].items() if name != key}}
        return call if inside else {name: value for name, value in call.items() if name != key}

    return message | {"tool_calls": [left(call) for call in message["tool_calls"]]}


def _shows_tools(template: str, messages: list[dict], tools: list[dict], text: str, program: Callable[..., str]) -> bool:
    """Whether the text depends on each of the tools."""
    lacking = [i for i, name in enumerate(function_of(tool).get("name") for tool in tools) if not (isinstance(name, str) and name in text)]
    if template not in _SHOWS_TOOLS:  # a tool's name may also be that of a call
        if not _differs(text, program, messages, tools=None):
            return False
        _SHOWS_TOOLS.add(template)
    return all(_differs(text, program, messages, tools=tools[:i] + tools[i + 1 :]) for i in lacking)


def _differs(text: str, program: Callable[..., str], messages: list[dict], **more) -> bool:
    try:
        return program(messages, **more) != text
    except ValueError:  # the template needs what was left out
        return True
