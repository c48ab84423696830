"""Sources of rows: files, folders, saved data sets and the hub. Every row has its place, and reading is strict. No torch here.

A source's content hash covers what was really read: the bytes of files with their names, or the rows of a hub data set (whose own cache
may serve stale rows or flipped bits). So a changed bit never gives tokens from the token cache.
"""

import dataclasses
import difflib
import functools
import hashlib
import io
import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config.data import BUILTIN_SOUNDS
from ...config.fields import with_setting_names
from ...config.formats import FORMATS
from ...config.recipe import Source
from ...errors import UserError, fix_of
from . import skills, sounds
from .class_names import names_of_data
from .files import KINDS, Records, kind_of, records, row_of
from .folders import data_files
from .media import ENDINGS, check_media_row, media_files, media_rows
from .problems import BadRow, ErrorCollector
from .row_checks import check_row
from .where import Chosen

_HUB_ID = re.compile(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")


@dataclass(frozen=True)
class Rows:
    """The rows of one source, the place of each (`file:line`), a hash of what was read, and the source's entry in the model card."""

    rows: list[dict]
    places: list[str]
    content: str
    origin: dict[str, Any] = field(default_factory=dict)  # path, name, split, revision (resolved, if there is one), rows
    unread: Counter = field(default_factory=Counter)  # columns that were not read, with the number of rows that have them
    chosen: Chosen | None = None  # the counts of rows that the source's `where` has kept and left out

    def report_chosen(self, source: Source) -> None:
        """One line with the numbers of rows that `where` kept and left out; none without `where`."""
        if self.chosen:
            reached = source.limit and source.seed is None and self.chosen.kept >= source.limit
            self.chosen.report(" before the limit was reached" if reached else "")


def read_sources(setting: Source | tuple[Source, ...] | None, name: str, choices: bool = False, views: Collection[str] = ()) -> list[Rows]:
    """The rows of every source of a setting; see `read_source`. UserError names every bad row of all of them."""
    out, problems = [], []
    for path, source in with_setting_names(setting, name):
        try:
            out.append(read_source(source, path, choices, views))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return out


def read_source(source: Source, setting: str, choices: bool = False, views: Collection[str] = ()) -> Rows:
    """All rows of a source, checked against its format (with `choices` as multiple-choice questions). UserError names every bad row.

    views   columns that teachers read in place of the student's
    """
    problems, opened = ErrorCollector(), open_source(source, setting)
    rows, places, unread = [], [], Counter()
    for place, row in some_rows(opened.records, source, problems):
        of_files = FORMATS[source.format].file and FORMATS[source.format].supervised == "label"
        rows.append(
            check_media_row(row, place, source, problems, unread, views)
            if of_files
            else check_row(row, place, source, problems, choices, unread if source.pattern is None else Counter(), views)
        )
        places.append(place)
    problems.raise_if_any()
    if not rows:
        opened.chosen.refuse_none()
        raise no_rows(source, setting)
    settings = [source.limit, source.seed, source.fields, source.roles, *([list(source.ignore)] if source.ignore else [])]
    settings += [{"where": source.where}] if source.where else []
    settings += [{"pattern": source.pattern}] if source.pattern is not None else []
    origin = {"path": source.path, "name": source.name, "split": opened.split, "revision": opened.revision, "rows": len(rows)}
    return Rows(rows, places, f"{opened.content()} {json.dumps(settings, sort_keys=True)}", origin, unread, opened.chosen)


def no_rows(source: Source, setting: str) -> UserError:
    return UserError(f"{setting}.path: {source.path} has no rows; name a file with at least one example")


def some_rows(found: Records, source: Source, problems: ErrorCollector) -> Iterator[tuple[str, Any]]:
    """(place, row) of the rows that the source's limit and seed choose. Rows that cannot be parsed are added to `problems`."""
    rows: Iterable[tuple[str, Any]] = _parsed(found, problems)
    if source.limit and source.seed is not None:
        rows = _sample(list(rows), source.limit, source.seed)
    return itertools.islice(rows, source.limit)


def _parsed(found: Records, problems: ErrorCollector) -> Iterator[tuple[str, Any]]:
    for place, get in found:
        try:
            row = get()
        except BadRow as error:
            problems.add(f"{place}: {error}", alike=error.alike)
            continue
        yield place, row


def _sample(found: list, limit: int, seed: int) -> list:
    """`limit` of the rows, drawn by seed, in the order of the file."""
    chosen = random.Random(f"sample {seed}").sample(range(len(found)), min(limit, len(found)))
    return [found[i] for i in sorted(chosen)]


# ---- opening


@dataclass
class Opened:
    """A source's rows, to be read once. `content()` gives the hash of its content after that."""

    records: Records
    content: Any  # () -> str
    split: str | None = None
    revision: str | None = None
    chosen: Chosen | None = None
    texts: bool = False  # all values are text, as in CSV


def open_source(source: Source, setting: str) -> Opened:
    """Open the source of a setting. UserError if it does not exist. The rows that `where` chooses are read one by one as they are used."""
    opened = _open(source, setting)
    chosen = Chosen(source, setting, opened.texts)
    return dataclasses.replace(opened, records=chosen.records(opened.records), chosen=chosen)


def _open(source: Source, setting: str) -> Opened:
    if source.path == "builtin:skills":
        return _builtin(source)
    if source.path == BUILTIN_SOUNDS:
        return _sounds(source, setting)
    if (media := FORMATS[source.format].file) and (folder := media_folder(source, setting)):
        return _media(folder, media, source, setting)
    if source.pattern is not None:
        raise UserError(f"{setting}.pattern: {source.path} is no folder of sounds or images; leave it out, or name such a folder")
    files = local(source, setting)
    if files is not None:
        reader = _Files(files, setting)
        return Opened(reader.records(), reader.content, source.split if len(files) > 1 or files[0][0] != source.path else None)
    return _hub(source, setting)


def _builtin(source: Source) -> Opened:
    name, noise = source.name or "questions", f" noise {source.noise!r}" if source.noise else ""
    rows = skills.rows(source.split, name, source.noise)
    found = ((f"builtin:skills[{source.split}]:{i + 1}", functools.partial(dict, row)) for i, row in enumerate(rows))
    return Opened(found, lambda: f"skills {skills.VERSION} {source.split} {name}{noise}", source.split)


def _sounds(source: Source, setting: str) -> Opened:
    if source.split not in sounds.SIZES:
        raise UserError(f"{setting}.split: found {source.split!r}, expected {', '.join(sounds.SIZES)}")
    found = ((f"{BUILTIN_SOUNDS}[{source.split}]:{i + 1}", functools.partial(dict, row)) for i, row in enumerate(sounds.rows(source.split)))
    return Opened(found, lambda: f"sounds {sounds.VERSION} {source.split}", source.split)


def media_folder(source: Source, setting: str) -> Path | None:
    """The folder at a path if it holds sounds or images and no files with rows; else None."""
    path = _path(source.path, setting)
    if not path.is_dir() or (source.pattern is None and any(kind_of(one) for one in path.iterdir())):
        return None
    if source.pattern is None and any(kind_of(one) for one in path.rglob("*")):  # folders of the hub have their rows in data/
        return path if any(one.suffix.lower() in ENDINGS[FORMATS[source.format].file] for one in path.rglob("*")) else None
    return path


def _media(folder: Path, media: str, source: Source, setting: str) -> Opened:
    """The files of a folder. Only their names are hashed here; their bytes are when they are decoded."""
    for name, value, default in (("name", source.name, None), ("revision", source.revision, None), ("split", source.split, "train")):
        if value != default:
            raise UserError(
                f"{setting}.{name}: found {value!r}, and a folder of files has none; name the split's own folder, and leave it out"
            )
    files = media_files(folder, source.path, ENDINGS[media], setting)
    content = hashlib.sha256(json.dumps([file.as_posix() for file in files]).encode()).hexdigest()
    labelled = FORMATS[source.format].supervised == "label"
    return Opened(media_rows(folder, source.path, media, files, source.pattern, labelled), lambda: content, texts=True)


_OTHER_KINDS = {
    ".tsv": "its columns are separated by tabs: save it with commas, as .csv",
    ".txt": 'write each text as a line {"text": ...} of a .jsonl file, with format: text',
    ".ndjson": "rename it to .jsonl",
    ".jsonlines": "rename it to .jsonl",
    ".pq": "rename it to .parquet",
    ".xlsx": "save it as .csv (UTF-8, with commas)",
    ".xls": "save it as .csv (UTF-8, with commas)",
    ".ods": "save it as .csv (UTF-8, with commas)",
} | dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".zip"), "unpack it")


