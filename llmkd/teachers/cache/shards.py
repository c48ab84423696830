"""A teacher cache: a folder with a record of bytes for each target. Examples are found by their content hash, not by their position.

    cache.json              written last: the header, every shard with its checksum, and a checksum of all of it
    unfinished.json         the header, while the cache is not complete
    shard-00000.safetensors records [targets, bytes], and for each example its content hash and number of targets
    shard-00000.json        its checksum and the header's, written after it
    head.safetensors        for hidden states

The header, a plain dict, holds everything that the shards depend on: kind and its options, vocabulary, bytes per target, `provenance`
(fingerprints), and a hash of the plan. The plan alone decides which examples are in which shard, so the files do not depend on the number of
processes, nor on interruptions. No torch.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...config.dotted import flatten
from ...errors import ChangedFiles, UserError, fix_of, report_from_any_rank
from ...files import Damaged, NotAFile, checksum, read_object, remove_leftovers, sha256_file, write_atomic, write_sealed
from ...model_folder.weights import tensors

VERSION = 2  # 1 was written as store.json, with other names in it
SHARD_BYTES = 64 << 20
SETTING = "teacher.cache.path"
#: A difference between a header of an earlier version, whose fingerprints are of samples, and one of this version.
_EARLIER = re.compile(r"provenance\.teacher\.(base|adapter): (?!sha256:|nothing).* -> sha256:")


@dataclass(frozen=True)
class ShardPlan:
    """The distinct examples of a teacher cache, and the shard of each."""

    hash_E: np.ndarray  # uint64
    targets_E: np.ndarray  # int64
    first_E: np.ndarray  # the index of each in the list of examples that the plan was made from
    shards: list[slice]

    @staticmethod
    def of(hashes: list[str], targets: list[int], bytes_per_target: int, shard_bytes: int = SHARD_BYTES) -> "ShardPlan":
        content_hash = np.array([int(x, 16) for x in hashes], np.uint64)
        first_E = np.sort(np.unique(content_hash, return_index=True)[1])
        targets_E = np.asarray(targets, np.int64)[first_E]
        number_E = (np.cumsum(targets_E) - targets_E) // max(1, shard_bytes // bytes_per_target)
        edges = [0, *(np.flatnonzero(np.diff(number_E)) + 1), len(first_E)]
        return ShardPlan(
            content_hash[first_E], targets_E, first_E, [slice(int(a), int(b)) for a, b in zip(edges, edges[1:], strict=False) if a < b]
        )

    def header(self) -> dict:
        content = hashlib.sha256(self.hash_E.tobytes() + self.targets_E.tobytes() + repr(self.shards).encode()).hexdigest()
        return {"examples": len(self.hash_E), "targets": int(self.targets_E.sum()), "shards": len(self.shards), "content": content}


class Writer:
    """Writes a teacher cache, or completes one. Rank 0 calls `begin` and `finish`; between them every rank writes its shards."""

    def __init__(self, folder: str | Path, record_format, provenance: dict, plan: ShardPlan, setting: str = SETTING):
        """`record_format` is a `records.RecordFormat`."""
        self.folder, self.plan, self.format, self.setting = Path(folder), plan, record_format, setting
        options = {"kind": record_format.options(), "vocab": record_format.vocab, "bytes_per_target": record_format.bytes}
        self.header = json.loads(json.dumps({"version": VERSION, **options, "provenance": provenance, "plan": plan.header()}))

    def begin(self) -> bool:
        """Prepare the folder; returns whether the cache is already complete. UserError, and no change, if the folder holds another cache."""
        _refuse_version_1(self.folder, self.setting)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        for name in ("cache.json", "unfinished.json"):
            if (self.folder / name).exists():
                found = read_header(self.folder, self.setting) if name == "cache.json" else _read_json(self.folder / name, self.setting)
                found.pop("files", None)
                if changed := differences(found, self.header):
                    earlier = any(_EARLIER.match(one) for one in changed)
                    why = (
                        "; an earlier version recorded samples of the weights only: runs read that cache, and it cannot be continued"
                        if earlier
                        else ""
                    )
                    raise UserError(
                        f"{self.setting}: {self.folder} holds another teacher cache ({'; '.join(changed)}){why}; choose another folder, or delete it"
                    )
        head = getattr(self.format, "head", None)
        if head and _digest(self.folder / head.options()["file"]) != head.sha256:
            write_atomic(self.folder / head.options()["file"], head.content())
        if (self.folder / "cache.json").exists():
            if not self.left():
                return True
            (self.folder / "cache.json").unlink()  # a shard of it is gone
        write_atomic(self.folder / "unfinished.json", json.dumps(self.header, indent=1).encode())
        return False

    def left(self, rank: int = 0, ranks: int = 1) -> list[int]:
        """The numbers of this rank's shards that are missing or damaged."""
        return [n for n in range(rank, len(self.plan.shards), ranks) if not self._whole(n)]

    def shard(self, n: int) -> "Shard":
        part = self.plan.shards[n]
        return Shard(self, n, self.plan.first_E[part], self.plan.hash_E[part], self.plan.targets_E[part])

    def finish(self) -> None:
        """Write cache.json, once all ranks have written their shards."""
        if left := [_name(n) for n in range(len(self.plan.shards)) if not (self.folder / f"{_name(n)}.json").exists()]:
            raise UserError(f"{self.setting}: {self.folder} lacks {left[0]} and {len(left) - 1} more; run llmkd cache again")
        files = [_read_json(self.folder / f"{_name(n)}.json") for n in range(len(self.plan.shards))]
        sealed = self.header | {"files": files}
        write_sealed(self.folder / "cache.json", sealed)
        (self.folder / "unfinished.json").unlink(missing_ok=True)

    def _whole(self, n: int) -> bool:
        try:
            about = _read_json(self.folder / f"{_name(n)}.json")
            return about["of"] == checksum(self.header) and about["sha256"] == _digest(self.folder / about["file"])
        except (UserError, KeyError):
            return False


