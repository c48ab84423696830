"""Checks of conversations: lists of messages with a role and a content, and the tools that they may call."""

import itertools
import json
from collections import Counter
from typing import Any

from ...config.data import ROLES, Source
from .column_hints import text_hint
from .problems import ErrorCollector
from .recognise import CALLS, Check, role_hint, settings_for
from .turn_marks import mark_of, plain
from .values import check_text, kind, surrogate


def read_messages(row: dict, name: str, source: Source, place: str, problems: ErrorCollector, unread: Counter, check: Check) -> Any:
    """The conversation in the row's column `name`, with our own names for roles and fields. A null field of a message is absent: parquet adds such fields to every message.

    A turn that is marked as trained on, or as not, has `train` true or false. Keys that are left out are counted in `unread`.
    """
    messages = row[name]
    if not isinstance(messages, list) or not messages:
        found = kind(messages) if messages != [] else "empty"
        problems.add(f"{place}: {name} is {found}, expected a list of {{role, content}}{text_hint(messages)}")
        return messages
    role_name, content_name = (source.fields.get(c, c) for c in ("role", "content"))
    roles = {source.roles.get(role, role): role for role in ROLES}
    out, left_out = [], set()
    for i, message in enumerate(messages):
        where = f"{place}: {name}[{i}]"
        if not isinstance(message, dict):
            problems.add(f"{where} is {kind(message)}, expected {{{role_name}, {content_name}}}")
            continue
        role, content = message.get(role_name), message.get(content_name)
        if not isinstance(role, str) or role not in roles:
            settings = settings_for(row, source, check) if problems.hints and not source.roles else None
            named = role_hint(role, roles, source) if problems.hints and isinstance(role, str) else ""
            hint = f"; {settings}" if settings and settings.startswith("set ") else named
            problems.add(
                f"{where}.{role_name} is {role!r}, expected one of {', '.join(roles)}{hint}", alike=f"role {role!r}" if hint else ""
            )
            if hint:
                break
            continue
        if isinstance(content, list):
            marked = source if roles[role] == "assistant" else None
            content = _text_of_parts(content, f"{where}.{content_name}", f"{name}[].{content_name}[]", problems, left_out, marked)
            if content is None:
                continue
        only_calls = content is None and roles[role] == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not only_calls:
            old = f"; {_OLD.format(lost[0])}" if content is None and (lost := _lost_calls(message, "assistant", source)) else ""
            problems.add(f"{where}.{content_name} is {kind(content)}, expected text{old}")
            continue
        for key in _lost_calls(message, roles[role], source):
            why = "calls are an assistant's" if key == "tool_calls" else _OLD.format(key)
            problems.add(
                f"{where}.{key} is a call that the model would not see: {why}; set ignore: [{', '.join([*source.ignore, key])}] to train without it",
                alike=f"{key} of a turn of role {role}",
            )
        rest = {k: v for k, v in message.items() if k not in (role_name, content_name, *source.ignore) and v is not None}
        trained, marks = mark_of(rest, source.fields.get("train"), where, problems)
        taken = {k for k in ("role", "content", "train") if k in rest and k not in marks}  # the file's own, beside those named in `fields`
        left_out |= taken
        rest = {k: v for k, v in rest.items() if k not in taken | marks}
        if "tool_calls" in rest and (calls := read_calls(rest.pop("tool_calls"), f"{where}.tool_calls", problems)):
            rest["tool_calls"] = calls
        if surrogate(rest) is not None:
            problems.add(f"{where} contains half of a surrogate pair, which is not a character; fix the file's encoding")
        check_text(content or "", f"{where}.{content_name}", problems)
        mark = {} if trained is None else {"train": trained}
        out.append({"role": roles[role], "content": content or "", **rest, **mark})
    unread.update(key if key.startswith(name) else f"{name}[].{key}" for key in left_out)
    return out


_OLD = "{} is another form of tool_calls, write tool_calls: [{{function: {{name, arguments}}}}]"


