"""The answers of a teacher's server: records of examples in a folder that several processes may read and add to. No torch.

    answers.json                 the header: everything that the answers depend on, as in a teacher cache
    answers-PID-RANDOM.bin       one file for each process that asked: the header's checksum, then the entries

An entry is the content hash, the number of targets and a CRC-32 of these and of the records (16 bytes together), then the records, as in a
teacher cache. A kill may leave an incomplete entry at the end of a file: it is ignored, and the example is asked for again.
"""

import contextlib
import json
import os
import secrets
import struct
import threading
import zlib
from pathlib import Path

import numpy as np

from ..console import warn
from ..errors import UserError
from ..files import Damaged, checksum, read_object, write_atomic
from .cache.shards import differences

VERSION = 1
_ENTRY = struct.Struct("<QII")
_START = 32  # bytes of the header's checksum at the start of a file


class Answers:
    """The answers in a folder; new ones go to a file of this process. Several threads may use it.

    record_format   a `cache.records.RecordFormat`
    provenance      everything that the answers depend on, apart from the example
    setting         the setting that names the folder or the teacher, for messages
    """

    def __init__(self, folder: str | Path, record_format, provenance: dict, setting: str):
        self.folder, self.format, self.setting = Path(folder).expanduser(), record_format, setting
        kind = {"kind": record_format.options(), "vocab": record_format.vocab, "bytes_per_target": record_format.bytes}
        self.header = json.loads(json.dumps({"version": VERSION, **kind, "provenance": provenance}))
        self._mark = checksum(self.header)[:_START].encode()
        self._lock, self._own = threading.Lock(), None
        self._entries: dict[int, tuple[Path, int, int]] = {}  # by content hash: file, start of the records, number of targets
        self._read_up_to: dict[Path, int] = {}
        self._damaged: set[Path] = set()
        self._check()
        self.refresh()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def identity(self) -> str:
        """A hash of what the answers depend on."""
        return checksum(self.header)

    def missing(self, hashes: list[str]) -> list[int]:
        """The indices in `hashes` of the examples without a known answer. `refresh` first, to know those of other processes."""
        with self._lock:
            return [i for i, one in enumerate(hashes) if int(one, 16) not in self._entries]

    def refresh(self) -> None:
        """Read the answers that other processes have added."""
        with self._lock:
            for path in sorted(self.folder.glob("answers-*.bin")):
                if path not in self._damaged and (self._own is None or path != self._own[0]):
                    self._read_file(path)

    def put(self, content_hash: str, records_NR: np.ndarray) -> None:
        """Write one example's records [targets, bytes]. They are handed to the system, not synced to disk."""
        content = np.ascontiguousarray(records_NR).tobytes()
        known, targets = int(content_hash, 16), len(records_NR)
        entry = _ENTRY.pack(known, targets, _crc(known, targets, content)) + content
        with self._lock:
            if self._own is None:
                self._own = self._new_file()
            path, file, end = self._own
            try:
                _write(file, entry)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, end)  # otherwise the next entry would follow an incomplete one
                raise
            self._own = path, file, end + len(entry)
            self._entries[known] = path, end + _ENTRY.size, targets

    def read(self, hashes: list[str], targets: list[int]) -> np.ndarray:
        """The records of those examples, one after another: uint8 [sum of targets, bytes]. KeyError for one without an answer."""
        out_NR, end = np.empty((sum(targets), self.format.bytes), np.uint8), 0
        for one, count in zip(hashes, targets, strict=True):
            with self._lock:
                path, start, own = self._entries[int(one, 16)]
            if own != count:
                raise UserError(f"{self.setting}: {path} has {own} targets of an example ({one}) that has {count}; delete {self.folder}")
            with open(path, "rb") as file:
                content = os.pread(file.fileno(), count * self.format.bytes, start)
            if len(content) < count * self.format.bytes:
                raise UserError(f"{self.setting}: {path} was cut while it was in use; start again, and what it lacks is asked for again")
            out_NR[end : end + count] = np.frombuffer(content, np.uint8).reshape(count, -1)
            end += count
        return out_NR

    def _check(self) -> None:
        """UserError if the folder's header is damaged or differs."""
        path = self.folder / "answers.json"
        if not path.exists():
            return
        try:
            found = read_object(path)
        except (OSError, Damaged) as error:
            raise UserError(f"{self.setting}: {path} is damaged (it cannot be read); delete {self.folder}") from error
        if changed := differences(found, self.header):
            raise UserError(
                f"{self.setting}: {self.folder} holds answers of another teacher ({'; '.join(changed)}); choose another folder, or delete it"
            )

    def _read_file(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            size, at = os.fstat(file.fileno()).st_size, self._read_up_to.get(path, 0)
            if at == 0 and size >= _START:
                if file.read(_START) != self._mark:
                    self._damaged.add(path)
                    warn(f"note: {self.setting}: {path} is no file of this folder's answers, and is not read")
                    return
                at = _START
            while at and at + _ENTRY.size <= size:
                file.seek(at)
                known, targets, crc = _ENTRY.unpack(file.read(_ENTRY.size))
                end = at + _ENTRY.size + targets * self.format.bytes
                if end > size:
                    break
                if crc != _crc(known, targets, file.read(targets * self.format.bytes)):
                    self._damaged.add(path)
                    warn(f"note: {self.setting}: {path} is damaged after {at:,} bytes; the answers that stood there are asked for again")
                    break
                self._entries.setdefault(known, (path, at + _ENTRY.size, targets))
                at = end
            self._read_up_to[path] = at

    def _new_file(self) -> tuple[Path, int, int]:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "answers.json").exists():
            write_atomic(self.folder / "answers.json", json.dumps(self.header, indent=1))
        path = self.folder / f"answers-{os.getpid()}-{secrets.token_hex(4)}.bin"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        _write(file, self._mark)
        return path, file, _START


def _crc(known: int, targets: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(struct.pack("<QI", known, targets)))


def _write(file: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(file, left) :]
