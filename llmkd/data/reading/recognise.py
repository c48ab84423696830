"""Proposes settings of a source (format, fields, roles) that would read a row which the given settings do not read.

Columns, keys and roles are known by the names that public data sets give them (`names.py`). What is proposed has been tried on the row.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterator
from typing import Any

from ...config.data import Source
from ...config.formats import FORMATS, ROLES
from .calls import are_tools
from .meanings import BETTER, PREFERENCE, is_empty, is_worse, meaning_of
from .names import (
    ANSWERS,
    ASKING,
    CONTENT_KEYS,
    DEFINITIONS,
    IDS,
    INPUTS,
    MASKS,
    PROMPTS,
    ROLE_KEYS,
    ROLE_NAMES,
    SYSTEMS,
    TEXTS,
    TOOLS,
    ending_in,
    flat,
    is_role,
    languages,
    named,
)
from .problems import ErrorCollector
from .turn_marks import rows_to_use
from .unread import lost_columns
from .values import as_yaml, opened, parsed, plain

#: `row_checks.check_row`, which checks a row against a source and adds its problems to the collector.
Check = Callable[[dict, str, Source, ErrorCollector], Any]


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A source that may read a row, and notes on it."""

    source: Source
    whole: Source  # the source with the columns that it leaves out
    lost: tuple[str, ...]  # the columns that it leaves out or chooses rows by
    taken: set[str]  # the columns that it reads
    notes: str  # other possible settings, and what may be lost


def settings_for(row: dict, source: Source, check: Check) -> str | None:
    """What to set, such as "set format: chat, fields: {messages: conversations}", so that the row is read; None if nothing is known.

    The source's own format comes first. Where no proposal reads the whole row, it is the one with the fewest problems. Columns with a meaning
    that a proposal does not read are left out by it and named with what they may hold: the fewer, the better. A conversation
    that does not end with an answer comes after all others, and one without a user's turn is not proposed: its question is elsewhere in the row.
    """
    best = None
    for proposal in _proposals(row, source):
        problems = ErrorCollector(hints=False)
        read = check(row, "", proposal.whole, problems)
        roles = _roles_in(read) if proposal.whole.format == "chat" else ["user", "assistant"]
        rank = roles[-1:] != ["assistant"], len(problems.found), len(proposal.lost)
        if "user" in roles and (best is None or rank < best[0]):
            best = rank, proposal
    if best is None:
        return None
    (unanswered, problems, lost), proposal = best
    nearest = problems or (unanswered and (lost or any(name not in proposal.taken for name in named(row, ANSWERS))))
    said = _changes(proposal.source if nearest else proposal.whole, source)
    return said and (f"the nearest is {said}" if nearest else f"set {said}{proposal.notes}")


def _roles_in(row: dict) -> list[str]:
    messages = row.get("messages")
    return [one.get("role") for one in messages if isinstance(one, dict)] if isinstance(messages, list) else []


def is_read(row: Any, source: Source, check: Check) -> bool:
    """Whether a source, or other known settings, read a row."""
    problems = ErrorCollector(hints=False)
    check(row, "", source, problems)
    return not problems.found or (isinstance(row, dict) and settings_for(row, source, check) is not None)


def _changes(candidate: Source, source: Source) -> str | None:
    """The settings in which the candidate differs from the source, as lines of a recipe."""
    names = ("format", "fields", "roles", "where", "ignore", "chat_template")
    said = []
    for name in names:
        value, given = getattr(candidate, name), getattr(source, name)
        if value != given:  # a mapping that is no longer needed is written as the identity
            said.append(f"{name}: {as_yaml({key: key for key in given} if value == {} else value)}")
    return ", ".join(said) or None


