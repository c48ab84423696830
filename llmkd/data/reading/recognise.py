"""The settings of a source that would read a row which the given ones do not: format, fields, roles.

Columns, keys and roles are known by the names that public data sets give them. What is proposed has been tried on the row.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from ...config.data import FORMATS, ROLES, Source
from .problems import ErrorCollector
from .turn_marks import plain
from .values import parsed

_PROMPTS = "instruction prompt question query problem input inputs user human questions prompts source request task q".split()
_ANSWERS = (
    "output response answer completion solution target reply assistant bot generation chosen responses answers completions targets outputs"
    " expectedoutput modeloutput goldanswer finalanswer summary highlights gpt a"
).split()
_INPUTS = "input context document passage article background".split()
_TEXTS = "text content document body passage article story abstract code rawcontent doc txt paragraph".split()
_SYSTEMS = "system systemprompt systemmessage".split()
_IDS = "inputids tokenids tokens".split()
_MASKS = "lossmask completionmask assistantmasks assistantmask assistanttokensmask trainmask targetmask responsemask mask".split()
ROLE_KEYS = "role from speaker author sender".split()
_CONTENT_KEYS = "content value text message utterance body".split()
_ROLE_NAMES = {
    "user": "user human prompter customer client question usermessage".split(),
    "assistant": "assistant gpt bot model chatgpt ai chatbot agent assistantmessage bing bard answer".split(),
    "system": ["system", "systemprompt"],
    "tool": "tool function observation toolresponse ipython toolresult functionresponse".split(),
}


#: What to do with rows that are turns.
ONE_ROW = "write the turns of each conversation as one row, {messages: [{role, content}, ...]} (format: chat)"


#: Checks a row against a source and adds what is wrong to the collector: `row_checks.check_row`.
Check = Callable[[dict, str, Source, ErrorCollector], Any]


def settings_for(row: dict, source: Source, check: Check) -> str | None:
    """What to set, such as "set format: chat, fields: {messages: conversations}", so that the row is read; None if nothing is known.

    The source's own format comes first. Where no proposal reads the whole row, it is the one with the fewest problems. A conversation
    that does not end with an answer comes after all others, and one without a user's turn is not proposed: its question is elsewhere in the row.
    """
    best = None
    for candidate in _candidates(row, source):
        problems = ErrorCollector(hints=False)
        read = check(row, "", candidate, problems)
        roles = _roles_in(read) if candidate.format == "chat" else ["user", "assistant"]
        rank = roles[-1:] != ["assistant"], len(problems.found)
        if "user" in roles and (best is None or rank < best[0]):
            best = rank, candidate
    said = _changes(best[1], source) if best else None
    return said and (f"the nearest is {said}" if best[0][1] else f"set {said}")


def _roles_in(row: dict) -> list[str]:
    messages = row.get("messages")
    return [one.get("role") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []


def is_read(row: Any, source: Source, check: Check) -> bool:
    """Whether a row is read by a source, or would be by other settings that are known."""
    problems = ErrorCollector(hints=False)
    check(row, "", source, problems)
    return not problems.found or (isinstance(row, dict) and settings_for(row, source, check) is not None)


def _changes(candidate: Source, source: Source) -> str | None:
    """The settings in which the candidate differs from the source, as lines of a recipe."""
    names = ("format", "fields", "roles", "ignore", "chat_template")
    said = []
    for name in names:
        value, given = getattr(candidate, name), getattr(source, name)
        if value != given:  # a mapping that is no longer needed: each name for itself
            said.append(f"{name}: {_shown({key: key for key in given} if value == {} else value)}")
    return ", ".join(said) or None


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_name(name)}' for key, name in value.items())}}}"
    return f"[{', '.join(map(_name, value))}]" if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else value


def _name(name: str) -> str:
    """A name as YAML: in quotes where it has to be."""
    return (
        name
        if re.fullmatch(r"[A-Za-z_][\w.-]*( [\w.-]+)*", name) and yaml.safe_load(name) == name
        else json.dumps(name, ensure_ascii=False)
    )


def _candidates(row: dict, source: Source) -> Iterator[Source]:
    """Sources that may read the row: first those of formats whose own columns it has, then of the given format."""
    own = {name for name in _READERS if all(column in row for column, kind in FORMATS[name].row.items() if not kind.optional)}
    for name in sorted(_READERS, key=lambda name: (name not in own, name != source.format)):
        for fields, roles in _READERS[name](row):
            kept = {
                ours: theirs
                for ours, theirs in source.fields.items()
                if ours not in fields and (ours in ("choices", "answer") or (name == source.format and theirs in row))
            }
            fields = kept | {ours: theirs for ours, theirs in fields.items() if ours != theirs}
            taken = {fields.get(column, column) for column in FORMATS[name].columns}
            pair = ("rejected",) if "chosen" in taken and row.get("rejected") and "rejected" not in taken else ()
            template = FORMATS[name].template == "optional" and (
                source.chat_template or source.format == "chat" or bool(row.get(fields.get("system", "system")))
            )
            ignore = tuple(dict.fromkeys((*(column for column in source.ignore if column not in taken), *pair)))
            yield dataclasses.replace(source, format=name, fields=fields, roles=roles, ignore=ignore, chat_template=template)


Found = Iterator[tuple[dict[str, str], dict[str, str]]]


def _chat(row: dict) -> Found:
    for name, value in row.items():
        keys = _message_keys(value)
        if keys:
            yield {"messages": name, **keys, **_system(row)}, _roles({message[keys["role"]] for message in parsed(value)})


def _message_keys(value: Any) -> dict[str, str]:
    """The keys of a list of messages that hold role and content; empty for anything else."""
    value = parsed(value)
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return {}
    found, kinds = {}, {"role": str, "content": str | list | None}
    for ours, names in (("role", ROLE_KEYS), ("content", _CONTENT_KEYS)):
        there = [
            key for name in names for key in value[0] if plain(key) == name and all(isinstance(one.get(key), kinds[ours]) for one in value)
        ]
        found |= {ours: there[0]} if there else {}
    return found if len(found) == 2 else {}


def _roles(theirs: set[str]) -> dict[str, str]:
    """The settings for the file's own names of the roles; a name that is known needs none."""
    names = sorted(theirs - set(ROLES))
    found = {role: name for role in ROLES for name in names if role not in theirs and plain(name) in _ROLE_NAMES.get(role, ())}
    return found | {"assistant": "gpt"} if found == {"user": "human"} and "assistant" not in theirs else found  # ShareGPT's, not seen yet


