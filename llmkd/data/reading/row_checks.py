"""Checks of a row against its format: columns that are missing, null, or of the wrong type are errors with the row's place.

Nothing is repaired, since a repair would be silent. Columns and roles are renamed by the recipe's `fields` and `roles`.
"""

import difflib
from typing import Any

from ...config.data import FORMATS, ROLES, Source
from ...errors import UserError
from .column_hints import column_hint

SHOWN = 20


class ErrorCollector:
    """Collects errors, one line each, and raises them as one UserError that shows the first twenty."""

    def __init__(self):
        self.found: list[str] = []
        self._alike: dict[str, int] = {}

    def add(self, problem: str, alike: str = "") -> None:
        """Add an error as one line: characters that do not print are escaped, and the rest after 600 characters is cut off.

        Of the errors with the same `alike`, which every row of a file may have, the first is shown and the others are counted.
        """
        if alike:
            self._alike[alike] = self._alike.get(alike, 0) + 1
            if self._alike[alike] > 1:
                return
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in problem)
        self.found.append(line if len(line) <= 600 else f"{line[:600]} ...")

    def raise_if_any(self) -> None:
        if self.found:
            more = [f"... and {len(self.found) - SHOWN} more problems like these"] if len(self.found) > SHOWN else []
            more += [f"... and {count - 1} more rows: {alike}" for alike, count in self._alike.items() if count > 1]
            raise UserError(*self.found[:SHOWN], *more)


def check_row(row: Any, place: str, source: Source, problems: ErrorCollector, choices: bool = False) -> Any:
    """The row with the format's own names for its columns. Its errors are added to `problems`."""
    try:
        return _checked(row, place, source, problems, choices)
    except RecursionError:
        problems.add(f"{place}: nested too deeply; give it fewer levels")
        return row


def _checked(row: Any, place: str, source: Source, problems: ErrorCollector, choices: bool) -> Any:
    if not isinstance(row, dict):
        problems.add(f"{place}: found {kind(row)}, expected an object with the columns of format {source.format}")
        return row
    row_format = FORMATS[source.format]
    columns = {name: column for name, column in row_format.columns.items() if not (choices and name == row_format.answer)}
    claimed = {name for column, name in source.fields.items() if column not in ("role", "content", name)}
    absent = {c for c in columns if columns[c].optional and c in claimed and c not in source.fields}  # another column has its name
    theirs = {column: source.fields.get(column, column) for column in columns if column not in absent}
    found = {c: value for c, value in row.items() if c not in absent} | {
        c: row[name] for c, name in source.fields.items() if c in ("choices", "answer") and name in row
    }
    for column, name in theirs.items():
        if name not in row:
            _missing(columns[column].optional and column == name, column, row, theirs, source, place, problems)
            continue
        value, value_kind = row[name], columns[column].kind
        if value_kind == "messages" or (value_kind == "text or messages" and isinstance(value, list)):
            value = _messages(value, name, source, place, problems)
        elif value_kind == "tools":
            value = _tools(value, name, place, problems)
        elif column == "teacher_context" and value is None:  # a null field is an absent one: parquet has them in every row
            continue
        elif not isinstance(value, str):
            fix = ', use "" for an empty one' if value is None else ""
            problems.add(f"{place}: {name} is {kind(value)}, expected text{fix}")
        else:
            _check_text(value, f"{place}: {name}", problems)
        found[column] = value
    mixed = [c for c in theirs if columns[c].kind == "text or messages" and c in found]
    if len({isinstance(found[c], list) for c in mixed}) > 1:
        problems.add(f"{place}: {' and '.join(mixed)} are of two kinds; give both as text or both as lists of messages")
    if choices:
        _check_choices(found, source, place, problems)
    return found


def _missing(optional: bool, column: str, row: dict, theirs: dict, source: Source, place: str, problems: ErrorCollector) -> None:
    name = theirs[column]
    if optional:  # but a name that was given in the recipe must be there
        near = difflib.get_close_matches(name, row.keys() - set(theirs.values()), 1, 0.8)
        if near:
            problems.add(f"{place}: no column {name!r}; did you mean {near[0]!r}?")
        return
    file = place.rpartition(":")[0]
    hint = column_hint(column, row, theirs, source, csv=file.endswith(".csv"))
    wrong_shape = not any(c in row for c in theirs.values())  # then every row of the file is likely to be so
    problems.add(f"{place}: no column {name!r}{hint}", alike=f"no column {name!r} in {file}" if wrong_shape else "")


def _messages(messages: Any, name: str, source: Source, place: str, problems: ErrorCollector) -> Any:
    """The conversation with our own names for roles and fields. A null field of a message is absent: parquet adds such fields to every message."""
    if not isinstance(messages, list) or not messages:
        problems.add(f"{place}: {name} is {kind(messages) if messages != [] else 'empty'}, expected a list of {{role, content}}")
        return messages
    role_name, content_name = (source.fields.get(c, c) for c in ("role", "content"))
    roles = {source.roles.get(role, role): role for role in ROLES}
    out = []
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
        rest = {k: v for k, v in message.items() if k not in (role_name, content_name, "role", "content") and v is not None}
        bad = _surrogate(rest)
        if bad is not None:
            problems.add(f"{where} contains half of a surrogate pair, which is not a character; fix the file's encoding")
        _check_text(content or "", f"{where}.{content_name}", problems)
        out.append({"role": roles[role], "content": content or "", **rest})
    return out


def _tools(tools: Any, name: str, place: str, problems: ErrorCollector) -> Any:
    """The functions that a conversation may call: a list of objects, or null."""
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        problems.add(f"{place}: {name} is {kind(tools)}, expected a list of objects")
    elif _surrogate(tools) is not None:
        problems.add(f"{place}: {name} contains half of a surrogate pair, which is not a character; fix the file's encoding")
    return tools or None


def _check_choices(row: dict, source: Source, place: str, problems: ErrorCollector) -> None:
    options, answer = row.get("choices"), row.get("answer")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(c, str) and c for c in options):
        problems.add(f"{place}: choices is {kind(options)}, expected a list of at least two texts")
    elif any(_surrogate(option) is not None for option in options):
        problems.add(f"{place}: choices contains half of a surrogate pair, which is not a character; fix the file's encoding")
    elif type(answer) is not int or not 0 <= answer < len(options):
        problems.add(f"{place}: answer is {answer!r}, expected an index from 0 to {len(options) - 1}")


def _check_text(text: str, where: str, problems: ErrorCollector) -> None:
    if _surrogate(text) is not None:
        problems.add(f"{where} contains half of a surrogate pair, which is not a character; fix the file's encoding")


def _surrogate(value: Any) -> str | None:
    """The first text in `value`, at any depth, that cannot be encoded as UTF-8."""
    if isinstance(value, dict | list):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return next((bad for bad in map(_surrogate, inner) if bad is not None), None)
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        return value
    return None


def kind(value: Any) -> str:
    """The type of a value, in the words of JSON rather than Python."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