def _lost_calls(message: dict, role: str, source: Source) -> list[str]:
    """The keys of a message that hold a call and are not read: function_call and its like, and the tool_calls of a turn that is no assistant's."""
    names = [key for key in message if plain(key) in CALLS and not (key == "tool_calls" and role == "assistant")]
    return [key for key in names if key not in source.ignore and message[key] not in (None, "", [], {})]


def _text_of_parts(parts: list, where: str, name: str, problems: ErrorCollector, left_out: set[str], marked: Source | None) -> str | None:
    """The text of a content that is a list of parts, [{type: text, text: ...}], as templates of vision models take it; None if it is refused.

    Keys of parts that are left out are added to `left_out`. With `marked`, the source of an assistant's turn, parts that are not to be
    trained on are refused, since a turn is supervised as a whole.
    """
    texts = []
    for j, part in enumerate(parts):
        part = {"text": part} if isinstance(part, str) else part
        part_kind = part.get("type") or "text" if isinstance(part, dict) else None
        if part_kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            found = f"a part of type {part_kind!r}" if part_kind else kind(part)
            problems.add(f"{where}[{j}] is {found}, expected {{type: text, text: ...}}; llmkd reads text only")
            return None
        part = {key: value for key, value in part.items() if value is not None}  # a null in parquet is an absent key
        rest = {key: value for key, value in part.items() if key not in ("type", "text")}
        left_out |= {f"{name}.{key}" for key in rest}
        if marked:
            of_mark = {key: value for key, value in rest.items() if key not in marked.ignore}
            trained, keys = mark_of(of_mark, marked.fields.get("train"), f"{where}[{j}]", problems)
            if trained is False:
                problems.add(
                    f"{where}[{j}] is marked as not trained on ({', '.join(sorted(keys))}), and llmkd supervises whole turns; write train: false "
                    f"for the turn, or set ignore: [{', '.join([*marked.ignore, *sorted(keys)])}]",
                    alike="a part that is marked as not trained on",
                )
                return None
        texts.append(part["text"])
    texts = [text for text in texts if text]
    glued = next((j for j, (a, b) in enumerate(itertools.pairwise(texts)) if not (a[-1].isspace() or b[0].isspace())), None)
    if glued is not None:
        problems.add(f"{where} is {len(texts)} texts without white space between them, and how they are joined is not said; write one text")
        return None
    return "".join(texts)


#: Other names for a call's arguments.
_ARGUMENTS = ("parameters", "params", "args", "kwargs", "input", "inputs", "argument", "parameter")


def read_calls(calls: Any, where: str, problems: ErrorCollector) -> list[dict] | None:
    """The calls of a turn: a list of objects with a name, or of {function: {name, arguments}}; the same as JSON text, as in many tables."""
    if isinstance(calls, str):
        try:
            calls = json.loads(calls) if calls.strip() else None
        except (ValueError, RecursionError):
            problems.add(f"{where} is text that is not JSON, expected a list of objects, or the same as JSON text")
            return None
    if calls is not None and not isinstance(calls, list):
        problems.add(f"{where} is {kind(calls)}, expected a list of objects")
        return None
    for j, call in enumerate(calls or []):
        function = call.get("function") if isinstance(call, dict) and isinstance(call.get("function"), dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            problems.add(f"{where}[{j}] is {kind(call)} without the name of a function, expected {{function: {{name, arguments}}}}")
            return None
        if function.get("arguments") is None and (other := next((key for key in _ARGUMENTS if function.get(key) is not None), None)):
            problems.add(
                f"{where}[{j}] has its arguments under {other!r}; rename the key to 'arguments'",
                alike=f"calls with {other!r} for 'arguments'",
            )
            return None
        if "arguments" not in function:
            problems.add(
                f"{where}[{j}] has no key 'arguments', expected {{function: {{name, arguments}}}}; write {{}} for none",
                alike="calls without 'arguments'",
            )
            return None
    return calls or None


def read_tools(tools: Any, name: str, place: str, problems: ErrorCollector) -> Any:
    """The functions that a conversation may call: a list of objects, the same as JSON text (as in many tables), or null."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            problems.add(f"{place}: {name} is text that is not JSON, expected a list of objects, or the same as JSON text")
            return None
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
