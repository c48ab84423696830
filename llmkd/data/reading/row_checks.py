"""Checks of a row against its format: columns that are missing, null, or of the wrong type are errors with the row's place.

Nothing is repaired, since a repair would be silent. Columns and roles are renamed by the recipe's `fields` and `roles`.
"""

import difflib
import functools
from collections import Counter
from collections.abc import Collection
from typing import Any

from ...config.data import Source
from ...config.formats import FILES, FORMATS
from .calls import read_tools
from .class_names import ClassName
from .column_hints import column_hint, row_hint
from .conversations import read_messages, read_system
from .meanings import is_about
from .problems import ErrorCollector
from .token_columns import HOW_MASKED, read_tokens
from .turn_marks import HOW_MARKED, ignoring, row_mark
from .unread import count_unread
from .values import TOO_DEEP, check_text, kind, opened, surrogate, too_deep


def check_row(
    row: Any,
    place: str,
    source: Source,
    problems: ErrorCollector,
    choices: bool = False,
    unread: Counter | None = None,
    views: Collection[str] = (),
) -> Any:
    """The row with the format's own names for its columns, and `train: False` if it is marked as not trained on.

    Its errors are added to `problems`, the columns that are not read to `unread`. `views`: columns that teachers read in place of the student's.
    """
    try:
        checked = row if too_deep(row) else _checked(row, place, source, problems, choices, Counter() if unread is None else unread, views)
        deep = too_deep(checked)  # including what was JSON text in the row
    except RecursionError:
        checked, deep = row, True
    if deep:
        problems.add(f"{place}: {TOO_DEEP}")
    return checked


def _checked(row: Any, place: str, source: Source, problems: ErrorCollector, choices: bool, unread: Counter, views: Collection[str]) -> Any:
    if not isinstance(row, dict):
        hint = row_hint(row, source, check_row) if problems.hints else ""
        problems.add(
            f"{place}: found {kind(row)}, expected an object with the columns of format {source.format}{hint}", alike=f"{kind(row)}"
        )
        return row
    row_format = FORMATS[source.format]
    columns = {name: column for name, column in row_format.columns_for(views).items() if not (choices and name == row_format.answer)}
    claimed = {name for column, name in source.fields.items() if column not in ("role", "content", "train", name)}
    absent = {c for c in columns if columns[c].optional and c not in source.fields and (c in claimed or c in source.ignore)}
    theirs = {column: source.fields.get(column, column) for column in columns if column not in absent}
    row = opened(row, theirs.values())
    asked = {c: source.fields.get(c, c) for c in ("choices", "answer")} if choices else {}
    read = {*theirs.values(), *asked.values()}
    lacking = [c for c, name in theirs.items() if name not in row and not (columns[c].optional and c == name)]
    if lacking and _missing(lacking, row, theirs, source, place, problems, choices):
        return row  # further problems would follow from this one
    how = HOW_MASKED if row_format.supervised == "marked" else HOW_MARKED
    trained, marks = row_mark(row, read, source, place, problems, how)
    lost = count_unread(row, read | marks | source.where.keys(), source, place, problems, unread)
    hidden = absent | (marks | set(source.ignore)) - read
    found = {c: value for c, value in row.items() if c not in hidden} | {c: row[name] for c, name in asked.items() if name in row}
    for column, name in theirs.items():
        if name not in row:
            if column not in lacking:
                _slip(name, row, {*theirs.values(), *lost}, source, place, problems, columns[column].kind == "numbers")
            continue
        value, value_kind = row[name], columns[column].kind
        if value is None and columns[column].optional:  # a null field is an absent one: parquet has them in every row
            found.pop(column, None)
            continue
        if value_kind == "messages" or (value_kind == "text or messages" and isinstance(value, list)):
            value = read_messages(row, name, source, place, problems, unread, check_row)
        elif column == "system" and isinstance(value, dict | list):
            value = read_system(value, name, place, problems, unread)
        elif value_kind == "tools":
            value = read_tools(value, name, place, problems)
        elif value_kind == "label":
            check_label(value, f"{place}: {name}", problems)
        elif value_kind not in ("numbers", *FILES):  # numbers are checked together below, and files when they are decoded
            check_is_text(value, f"{place}: {name}", problems)
        found[column] = value
    if row_format.supervised == "marked":
        found |= read_tokens(found, theirs, place, problems)
    if isinstance(found.get("prompt"), list) and isinstance(found.get("completion"), str):  # the answer to a conversation
        found["completion"] = [{"role": "assistant", "content": found["completion"]}]
    mixed = [c for c in theirs if columns[c].kind == "text or messages" and c in found]
    if len({isinstance(found[c], list) for c in mixed}) > 1:
        problems.add(f"{place}: {' and '.join(mixed)} are of two kinds; give both as text, or the prompt as a list of messages")
    if unnamed := {c: name for c, name in asked.items() if name not in row}:
        columns = f"column{'s' * (len(unnamed) > 1)} {' and '.join(map(repr, unnamed.values()))}"
        fix = f"set fields: {{{', '.join(f'{c}: NAME' for c in unnamed)}}} if the file has other names"
        problems.add(f"{place}: no {columns}; found {', '.join(map(repr, row))}; {fix}", alike=f"no {columns}")
    elif choices:
        _check_choices(found, source, place, problems)
    _check_system(found, theirs, source, place, problems)
    if trained is False:
        found["train"] = False
        if choices:
            problems.add(
                f"{place}: the question is marked as not trained on, and questions are only scored; set {ignoring(source, *sorted(marks))}"
            )
    return found


