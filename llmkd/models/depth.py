"""Students with fewer layers than their base (`student.layers`): which families allow it, which layers are kept, where the model is cached.

The smaller model is written as files before anything is loaded, so that it is an ordinary model for everything that follows: quantisation,
adapters, checkpoints, export and other tools. It is cached next to the token cache, and written again if it is missing or damaged.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..config.recipe import LayerChoice, PartLayers, Student
from ..console import info, warn
from ..errors import UserError, brief
from ..files import lock_file, read_sealed, remove_leftovers, temporary_folder, write_folder, write_sealed
from ..model_folder.files import ModelFiles, find, hub_origin, licence
from ..model_folder.identity import config_hash, fingerprint, verify, write_record
from ..model_folder.layers import cut_config, layer_count, layer_words, write_config, write_layers
from .block_influence import block_influence, most_influential
from .families import layers_of

SETTING = "student.layers"
#: Options of config.json that make a layer's output depend on its place or on the number of layers.
_BY_PLACE = ("scale_attn_by_inverse_layer_idx", "scale_depth", "num_kv_shared_layers", "num_nextn_predict_layers")
_PLAIN = (bool, int, float, str, type(None))


def find_student(settings: Student) -> ModelFiles | None:
    """The files of the student's model, cut to `student.layers` if these are known; None for new weights."""
    if not settings.model:
        return None
    files = find(settings.model, "student.model", settings.revision, settings.base)
    if isinstance(settings.layers, PartLayers):
        from .depth_parts import cut_parts

        return cut_parts(files, settings.layers)
    kept = kept_of(settings, files)
    return files if kept is None else cut(files, kept)


def kept_of(settings: Student, files: ModelFiles) -> tuple[int, ...] | None:
    """The layers that are kept; None if all are, or if they are yet to be measured. UserError for layers that the model does not have."""
    if settings.layers is None:
        return None
    if files.adapter:
        raise UserError(
            f"{SETTING}: student.model is an adapter, which belongs to all layers of its base; merge it first (llmkd export), and name that folder"
        )
    return kept_layers(settings.layers, layer_count(files.config)[1])


def cut(files: ModelFiles, kept: tuple[int, ...]) -> ModelFiles:
    """The files of a model with only the `kept` layers, which are written unless cached. UserError if the family does not allow it."""

    def write(part: Path) -> None:
        config = smaller_config(files.config, _whole_config(files), kept)
        write_layers(files.base, part, config, kept, layer_count(files.config)[1], "student.model")

    return made(files, list(kept), layer_words(kept), write)


def made(files: ModelFiles, kept: list | dict, words: str, write: Callable[[Path], None]) -> ModelFiles:
    """The cached files of a model with some layers of another; `write` writes them into a folder if they are not cached yet.

    kept, words  the layers, as a key and in words
    """
    base, setting = files.base, "student.model"
    verify(base, None, setting)
    key = [fingerprint(base, setting), config_hash(base, setting), kept, str(base.resolve())]
    folder = model_cache() / "models" / key_of(key)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not _is_whole(folder):
                remove_leftovers(folder.parent, folder.name)
                with write_folder(folder, replace=True) as part:
                    write(part)
                    (part / "README.md").write_text(_readme(files, words), encoding="utf-8")
                    write_record(part, setting, student="base", cut_from=named(base), layers=kept)
    except OSError as error:
        raise UserError(
            f"{SETTING}: the smaller model cannot be written to {folder.parent} ({error.strerror}); set LLMKD_CACHE to another folder"
        ) from error
    return find(str(folder), setting)


def described(kept: tuple[int, ...], whole: ModelFiles) -> str:
    """The kept layers and their base, in words."""
    return f"{layer_words(kept)} of the {layer_count(whole.config)[1]} of {named(whole.base)}"