@dataclass
class Shard:
    """A shard to be written. The records of its examples may come in any order."""

    writer: Writer
    number: int
    examples: np.ndarray  # their indices in the list that the plan was made of
    hash_E: np.ndarray
    targets_E: np.ndarray

    def __post_init__(self):
        ends_E = np.cumsum(self.targets_E)
        self._rows = {int(i): slice(int(e - n), int(e)) for i, n, e in zip(self.hash_E, self.targets_E, ends_E, strict=True)}
        self._records_NR = np.zeros((int(self.targets_E.sum()), self.writer.format.bytes), np.uint8)
        self._wanted = set(self._rows)

    def put(self, hashes: list[str], targets: list[int], records_NR: np.ndarray) -> None:
        """Set the records [targets, bytes] of some of its examples, one after another."""
        start = 0
        for content_hash, count in zip(hashes, targets, strict=True):
            self._records_NR[self._rows[int(content_hash, 16)]] = records_NR[start : start + count]
            self._wanted.discard(int(content_hash, 16))
            start += count

    def write(self) -> None:
        from safetensors.numpy import save

        if self._wanted:
            raise ValueError(f"shard {self.number}: {len(self._wanted)} of its examples have no records")
        content = save({"records": self._records_NR, "content_hash": self.hash_E, "targets": self.targets_E})
        name, digest = _name(self.number), hashlib.sha256(content).hexdigest()
        write_atomic(self.writer.folder / f"{name}.safetensors", content)
        about = {"file": f"{name}.safetensors", "sha256": digest, "examples": len(self.hash_E), "targets": len(self._records_NR)}
        write_atomic(self.writer.folder / f"{name}.json", json.dumps(about | {"of": checksum(self.writer.header)}).encode())