def check_is_text(value: Any, where: str, problems: ErrorCollector) -> None:
    if isinstance(value, str):
        return check_text(value, where, problems)
    fix = ', use "" for an empty one' if value is None else ""
    if type(value) in (int, float):
        fix = f'; put it in quotes: "{value}"'
    problems.add(f"{where} is {kind(value)}, expected text{fix}")


def check_label(value: Any, where: str, problems: ErrorCollector) -> None:
    """Adds a problem if a class is neither text nor a whole number."""
    if isinstance(value, str) and value.strip():
        return check_text(value, where, problems)
    if type(value) is not int:
        found = "empty" if isinstance(value, str) else kind(value)
        problems.add(f"{where} is {found}, expected the name of a class or its number; label the row, or leave it out (where)")


def _check_system(row: dict, theirs: dict[str, str], source: Source, place: str, problems: ErrorCollector) -> None:
    """Adds problems if a row has a system message or tools without a conversation, or a second, different system message."""
    system, first = row.get("system"), next((row[c] for c in ("messages", "prompt") if isinstance(row.get(c), list)), None)
    said = {"system": isinstance(system, str) and system.strip() and "a system message", "tools": row.get("tools") and "a list of tools"}
    for column, what in said.items() if first is None and not source.chat_template else ():
        if (name := theirs.get(column)) and what:
            problems.add(
                f"{place}: {name} is {what}, for which a prompt without a chat template has no place; set chat_template: true, "
                f"or {ignoring(source, name)} to train without it",
                alike=f"{name} is {what}",
            )
    if (
        (name := theirs.get("system"))
        and said["system"]
        and first
        and isinstance(first[0], dict)
        and first[0].get("role") in ("system", "developer")
        and first[0].get("content") != system
    ):
        problems.add(f"{place}: {name} and the first message are two system messages; keep one, or set {ignoring(source, name)}")


def _missing(
    lacking: list[str], row: dict, theirs: dict, source: Source, place: str, problems: ErrorCollector, choices: bool = False
) -> bool:
    """Adds one problem with the columns that the row lacks, and the settings that read it. True if the whole row has another shape."""
    named = f"column{'s' * (len(lacking) > 1)} {' and '.join(repr(theirs[column]) for column in lacking)}"
    file = place.rpartition(":")[0]
    csv, alike = file.endswith(".csv"), f"no {named} in {file}"
    if problems.has(alike):
        problems.add("", alike)
        return True
    hint, known = column_hint(lacking, row, theirs, source, check_row, csv, choices) if problems.hints else ("", False)
    other_shape = known or not any(name in row for name in theirs.values())
    every_row = not file.endswith((".json", ".jsonl"))  # in other kinds of files all rows have the same columns
    problems.add(f"{place}: no {named}{hint}", alike=alike if other_shape or every_row else "")
    return other_shape


def _slip(name: str, row: dict, known: set[str], source: Source, place: str, problems: ErrorCollector, numbers: bool) -> None:
    """Adds a problem if an optional column is missing and another one has nearly its name. `numbers`: the column is a list of numbers."""
    others = {other for other in row.keys() - {*known, *source.ignore, *source.where} if not is_about(other)}
    near = _near(name, frozenset(other for other in others if not numbers or isinstance(row[other], list)))
    if near:
        problems.add(f"{place}: no column {name!r}; did you mean {near!r}?")


@functools.lru_cache(1024)  # every row of a file has the same columns
def _near(name: str, columns: frozenset[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, sorted(columns), 1, 0.8)), None)


def _check_choices(row: dict, source: Source, place: str, problems: ErrorCollector) -> None:
    options, answer = row.get("choices"), row.get("answer")
    if isinstance(answer, ClassName):  # A to D in MMLU
        answer = row["answer"] = answer.number
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(c, str) and c for c in options):
        problems.add(f"{place}: choices is {kind(options)}, expected a list of at least two texts")
    elif any(surrogate(option) is not None for option in options):
        problems.add(f"{place}: choices contains half of a surrogate pair, which is not a character; fix the file's encoding")
    elif type(answer) is not int or not 0 <= answer < len(options):
        problems.add(f"{place}: answer is {answer!r}, expected an index from 0 to {len(options) - 1}")
