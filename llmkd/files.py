"""Files that are written whole or not at all, locks between processes, hashes of files, JSON and JSONL. No torch, nothing else of llmkd.

What is not finished stands under a temporary name, NAME.tmp-PID-RANDOM, beside its own, and is locked while it is written. A process
that is killed leaves it there; `remove_leftovers` takes it away.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

_NO_FILE = "it is a pipe or a device, not a file"
_LEFTOVER = re.compile(r".+\.tmp-\d+-[0-9a-f]{8}")


class Damaged(ValueError):
    """The content of a file is not what was written. The text says what was found, such as "it is empty"."""


class NotAFile(OSError):
    """A pipe or a device has the name of a file."""


class FileLocked(Exception):
    """Another process holds the lock. Its text is what that process wrote into the file, which may be empty."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file. A kill or a power cut leaves the file that was there before, or the new one, never a part. Text is UTF-8.

    NotAFile where a pipe or a device has its name: a new file in its place would take that away from everybody.
    """
    if os.path.lexists(path) and not (path.is_symlink() or path.is_file() or path.is_dir()):
        raise NotAFile(errno.EINVAL, _NO_FILE, str(path))
    part, file = _new_file(path)
    try:
        with _named(path), file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            sync(part)
            os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextlib.contextmanager
def write_folder(path: Path, replace: bool = False) -> Iterator[Path]:
    """A new folder to fill. At the end of the `with` block, when all of it is on the disk, it is renamed to `path`.

    So `path` is never a part of it, and after an error in the block nothing has changed. With `replace` it takes the place of a folder
    of that name; without, OSError where there is one that is not empty. The folder around it is not made.
    """
    old, (part, held) = _temporary(path), _new_folder(path)
    try:
        yield part
        for below, _, files in os.walk(part):
            for name in (*files, ""):
                sync(Path(below, name))
        if replace and os.path.lexists(path):
            os.rename(path, old)
        os.rename(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if os.path.lexists(old) and not os.path.lexists(path):
            os.rename(old, path)
        raise
    finally:
        os.close(held)
    sync(path.parent)
    remove(old)


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[Path]:
    """A folder among the system's temporary files for the `with` block. Those of killed processes are removed."""
    place = Path(tempfile.gettempdir(), f"llmkd-{name}")
    remove_leftovers(place.parent, place.name)
    folder, held = _new_folder(place, 0o700)
    try:
        yield folder
    finally:
        os.close(held)
        remove(folder)


def try_to_make_in(folder: Path) -> None:
    """OSError if nothing can be made in a folder: access rights do not tell (/proc, a read-only mount). Nothing stays.

    Under a name of its own, so that no other process takes what is tried for the real thing.
    """
    remove_leftovers(folder, "llmkd")
    tried = _temporary(folder / "llmkd")
    tried.mkdir()
    with contextlib.suppress(FileNotFoundError):  # another process took it for a leftover
        tried.rmdir()


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left unfinished of the files and folders `name`, a glob pattern.

    What another process is writing at that moment is left alone, by its lock; where nothing can be locked, this is only for the process
    that has the folder to itself.
    """
    for leftover in filter(is_leftover, folder.glob(f"{name}.tmp-*")):
        with _free(leftover) as free:
            if free:
                remove(leftover)


def is_leftover(path: Path) -> bool:
    """Whether a name is one of those that unfinished files and folders have."""
    return bool(_LEFTOVER.fullmatch(path.name))


def remove(path: Path) -> None:
    """A file, a folder with all in it, or a link, of which what it leads to stays. No error where it cannot be removed."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def lock_file(path: Path, wait: bool = False) -> IO[str]:
    """Open a file and hold its lock, until the file that is returned is closed or the process ends, however it ends.

    With `wait` it waits for the process that holds the lock. FileLocked if another one holds it; OSError where the file cannot be
    opened, or on a file system without locks.
    """
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 held by the caller
    except io.UnsupportedOperation:
        raise NotAFile(errno.EINVAL, _NO_FILE, str(path)) from None
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


