"""Adapter folders that PEFT cannot read as they are: a copy under PEFT's names if tensors have others, and errors for a base of another size."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from ..console import info, warn
from ..errors import UserError
from ..files import temporary_folder
from ..model_folder.files import ModelFiles
from ..model_folder.weights import ADAPTER, read_json
from .adapter_names import layer_of, regular_module, regular_names
from .families import base_of


@contextlib.contextmanager
def as_peft_names_it(model: nn.Module, folder: Path, weights: dict[str, Tensor], setting: str) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """The adapter's folder and tensors; if PEFT would name the tensors differently, a temporary copy under PEFT's names, with a note.

    If the adapter's configuration names modules differently than the base, the copy names those that have tensors instead.
    """
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from safetensors.torch import save_file

    config = read_json(folder / "adapter_config.json", setting)
    prefix, modules = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.get("peft_type")), _own_modules(model)
    names = regular_names(weights, modules, prefix)
    if not (changed := [name for name in weights if names[name] != name]):
        yield folder, weights
        return
    renamed = {names[name]: value for name, value in weights.items()}
    adapted = sorted({layer for name in renamed if (layer := layer_of(name, prefix))})
    if not set(adapted) <= _targeted(config.get("target_modules"), modules):
        config["target_modules"] = adapted
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(name), dict):
            config[name] = {
                _as_here(key, modules, f"{setting}: {folder}/adapter_config.json's {name}"): value for key, value in config[name].items()
            }
    with temporary_folder("adapter") as copy:
        (copy / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(renamed, copy / ADAPTER, {"format": "pt"})
        yield copy, renamed
    info(
        f"{setting}: {len(changed)} of the tensors of {folder} have other names than PEFT's, such as {changed[0]}; it is read as {names[changed[0]]}"
    )


def _own_modules(model: nn.Module) -> list[str]:
    """The names of the base's modules, without those that adapters added."""
    modules = list(base_of(model).named_modules())
    put_on = tuple(f"{name}." for name, module in modules if hasattr(module, "base_layer") or hasattr(module, "original_module"))
    return [name for name, _ in modules if not (put_on and name.startswith(put_on))]


def _targeted(targets: object, modules: list[str]) -> set[str]:
    """The modules that an adapter's `target_modules` selects: a pattern for whole names, or a list of their ends."""
    if targets == "all-linear" or not targets:
        return set(modules)
    if isinstance(targets, str):
        return {name for name in modules if re.fullmatch(targets, name)}
    return {name for name in modules if any(f".{name}".endswith(f".{one}") for one in targets)}


def _as_here(key: str, modules: list[str], whose: str) -> str:
    """A key of rank_pattern or alpha_pattern, in the names of this base. UserError if it matches no module: PEFT would ignore it."""
    if any(re.fullmatch(rf"(.*\.)?({key})", name) for name in modules):
        return key
    if found := regular_module(key, modules):
        return found
    raise UserError(f"{whose} has {key}, which matches no module of this base; rename it as the base names its modules")


def note_unknown(config: dict, whose: str) -> None:
    """UserError for a type of adapter that PEFT does not know; a warning for options that it does not know and ignores."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UserError(
            f"{whose} is an adapter of type {kind}, which PEFT {peft.__version__} does not know; update PEFT, or use another adapter"
        )
    known = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
    if unknown := sorted(name for name, value in config.items() if value and name not in known):
        warn(f"warning: {whose}/adapter_config.json sets {', '.join(unknown)}, which PEFT {peft.__version__} does not know and ignores")


def _base_setting(setting: str) -> str:
    """The name of the setting that gives the base of the adapter in `setting`."""
    return f"{setting.removesuffix('.model')}.base" if setting.endswith(".model") else "base_model_name_or_path in adapter_config.json"


_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch.Size\(\[(\d+), (\d+)\]\) from checkpoint, the shape in current model is torch.Size\(\[(\d+), (\d+)\]\)"
)


def other_width(error: Exception, files: ModelFiles, setting: str) -> UserError | None:
    """The error for a LoRA adapter that was trained on a narrower or wider base; None for any other error of PEFT."""
    for name, *sizes in _MISMATCH.findall(str(error)):
        theirs, own = sizes[:2], sizes[2:]
        side = 1 if "lora_A" in name else 0  # the other dimension is the rank
        if theirs[side] != own[side]:
            return UserError(
                f"{setting}: the adapter {files.adapter} was trained on another base than {files.base}: {name} has {theirs[side]} "
                f"{'inputs' if side else 'outputs'}, and this base {own[side]}; set {_base_setting(setting)} to its own base"
            )
    return None


def more_tokens(model: nn.Module, weights: dict[str, Tensor], files: ModelFiles, setting: str) -> UserError | None:
    """The error for an adapter that was trained after tokens were added to its base; None for any other adapter."""
    try:
        rows = base_of(model).get_input_embeddings().weight.shape[0]
    except Exception:  # PEFT may have left the model half built
        return None
    for name, value in weights.items():
        if not re.search(r"embed_tokens|wte|embed_in|lm_head|embed_out", name) or "lora_A" in name or not value.dim():
            continue
        own = value.shape[-1 if "lora_embedding_A" in name else 0]
        if own > rows and "lora_embedding_B" not in name:
            return UserError(
                f"{setting}: the adapter {files.adapter} has {own} rows in {name}, but its base {files.base} has {rows}: {own - rows} tokens were "
                f"added before it was trained; enlarge the base likewise (transformers: model.resize_token_embeddings({own})), save it with the "
                f"adapter's tokenizer, and name that folder as {_base_setting(setting)}"
            )
    return None
