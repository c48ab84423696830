"""Files that are written whole or not at all, locks between processes, hashes of files, and JSONL. No torch, nothing else of llmkd.

What is not finished stands under a temporary name, NAME.tmp-PID-RANDOM, beside its own. A process that is killed leaves it there;
`remove_leftovers` takes it away.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_LEFTOVER = re.compile(r".+\.tmp-\d+-[0-9a-f]{8}")


class FileLocked(Exception):
    """Another process holds the lock. Its text is what that process wrote into the file, which may be empty."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file. A kill or a power cut leaves the file that was there before, or the new one, never a part. Text is UTF-8."""
    part = _temporary(path)
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        _sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def write_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A new folder to fill. At the end of the `with` block, when all of it is on the disk, it is renamed to `path`.

    So `path` is never a part of it, and after an error in the block nothing has changed. With `replace` it takes the place of a folder
    of that name; without, OSError where there is one that is not empty.
    """
    part, old = _temporary(path), _temporary(path)
    try:
        part.mkdir(parents=True)
        yield part
        for below, _, files in os.walk(part):
            for name in (*files, ""):
                _sync(Path(below, name))
        if replace and os.path.lexists(path):
            os.rename(path, old)
        os.rename(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        raise
    _sync(path.parent)
    _remove(old)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left unfinished of the files and folders `name`, a glob pattern.

    Only for the process that holds the lock of these files: another one may be writing them.
    """
    for leftover in filter(is_leftover, folder.glob(f"{name}.tmp-*")):
        _remove(leftover)


def is_leftover(path: Path) -> bool:
    """Whether a name is one of those that unfinished files and folders have."""
    return bool(_LEFTOVER.fullmatch(path.name))


def lock_file(path: Path, wait: bool = False) -> IO[str]:
    """Open a file and hold its lock, until the file that is returned is closed or the process ends, however it ends.

    With `wait` it waits for the process that holds the lock. FileLocked if another one holds it; OSError where the file cannot be
    opened, or on a file system without locks.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 held by the caller
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        with file:
            file.seek(0)
            raise FileLocked(file.read().strip()) from None
    except BaseException:
        file.close()
        raise
    return file


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_jsonl(path: Path) -> list[dict]:
    """The records of a file with one JSON object a line. A last line that a kill cut short is left out, with all that follows it."""
    records = []
    for line in path.read_bytes().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _temporary(path: Path) -> Path:
    """Random, since two machines or containers that share a folder may give two processes one number."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _remove(path: Path) -> None:
    """A file, a folder with all in it, or a link, of which what it leads to stays. No error where it cannot be removed."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems cannot for a folder
            raise
    finally:
        os.close(descriptor)
