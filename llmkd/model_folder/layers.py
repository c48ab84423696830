"""Makes an ordinary smaller model of some layers of a model, from its files alone: the other layers' tensors are left out, and the rest are
renumbered.

No torch. `models/depth.py` knows which layers of a family may be left out.
"""

import copy
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..files import open_file
from .files import TOKENIZER
from .weights import MODEL, headers, tensors, weight_files

#: The names that families have for the number of layers in config.json.
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
#: The name of a layer's tensor: the text before the number, the number, the text after it.
NUMBERED = re.compile(r"(.*?\.)?(\d+)\.(.+)")
_CHUNK = 16 << 20


def layer_count(config: dict, setting: str = "student.layers") -> tuple[str, int]:
    """(name, value) of the number of layers in a config.json. UserError if there is none, or the model has more than one stack of layers."""
    if "text_config" in config or config.get("is_encoder_decoder"):
        what = "more parts than one stack of layers (text_config)" if "text_config" in config else "an encoder and a decoder"
        raise UserError(f"{setting}: student.model ({config.get('model_type')}) has {what}, which llmkd does not cut; leave it out")
    found = [name for name in COUNTS if type(config.get(name)) is int]
    if len(found) != 1:
        raise UserError(
            f"{setting}: the config.json of student.model ({config.get('model_type')}) does not say how many layers it has; leave it out"
        )
    return found[0], config[found[0]]


def layer_words(kept: Sequence[int]) -> str:
    return f"layer{'s' * (len(kept) > 1)} {', '.join(map(str, kept))}"


def cut_config(config: dict, kept: tuple[int, ...], lists: dict[str, list]) -> dict:
    """The config.json of the smaller model. `lists`: the settings with one entry for each layer of the whole model."""
    name, _ = layer_count(config)
    return copy.deepcopy(config) | {name: len(kept)} | {key: [values[i] for i in kept] for key, values in lists.items()}


def write_config(folder: Path, config: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_layers(folder: Path, to: Path, config: dict, kept: tuple[int, ...], count: int, setting: str) -> None:
    """Write a model with this config.json and the layers `kept` of the model in `folder` into the empty folder `to`.

    Tensors are copied byte by byte. UserError if the tensors of `count` layers cannot be recognised by their names.
    """
    prefix = _prefix_of_layers(list(headers(folder, setting)), count, folder, setting)
    write_lists(folder, to, config, {prefix: kept}, setting)


def write_lists(folder: Path, to: Path, config: dict, kept: dict[str, tuple[int, ...]], setting: str) -> None:
    """The same for a model with several lists of layers. `kept`: {beginning of the names of a list's tensors: layers}; other lists stay whole."""
    new = {prefix: {old: number for number, old in enumerate(own)} for prefix, own in kept.items()}
    names = {}
    for name in headers(folder, setting):
        at = NUMBERED.fullmatch(name)
        if not at or (at[1] or "") not in new:
            names[name] = name
        elif int(at[2]) in (numbers := new[at[1] or ""]):
            names[name] = f"{at[1] or ''}{numbers[int(at[2])]}.{at[3]}"
    _write_tensors(weight_files(folder, setting), to / MODEL, names)
    write_config(to, config)
    for pattern in TOKENIZER:
        for path in sorted(folder.glob(pattern)):
            if path.name not in ("config.json", "llmkd.json") and not path.name.endswith(".safetensors.index.json"):
                shutil.copyfile(path, to / path.name)


def _prefix_of_layers(names: list[str], count: int, folder: Path, setting: str) -> str:
    """The beginning of the names of the layers' tensors, up to the number."""
    numbers: dict[str, set[int]] = {}
    for name in names:
        if at := NUMBERED.fullmatch(name):
            numbers.setdefault(at[1] or "", set()).add(int(at[2]))
    right = [prefix for prefix, found in numbers.items() if found == set(range(count))]
    if len(right) != 1 or len(numbers) != 1:
        listed = ", ".join(f"{prefix}0 to {max(found)}" for prefix, found in sorted(numbers.items())) or "none"
        raise UserError(f"{setting}: {folder} has tensors of the layers {listed}, expected one list of {count}; its layers cannot be cut")
    return right[0]


def _write_tensors(files: list[Path], to: Path, names: dict[str, str]) -> None:
    """Copy tensors under new names from safetensors files into one."""
    header, at, pieces = {"__metadata__": {"format": "pt"}}, 0, []
    for path in files:
        for name, t in sorted(tensors(path).items(), key=lambda item: item[1]["start"]):
            if name in names:
                size = t["stop"] - t["start"]
                header[names[name]] = {"dtype": t["dtype"], "shape": t["shape"], "data_offsets": [at, at + size]}
                pieces.append((path, t["start"], size))
                at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(to, "xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for path, start, size in pieces:
            with open_file(path) as file:
                file.seek(start)
                while size:
                    chunk = file.read(min(size, _CHUNK))
                    if not chunk:
                        raise OSError(f"{path} ended while it was read")
                    out.write(chunk)
                    size -= len(chunk)
