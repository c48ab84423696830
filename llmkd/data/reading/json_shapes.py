"""Messages about valid JSON that does not have the shape of a data file: what it is, and what to write instead. No row is read from it."""

import json
import re
from typing import Any

_SPACE = re.compile(r"\s*")
_HEAD = 1 << 22  # characters of a .jsonl file that are examined


def not_a_list(text: str) -> str:
    """The reason to refuse the text of a .json file, which does not begin with a list."""
    wanted = "expected a list of objects"
    if not text.strip():
        return f"the file is empty, {wanted}"
    value, rest = _first(text)
    if not isinstance(value, dict):
        return f"found {text.strip()[:10]!r}, {wanted}; a file with one object per line needs the ending .jsonl"
    if rest:
        line = "one object per line needs the ending .jsonl" if "\n" not in text.strip()[: -len(rest)].strip() else _BRACKETS
        return f"found several objects, {wanted}; {line}"
    return f"found an object, {wanted}; {_inside(value)}"


_BRACKETS = "put the objects between [ and ], with commas between them"


def over_lines(head: bytes) -> str | None:
    """The problem with a .jsonl file whose first value spans several lines; None if it does not."""
    text = head.decode("utf-8", "replace")
    start = text[: text.find("\n") if "\n" in text else len(text)].strip()
    if not start.startswith(("{", "[")) or _first(start)[0] is not None:
        return None
    value, rest = _first(text)
    if value is None and start not in ("{", "["):  # a bad line, or a value longer than the part that is examined
        return None
    if start.startswith("["):
        return "the file is one list over several lines; give it the ending .json"
    if rest or not isinstance(value, dict):
        return f"an object goes over several lines; write each on one line, or give the file the ending .json and {_BRACKETS}"
    return f"the file is one object over several lines; {_inside(value)}"


def head_of(file) -> bytes:
    """The beginning of an open file, whose position stays the same."""
    at = file.tell()
    head = file.read(_HEAD)
    file.seek(at)
    return head


def _first(text: str) -> tuple[Any, str]:
    """The first JSON value of a text, and the rest; None if it cannot be read."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, _SPACE.match(text).end())
    except (ValueError, RecursionError):
        return None, text
    return value, text[end:].strip()


def _inside(value: dict) -> str:
    """The message on where the rows are in an object, and how to get them out."""
    lists = {path: rows for path, rows in _lists(value) if rows}
    nested = next((path for path, rows in lists.items() if all(set(row) >= {"row", "row_idx"} for row in rows)), None)
    if nested:
        return f"the rows are in {nested}, each under 'row': write these as a list (jq '[.{nested}[].row]' FILE)"
    if len(lists) == 1:
        (path,) = lists
        return f"the rows are the list in {path}: write that list alone (jq .{path} FILE)"
    if lists:
        return f"its lists of rows are in {', '.join(lists)}: write each to a file of its own (jq .{next(iter(lists))} FILE)"
    if value and all(isinstance(one, list) and not any(isinstance(x, dict) for x in one) for one in value.values()):
        return "it holds columns: write one object for each row, with these keys"
    if value and all(isinstance(one, dict) for one in value.values()):
        return "its rows are under keys: write them as a list (jq '[.[]]' FILE)"
    return "it is one row: put it between [ and ], or on one line of a .jsonl file"


def _lists(value: dict, path: str = ""):
    """(path, list) of the lists of objects in an object and in its inner objects."""
    for key, inner in value.items():
        at = f"{path}.{key}" if path else key
        if isinstance(inner, list) and inner and all(isinstance(one, dict) for one in inner) and not _is_talk(inner):
            yield at, inner
        elif isinstance(inner, dict) and not path:
            yield from _lists(inner, at)


def _is_talk(rows: list[dict]) -> bool:
    """Whether the objects are messages of one conversation."""
    return all({"role", "content"} <= row.keys() or {"from", "value"} <= row.keys() for row in rows)