def local(source: Source, setting: str) -> list[tuple[str, Path]] | None:
    """The files at a path, each with its name in places; None if the path can only be a hub data set."""
    path, kinds = _path(source.path, setting), ", ".join(KINDS)
    if path.is_dir() and source.path.strip():
        files = data_files(path, source, setting)
    elif os.path.exists(path) and not path.is_file() and not path.is_dir():
        raise UserError(f"{setting}.path: {source.path} is a pipe or a device; save what it gives to a file, and name that")
    elif kind_of(path) or path.is_file():
        if not kind_of(path):
            fix = _OTHER_KINDS.get(path.suffix.lower(), "convert it to one")
            raise UserError(f"{setting}.path: {source.path} is not a file of a known kind ({kinds}); {fix}")
        if not path.is_file():
            raise UserError(f"{setting}.path: {source.path}: No such file or directory{_nearest(path)}")
        if source.split != "train":
            raise UserError(f"{setting}.split: found {source.split!r}, and one file has no splits; leave it out")
        files = [(source.path, path)]
    else:
        looks_local = source.path.startswith((".", "/", "~")) or (len(path.parts) > 1 and Path(path.parts[0]).is_dir())
        if looks_local or not _HUB_ID.fullmatch(source.path):
            raise UserError(
                f"{setting}.path: {source.path} does not exist, and is not the name of a hub data set; name a file ({kinds}) or a folder{_nearest(path)}"
            )
        return None
    for name in ("name", "revision"):
        if getattr(source, name) is not None:
            raise UserError(f"{setting}.{name}: found {getattr(source, name)!r}, which only a hub data set has; leave it out")
    return files