def open_file(path: Path | str) -> IO[bytes]:
    """Open a file to read its bytes. NotAFile for a pipe or a device, of which a reader may find no end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115 closed by the caller
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise NotAFile(errno.EINVAL, _NO_FILE, str(path))
    return file


def read_file(path: Path | str) -> bytes:
    """The content of a file; see `open_file`."""
    with open_file(path) as file:
        return file.read()


def sha256_file(path: Path | str) -> str:
    """The SHA-256 of a file's content, in hex."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sealed(path: Path, content: dict) -> None:
    """Write a JSON file with a checksum of its content in it, see `read_sealed`."""
    write_atomic(path, json.dumps(content | {"checksum": checksum(content)}, indent=1))


def read_sealed(path: Path) -> dict:
    """The object of a JSON file, without its checksum. Files of earlier versions have none.

    Damaged if it does not match its checksum or is no JSON object; OSError where the file cannot be opened.
    """
    found = read_object(path)
    last = next(reversed(found), "")
    if "checksum" not in found and found.get(last) == checksum({key: value for key, value in found.items() if key != last}):
        raise Damaged(f"its last key is {last!r}, and should be 'checksum'")
    if "checksum" in found and found.pop("checksum") != checksum(found):
        raise Damaged('it does not match its checksum; after a change of your own delete the "checksum" in it')
    return found


def checksum(content: dict) -> str:
    """The SHA-256 of what JSON keeps of an object, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()


def read_object(path: Path) -> dict:
    """The object of a JSON file. Damaged if it holds anything else; OSError where it cannot be opened."""
    return _object(read_file(path))


def _object(content: bytes) -> dict:
    if not content.strip():
        raise Damaged("it is empty")
    try:
        found = json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Damaged(f"its byte {error.start} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Damaged(f"it holds a {type(found).__name__}, expected an object")
    return found


def append(path: Path, content: str, sync: bool = True) -> None:
    """Add to a file that is there; with `sync` wait until all of it is on the disk. OSError if the file is gone."""
    with _named(path), open(path, "rb+") as file:
        file.seek(0, os.SEEK_END)
        file.write(content.encode())
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_jsonl(path: Path, damaged: Callable[[int, str], None] = lambda line, what: None) -> list[dict]:
    """The records of a file with one JSON object a line.

    What is no object is left out, and `damaged` is called with the line's number and what was found; not for a last line that a kill cut
    short. Of a line that has become one with the next the whole objects at its beginning and end are kept.
    """
    records, lines = [], read_file(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            records.append(_object(line))
        except Damaged as error:
            if number < len(lines):
                damaged(number, str(error))
                records += _ends(line.decode("utf-8", "replace"))
    return records


def _ends(line: str) -> Iterator[dict]:
    """The object that a line begins with, and the longest one that it ends with."""
    with contextlib.suppress(ValueError, RecursionError):
        first, _ = json.JSONDecoder().raw_decode(line)
        if isinstance(first, dict):
            yield first
    starts = [found.start() for found in re.finditer('{"', line)]
    for start in starts[:100]:
        with contextlib.suppress(ValueError, RecursionError):
            yield json.loads(line[start:])
            return


def _new_file(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file under a temporary name of `path`, open and locked until it is closed."""
    while True:
        part = _temporary(path)
        file = open(part, "xb")  # noqa: SIM115 held by the caller
        if _hold(part, file.fileno()):
            return part, file
        file.close()


def _new_folder(path: Path, mode: int = 0o777) -> tuple[Path, int]:
    """A new folder under a temporary name of `path`, and its descriptor, which is locked until it is closed."""
    while True:
        part = _temporary(path)
        part.mkdir(mode=mode)
        with contextlib.suppress(FileNotFoundError):
            held = os.open(part, os.O_RDONLY)
            if _hold(part, held):
                return part, held
            os.close(held)


def _hold(part: Path, descriptor: int) -> bool:
    """Lock what is being written, until it is closed, so that others see that somebody does. False if it was taken for a leftover before."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for one that is just removing it
    return os.path.lexists(part)


@contextlib.contextmanager
def _free(path: Path) -> Iterator[bool]:
    """Whether no process writes to a file or folder; in the `with` block none can begin to."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # a link, or gone
        yield True
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            free = not isinstance(error, BlockingIOError)
        else:
            free = True
        yield free
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """An OSError in the block, such as that of a full disk, says the file's name: writing to an open file does not."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def _temporary(path: Path) -> Path:
    """Random, since two machines or containers that share a folder may give two processes one number."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems cannot for a folder
            raise
    finally:
        os.close(descriptor)