def role_hint(role: str, roles: dict[str, str], source: Source) -> str:
    """The end of the message about a role that is not known. `roles`: ours by the file's own names, as the source has them."""
    ours = next((ours for ours, names in _ROLE_NAMES.items() if plain(role) in names), None)
    if ours:
        already = f", or write {source.roles[ours]!r} for it in the file" if ours in source.roles else ""
        return f"; set roles: {_shown(source.roles | {ours: role})}{already}"
    near = difflib.get_close_matches(role, roles, 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _alpaca(row: dict) -> Found:
    for prompt, answer in _pairs(row, "instruction", "output"):
        given = next((name for name in _named(row, _INPUTS) if name not in (prompt, answer)), None)
        yield {"instruction": prompt, **({"input": given} if given else {}), "output": answer, **_system(row)}, {}


def _prompt_completion(row: dict) -> Found:
    for prompt, answer in _pairs(row, "prompt", "completion", _PROMPTS + _INPUTS):  # a document and its summary, too
        yield {"prompt": prompt, "completion": answer, **_system(row)}, {}
    for fields, roles in _chat(row):  # a conversation whose answer is another column
        name = fields.pop("messages")
        last, answer = parsed(row[name])[-1], next((one for one in _named(row, _ANSWERS) if isinstance(row[one], str)), None)
        if answer and plain(last[fields["role"]]) in _ROLE_NAMES["user"]:
            yield {"prompt": name, "completion": answer, **fields}, roles


def _pairs(row: dict, prompt: str, answer: str, prompts: list[str] = _PROMPTS) -> Iterator[list[str]]:
    """The columns of prompt and answer: those with the format's own names, or the first that have another known name."""
    known = ((prompt, prompts), (answer, _ANSWERS))
    named = [[name] if row.get(name) is not None else _named(row, names) for name, names in known]
    if all(named):
        yield [names[0] for names in named]


def is_turn(row: dict) -> bool:
    """Whether a row is one turn of a conversation (oasst's): its role is a column."""
    return any(is_role(row[name]) for name in _named(row, ROLE_KEYS))


def is_role(value: Any) -> bool:
    return isinstance(value, str) and any(plain(value) in names for names in _ROLE_NAMES.values())


def _text(row: dict) -> Found:
    if not is_turn(row) and not _named(row, _PROMPTS) and not _named(row, _ANSWERS):
        known = _named(row, _TEXTS) or list(row)[: len(row) == 1]
        yield from (({"text": name}, {}) for name in known[:1] if isinstance(row[name], str))


def _tokens(row: dict) -> Found:
    """Token ids; a mask under another name than the format's own is its loss_mask."""
    ids = next((name for name in _named(row, _IDS) if is_numbers(row[name])), None)
    if ids:
        own = [name for name in FORMATS["tokens"].row if name in row]
        mask = next((name for name in _named(row, _MASKS) if is_numbers(row[name]) and name not in own), None)
        yield {"input_ids": ids, **({"loss_mask": mask} if mask and not {"loss_mask", "labels"}.intersection(own) else {})}, {}


def is_numbers(value: Any) -> bool:
    """Whether it is a list of whole numbers, or the same as JSON text."""
    value = parsed(value)
    return isinstance(value, list) and bool(value) and all(isinstance(one, int) for one in value)


def _system(row: dict) -> dict[str, str]:
    names = _named(row, _SYSTEMS)
    return {"system": names[0]} if names else {}


def _named(row: dict, names: list[str]) -> list[str]:
    """The columns that have one of these names, in the names' order."""
    return [column for name in names for column in row if plain(column) == name and row[column] is not None]


#: In the order in which they are tried.
_READERS = {"chat": _chat, "prompt_completion": _prompt_completion, "alpaca": _alpaca, "text": _text, "tokens": _tokens}