def _is_whole(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        verify(folder, None, SETTING)
        return (folder / "llmkd.json").is_file()
    except UserError as error:
        warn(f"warning: {error.problems[0]}; it is written again")
        return False


def named(base: Path) -> str:
    """A base's name for people: its id on the hub with the commit, or its folder."""
    origin = hub_origin(base)
    return f"{origin[0]} ({origin[1]})" if origin else str(base.resolve())


def _readme(files: ModelFiles, words: str) -> str:
    front = "".join(f"{name}: {json.dumps(value)}\n" for name, value in licence(files.base).items())
    front = f"---\n{front}---\n" if front else ""
    return (
        f"{front}# {words.capitalize()} of {named(files.base)}\n\nAn ordinary transformers model: the other layers were left out, "
        "and nothing was trained. Made by llmkd (student.layers).\n"
    )


def kept_layers(wanted: tuple[int, ...] | LayerChoice, count: int, setting: str = SETTING) -> tuple[int, ...] | None:
    """The layers (from 0) that are kept of `count`; None if they are to be measured first.

    UserError for layers that the model does not have, and if none would be left out.
    """
    if isinstance(wanted, tuple):
        if beyond := [number for number in wanted if number >= count]:
            raise UserError(f"{setting}: found layer {beyond[0]}, but student.model has {count} layers, 0 to {count - 1}")
        chosen = wanted
    else:
        if wanted.count > count:
            raise UserError(f"{setting}.count: found {wanted.count}, but student.model has {count} layers; lower it")
        if wanted.count == count:
            chosen = tuple(range(count))
        elif wanted.by == "even":
            chosen = evenly(wanted.count, count)
        else:
            chosen = None
    if chosen is not None and len(chosen) == count:
        raise UserError(f"{setting}: keeps all {count} layers of student.model; leave it out")
    return chosen


def evenly(count: int, layers: int) -> tuple[int, ...]:
    """`count` evenly spaced numbers from 0 to `layers` - 1, including both; halves are rounded up. A single one is 0."""
    if count == 1:
        return (0,)
    return tuple((2 * i * (layers - 1) + (count - 1)) // (2 * (count - 1)) for i in range(count))


# ---- which families allow it


def smaller_config(config: dict, whole_config, kept: tuple[int, ...]) -> dict:
    """The config.json of the model with these layers. UserError if the layers of a family differ, or depend on their place.

    Both models are built without weights and compared. All layers of the whole model must have the same modules and parameters, and the
    modules of each kept layer must have the same plain values in the smaller model, except for its own index.

    config, whole_config  the whole model's config.json, and transformers' configuration made from it
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = config.get("model_type")
    for name in _BY_PLACE:
        if config.get(name):
            raise _unlike(kind, f"{name} makes what a layer computes depend on its place")
    count = layer_count(config)[1]
    lists = {
        name: list(value)
        for name, value in whole_config.to_dict().items()
        if isinstance(value, list | tuple) and len(value) == count and "layer" in name
    }
    smaller = cut_config(config, kept, lists)
    try:
        with temporary_folder("config") as folder, torch.device("meta"):
            write_config(folder, smaller)
            whole = AutoModelForCausalLM.from_config(whole_config)
            few = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        raise UserError(f"{SETTING}: a {kind} of these layers cannot be built ({brief(error)}); leave it out, or keep others") from error
    layers, new = layers_of(whole), layers_of(few)
    if layers is None or new is None or (len(layers), len(new)) != (count, len(kept)):
        raise _unlike(kind, "it has no list of layers")
    first, owners = shape_of(layers[0]), {}
    for i, layer in enumerate(layers):
        if (own := shape_of(layer)) != first:
            other = min(name for name in first.keys() | own.keys() if first.get(name) != own.get(name))
            raise _unlike(kind, f"layer {i} is not like layer 0 in {other or 'its kind'}")
        for parameter in layer.parameters():
            if owners.setdefault(id(parameter), i) != i:
                raise _unlike(kind, f"layers {owners[id(parameter)]} and {i} share a parameter")
    for now, before in enumerate(kept):
        if place := _difference(layers[before], new[now], before, now):
            raise _unlike(kind, f"layer {before} would not compute as it did ({place})")
    of_whole, of_few = _outside_layers(whole, layers), _outside_layers(few, new)
    if of_whole != of_few:
        place = min(name for name in of_whole.keys() | of_few.keys() if of_whole.get(name) != of_few.get(name))
        raise _unlike(kind, f"{place} depends on the number of layers")
    return smaller


def _whole_config(files: ModelFiles):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(files.base, trust_remote_code=False)


def _unlike(kind: str | None, why: str) -> UserError:
    return UserError(f"{SETTING}: the layers of student.model ({kind}) cannot be left out: {why}; leave it out, or use another model")


def shape_of(layer: nn.Module) -> dict[str, object]:
    """The kinds of a layer's modules and the shapes of its parameters, by name."""
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.named_parameters()}
    return {name: type(module).__name__ for name, module in layer.named_modules()} | shapes


def _difference(old: nn.Module, new: nn.Module, before: int, now: int) -> str | None:
    """The name of the first plain value in a layer's modules that changes with its index, except the index itself; None if there is none."""
    was, has = _values(old), _values(new)
    for name in sorted(was.keys() | has.keys()):
        a, b = was.get(name), has.get(name)
        if (a != b or type(a) is not type(b)) and not (type(a) is type(b) is int and (a, b) == (before, now)):
            return name
    return None


def _values(module: nn.Module) -> dict[str, object]:
    return {
        f"{where}.{name}".lstrip("."): value
        for where, one in module.named_modules()
        for name, value in vars(one).items()
        if isinstance(value, _PLAIN) and not name.startswith("_")
    }


def _outside_layers(model: nn.Module, layers: nn.ModuleList) -> dict[str, tuple]:
    """The shapes of a model's parameters and buffers outside its layers, by name."""
    inside = {id(tensor) for tensor in (*layers.parameters(), *layers.buffers())}
    every = (*model.named_parameters(), *model.named_buffers())
    return {name: tuple(tensor.shape) for name, tensor in every if id(tensor) not in inside}


# ---- which layers matter


def choose_layers(settings: Student, files: ModelFiles, examples: list[np.ndarray]) -> tuple[int, ...]:
    """The layers of `student.layers: {count, by: block_influence}`, measured on token ids [T] of some training examples.

    The measurement is cached, so that all processes of a launch, the runs of a sweep and a resumed run choose the same layers.
    """
    from . import pretrained

    key = [fingerprint(files.base, "student.model"), config_hash(files.base, "student.model"), settings.dtype, settings.attention]
    path = model_cache() / "influence" / f"{key_of([*key, [ids.tolist() for ids in examples]])}.json"
    with locked(path):
        try:
            found = read_sealed(path)["influence"]
        except (OSError, ValueError, KeyError):
            smaller_config(files.config, _whole_config(files), (0,))  # refuse the family before its weights are loaded
            model = pretrained.load_pretrained(
                files.base, "student.model", settings.dtype, settings.attention, "cuda" if torch.cuda.is_available() else "cpu"
            ).eval()
            found = block_influence(model, [torch.from_numpy(ids_T).long() for ids_T in examples])
            with contextlib.suppress(OSError):  # without a cache it is measured again next time
                path.parent.mkdir(parents=True, exist_ok=True)
                write_sealed(path, {"influence": found})
    kept = most_influential(found, settings.layers.count)
    shown = ", ".join(f"{i}: {value:.3f}" for i, value in enumerate(found))
    info(f"student.layers: block influence on {len(examples)} training examples: {shown}")
    return kept


# ---- the cache


def model_cache() -> Path:
    return Path(os.environ.get("LLMKD_CACHE") or Path.home() / ".cache" / "llmkd").expanduser()


def in_cache(base: Path) -> bool:
    """Whether a base is one of the smaller models in llmkd's cache, and exists nowhere else."""
    return base.resolve().parent == (model_cache() / "models").resolve()


def key_of(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@contextlib.contextmanager
def locked(entry: Path) -> Iterator[None]:
    """A lock that one process of this machine can hold at a time; without effect on file systems that cannot lock."""
    try:
        place = entry.parent.with_name("locks")
        place.mkdir(parents=True, exist_ok=True)
        file = lock_file(place / entry.name, wait=True)
    except OSError:
        yield
        return
    with file:
        yield