def _proposals(row: dict, source: Source) -> Iterator[Proposal]:
    """Sources that may read the row: first those of formats whose own columns it has, then of the given format."""
    own = {name for name in _READERS if all(column in row for column, kind in FORMATS[name].row.items() if not kind.optional)}
    columns, asked = dict(flat(row)), {"choices", "answer"}.intersection(source.fields)
    for name in sorted(_READERS, key=lambda name: (name not in own, name != source.format)):
        for fields, roles in _READERS[name](columns):
            kept = {
                ours: theirs
                for ours, theirs in source.fields.items()
                if ours not in fields and (ours in ("choices", "answer") or (name == source.format and theirs in columns))
            }
            others = _other_answers(row, fields, FORMATS[name].answer, bool(asked))
            fields = kept | {ours: theirs for ours, theirs in fields.items() if ours != theirs}
            taken = {fields.get(column, column) for column in (*FORMATS[name].columns, *asked)}
            template = FORMATS[name].template == "optional" and (
                source.chat_template
                or source.format == "chat"
                or any(row.get(fields.get(one, one)) for one in ("system", "tools") if one in FORMATS[name].columns)
            )
            ignore = tuple(column for column in source.ignore if column not in taken)
            new = dataclasses.replace(source, format=name, fields=fields, roles=roles, ignore=ignore, chat_template=template)
            yield _with_losses(row, new, taken, others)


def _other_answers(row: dict, fields: dict[str, str], answer: str | None, asked: bool) -> str:
    """Another column that may be trained on, as in "or output: answer"; "" if there is none."""
    if answer not in fields or asked:
        return ""
    if len(found := languages(dict(flat(row)))) > 1 and fields[answer] in found:
        return "or the other way round" if len(found) == 2 else f"or others of {', '.join(found)}"
    texts = [name for name in [*named(row, ANSWERS), *ending_in(row, ANSWERS)] if _is_text(row[name])]
    others = dict.fromkeys(name for name in texts if name not in fields.values() and not meaning_of(name, row[name], "alpaca"))
    return f"or {answer}: {' or '.join(map(as_yaml, [*others][:3]))}" if others else ""


def _with_losses(row: dict, source: Source, taken: set[str], others: str) -> Proposal:
    """The proposal that chooses rows by their marks, and ignores columns with a meaning."""
    row = opened(row, taken)
    lost = lost_columns(row, taken | {*source.where}, source)
    where = rows_to_use(row, {*taken, *source.ignore, *source.where})
    better = any(plain(name) in BETTER for name in taken)
    lost = {name: one for name, one in lost.items() if better or one.what != PREFERENCE or is_worse(name)}
    whole = dataclasses.replace(source, ignore=(*source.ignore, *lost), where=source.where | where)
    what = {meaning.what: [repr(name) for name in lost if lost[name] is meaning] for meaning in lost.values() if meaning.what != PREFERENCE}
    losses = [f"{', '.join(names)} may hold {held}" for held, names in what.items()]
    notes = "; ".join([*([others] if others else []), *losses])
    return Proposal(source, whole, (*lost, *where), taken, f" ({notes})" if notes else "")


Found = Iterator[tuple[dict[str, str], dict[str, str]]]


def _chat(row: dict) -> Found:
    for name, value in row.items():
        keys = _message_keys(value)
        if keys:
            yield {"messages": name, **keys, **_tools(row), **_system(row)}, _roles({message[keys["role"]] for message in parsed(value)})


def _message_keys(value: Any) -> dict[str, str]:
    """The keys for role and content in a list of messages; empty for any other value."""
    value = parsed(value)
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return {}
    found, kinds = {}, {"role": str, "content": str | list | None}
    typed = ["type"] if all(is_role(message.get("type")) for message in value) else []  # of LangChain
    for ours, names in (("role", [*ROLE_KEYS, *typed]), ("content", CONTENT_KEYS)):
        there = [
            key for name in names for key in value[0] if plain(key) == name and all(isinstance(one.get(key), kinds[ours]) for one in value)
        ]
        found |= {ours: there[0]} if there else {}
    return found if len(found) == 2 else {}


def _roles(theirs: set[str]) -> dict[str, str]:
    """The settings for the file's own names of the roles; a name that is known needs none."""
    names = sorted(theirs - set(ROLES))
    found = {role: name for role in ROLES for name in names if role not in theirs and plain(name) in ROLE_NAMES.get(role, ())}
    if found == {"user": "human"} and "assistant" not in theirs:
        return found | {"assistant": "gpt"}  # ShareGPT's name, which no row has had yet
    return found


