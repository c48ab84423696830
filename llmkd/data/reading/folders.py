"""Finds the files of a split in a folder, by their names or by the index of `datasets.save_to_disk`."""

import json
import re
from pathlib import Path

from ...config.recipe import Source
from ...errors import UserError, fix_of
from ...files import read_file
from .files import KINDS, kind_of

_WORDS = {
    "train": "train training trainset",
    "validation": "validation valid val dev valset devset",
    "test": "test testing testset eval evaluation evalset",
}
_SPLITS = {word: split for split, words in _WORDS.items() for word in words.split()}
_SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # my-test, my_test, myTest
_NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

_PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")

Files = list[tuple[str, Path]]


def data_files(root: Path, source: Source, setting: str) -> Files:
    """The files of the source's split, sorted by name, each with its name in places."""
    if (root / "dataset_dict.json").exists():
        splits = _json(root / "dataset_dict.json", setting).get("splits") or []
        if source.split not in splits:
            raise _no_split(source, setting, splits)
        return _saved(root / source.split, f"{source.path.rstrip('/')}/{source.split}", setting)
    if (root / "state.json").exists():
        own = _json(root / "state.json", setting).get("_split")
        if source.split not in ("train", own):
            raise _no_split(source, setting, [own or "train"])
        return _saved(root, source.path.rstrip("/"), setting)
    every = sorted(p.relative_to(root) for p in root.rglob("*") if not p.is_dir())
    every = [p for p in every if not any(part.startswith((".", "_")) for part in p.parts) and p.name not in _NOT_DATA]
    gone = next((p for p in every if kind_of(p) and not (root / p).is_file()), None)
    if gone:
        raise UserError(f"{setting}.path: {source.path}/{gone} is a broken link, or not a file; fix or remove it")
    packed = next((p for p in every if p.suffix.lower() in _PACKED and kind_of(p.with_suffix(""))), None)
    if packed:
        raise UserError(f"{setting}.path: {source.path}/{packed} is compressed; unpack it, or name a file")
    inside = [p for p in every if kind_of(p)]
    if not inside:
        there = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{setting}.path: {source.path} has no data file ({', '.join(KINDS)}); it has {there}; name a file, or another folder"
        )
    chosen = _of_split(inside, source, setting)
    _refuse_gaps(chosen, source, setting)
    return [(f"{source.path.rstrip('/')}/{p}", root / p) for p in chosen]


def _refuse_gaps(files: list[Path], source: Source, setting: str) -> None:
    """UserError if a file of a numbered set (NAME-00000-of-00005) is missing."""
    there: dict[tuple[str, str, str], set[int]] = {}
    for path in files:
        if shard := _SHARD.fullmatch(path.stem):
            there.setdefault((str(path.parent / shard[1]), shard[3], path.suffix), set()).add(int(shard[2]))
    for (name, count, suffix), numbers in there.items():
        lacking = next((n for n in range(int(count)) if n not in numbers), None)
        if lacking is not None:
            raise UserError(
                f"{setting}.path: {source.path}/{name}-{lacking:0{len(count)}}-of-{count}{suffix} is missing; {len(numbers)} of its {int(count)} parts "
                f"are there; fetch it"
            )


def _of_split(inside: list[Path], source: Source, setting: str) -> list[Path]:
    """All files if none is named after a split; the files of the wanted split if all are. A mixture is refused, since it may include test rows."""
    splits = {path: _split_of(path, source, setting) for path in inside}
    known = sorted({split for split in splits.values() if split})
    if not known:
        if source.split != "train":
            raise UserError(f"{setting}.split: found {source.split!r}, and no file in {source.path} is named after a split; leave it out")
        return inside
    unnamed = next((path for path, split in splits.items() if not split), None)
    if unnamed:
        named = next(path for path, split in splits.items() if split)
        raise UserError(
            f"{setting}.path: in {source.path} some files are named after a split ({named}) and some are not ({unnamed}); name a file, or rename them"
        )
    wanted = _SPLITS.get(source.split, source.split)
    if wanted not in known:
        raise _no_split(source, setting, known)
    return [path for path, split in splits.items() if split == wanted]


def _split_of(path: Path, source: Source, setting: str) -> str | None:
    """The split in a file's name or its folders' names: train-00000-of-00001, gsm_test, Validation.part2, ..."""
    shard = _SHARD.fullmatch(path.stem)
    name = shard[1] if shard else path.stem
    found = {_SPLITS[word] for part in (*path.parts[:-1], name) for word in map(str.lower, _WORD.findall(part)) if word in _SPLITS}
    if len(found) > 1:
        raise UserError(f"{setting}.path: {source.path}/{path} names two splits ({' and '.join(sorted(found))}); rename it, or name a file")
    if shard and name.lower() not in _SPLITS and name.lower() not in ("data", "part"):
        return name  # another split, such as train_sft
    return found.pop() if found else None


def _saved(folder: Path, name: str, setting: str) -> Files:
    """The Arrow files of a saved data set, to be read directly instead of through the library's cache."""
    listed = [file.get("filename") for file in _json(folder / "state.json", setting).get("_data_files") or []]
    if not listed or not all(isinstance(file, str) and Path(file).name == file for file in listed):
        raise UserError(f"{setting}.path: {folder / 'state.json'} names no data files; save the data set again")
    missing = next((file for file in listed if not (folder / file).is_file()), None)
    if missing:
        raise UserError(f"{setting}.path: {name}/{missing} is missing; copy the whole folder")
    return [(f"{name}/{file}", folder / file) for file in listed]


def _json(path: Path, setting: str) -> dict:
    try:
        value = json.loads(read_file(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{setting}.path: {path} cannot be read ({error}); {fix_of(error, 'save the data set again')}") from error
    return value if isinstance(value, dict) else {}


def _no_split(source: Source, setting: str, known: list[str]) -> UserError:
    return UserError(f"{setting}.split: {source.path} has no split {source.split!r}; it has {', '.join(known) or 'none'}")