class TeacherCache:
    """A complete teacher cache, memory-mapped. Open one with `TeacherCache.open(path)`; `CachedTeacher` makes signals of its records."""

    def __init__(self, folder: Path, header: dict, setting: str, written: list[tuple[int, int, int]]):
        """`written`: `_written` of each shard at the time when it was checked."""
        self.folder, self.header, self.setting, self._shards_then = folder, header, setting, written
        hashes, targets = zip(*(self._index(file["file"]) for file in header["files"]), strict=True)
        order = np.argsort(np.concatenate(hashes))
        self._hash_E = np.concatenate(hashes)[order]
        shard_E = np.repeat(np.arange(len(targets)), [len(part) for part in targets])
        start_E = np.concatenate([np.cumsum(part) - part for part in targets])
        self._where_E3 = np.stack([shard_E, start_E, np.concatenate(targets)], 1)[order]
        self._map = functools.lru_cache(256)(self._map)  # at most 256 at a time: each keeps a file open

    @staticmethod
    def open(path: str | Path, setting: str = SETTING) -> "TeacherCache":
        """Check a cache and open it. UserError names a missing or damaged file. Several processes on a machine share the work of checking."""
        folder = Path(path).expanduser()
        header = read_header(folder, setting)
        head = header["kind"].get("head")
        files = [*header["files"], *([head] if head else [])]
        if lacking := [file["file"] for file in files if not (folder / file["file"]).exists()]:
            more = f" (and {len(lacking) - 1} more are)" if len(lacking) > 1 else ""
            raise UserError(f"{setting}: {folder / lacking[0]} is missing{more}; run llmkd cache again")
        rank, ranks = (int(os.environ.get(name, value)) for name, value in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
        mine, written = files[rank::ranks], [_written(folder / file["file"]) for file in header["files"]]
        threads = min(8, os.cpu_count() or 1)  # hashing releases the GIL
        with report_from_any_rank(), concurrent.futures.ThreadPoolExecutor(threads) as pool:
            for file, found in zip(mine, pool.map(lambda file: _digest(folder / file["file"]), mine), strict=True):
                if found != file["sha256"]:
                    raise UserError(
                        f"{setting}: {folder / file['file']} is damaged (its content does not match its checksum); delete it and run llmkd cache again"
                    )
        return TeacherCache(folder, header, setting, written)

    @property
    def bytes_per_target(self) -> int:
        return self.header["bytes_per_target"]

    @property
    def identity(self) -> str:
        """A hash of its contents."""
        return checksum(self.header)

    def missing(self, hashes: list[str]) -> list[int]:
        """The indices in `hashes` of the examples that are not in the cache."""
        wanted = np.array([int(x, 16) for x in hashes], np.uint64)
        return np.flatnonzero(~self._found(wanted)[1]).tolist()

    def read(self, hashes: list[str], targets: list[int]) -> np.ndarray:
        """The records of some examples, one after another: uint8 [sum of targets, bytes]. UserError for an example that is not in the cache.

        hashes    content hash of each example
        targets   number of targets of each
        """
        wanted = np.array([int(x, 16) for x in hashes], np.uint64)
        places, here = self._found(wanted)
        if not here.all():
            raise UserError(f"{self.setting}: {self.folder} has no record of an example ({hashes[here.argmin()]}); run llmkd cache again")
        for shard in set(self._where_E3[places, 0].tolist()):
            path = self.folder / self.header["files"][shard]["file"]
            if _written(path) != self._shards_then[shard]:
                raise ChangedFiles(f"{self.setting}: {path} was changed while the run was using it; write the cache again, then --resume")
        out_NR, end = np.empty((sum(targets), self.bytes_per_target), np.uint8), 0
        for content_hash, count, (shard, start, own) in zip(hashes, targets, self._where_E3[places].tolist(), strict=True):
            if own != count:
                raise UserError(
                    f"{self.setting}: {self.folder} has {own} targets of an example ({content_hash}) that has {count}; run llmkd cache again"
                )
            out_NR[end : end + count] = self._map(shard)[start : start + count]
            end += count
        return out_NR

    def _found(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = np.searchsorted(self._hash_E, wanted).clip(max=len(self._hash_E) - 1)
        return places, self._hash_E[places] == wanted

    def _map(self, shard: int) -> np.memmap:
        path = self.folder / self.header["files"][shard]["file"]
        records = tensors(path)["records"]
        return np.memmap(path, np.uint8, "r", records["start"], tuple(records["shape"]))

    def _index(self, file: str) -> tuple[np.ndarray, np.ndarray]:
        from safetensors import safe_open

        try:
            with safe_open(self.folder / file, "numpy") as found:
                return found.get_tensor("content_hash"), found.get_tensor("targets")
        except Exception as error:
            raise UserError(
                f"{self.setting}: {self.folder / file} is damaged (it cannot be read); delete it and run llmkd cache again"
            ) from error


def read_header(folder: Path, setting: str = SETTING) -> dict:
    """The header of a complete cache, checked against its own checksum. The shards are not read."""
    _refuse_version_1(folder, setting)
    if not (folder / "cache.json").exists():
        if (folder / "unfinished.json").exists():
            done, of = len(list(folder.glob("shard-*.json"))), _read_json(folder / "unfinished.json", setting).get("plan", {}).get("shards")
            raise UserError(f"{setting}: {folder} is not complete: {done} of {of} shards; run llmkd cache again with the same settings")
        raise UserError(f"{setting}: there is no teacher cache at {folder}; llmkd cache writes one")
    header = _read_json(folder / "cache.json", setting)
    if header.get("version", VERSION) != VERSION:
        raise UserError(
            f"{setting}: {folder} is a teacher cache of version {header.get('version')}, expected {VERSION}; run llmkd cache again, to another folder"
        )
    if header.pop("checksum", None) != checksum(header):
        raise UserError(
            f"{setting}: {folder / 'cache.json'} is damaged (its content does not match its checksum); delete it and run llmkd cache again"
        )
    return header


def _refuse_version_1(folder: Path, setting: str) -> None:
    if any((folder / name).exists() for name in ("store.json", "making.json")):
        raise UserError(
            f"{setting}: {folder} is a teacher cache of version 1, expected {VERSION}; run llmkd cache again, to another folder"
        )


def differences(old: dict, new: dict) -> list[str]:
    """The differences of two headers, as "provenance.tokenizer: a -> b"."""
    old, new = flatten(old), flatten(new)
    return [
        f"{key}: {old.get(key, 'nothing')} -> {new.get(key, 'nothing')}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]


def _name(n: int) -> str:
    return f"shard-{n:05d}"


def _written(path: Path) -> tuple[int, int, int] | None:
    """Inode, size and modification time of a file, which stay the same as long as it is not written to. None if it is gone."""
    with contextlib.suppress(OSError):
        about = os.stat(path)
        return about.st_ino, about.st_size, about.st_mtime_ns
    return None


def _digest(path: Path) -> str | None:
    with contextlib.suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError, NotAFile):
        return sha256_file(path)
    return None


def _read_json(path: Path, setting: str = SETTING) -> dict:
    try:
        return read_object(path)
    except (OSError, Damaged) as error:
        what = f"cannot be read ({error.strerror})" if isinstance(error, PermissionError) else "is damaged (it cannot be read)"
        raise UserError(f"{setting}: {path} {what}; {fix_of(error, 'delete it and run llmkd cache again')}") from error
