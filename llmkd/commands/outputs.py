"""The files that a command's options ask for: checked before anything slow, then written; and its results as JSON."""

import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..console import first_process
from ..errors import UserError
from ..files import remove_leftovers, try_to_make_in, write_atomic

#: Paths of files that a process has open. Replacing one by a new file would lose what the process writes to the old one.
_OPEN_FILES = re.compile(r"/dev/(std(in|out|err)$|fd/)|/proc/")


def check_file(path: str, option: str) -> None:
    """UserError unless the path can be written, or is a pipe or a device. Creates nothing."""
    file = Path(path).expanduser()
    if path == "-":
        raise UserError(f"{option}: - is no file name; only --json writes to stdout")
    if not path.strip() or file.is_dir():
        raise UserError(f"{option}: {path or 'an empty name'} is {'a folder' if path.strip() else 'no file'}; name a file")
    if file.is_file() and _OPEN_FILES.match(str(file.absolute())):
        raise UserError(f"{option}: {path} is a file that is open already; name a file of its own")
    if is_stream(file):
        return
    parents = list(file.absolute().parents)
    there = next(n for n, folder in enumerate(parents) if folder.exists())
    try:
        if there:
            try_to_make_in(parents[there])
        elif not os.access(parents[0], os.W_OK | os.X_OK):
            raise PermissionError
    except OSError as error:
        raise UserError(f"{option}: {parents[there]} cannot be written to; name another file") from error


def is_stream(file: Path) -> bool:
    """Whether the path is a pipe or a device, such as /dev/null, or a shell's >(command)."""
    return os.path.exists(file) and not file.is_file() and not file.is_dir()


def write_file(path: str, content: str) -> None:
    """Write a file, and create its folder if need be. Of a link the target is written; a pipe or a device is written to."""
    file = Path(path).expanduser()
    if is_stream(file):
        file.write_text(content, encoding="utf-8")
        return
    file = file.resolve()
    file.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(file.parent, file.name)
    write_atomic(file, content)


@contextlib.contextmanager
def json_results(to: str | None) -> Iterator[Any]:
    """Yields a function that writes a command's results as JSON to the file `to`, or for - to stdout; all other output then goes to stderr.

    If a UserError with an attribute `results` ends the command, these results are written too.
    """
    if to not in (None, "-"):
        check_file(to, "--json")
    stdout = sys.stdout

    def write(results: Any) -> None:
        if to is None or not first_process():
            return
        text = json.dumps(plain(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        if to == "-":
            stdout.write(text)
        else:
            write_file(to, text)

    with contextlib.redirect_stdout(sys.stderr) if to == "-" else contextlib.nullcontext():
        try:
            yield write
        except UserError as error:
            if hasattr(error, "results"):
                write(error.results)
            raise


def plain(value: Any) -> Any:
    """A value as plain JSON types: dataclasses become objects, paths text, numpy's numbers Python's, and numbers that are not finite null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
