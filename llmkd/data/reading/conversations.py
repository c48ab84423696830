"""Checks of conversations: lists of messages with a role and a content, and the tools that they may call."""

import json
from collections import Counter
from typing import Any

from ...config.data import ROLES, Source
from .problems import ErrorCollector
from .turn_marks import mark_of
from .values import check_text, kind, surrogate


def read_messages(messages: Any, name: str, source: Source, place: str, problems: ErrorCollector, unread: Counter) -> Any:
    """The conversation with our own names for roles and fields. A null field of a message is absent: parquet adds such fields to every message.

    A turn that is marked as trained on, or as not, has `train` true or false. Keys that are left out are counted in `unread`.
    """
    if not isinstance(messages, list) or not messages:
        problems.add(f"{place}: {name} is {kind(messages) if messages != [] else 'empty'}, expected a list of {{role, content}}")
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
            problems.add(f"{where}.{role_name} is {role!r}, expected one of {', '.join(roles)}")
            continue
        only_calls = content is None and roles[role] == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not only_calls:
            problems.add(f"{where}.{content_name} is {kind(content)}, expected text")
            continue
        rest = {k: v for k, v in message.items() if k not in (role_name, content_name, *source.ignore) and v is not None}
        trained, marks = mark_of(rest, source.fields.get("train"), where, problems)
        taken = {k for k in ("role", "content", "train") if k in rest and k not in marks}  # the file's own, beside those named in `fields`
        left_out |= taken
        rest = {k: v for k, v in rest.items() if k not in taken | marks}
        if surrogate(rest) is not None:
            problems.add(f"{where} contains half of a surrogate pair, which is not a character; fix the file's encoding")
        check_text(content or "", f"{where}.{content_name}", problems)
        mark = {} if trained is None else {"train": trained}
        out.append({"role": roles[role], "content": content or "", **rest, **mark})
    unread.update(f"{name}[].{key}" for key in left_out)
    return out


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
    elif surrogate(tools) is not None:
        problems.add(f"{place}: {name} contains half of a surrogate pair, which is not a character; fix the file's encoding")
    return tools or None
