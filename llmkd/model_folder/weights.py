"""Finds the files of a folder that hold a model's weights, as transformers chooses them, and reads the headers of safetensors files. No torch."""

import json
import re
import struct
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, fix_of
from ..files import open_file, read_file

MODEL, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"


def weight_files(folder: Path, setting: str) -> list[Path]:
    """The weight files of a model or an adapter that transformers and PEFT load from its folder, and no others.

    UserError if there are none, if an index is damaged or names a missing file, or if a name leads out of the folder. Links are followed
    wherever they lead (the hub's cache consists of links).
    """
    if (folder / "adapter_config.json").exists():
        if not (folder / ADAPTER).exists():
            raise UserError(f"{setting}: {folder} has no {ADAPTER} (pickled weights are not loaded); save it with safetensors")
        return [folder / ADAPTER]
    named = read_json(folder / "config.json", setting).get("transformers_weights") if (folder / "config.json").exists() else None
    name = _inside(folder, named, "config.json (transformers_weights)", setting) if named is not None else None
    name = name or next((one for one in (MODEL, INDEX) if (folder / one).is_file()), None)
    if name is None:
        raise UserError(f"{setting}: {folder} has {_instead(folder)}")
    if not (folder / name).is_file():
        raise UserError(f"{setting}: {folder} has no {name}, which its config.json names; fetch or copy it again")
    return _shards(folder, name, setting) if name.endswith(".index.json") else [folder / name]


def _shards(folder: Path, index: str, setting: str) -> list[Path]:
    mapping = read_json(folder / index, setting).get("weight_map")
    if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
        raise UserError(f"{setting}: {folder / index} has no weight_map from tensors to files; fetch or copy it again")
    names = sorted({_inside(folder, name, index, setting) for name in mapping.values()})
    if lacking := [name for name in names if not (folder / name).is_file()]:
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise UserError(f"{setting}: {folder} has no {lacking[0]}{more}, which its {index} names; fetch or copy it again")
    return [folder / name for name in names]


def _inside(folder: Path, name: object, where: str, setting: str) -> str:
    """A file's name from a model's folder. UserError unless it is a safetensors file (or its index) in that folder or below."""
    parts = Path(name).parts if isinstance(name, str) else ("..",)
    if ".." in parts or Path(*parts).is_absolute():
        raise UserError(f"{setting}: {folder}'s {where} names {name!r}, which is not in that folder; use a model whose files lie together")
    if not name.endswith((".safetensors", ".safetensors.index.json")):
        raise UserError(f"{setting}: {folder}'s {where} names {name!r}; only safetensors files are loaded")
    return name


def _instead(folder: Path) -> str:
    """A description of what a folder without weights holds."""
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    if other:
        return f"neither {MODEL} nor {INDEX}, which transformers loads; it holds {other[0]}: rename it if these are the weights"
    if pickled:
        return f"only pickled weights ({pickled[0].name}), which are not loaded; convert them to safetensors"
    return f"no weights; it holds {some(folder)}"


def some(folder: Path) -> str:
    """A few of the names in a folder, for a message."""
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"


def read_json(path: Path, setting: str) -> dict:
    """The object in a JSON file. UserError if it cannot be read, or is something else."""
    try:
        found = json.loads(read_file(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{setting}: {path} cannot be read ({error}); {fix_of(error, 'copy it again')}") from error
    if not isinstance(found, dict):
        raise UserError(f"{setting}: {path} holds {type(found).__name__}, expected an object of settings; copy it again")
    return found


def refuse_what_is_no_file(folder: Path, setting: str) -> None:
    """UserError for a folder or a broken link with the name of a model's file: libraries would continue as if it were not there."""
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".model", ".txt", ".safetensors") and not path.is_file():
            what = "a folder" if path.is_dir() else "a link that leads nowhere" if path.is_symlink() else "no file"
            raise UserError(f"{setting}: {path} is {what}, and has the name of a file of a model; copy it again, or remove it")


def tensors(path: Path) -> dict[str, dict]:
    """The header of a safetensors file: {name: {dtype, shape, data_offsets, start, stop}}. start and stop are byte positions in the file.

    ValueError if it is damaged.
    """
    with open_file(path) as file:
        size = path.stat().st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{path} is truncated")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = 8 + length + max((t["data_offsets"][1] for t in header.values()), default=0)
            found = {
                name: dict(t, start=8 + length + t["data_offsets"][0], stop=8 + length + t["data_offsets"][1], shape=list(t["shape"]))
                for name, t in header.items()
            }
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged (its header cannot be read: {type(error).__name__})") from None
    if end != size:
        raise ValueError(f"{path} is {size} bytes and should be {end}")
    return found


def headers(folder: Path, setting: str) -> dict[str, dict]:
    """The tensors of all weight files of a folder, as `tensors` gives them. UserError for a damaged file."""
    found = {}
    for path in weight_files(folder, setting):
        try:
            found |= tensors(path)
        except ValueError as error:
            raise UserError(f"{setting}: {error}; fetch or copy it again") from None
    return found


def modules_are_named(folder: Path, targets: str | Sequence[str], copies: Sequence[str]) -> bool:
    """Whether the weight files have all modules of an adapter by name: `targets` (student.lora.target_modules) and `copies` (modules_to_save)."""
    if targets == "all-linear" and not copies:
        return True
    try:
        stored = {key.rpartition(".")[0] for key in headers(folder, "student.model")}
        known = not isinstance(targets, str) or targets == "all-linear" or any(re.fullmatch(targets, where) for where in stored)
    except (UserError, OSError, re.error):  # found again when the model is loaded
        return False
    listed = (*(() if isinstance(targets, str) else targets), *copies)
    return known and all(any(f".{where}".endswith(f".{one}") for where in stored) for one in listed)
