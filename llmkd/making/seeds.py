"""The rows that `llmkd make` starts from, read like those of `data.train`. No torch."""

import dataclasses
import hashlib
import json
from collections import Counter
from typing import Any

from ..config import formats as config
from ..config.data import Source
from ..config.fields import OneOrMany, with_setting_names
from ..data.media.files import read_bytes
from ..data.prompt_files import asks, with_some_answer
from ..data.reading.media import media_of
from ..data.reading.problems import ErrorCollector
from ..data.reading.row_checks import check_row
from ..data.reading.sources import no_rows, open_source, some_rows
from ..errors import UserError
from .rows import MADE, Message, Row, Sound, row_id
from .selection import ORIGINAL

#: Columns that become part of the conversation, and are not passed on as columns.
_SAID = (
    "messages",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "tools",
    "teacher_context",
    "train",
)
#: The same for sounds.
_SAID_OF_SOUNDS = (*config.FORMATS["speech"].columns, "train")
#: The keys of `made` that are not notes.
_OF_ROWS = ("id", "stage", "writer", "parents", "sha256")


def read_seeds(sources: OneOrMany[Source]) -> list[Row]:
    """The rows of all sources. UserError names every bad row of all of them."""
    rows, problems, before = [], [], Counter()
    for setting, source in with_setting_names(sources, "seeds"):
        try:
            found = _rows_of(source, setting)
        except UserError as error:
            problems += error.problems
            continue
        for messages, columns, audio, origin in found:
            content = row_id(messages)
            number, before[content] = before[content], before[content] + 1
            rows.append(Row(row_id("seeds", messages, number), messages, columns, audio=audio, **origin))
    if problems:
        raise UserError(*problems)
    originals = {None} | {row.notes["original"] for row in rows if row.notes.get("version") == ORIGINAL}
    return [row if row.notes.get("original") in originals else _without_version(row) for row in rows]


def _without_version(row: Row) -> Row:
    """A version whose original is not among the rows, for example after a selection: an ordinary row, of which new versions can be made."""
    return dataclasses.replace(row, notes={name: value for name, value in row.notes.items() if name not in ("version", "original")})


def _rows_of(source: Source, setting: str) -> list[tuple[tuple[Message, ...], dict, Sound | None, dict]]:
    """For every row its conversation, its other columns, its sound or None, and its origin in an earlier run."""
    problems, opened, out, count, bad = ErrorCollector(), open_source(source, setting), [], 0, False
    sounds, text = source.format == "speech", source.fields.get("text", "text")
    for place, raw in some_rows(opened.records, source, problems):
        count += 1
        row, answered = with_some_answer(raw, source) if asks(raw, source) else (raw, True)
        if sounds and isinstance(row, dict) and row.get(text) is None:
            row = {**row, text: ""}
        before = len(problems.found)
        row = check_row(row, place, source, problems)
        bad |= len(problems.found) > before
        if bad:  # go on only to count further errors of the same kind
            continue
        try:
            messages, audio = _sound(row, place) if sounds else (conversation_of(row, source.format, answered), None)
            origin = {} if MADE in source.ignore else _origin(row.get(MADE))
        except (ValueError, UserError) as error:
            problems.add(str(error) if isinstance(error, UserError) else f"{place}: {error}")
            continue
        mapped = {source.fields.get(name, name) for name in config.FORMATS[source.format].columns}
        said = _SAID_OF_SOUNDS if sounds else _SAID
        columns = {name: value for name, value in row.items() if name not in {*said, MADE, *mapped, *source.ignore}}
        if bad_column := next((name for name, value in columns.items() if not _is_json(value)), None):
            fix = f"set ignore: [{', '.join([*source.ignore, bad_column])}] to leave it out"
            problems.add(f"{place}: {bad_column} holds what JSON has no form for; {fix}", alike=f"{bad_column} is no JSON")
            continue
        out.append((messages, columns, audio, origin))
    problems.raise_if_any()
    if not count:
        raise no_rows(source, setting)
    return out


def _origin(made: Any) -> dict[str, Any]:
    """The writer, parents and notes of a row of an earlier train.jsonl, from its column `made`. ValueError if llmkd did not write that."""
    if made is None:
        return {}
    own = {name: value for name, value in made.items() if value is not None} if isinstance(made, dict) else {}
    notes = {name: value for name, value in own.items() if name not in _OF_ROWS}
    texts = [own.get("writer", ""), *(notes.get(name, "") for name in ("finish", "version", "original", "reference"))]
    whole = isinstance(own.get("id"), str) and all(isinstance(one, str) for one in texts) and ("version" in notes) == ("original" in notes)
    if not whole or not _is_json(own):
        raise ValueError(f"{MADE} is not what llmkd make writes there; set ignore: [{MADE}] to leave it out")
    return {"writer": own.get("writer"), "parents": (own["id"],), "notes": notes}


def _sound(row: dict, place: str) -> tuple[tuple[Message, ...], Sound]:
    """The messages and the sound of a row of format speech. Its transcript, if it has one, is the answer."""
    file = media_of(row["audio"], place)
    raw = file if isinstance(file, bytes) else read_bytes(file, place)
    asked = _says("user", hashlib.sha256(raw).hexdigest())
    sound = Sound(raw if isinstance(file, bytes) else str(file.resolve()), place, len(raw))
    return (asked, _says("assistant", row["text"])) if row["text"].strip() else (asked,), sound


def conversation_of(row: dict, row_format: str, answered: bool) -> tuple[Message, ...]:
    """The messages of a checked row, without an answer if it is only a placeholder. ValueError if nothing is asked."""
    if row.get("tools"):
        raise ValueError("it has tools, and stages of llmkd make write no calls; leave the row out")
    if row_format == "alpaca":
        asked = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        messages = [_says("user", asked), _says("assistant", row["output"])]
    elif row_format == "prompt_completion" and isinstance(row["prompt"], str):
        messages = [_says("user", row["prompt"]), _says("assistant", row["completion"])]
    elif row_format == "prompt_completion":
        messages = [*row["prompt"], *row["completion"]]
    else:
        messages = row["messages"]
    if row_format != "chat" and not answered:
        messages = messages[:-1]
    if row.get("system") and messages[0]["role"] not in ("system", "developer"):
        messages = [_says("system", row["system"]), *messages]
    messages = [{**one, "content": _text(one)} for one in messages]
    if not _is_json(messages):
        raise ValueError("its messages hold what JSON has no form for")
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked or asked[-1]["role"] != "user" or not asked[-1]["content"].strip():
        raise ValueError("nothing is asked: the last turn before the answer is not the user's, or is empty")
    if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
        messages = messages[:-1]
    return tuple(messages)


def _text(message: Message) -> str:
    if message["role"] == "tool" or message.get("tool_calls"):
        raise ValueError("it has calls of tools, and stages of llmkd make write none; leave the row out")
    return message["content"] or ""


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        return True
    except (TypeError, ValueError):  # a date, NaN, half of a surrogate pair
        return False


def _says(role: str, content: str) -> Message:
    return {"role": role, "content": content}
