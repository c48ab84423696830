"""Hashes of whole weight files, tensor by tensor. Files are read in parallel, and hashes are kept in the user's cache folder, so that a file is
read once.

A kept hash is used as long as the file's size, inode, and times of writing and of change are the same. Only the file system sets the time of
change, so a file that was written to is read again whatever time of writing it was given. The hash of a file that was changed less than
`SETTLED` seconds before is not kept: it may be written to again within the clock's resolution. No torch.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..console import info, progress_bar
from ..files import lock_file, read_file, remove_leftovers, write_atomic
from .weights import tensors

VERSION = 1  # raise it when the hash of the same tensors changes
PIECE = 32 << 20  # bytes hashed by one thread; a tensor's hash is the hash of its pieces' hashes
SETTLED = 2.0  # seconds; the coarsest resolution of a usual file system's clock
KEPT_FROM = 64 << 20  # bytes; reading a smaller file is as fast as looking up its hash

kept: dict[Path, tuple[list[int], dict[str, str]]] = {}  # of this process
_local = threading.local()


def cache_root() -> Path:
    """The folder of llmkd's caches: LLMKD_CACHE, or else ~/.cache/llmkd. RuntimeError if there is no home folder."""
    return Path(os.environ.get("LLMKD_CACHE") or Path.home() / ".cache" / "llmkd").expanduser()


def tensor_hashes(paths: Sequence[Path]) -> list[dict[str, str]]:
    """{tensor: "dtype shape sha256"} of each safetensors file, over all bytes.

    ValueError for a file that is damaged, or changed while it is read; OSError if it cannot be read.
    """
    found = {path: known for path in paths if (known := _known(path))}
    lacking = [path for path in paths if path not in found]
    if not lacking:
        return [found[path] for path in paths]
    size = sum(path.stat().st_size for path in lacking)
    with _lock(lacking) if size >= KEPT_FROM else contextlib.nullcontext():
        found |= {path: known for path in lacking if (known := _known(path))}  # another process was faster
        found |= _read([path for path in lacking if path not in found])
    return [found[path] for path in paths]


def stamp(path: Path) -> list[int]:
    """Size, inode, and the times of the last writing and the last change in nanoseconds: they stay the same if a file is left alone."""
    about = os.stat(path)
    return [about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns]


def _read(paths: list[Path]) -> dict[Path, dict[str, str]]:
    start, now = time.monotonic(), time.time_ns()
    before = {path: stamp(path) for path in paths}
    wanted = {path: tensors(path) for path in paths}
    pieces = [
        (path, name, at, min(at + PIECE, t["stop"]))
        for path in paths
        for name, t in wanted[path].items()
        for at in range(t["start"], max(t["stop"], t["start"] + 1), PIECE)
    ]
    size = sum(about[0] for about in before.values())
    bar = progress_bar("hashing weights") if size >= 1 << 30 else iter
    digests: dict[tuple[Path, str], list[bytes]] = {}
    with concurrent.futures.ThreadPoolExecutor(_threads()) as pool:  # hashing and reading release the GIL
        try:
            for (path, name, *_), one in zip(pieces, bar([pool.submit(hash_piece, *piece) for piece in pieces]), strict=True):
                digests.setdefault((path, name), []).append(one.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    out = {}
    for path in paths:
        if stamp(path) != before[path]:
            raise ValueError(f"{path} was changed while it was read")
        out[path] = {
            name: f"{t['dtype']} {t['shape']} {hashlib.sha256(b''.join(digests[path, name])).hexdigest()}"
            for name, t in wanted[path].items()
        }
        if now - max(before[path][2:]) >= SETTLED * 1e9:
            _keep(path, before[path], out[path])
    if size >= 1 << 30:
        seconds = max(time.monotonic() - start, 1e-3)
        info(f"hashed {size / 1e9:.1f} GB of weights in {seconds:.0f} s ({size / 1e6 / seconds:,.0f} MB/s)")
    return out


def _threads() -> int:
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def hash_piece(path: Path, name: str, at: int, stop: int) -> bytes:
    if not hasattr(_local, "buffer"):
        _local.buffer = bytearray(4 << 20)
    digest, view = hashlib.sha256(), memoryview(_local.buffer)
    with open(path, "rb", buffering=0) as file:
        file.seek(at)
        while at < stop:
            count = file.readinto(view[: min(len(view), stop - at)])
            if not count:
                raise ValueError(f"{path} was cut short while it was read")
            digest.update(view[:count])
            at += count
    return digest.digest()


def _known(path: Path) -> dict[str, str] | None:
    """The kept hashes of a file; None if there are none, or the file has changed since."""
    now = stamp(path)
    if path in kept and kept[path][0] == now:
        return kept[path][1]
    if now[0] < KEPT_FROM:
        return None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):  # damaged: read the weights again
        entry = json.loads(read_file(_entry(path)))
        if entry.pop("checksum") == _checksum(entry) and entry["version"] == VERSION and entry["stamp"] == now:
            kept[path] = now, entry["tensors"]
            return entry["tensors"]
    return None


def _keep(path: Path, before: list[int], hashes: dict[str, str]) -> None:
    """Keep hashes in memory and, for a large file, on disk. If the cache cannot be written, the file is read again the next time."""
    kept[path] = before, hashes
    if before[0] < KEPT_FROM:
        return
    entry = {"version": VERSION, "path": str(path.resolve()), "stamp": before, "tensors": hashes}
    with contextlib.suppress(OSError, RuntimeError):
        _entry(path).parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(_entry(path).parent, _entry(path).name)
        write_atomic(_entry(path), json.dumps(entry | {"checksum": _checksum(entry)}))


def _entry(path: Path) -> Path:
    return cache_root() / "hashes" / f"{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]}.json"


def _checksum(entry: dict) -> str:
    return hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _lock(paths: list[Path]) -> Iterator[None]:
    """A lock for one process of this machine at a time, so that the others wait and use its result. Without effect if files cannot be locked."""
    name = hashlib.sha256("\n".join(str(path.resolve()) for path in paths).encode()).hexdigest()[:32]
    try:
        place = cache_root() / "locks"
        place.mkdir(parents=True, exist_ok=True)
        held = lock_file(place / name, wait=True)
    except (OSError, RuntimeError):
        yield
        return
    with held:
        yield
