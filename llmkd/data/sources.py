"""Where examples come from: every row with its place, read strictly. No torch here.

A row that is malformed, or lacks a column, or holds the wrong type or null in one, is refused with its file and
line; the first twenty are shown together. Nothing is repaired, since a repair would be silent.
"""

import difflib
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..recipe import Source
from . import skills

SHOWN = 20
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Rows:
    """The rows of one source, where each stands (`file:line`), and a hash of what was read."""

    rows: list[dict]
    places: list[str]
    content: str


class Problems:
    """Collects what is wrong; raises all of it together, the first twenty in words."""

    def __init__(self):
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        self.found.append(problem)

    def raise_if_any(self) -> None:
        if self.found:
            more = [f"... and {len(self.found) - SHOWN} more problems like these"] if len(self.found) > SHOWN else []
            raise UserError(*self.found[:SHOWN], *more)


def read_source(source: Source, setting: str, choices: bool = False) -> Rows:
    """All rows of a source, checked for its format (and for multiple choice). UserError names every bad one."""
    problems = Problems()
    if source.path == "builtin:skills":
        found = [
            (f"builtin:skills[{source.split}]:{i + 1}", row) for i, row in enumerate(skills.rows(source.split, source.name or "questions"))
        ]
        content = f"skills {skills.VERSION} {source.split} {source.name}"
    elif Path(source.path).suffix in (".json", ".jsonl"):
        raw = _bytes(source.path, setting)
        reader = _jsonl if source.path.endswith(".jsonl") else _json_array
        found = reader(_text(raw, source.path), source.path, problems)
        content = hashlib.sha256(raw).hexdigest()
    else:
        found, content = _hub(source, setting)
    rows, places = [], []
    for place, row in itertools.islice(found, source.limit):
        check_row(row, place, source.format, problems, choices)
        rows.append(row)
        places.append(place)
    problems.raise_if_any()
    if not rows:
        raise UserError(f"{setting}.path: {source.path} has no rows; name a file with at least one example")
    return Rows(rows, places, f"{content} limit={source.limit}")


def check_row(row, place: str, format: str, problems: Problems, choices: bool = False) -> None:
    """Add to `problems` what is wrong with a row."""
    if not isinstance(row, dict):
        problems.add(f"{place}: found {_kind(row)}, expected an object with the columns of format {format}")
        return
    columns = {"alpaca": ("instruction", "input", "output"), "chat": ("messages",), "text": ("text",)}[format]
    for column in columns:
        if choices and column == "output":
            continue
        if column == "input" and column not in row:
            near = difflib.get_close_matches(column, row.keys() - set(columns), 1, 0.8)
            if near:
                problems.add(f"{place}: no column 'input'; did you mean {near[0]!r}?")
            continue
        if column not in row:
            near = difflib.get_close_matches(column, row, 1, 0.6)
            problems.add(
                f"{place}: no column {column!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; found {', '.join(map(repr, row)) or 'none'}")
            )
        elif column == "messages":
            _check_messages(row[column], place, problems)
        elif not isinstance(row[column], str):
            mend = ', use "" for an empty one' if row[column] is None else ""
            problems.add(f"{place}: {column} is {_kind(row[column])}, expected text{mend}")
        else:
            _check_text(row[column], f"{place}: {column}", problems)
    if choices:
        options, answer = row.get("choices"), row.get("answer")
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(c, str) and c for c in options):
            problems.add(f"{place}: choices is {_kind(options)}, expected a list of at least two texts")
        elif any(_has_surrogate(option) for option in options):
            problems.add(f"{place}: choices holds half of a surrogate pair, which is no character; mend the file's encoding")
        elif type(answer) is not int or not 0 <= answer < len(options):
            problems.add(f"{place}: answer is {answer!r}, expected an index from 0 to {len(options) - 1}")


def _check_messages(messages, place: str, problems: Problems) -> None:
    if not isinstance(messages, list) or not messages:
        problems.add(f"{place}: messages is {_kind(messages) if messages != [] else 'empty'}, expected a list of {{role, content}}")
        return
    for i, message in enumerate(messages):
        where = f"{place}: messages[{i}]"
        if not isinstance(message, dict):
            problems.add(f"{where} is {_kind(message)}, expected {{role, content}}")
        elif message.get("role") not in ROLES:
            problems.add(f"{where}.role is {message.get('role')!r}, expected one of {', '.join(ROLES)}")
        elif not isinstance(message.get("content"), str):
            problems.add(f"{where}.content is {_kind(message.get('content'))}, expected text")
        else:
            _check_text(message["content"], f"{where}.content", problems)


