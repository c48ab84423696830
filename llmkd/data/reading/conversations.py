"""Checks of conversations: lists of messages with a role and a content."""

import itertools
from collections import Counter
from typing import Any

from ...config.data import Source
from ...config.formats import ROLES
from .calls import is_call, read_call_turn, with_calls
from .column_hints import messages_hint
from .meanings import NO_TEXT, meaning_of
from .problems import ErrorCollector
from .recognise import Check, role_hint, settings_for
from .turn_marks import ignoring, mark_of
from .values import check_text, kind, parsed, surrogate


def read_messages(row: dict, name: str, source: Source, place: str, problems: ErrorCollector, unread: Counter, check: Check) -> Any:
    """The conversation in the row's column `name`, a list or its JSON text, with llmkd's names for roles and fields. Null fields of a message are
    left out: parquet adds them to every message.

    A turn that is marked as trained on, or as not, has `train` true or false. Keys that are left out are counted in `unread`.
    """
    messages = parsed(row[name])
    if not isinstance(messages, list) or not messages:
        found = kind(messages) if messages != [] else "empty"
        problems.add(f"{place}: {name} is {found}, expected a list of {{role, content}}{messages_hint(messages)}")
        return row[name]
    role_name, content_name = (source.fields.get(c, c) for c in ("role", "content"))
    roles = {source.roles.get(role, role): role for role in ROLES}
    out, left_out = [], set()
    for i, message in enumerate(messages):
        where = f"{place}: {name}[{i}]"
        if not isinstance(message, dict):
            problems.add(f"{where} is {kind(message)}, expected {{{role_name}, {content_name}}}")
            continue
        role, content = message.get(role_name), message.get(content_name)
        if isinstance(role, str) and role not in roles and is_call(role):  # of ShareGPT: the content is the call
            calls = read_call_turn(content, f"{where}.{content_name}", role, problems)
            if calls is None:
                continue
            role, content = source.roles.get("assistant", "assistant"), None
            message = {key: value for key, value in message.items() if key != content_name} | {"tool_calls": calls}
        if not isinstance(role, str) or role not in roles:
            settings = settings_for(row, source, check) if problems.hints and not source.roles else None
            found = f".{role_name} is {role!r}" if role_name in message else f" has no {role_name!r}"
            named = role_hint(role, roles, source) if problems.hints and isinstance(role, str) else ""
            hint = f"; {settings}" if settings and settings.startswith("set ") else named
            problems.add(f"{where}{found}, expected one of {', '.join(roles)}{hint}", alike=f"role {role!r}" if hint else "")
            if hint:
                break
            continue
        if isinstance(content, list):
            marked = source if roles[role] == "assistant" else None
            content = _text_of_parts(content, f"{where}.{content_name}", f"{name}[].{content_name}[]", problems, left_out, marked)
            if content is None:
                continue
        message = with_calls(message, roles[role], source, where, problems)
        if message is None:
            continue
        only_calls = content is None and roles[role] == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not only_calls:
            problems.add(f"{where}{_no_content(message, role_name, content_name)}")
            continue
        rest = {k: v for k, v in message.items() if k not in (role_name, content_name, *source.ignore) and v is not None}
        trained, marks = mark_of(rest, source, where, problems, roles[role] == "assistant")
        taken = {
            k for k in ("role", "content", "train") if k in rest and k not in marks
        }  # the file's own keys, besides those named in `fields`
        left_out |= taken
        rest = {k: v for k, v in rest.items() if k not in taken | marks}
        for key in rest:
            if (meaning := meaning_of(key, rest[key], "chat")) and meaning.what == NO_TEXT:
                problems.add(
                    f"{where}.{key}: it may hold {NO_TEXT}; set {ignoring(source, key)} to train without it", alike=f"{key} in messages"
                )
        if surrogate(rest) is not None:
            problems.add(f"{where} contains half of a surrogate pair, which is not a character; fix the file's encoding")
        check_text(content or "", f"{where}.{content_name}", problems)
        mark = {} if trained is None else {"train": trained}
        out.append({"role": roles[role], "content": content or "", **rest, **mark})
    unread.update(key if key.startswith(name) else f"{name}[].{key}" for key in left_out)
    return out


def read_system(value: dict | list, name: str, place: str, problems: ErrorCollector, unread: Counter) -> str | None:
    """The text of a system message given as a message or as a list of parts (Gemini's and Anthropic's rows); None if it is refused."""
    key = next((key for key in ("content", "parts") if isinstance(value, dict) and key in value), None)
    content, where = (value[key], f"{name}.{key}") if key else (value, name)
    if isinstance(content, list):
        left_out: set[str] = set()
        content = _text_of_parts(content, f"{place}: {where}", f"{where}[]", problems, left_out, None)
        unread.update(left_out)
    elif not isinstance(content, str):
        problems.add(f"{place}: {where} is {kind(content)}, expected text")
    return content


def _no_content(message: dict, role_name: str, content_name: str) -> str:
    """The problem with a message whose content is not text."""
    if content_name in message:
        return f".{content_name} is {kind(message[content_name])}, expected text"
    texts = [key for key, value in message.items() if key != role_name and isinstance(value, str)]
    fix = f"; set fields: {{content: {texts[0]}}}" if len(texts) == 1 else ""
    return f" has no {content_name!r}; found {', '.join(map(repr, message))}{fix}"


def _text_of_parts(parts: list, where: str, name: str, problems: ErrorCollector, left_out: set[str], marked: Source | None) -> str | None:
    """The text of a content given as a list of parts, [{type: text, text: ...}], as for templates of vision models; None if it is refused.

    Keys of parts that are left out are added to `left_out`. With `marked`, the source of an assistant's turn, parts that are not to be
    trained on are refused, since a turn is supervised as a whole.
    """
    texts = []
    for j, part in enumerate(parts):
        part = {"text": part} if isinstance(part, str) else part
        part_kind = part.get("type") or "text" if isinstance(part, dict) else None
        if part_kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
            keys = ", ".join(map(repr, part)) if isinstance(part, dict) and not part.get("type") else ""
            found = f"a part with {keys}" if keys else f"a part of type {part_kind!r}" if part_kind else kind(part)
            problems.add(f"{where}[{j}] is {found}, expected {{type: text, text: ...}}; llmkd reads text only")
            return None
        part = {key: value for key, value in part.items() if value is not None}  # a null in parquet is an absent key
        rest = {key: value for key, value in part.items() if key not in ("type", "text")}
        left_out |= {f"{name}.{key}" for key in rest}
        if marked:
            of_mark = {key: value for key, value in rest.items() if key not in marked.ignore}
            trained, keys = mark_of(of_mark, marked, f"{where}[{j}]", problems, True)
            if trained is False:
                problems.add(
                    f"{where}[{j}] is marked as not trained on ({', '.join(sorted(keys))}), and llmkd supervises whole turns; write train: false "
                    f"for the turn, or set {ignoring(marked, *sorted(keys))}",
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
