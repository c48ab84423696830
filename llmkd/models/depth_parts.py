"""Students with fewer encoder and decoder layers than their base (`student.layers: {encoder: all, decoder: [0, 3]}`)."""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..config.recipe import PartLayers
from ..errors import UserError, brief
from ..files import temporary_folder
from ..model_folder.files import ModelFiles
from ..model_folder.layers import layer_words, write_config, write_lists
from ..model_folder.weights import headers
from .depth import SETTING, evenly, made, named, shape_of

#: The names of the numbers of layers in config.json, in different families.
_COUNTS = {"encoder": ("encoder_layers", "num_layers", "num_encoder_layers"), "decoder": ("decoder_layers", "num_decoder_layers")}
#: A further name that must agree with the encoder's number, if config.json has it.
_AS_ENCODER = "num_hidden_layers"


def cut_parts(files: ModelFiles, wanted: PartLayers) -> ModelFiles:
    """The files of an encoder-decoder model with only the `wanted` layers, which are written unless cached. UserError if that is not possible."""
    if files.adapter:
        raise UserError(
            f"{SETTING}: student.model is an adapter, which belongs to all layers of its base; merge it first, and name that folder"
        )
    config, kept = smaller_config(files, wanted), kept_parts(files, wanted)
    words = _words(kept)

    def write(part: Path) -> None:
        prefixes = _prefixes(files, config, kept)
        write_lists(files.base, part, config, {prefixes[one]: own for one, own in kept.items()}, "student.model")

    return made(files, {part: list(own) for part, own in kept.items()}, words, write)


def smaller_config(files: ModelFiles, wanted: PartLayers) -> dict:
    """The configuration of the model with only the `wanted` layers. UserError if these are all of them."""
    counts, kept = {part: _count(files.config, part) for part in _COUNTS}, kept_parts(files, wanted)
    if all(len(kept[part]) == counts[part][1] for part in kept):
        raise UserError(f"{SETTING}: keeps all layers of student.model; leave it out")
    config = files.config | {name: len(kept[one]) for one, (name, _) in counts.items()}
    return config | ({_AS_ENCODER: len(kept["encoder"])} if _AS_ENCODER in config else {})


def kept_parts(files: ModelFiles, wanted: PartLayers) -> dict[str, tuple[int, ...]]:
    """The layers (from 0) that are kept, by part."""
    return {part: _kept(getattr(wanted, part), _count(files.config, part)[1], part) for part in _COUNTS}


def described(files: ModelFiles, wanted: PartLayers) -> str:
    return f"{_words(kept_parts(files, wanted))} of {named(files.base)}"


def _words(kept: dict[str, tuple[int, ...]]) -> str:
    return " and ".join(f"{part} {layer_words(own)}" for part, own in kept.items())


def _count(config: dict, part: str) -> tuple[str, int]:
    found = [name for name in _COUNTS[part] if type(config.get(name)) is int]
    if len(found) != 1:
        raise UserError(
            f"{SETTING}: the config.json of student.model ({config.get('model_type')}) does not say how many layers its {part} has; leave it out, or "
            "use an encoder-decoder model"
        )
    return found[0], config[found[0]]


def _kept(wanted: str | int | tuple[int, ...], count: int, part: str) -> tuple[int, ...]:
    """The layers (from 0) of a part that are kept."""
    if wanted == "all":
        return tuple(range(count))
    if isinstance(wanted, int):
        if wanted > count:
            raise UserError(f"{SETTING}.{part}: found {wanted}, but the {part} of student.model has {count} layers; lower it")
        return evenly(wanted, count)
    if beyond := [number for number in wanted if number >= count]:
        raise UserError(f"{SETTING}.{part}: found layer {beyond[0]}, but the {part} of student.model has {count} layers, 0 to {count - 1}")
    return wanted


def _prefixes(files: ModelFiles, config: dict, kept: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """The prefix of the tensors of each part's layers in the files. UserError if a layer would change.

    Both models are built without weights: a kept layer must have the same modules and parameters in the smaller one.
    """
    from transformers import AutoConfig, AutoModel

    kind = config.get("model_type")
    try:
        with temporary_folder("config") as folder, torch.device("meta"):
            write_config(folder, config)
            whole = AutoModel.from_config(AutoConfig.from_pretrained(files.base, trust_remote_code=False))
            few = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        raise UserError(f"{SETTING}: a {kind} of these layers cannot be built ({brief(error)}); leave it out, or keep others") from error
    out, names = {}, list(headers(files.base, "student.model"))
    for part, own in kept.items():
        layers = {model: _layers(model, part) for model in (whole, few)}
        if layers[whole] is None or layers[few] is None or len(layers[few][1]) != len(own):
            raise UserError(f"{SETTING}: the {part} of student.model ({kind}) has no list of layers; leave it out")
        for now, before in enumerate(own):
            a, b = shape_of(layers[whole][1][before]), shape_of(layers[few][1][now])
            if a != b:
                other = min(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
                raise UserError(
                    f"{SETTING}.{part}: layer {before} of student.model ({kind}) would not be the same as layer {now} ({other}); keep another in its "
                    "place, such as the first one"
                )
        found = {at[0] for name in names if (at := re.match(rf"(.*\.)?{re.escape(layers[whole][0])}\.(?=\d+\.)", name))}
        if len(found) != 1:
            raise UserError(f"{SETTING}: the tensors of the {part}'s layers in {files.base} cannot be told by their names; leave it out")
        (out[part],) = found
    return out


def _layers(model: nn.Module, part: str) -> tuple[str, nn.ModuleList] | None:
    """The name of a part's list of layers in the model, and the list; None without one."""
    module: Callable = model.get_encoder if part == "encoder" else model.get_decoder
    inside = module()
    where = next((name for name, one in model.named_modules() if one is inside), part)
    lists = [(name, one) for name, one in inside.named_modules() if isinstance(one, nn.ModuleList) and "." not in name]
    longest = max(lists, key=lambda one: len(one[1]), default=None)
    return longest and (f"{where}.{longest[0]}", longest[1])