def _check_text(text: str, where: str, problems: Problems) -> None:
    if _has_surrogate(text):
        problems.add(f"{where} holds half of a surrogate pair, which is no character; mend the file's encoding")


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _kind(value) -> str:
    return "null" if value is None else {dict: "an object", list: "a list", str: "text", bool: "true or false"}.get(type(value), "a number")


def _bytes(name: str, setting: str) -> bytes:
    try:
        path = Path(name).expanduser()
        return path.read_bytes()
    except (RuntimeError, ValueError) as error:  # a home that does not exist, a NUL
        raise UserError(f"{setting}.path: {name!r} is no path ({error}); name a file") from None
    except OSError as error:
        others = [p.name for p in path.parent.glob("*.json*") if p.name != path.name] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, others, 1, 0.6)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{setting}.path: {name}: {error.strerror}{hint}") from None


def _text(raw: bytes, path: str) -> str:
    if raw.startswith(b"\xef\xbb\xbf"):
        raise UserError(f"{path}:1: starts with a byte order mark; save the file as plain UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {raw[error.start]:#04x}); save the file as UTF-8") from None


def _once(pairs):
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"the key {twice!r} is given twice")
    return out


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
_LENIENT = json.JSONDecoder()


def _jsonl(text: str, name: str, problems: Problems) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            yield place, _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            problems.add(f"{place}: not valid JSON ({getattr(error, 'msg', error)})")


_SPACE = re.compile(r"[ \t\r\n]*")


def _json_array(text: str, name: str, problems: Problems) -> Iterator[tuple[str, object]]:
    """The objects of one JSON list, each with the line it starts on."""
    at, line = _SPACE.match(text).end(), 1
    line += text.count("\n", 0, at)
    if text[at : at + 1] != "[":
        problems.add(
            f"{name}:{line}: found {text[at : at + 10]!r}, expected a list of objects; one object per line wants the ending .jsonl"
        )
        return
    at += 1
    expect_value = False
    while True:
        start, at = at, _SPACE.match(text, at).end()
        line += text.count("\n", start, at)
        if text[at : at + 1] == "]" and not expect_value:
            rest = text[at + 1 :].strip()
            if rest:
                problems.add(f"{name}:{line}: text after the end of the list ({rest[:20]!r})")
            return
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            problems.add(f"{name}:{error.lineno}: not valid JSON ({error.msg})")
            return
        except RecursionError:
            problems.add(f"{name}:{line}: not valid JSON (nested too deeply)")
            return
        except ValueError as error:  # a NaN or a key given twice: the row is bad, and where it ends is known
            problems.add(f"{name}:{line}: not valid JSON ({error})")
            _, end = _LENIENT.raw_decode(text, at)
        else:
            yield f"{name}:{line}", value
        line += text.count("\n", at, end)
        start, at = end, _SPACE.match(text, end).end()
        line += text.count("\n", start, at)
        expect_value = text[at : at + 1] == ","
        if expect_value:
            at += 1
        elif text[at : at + 1] != "]":
            problems.add(f"{name}:{line}: not valid JSON (expected ',' or ']' after an object)")
            return


def _hub(source: Source, setting: str) -> tuple[list[tuple[str, dict]], str]:
    path = Path(source.path)
    if source.path.startswith((".", "/", "~")) or len(path.parts) > 2 or path.exists():
        raise UserError(f"{setting}.path: {source.path} is not a .json or .jsonl file" + ("" if path.exists() else ", and does not exist"))
    from datasets import load_dataset

    try:
        data = load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"{setting}.path: {source.path} is no file here and could not be had from the hub ({type(error).__name__}: {reason[:160]})"
        ) from None
    return [
        (f"{source.path}[{source.split}]:{i + 1}", row) for i, row in enumerate(data)
    ], f"{source.path} {source.name} {source.split} {data._fingerprint}"
