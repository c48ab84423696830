"""Files that are written whole or not at all, locks between processes, hashes of files, JSON and JSONL. No torch, nothing else of llmkd.

A file or folder is written under a temporary name, NAME.tmp-PID-RANDOM, in the same folder, locked meanwhile, and renamed when it is
complete. A process that is killed leaves the temporary one behind; `remove_leftovers` deletes it.
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
    """The path is a pipe or a device."""


class FileLocked(Exception):
    """Another process holds the lock. Its text is what that process wrote into the file, which may be empty."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8. After a kill or a power cut the old file is there or the new one, never a part of it.

    NotAFile for a pipe or a device: renaming a new file to its path would remove it.
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
    """A new folder to fill in the `with` block, synced to disk and renamed to `path` at its end.

    So `path` is never incomplete, and an error in the block changes nothing. With `replace` an existing folder is replaced; without it,
    OSError if there is one that is not empty. The parent folder must exist.
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
    """A temporary folder for the `with` block. Those that killed processes left behind are removed."""
    place = Path(tempfile.gettempdir(), f"llmkd-{name}")
    remove_leftovers(place.parent, place.name)
    folder, held = _new_folder(place, 0o700)
    try:
        yield folder
    finally:
        os.close(held)
        remove(folder)


def try_to_make_in(folder: Path) -> None:
    """OSError if nothing can be created in a folder, which its access rights do not always tell (/proc, a read-only mount).

    The attempt has a name of its own, so that no other process takes it for the real thing, and is removed again.
    """
    remove_leftovers(folder, "llmkd")
    tried = _temporary(folder / "llmkd")
    tried.mkdir()
    with contextlib.suppress(FileNotFoundError):  # another process removed it as a leftover
        tried.rmdir()


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the unfinished files and folders that killed processes left behind. `name`: their final name, a glob pattern.

    One that another process is writing is locked, and stays. On a file system without locks only a process that has the folder to
    itself may call this.
    """
    for leftover in filter(is_leftover, folder.glob(f"{name}.tmp-*")):
        with _free(leftover) as free:
            if free:
                remove(leftover)


def is_leftover(path: Path) -> bool:
    """Whether a name is the temporary name of an unfinished file or folder."""
    return bool(_LEFTOVER.fullmatch(path.name))


def remove(path: Path) -> None:
    """Remove a file, a folder with its contents, or a link (not its target). No error if that fails."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def lock_file(path: Path, wait: bool = False) -> IO[str]:
    """Open a file and lock it until the returned file is closed or the process ends, however it ends.

    If another process holds the lock: FileLocked, or with `wait` wait for it. OSError if the file cannot be opened, or on a file system
    without locks.
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
    """Open a file to read its bytes. NotAFile for a pipe or a device, which may never end."""
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
    """Write a JSON object with a checksum of it as its last key; see `read_sealed`."""
    write_atomic(path, json.dumps(content | {"checksum": checksum(content)}, indent=1))


def read_sealed(path: Path) -> dict:
    """The object of a JSON file, without its checksum, which files of earlier versions lack.

    Damaged if it does not match its checksum or is no JSON object; OSError if the file cannot be opened.
    """
    found = read_object(path)
    last = next(reversed(found), "")
    if "checksum" not in found and found.get(last) == checksum({key: value for key, value in found.items() if key != last}):
        raise Damaged(f"its last key is {last!r}, and should be 'checksum'")
    if "checksum" in found and found.pop("checksum") != checksum(found):
        raise Damaged('it does not match its checksum; after a change of your own delete the "checksum" in it')
    return found


def checksum(content: dict) -> str:
    """The SHA-256 of an object as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()


def read_object(path: Path) -> dict:
    """The object of a JSON file. Damaged if it holds anything else; OSError if it cannot be opened."""
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
    """Append to an existing file; with `sync` wait until it is on the disk. OSError if the file is gone."""
    with _named(path), open(path, "rb+") as file:
        file.seek(0, os.SEEK_END)
        file.write(content.encode())
        file.flush()
        if sync:
            os.fsync(file.fileno())


def read_jsonl(path: Path, damaged: Callable[[int, str], None] = lambda line, what: None) -> list[dict]:
    """The records of a file with one JSON object a line.

    Other lines are left out, and `damaged` is called with the line's number and what was found, except for a last line that a kill cut
    short. Of two lines that run together, the complete objects at the beginning and at the end are kept.
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
    """The object at the beginning of a line, and the longest one at its end."""
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
    """Lock an unfinished file or folder until it is closed, which tells others that it is being written. False if one of them has removed it."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for a process that is about to remove it
    return os.path.lexists(part)


@contextlib.contextmanager
def _free(path: Path) -> Iterator[bool]:
    """Whether no process is writing a file or folder. None can start to during the `with` block."""
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
    """Add the file's name to an OSError raised in the block: an error while writing, such as a full disk, does not have it."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def _temporary(path: Path) -> Path:
    """Random, since two machines or containers that share a folder may give two processes the same id."""
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)