def _path(name: str, setting: str) -> Path:
    try:
        path = Path(name).expanduser()
        path.exists()
        if "\0" in name:
            raise ValueError("it contains a NUL character")
        return path
    except (RuntimeError, ValueError, OSError) as error:  # a home that does not exist, a NUL, a name too long
        raise UserError(f"{setting}.path: {name!r} is not a path ({error}); name a file") from None


def _nearest(path: Path) -> str:
    others = [p.name for p in path.parent.iterdir() if kind_of(p) or p.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, others, 1, 0.6)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


class _Files:
    """Files one after another, each read as a whole and hashed as it is read."""

    def __init__(self, files: list[tuple[str, Path]], setting: str):
        self.files, self.setting, self.hashes = files, setting, {}

    def records(self) -> Records:
        for name, path in self.files:
            yield from records(io.BytesIO(self._bytes(name, path)), name, path)

    def content(self) -> str:
        """The hash of all files, including those that a limit left unread."""
        for name, path in self.files:
            if name not in self.hashes:
                self._bytes(name, path)
        if len(self.files) == 1:
            return next(iter(self.hashes.values()))
        root = os.path.commonpath([path.parent for _, path in self.files])
        return hashlib.sha256(
            json.dumps([[os.path.relpath(path, root), self.hashes[name]] for name, path in self.files]).encode()
        ).hexdigest()

    def _bytes(self, name: str, path: Path) -> bytes:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.setting}.path: {name}: {error.strerror}; {fix_of(error, 'fetch or write the file again')}") from error
        self.hashes[name] = hashlib.sha256(raw).hexdigest()
        return raw


# ---- the hub


def from_hub(source: Source, setting: str, streaming: bool = False) -> Any:
    from datasets import load_dataset

    try:
        data = load_dataset(source.path, source.name, split=source.split, revision=source.revision, streaming=streaming)
        return _as_bytes(data)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        fix = "unset HF_HUB_OFFLINE, or name local files" if "OfflineModeIsEnabled" in reason else "check the name and the connection"
        raise UserError(
            f"{setting}.path: {source.path} is not a file here and could not be read from the hub ({type(error).__name__}: {reason[:160]}); {fix}"
        ) from None


def _as_bytes(data: Any) -> Any:
    """The data set with sounds and images as the bytes of their files. llmkd decodes them, as the library would need torchcodec."""
    for name, feature in (getattr(data, "features", None) or {}).items():
        if getattr(feature, "decode", False):
            data = data.cast_column(name, dataclasses.replace(feature, decode=False))
    return data


def _hub(source: Source, setting: str) -> Opened:
    data = from_hub(source, setting)
    names = names_of_data(data)
    digest = hashlib.sha256(json.dumps(names, sort_keys=True).encode() if names else b"")

    def found() -> Records:
        for i, row in enumerate(data):
            digest.update(json.dumps(row, sort_keys=True, default=repr).encode("utf-8", "surrogatepass"))
            yield f"{source.path}[{source.split}]:{i + 1}", functools.partial(row_of, row, names)

    return Opened(found(), lambda: f"{source.path} {digest.hexdigest()}", source.split, hub_revision(data, source))


def hub_revision(data: Any, source: Source) -> str | None:
    """The commit at which a hub data set was read: from its files' addresses, else from the hub, else the recipe's revision."""
    addresses = " ".join(map(str, getattr(data.info, "download_checksums", None) or {}))
    commits = set(re.findall(r"@([0-9a-f]{40})/", addresses))
    if len(commits) == 1:
        return commits.pop()
    from huggingface_hub import dataset_info

    try:
        return dataset_info(source.path, revision=source.revision, timeout=10).sha
    except Exception:  # offline, say, with the rows from the hub's cache
        return source.revision