def role_hint(role: str, roles: dict[str, str], source: Source) -> str:
    """The end of the message about an unknown role. `roles`: the source's mapping from the file's names to llmkd's."""
    ours = next((ours for ours, names in ROLE_NAMES.items() if plain(role) in names), None)
    if ours:
        already = f", or write {source.roles[ours]!r} for it in the file" if ours in source.roles else ""
        return f"; set roles: {as_yaml(source.roles | {ours: role})}{already}"
    near = difflib.get_close_matches(role, roles, 1, 0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _alpaca(row: dict) -> Found:
    for prompt, answer in _pairs(row, "instruction", "output"):
        if (task := named(row, DEFINITIONS)[:1]) and isinstance(row[task[0]], str):
            yield {"instruction": task[0], "input": prompt, "output": answer, **_system(row)}, {}
        inputs = [name for name in named(row, INPUTS, empty=True) if name not in (prompt, answer)]
        given = next((name for name in inputs if isinstance(row[name], str | None)), None)
        yield {"instruction": prompt, **({"input": given} if given else {}), "output": answer, **_system(row)}, {}


def _prompt_completion(row: dict) -> Found:
    for prompt, answer in _pairs(row, "prompt", "completion", PROMPTS + _DOCUMENTS):
        yield {"prompt": prompt, "completion": answer, **_tools(row), **_system(row)}, {}
    for fields, roles in _chat(row):  # a conversation whose answer is another column
        name = fields.pop("messages")
        last = parsed(row[name])[-1]
        answer = next((one for one in named(row, ANSWERS) if one != name and (isinstance(row[one], str) or _message_keys(row[one]))), None)
        if answer and plain(last[fields["role"]]) in ROLE_NAMES["user"]:
            yield {"prompt": name, "completion": answer, **fields}, roles
    if len(both := languages(row)) > 1:
        yield {"prompt": both[0], "completion": both[1]}, {}


_DOCUMENTS = [*INPUTS, "text", "content"]  # each has a summary, or code


def _pairs(row: dict, prompt: str, answer: str, prompts: list[str] = PROMPTS) -> Iterator[list[str]]:
    """The text columns of prompt and answer: those with the format's own names, or the first with another known name."""
    found = []
    for own, names in ((prompt, prompts), (answer, ANSWERS)):
        texts = [own, *named(row, names), *ending_in(row, names)]
        inner = [f"{name}.{key}" for name in texts if isinstance(row.get(name), dict) for key in CONTENT_KEYS]
        found += [name for name in [*texts, *inner] if name in row and _is_text(row[name]) and name not in found][:1]
    if len(found) == 2:
        yield found


def _is_text(value: Any) -> bool:
    """Whether the value is a text, but not a list of tool calls as JSON."""
    calls = parsed(value) if isinstance(value, str) and value[:1] == "[" else None
    return isinstance(value, str) and not (
        isinstance(calls, list) and calls and all(isinstance(one, dict) and "name" in one for one in calls)
    )


def is_turn(row: dict) -> bool:
    """Whether a row is one turn of a conversation, with its role as a column (as in oasst)."""
    return any(is_role(row[name]) for name in named(row, ROLE_KEYS))


def _text(row: dict) -> Found:
    known = named(row, TEXTS)[:1] or list(row)[: len(row) == 1]
    if not is_turn(row) and not named(row, ASKING) and not [name for name in named(row, ANSWERS) if name not in known]:
        yield from (({"text": name}, {}) for name in known if isinstance(row[name], str))


def _tokens(row: dict) -> Found:
    """Proposals for token ids; a mask under another name becomes the format's loss_mask."""
    ids = next((name for name in named(row, IDS) if is_numbers(row[name])), None)
    if ids:
        own = [name for name in FORMATS["tokens"].row if name in row]
        mask = next((name for name in named(row, MASKS) if is_numbers(row[name]) and name not in own), None)
        yield {"input_ids": ids, **({"loss_mask": mask} if mask and not {"loss_mask", "labels"}.intersection(own) else {})}, {}


def is_numbers(value: Any) -> bool:
    """Whether the value is a list of whole numbers, or such a list as JSON text."""
    value = parsed(value)
    return isinstance(value, list) and bool(value) and all(isinstance(one, int) for one in value)


def _system(row: dict) -> dict[str, str]:
    names = sorted(named(row, SYSTEMS, empty=True), key=lambda name: is_empty(row[name]))  # it may be empty in this row
    return {"system": names[0]} if names else {}


def _tools(row: dict) -> dict[str, str]:
    names = [name for name in named(row, TOOLS) if are_tools(row[name])]
    return {"tools": names[0]} if names else {}


#: In the order in which they are tried.
_READERS = {"chat": _chat, "prompt_completion": _prompt_completion, "alpaca": _alpaca, "text": _text, "tokens": _tokens}
