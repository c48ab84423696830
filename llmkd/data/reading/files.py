"""Readers of one file: every row with its place. JSON, JSONL, CSV, Parquet and Arrow.

A reader yields (place, get): `get()` returns the row, or raises BadRow with the error. So a row that is only skipped (by a stream that
resumes) is not parsed, and a bad row does not hide the rows after it. In a damaged file the last `get` raises.
"""

import csv
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .class_names import Names, names_of_schema, with_names
from .json_shapes import head_of, not_a_list, over_lines
from .problems import BadRow

Records = Iterator[tuple[str, Callable[[], Any]]]


def _raise(message: str) -> Any:
    raise BadRow(message)


def kind_of(path: Path) -> str | None:
    """The ending that decides how a file is read, in lower case; None for an unknown one."""
    return path.suffix.lower() if path.suffix.lower() in KINDS else None


def records(file: BinaryIO, name: str, path: Path) -> Records:
    """The rows of an open file, with their places `name:line` (Parquet and Arrow: the row's number)."""
    return KINDS[path.suffix.lower()](file, name)


# ---- json


_CORRECT = "correct this row, or remove it"


def _once(pairs):
    out = dict(pairs)
    if len(out) < len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise ValueError(f"the key {twice!r} is given twice")
    return out


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


def _int(digits: str) -> int:
    if len(digits) > 4000:  # near Python's own limit, whose message addresses programmers
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant, parse_int=_int)
_LENIENT = json.JSONDecoder(parse_int=len)
_SPACE = re.compile(r"[ \t\r\n]*")
_MARK = b"\xef\xbb\xbf"


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {raw[error.start]:#04x}); save the file as UTF-8") from None


#: The first bytes of other kinds of files, the names of these kinds, and what to do.
_OTHERS = {
    b"version https://git-lfs": ("a pointer of Git LFS and not the data itself", "git lfs pull fetches that"),
    b"\x1f\x8b": ("compressed (gzip)", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("compressed (zstd)", "unpack it"),
    b"BZh": ("compressed (bzip2)", "unpack it"),
    b"\xfd7zXZ": ("compressed (xz)", "unpack it"),
    b"PK\x03\x04": ("a zip archive", "unpack it; of a spreadsheet, save the sheet as .csv (UTF-8, with commas)"),
    b"PAR1": ("parquet", "give it the ending .parquet"),
    b"ARROW1": ("Arrow", "give it the ending .arrow"),
    b"SQLite format 3": ("a database", "write its rows as .jsonl"),
    b"\x89HDF": ("HDF5", "write its rows as .jsonl"),
}
_PAGE = re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)


def _no_text(start: bytes) -> str | None:
    """The problem with a file that does not begin as UTF-8 text; None if it does."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "the file is UTF-16; save it as plain UTF-8"
    if start.startswith(_MARK):
        return "starts with a byte order mark; save the file as plain UTF-8"
    if wrong := _of_another_kind(start):
        return wrong
    return "the file has zero bytes, as UTF-16 has; save it as plain UTF-8" if b"\0" in start[:4] else None


def _of_another_kind(start: bytes) -> str | None:
    """The kind of a file that does not hold rows, and what to do, by its first bytes; None if these do not tell."""
    if found := next((about for begin, about in _OTHERS.items() if start.startswith(begin)), None):
        return f"the file is {found[0]}; {found[1]}"
    return "the file is a web page or XML; download the data itself" if _PAGE.match(start) else None


def _jsonl(file: BinaryIO, name: str) -> Records:
    head = head_of(file)
    if wrong := _no_text(head) or over_lines(head):
        yield f"{name}:1", functools.partial(_raise, wrong)
        return
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"{name}:{number}", functools.partial(_json_line, line)


def _json_line(line: bytes) -> Any:
    try:
        return _DECODER.decode(_text(line))
    except BadRow:
        raise
    except (ValueError, RecursionError) as error:
        fix = "remove the comma at its end" if line.rstrip().endswith(b",") else _CORRECT
        raise BadRow(f"not valid JSON ({getattr(error, 'msg', error)}); {fix}") from None


def _json(file: BinaryIO, name: str) -> Records:
    """The objects of one JSON list, each with the line it starts on."""
    raw = file.read()
    if wrong := _no_text(raw):
        yield f"{name}:1", functools.partial(_raise, wrong)
        return
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        yield f"{name}:{raw.count(10, 0, error.start) + 1}", functools.partial(_text, raw[error.start :])
        return
    for line, get in _json_values(text):
        yield f"{name}:{line}", get


def _json_values(text: str) -> Iterator[tuple[int, Callable[[], Any]]]:
    at, line = _SPACE.match(text).end(), 1
    line += text.count("\n", 0, at)
    if text[at : at + 1] != "[":
        yield line, functools.partial(_raise, not_a_list(text))
        return
    at += 1
    expect_value = False
    while True:
        start, at = at, _SPACE.match(text, at).end()
        line += text.count("\n", start, at)
        if text[at : at + 1] == "]" and not expect_value:
            rest = text[at + 1 :].strip()
            if rest:
                yield line, functools.partial(_raise, f"text after the end of the list ({rest[:20]!r}); remove it")
            return
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            yield error.lineno, functools.partial(_raise, f"not valid JSON ({error.msg}); {_CORRECT}")
            return
        except RecursionError:
            yield line, functools.partial(_raise, f"not valid JSON (nested too deeply); {_CORRECT}")
            return
        except ValueError as error:  # a NaN or a repeated key: the row is bad, but its end can be found
            yield line, functools.partial(_raise, f"not valid JSON ({error}); {_CORRECT}")
            try:
                _, end = _LENIENT.raw_decode(text, at)
            except (ValueError, RecursionError):
                return
        else:
            yield line, functools.partial(_same, value)
        line += text.count("\n", at, end)
        start, at = end, _SPACE.match(text, end).end()
        line += text.count("\n", start, at)
        expect_value = text[at : at + 1] == ","
        if expect_value:
            at += 1
        elif text[at : at + 1] != "]":
            yield line, functools.partial(_raise, "not valid JSON (expected ',' or ']' after an object); write it there")
            return


def _same(value: Any) -> Any:
    return value


# ---- csv


def _csv(file: BinaryIO, name: str) -> Records:
    """Comma-separated, with a header and as many fields in each row. A row's place is the line on which it starts."""
    head = head_of(file)
    if wrong := _no_text(head) or _separated_otherwise(head.partition(b"\n")[0]):
        yield f"{name}:1", functools.partial(_raise, wrong)
        return
    csv.field_size_limit(2**31 - 1)  # the default refuses long texts
    rows = csv.reader(map(_text, file), strict=True)
    header: list[str] = []
    for _ in itertools.count():
        start = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except BadRow as error:
            yield f"{name}:{rows.line_num + 1}", functools.partial(_raise, str(error))
            return
        except csv.Error as error:  # after an unclosed quotation the rest cannot be read reliably
            wrong = "a carriage return outside quotes; end lines by a line feed" if "new-line character" in str(error) else error
            yield f"{name}:{start}", functools.partial(_raise, f"not valid CSV ({wrong}); {_CORRECT}")
            return
        if not row:
            continue
        if any("\0" in value for value in row):
            yield f"{name}:{start}", functools.partial(_raise, "contains a NUL character; fix the file's encoding")
        elif header:
            yield f"{name}:{start}", functools.partial(_csv_row, header, row)
        else:
            header = row
            twice = next((column for column in header if header.count(column) > 1), None)
            if twice is not None or "" in header:
                wrong = "has a column without a name" if "" in header else f"has the column {twice!r} twice"
                yield f"{name}:{start}", functools.partial(_raise, f"the header {wrong}; give each column its own name")
                return


def _separated_otherwise(header: bytes) -> str | None:
    """The problem with a header whose columns are not separated by commas."""
    most = max(b";\t|", key=header.count)
    if header.count(most) <= header.count(b","):
        return None
    names = header.decode("utf-8", "replace").strip()[:80]
    return f"columns are separated by {chr(most)!r} here ({names}), expected commas (the delimiter of csv): save the file with commas"


def _csv_row(header: list[str], row: list[str]) -> dict[str, str]:
    if len(row) != len(header):
        raise BadRow(
            f"{len(row)} fields, expected {len(header)} ({', '.join(header)}); put quotes around a field with a comma or a line break"
        )
    return dict(zip(header, row, strict=True))


# ---- parquet and arrow


def _parquet(file: BinaryIO, name: str) -> Records:
    def batches():
        import pyarrow.parquet

        yield from pyarrow.parquet.ParquetFile(file, page_checksum_verification=True).iter_batches(1024)

    return _table(batches(), file, name, "parquet")


_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # without this check a stream that was cut between two batches would look complete


def _arrow(file: BinaryIO, name: str) -> Records:
    def batches():
        import pyarrow.ipc

        start = file.read(6)
        if start != b"ARROW1":
            end = file.seek(0, io.SEEK_END)
            file.seek(max(0, end - len(_STREAM_END)))
            if file.read() != _STREAM_END:
                raise ValueError("it stops before its end")
            file.seek(0)
            yield from pyarrow.ipc.open_stream(file)
            return
        file.seek(0)
        reader = pyarrow.ipc.open_file(file)
        for i in range(reader.num_record_batches):
            yield reader.get_batch(i)

    return _table(batches(), file, name, "Arrow")


def _table(batches: Iterator, file: BinaryIO, name: str, what: str) -> Records:
    """The rows of record batches. A batch is validated first, since reading a damaged one may go beyond its memory."""
    start, number = file.read(64), 0
    file.seek(0)
    if wrong := None if start.startswith((b"PAR1", b"ARROW1")) else _of_another_kind(start):
        yield f"{name}:1", functools.partial(_raise, wrong)
        return
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            batch.validate(full=True)
            rows = _Rows(batch)
        except Exception as error:  # pyarrow raises its own exceptions and Python's
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            yield (
                f"{name}:{number + 1}",
                functools.partial(_raise, f"not readable as {what} ({reason[:160]}); fetch or write the file again"),
            )
            return
        for i in range(batch.num_rows):
            number += 1
            yield f"{name}:{number}", functools.partial(rows.get, i)


class _Rows:
    """A record batch that is converted to Python objects when its first row is used."""

    def __init__(self, batch):
        names = batch.schema.names
        twice = next((column for column in names if names.count(column) > 1), None)
        if twice is not None:
            raise BadRow(f"the column {twice!r} occurs twice; give each its own name")
        self.batch, self.columns = batch, None
        self.names = names_of_schema(batch.schema)

    def get(self, i: int) -> dict:
        if self.columns is None:
            self.columns = {name: _values(column) for name, column in zip(self.batch.schema.names, self.batch.columns, strict=True)}
        for name, values in self.columns.items():
            if isinstance(values, str):
                raise BadRow(f"the column {name!r} is not readable ({values}); fix it, or write the file without it")
        return row_of({name: values[i] for name, values in self.columns.items()}, self.names)


def _values(column) -> list | str:
    """A column's values, or the error as text: text that is not UTF-8, a date out of range, an unknown time zone."""
    try:
        return column.to_pylist()
    except Exception as error:  # pyarrow raises its own exceptions and Python's
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def without_nulls(value: Any) -> Any:
    """The value without null fields. In columnar files every object has the fields of all objects; those it lacked are null."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def row_of(columns: dict, names: Names) -> dict:
    """A row of a columnar source with all its columns, also null ones, without null fields inside values, and with names of classes."""
    return with_names({name: without_nulls(value) for name, value in columns.items()}, names)


def raw(get: Callable[[], Any]) -> bytes:
    """Bytes that identify a row's content, if possible without parsing it."""
    if isinstance(get, functools.partial) and get.func in (_json_line, _csv_row):
        return get.args[0].strip() if get.func is _json_line else repr(get.args).encode()
    try:
        return json.dumps(get(), sort_keys=True, default=repr).encode()
    except BadRow as error:
        return repr(error).encode("utf-8", "backslashreplace")


KINDS: dict[str, Callable[[BinaryIO, str], Records]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
