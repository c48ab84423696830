"""Loads adapters from a folder onto a base and saves them: with PEFT, and with the checks that it does not make."""

import copy
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.recipe import Lora, Quantization, Student
from ..console import count, info, warn
from ..errors import UserError, brief
from ..model_folder import generation
from ..model_folder.files import ModelFiles
from ..model_folder.identity import record_of, unchanged, verify
from ..model_folder.weights import ADAPTER, read_json, tensors
from .adapter_files import as_peft_names_it, more_tokens, note_unknown, other_width

#: PEFT's types that change the model's inputs or need PEFT's own forward pass, and do not only change weights.
_NO_WEIGHTS = (
    *("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT", "CARTRIDGE", "XLORA"),
    *("POLY", "SHADOW"),
)
#: Variants of LoRA that need PEFT's own forward pass, by the option that selects them.
_VARIANTS = {"alora_invocation_tokens": "aLoRA", "arrow_config": "Arrow"}
#: Initialisations of LoRA that change the base's weights whenever the adapter is loaded.
_CHANGE_BASE = ("pissa", "olora", "OLORA", "corda", "loftq", "lora_ga", "mica")


def load(model: nn.Module, files: ModelFiles, setting: str, trainable: bool = False, name: str = "default") -> nn.Module:
    """The base with a folder's adapter on it. UserError unless every tensor is finite and fits the base by name and shape.

    PEFT itself silently loads an adapter of another depth or of another base. If the model has adapters already, this one is added to them
    as `name`.
    """
    config = read_json(files.adapter / "adapter_config.json", setting)
    _refuse_unsupported(config, model, files, setting, name)
    verify(files.base, files.adapter, setting)
    adapted, weights = _attach(model, files, setting, trainable, name)
    for key, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{setting}: the adapter {files.adapter} holds values that are not finite, in {key}; train or copy it again")
    matched = _matched(adapted, weights, files, setting, name)
    _read_in_full(adapted, matched, name, f"{setting}: the adapter {files.adapter}")
    if (files.adapter / generation.NAME).is_file():  # end tokens of the adapter's training data, not the base's
        from transformers import GenerationConfig

        adapted.get_base_model().generation_config = GenerationConfig.from_pretrained(files.adapter)
    return adapted


def _refuse_unsupported(config: dict, model: nn.Module, files: ModelFiles, setting: str, name: str) -> None:
    """UserError for an adapter that is more than a change of weights, or that changes a base that other adapters use."""
    kind = next((name for key, name in _VARIANTS.items() if config.get(key)), config.get("peft_type"))
    if kind in _VARIANTS.values() or kind in _NO_WEIGHTS:
        raise UserError(
            f"{setting}: {files.adapter} is an adapter of type {kind}, which is more than a change of weights; only those, such as LORA, are supported"
        )
    note_unknown(config, f"{setting}: {files.adapter}")
    refuse_dora_in_8bit(model, config.get("use_dora"), setting.removesuffix(".model"))
    init = str(config.get("init_lora_weights"))
    if init.startswith("pissa_niter"):
        raise UserError(
            f"{setting}: {files.adapter} was initialised by {init}, which changes the base at random each time it is loaded; save it as a plain "
            "adapter with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    changes = init if init in _CHANGE_BASE else next((one for one in ("kasa_config", "layer_replication") if config.get(one)), None)
    if name != "default" and changes:
        raise UserError(
            f"{setting}: {files.adapter} was initialised by {changes}, which changes the base; train it alone, not together with others"
        )


def _attach(model: nn.Module, files: ModelFiles, setting: str, trainable: bool, name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """PEFT's model with the adapter on it, and the tensors of the adapter's file."""
    from peft import PeftModel
    from safetensors.torch import load_file

    path, weights = files.adapter / ADAPTER, {}
    try:
        tensors(path)  # raises where the file is truncated
        weights = load_file(path)
        with unchanged([files.adapter], setting), as_peft_names_it(model, files.adapter, weights, setting) as (folder, weights):
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=name, is_trainable=trainable)
                return model, weights
            return PeftModel.from_pretrained(model, folder, adapter_name=name, is_trainable=trainable), weights
    except UserError:
        raise
    except Exception as error:
        if hint := more_tokens(model, weights, files, setting) or other_width(error, files, setting):
            raise hint from error
        raise UserError(
            f"{setting}: the adapter {files.adapter} cannot be loaded ({brief(error)}); check its adapter_config.json and weights, or train it again"
        ) from error


def _matched(adapted: nn.Module, weights: dict[str, Tensor], files: ModelFiles, setting: str, name: str) -> dict[str, Tensor]:
    """The file's tensors by their names in the model. UserError for a tensor that is missing or left over, or has another shape."""
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    renamed = {key: key if key in expected else _renamed(adapted, key) for key in weights}
    found = {renamed[key] if renamed[key] in expected else key: value for key, value in weights.items()}
    copies = {key for key in found.keys() - expected.keys() if _is_base_weight(adapted, key, found[key])}
    lacking, left = expected.keys() - found.keys(), found.keys() - expected.keys() - copies
    sides = [
        f"{what} {count(len(keys), 'tensor')}, such as {min(keys)}"
        for what, keys in (("lacks", lacking), ("holds left-over", left))
        if keys
    ]
    if sides:
        raise UserError(
            f"{setting}: the adapter {files.adapter} {', and '.join(sides)}, for the base {files.base}; it belongs to another base, or its tensors "
            "have names that PEFT does not give them"
        )
    for key, value in found.items():
        if key in expected and value.shape != expected[key].shape:
            raise UserError(
                f"{setting}: the adapter {files.adapter} has {key} in shape {list(value.shape)}, but {files.base} needs {list(expected[key].shape)}; "
                "it belongs to another base"
            )
    return {key: found[key] for key in expected}


def _read_in_full(adapted: nn.Module, weights: dict[str, Tensor], name: str, whose: str) -> None:
    """Copy the tensors that PEFT left at their initial values: it renames tensors like those of a checkpoint, and drops unknown names."""
    from peft import get_peft_model_state_dict

    for attempt in range(2):
        own = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
        lost = [key for key, value in weights.items() if not torch.equal(own[key].cpu(), value.to(own[key].dtype))]
        if lost and attempt:
            raise UserError(
                f"{whose} cannot be read: PEFT gives {len(lost)} tensors, such as {min(lost)}, other values than the file has; save it again with this version of PEFT"
            )
        for key in lost:
            own[key].copy_(weights[key])


def save(adapted: nn.Module, folder: Path, name: str = "default") -> None:
    """Save the adapter with PEFT, under names with which PEFT reads it back: PEFT's own do not work for every family."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    config = adapted.peft_config[name]
    adapted.peft_config[name] = _in_order(config)
    adapted.create_or_update_model_card = lambda folder: None  # a run writes its own card, and an adapter for a server needs none
    try:
        adapted.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    finally:
        adapted.peft_config[name] = config
        del adapted.create_or_update_model_card
    for file in (folder / name).glob("*"):  # PEFT saves an adapter that is not "default" in a subfolder
        file.rename(folder / file.name)
    shutil.rmtree(folder / name, ignore_errors=True)
    path = folder / "adapter_model.safetensors"
    if set_peft_model_state_dict(adapted, load_file(path), adapter_name=name).unexpected_keys:
        save_file({_renamed(adapted, key, back=True): value for key, value in load_file(path).items()}, path, {"format": "pt"})
        if lost := set_peft_model_state_dict(adapted, load_file(path), adapter_name=name).unexpected_keys:
            warn(
                f"note: {folder}: PEFT alone does not read back {len(lost)} of its tensors, such as {lost[0]}; llmkd does: "
                "share the model that llmkd export writes instead"
            )


def _in_order(config):
    """A copy of an adapter's configuration with sorted lists in place of sets, whose order differs between processes."""
    out = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(out, name, sorted(value))
    return out


def _renamed(model: nn.Module, key: str, back: bool = False) -> str:
    """The name in the model of a tensor that a transformers checkpoint calls `key`, as PEFT renames an adapter's; with `back` the reverse."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [r for r in get_model_conversion_mapping(model.get_base_model()) if isinstance(r, WeightRenaming)]
    return rename_source_key(key, [r.reverse_transform() for r in reversed(renamings)] if back else renamings, [])[0]


def _is_base_weight(model: nn.Module, name: str, value: Tensor) -> bool:
    """Whether a tensor is the base's own head or embedding, which PEFT saves together with an adapter on it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = parameters.get(name, parameters.get(name.replace(".weight", ".base_layer.weight")))
    return own is not None and own.shape == value.shape and torch.equal(own.cpu(), value.to(own.dtype))


def is_lora_alone(files: ModelFiles, setting: str) -> bool:
    """Whether a folder's adapter is only two matrices per layer, so that loading it does not read the base's values."""
    config = read_json(files.adapter / "adapter_config.json", setting)
    more = ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "lora_bias")
    plain = (
        config.get("peft_type") == "LORA"
        and config.get("bias", "none") == "none"
        and isinstance(config.get("init_lora_weights", True), bool)
    )
    return plain and not any(config.get(one) for one in more) and not any(value for one, value in config.items() if one.endswith("_config"))


def refuse_dora_in_8bit(model: nn.Module, dora: bool | None, who: str) -> None:
    if dora and getattr(model, "is_loaded_in_8bit", False):
        raise UserError(f"{who}.quantization: found int8 with a DoRA adapter, whose second forward pass fails in PEFT; use nf4")


def load_to_train(model: nn.Module, files: ModelFiles, settings: Student, name: str) -> nn.Module:
    """The base with a folder's adapter, to continue training it. UserError if `student.lora` differs from the adapter."""
    config = read_json(files.adapter / "adapter_config.json", "student.model")
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"student.model: {settings.model} is an adapter of type {config.get('peft_type')}; training can only continue with LORA"
        )
    _refuse_other_settings(settings, config)
    note_quantization(files, settings.quantization, "student")
    adapted = load(model, files, "student.model", trainable=True, name=name)
    if settings.base:
        adapted.peft_config[name].base_model_name_or_path = str(files.base.resolve())
    info(f"student: continuing with the adapter {settings.model} (rank {config.get('r')}, alpha {config.get('lora_alpha')})")
    return adapted


def _refuse_other_settings(settings: Student, config: dict) -> None:
    """UserError if `student.lora` differs from the adapter; it names settings that are not defaults first."""
    lora, default = settings.lora, Lora()
    if lora is None or (
        lora == default and not Path(settings.model).is_dir()
    ):  # for a hub id the defaults were filled in, not set by the user
        return
    own = {
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dropout": config.get("lora_dropout"),
        "target_modules": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save") or (),
        "rslora": config.get("use_rslora", False),
        "dora": config.get("use_dora", False),
    }
    for name in sorted(own, key=lambda name: getattr(lora, name) == getattr(default, name)):
        here, there = getattr(lora, name), own[name]
        if name == "target_modules" and here == default.target_modules:
            continue
        same = set(here) == set(there) if isinstance(here, tuple) and isinstance(there, list | tuple) else here == there
        if there is not None and not same:
            raise UserError(
                f"student.lora.{name}: found {here}, but the adapter {settings.model} has {there}; leave student.lora out to continue training it"
            )


def note_quantization(files: ModelFiles, now: Quantization | None, who: str) -> None:
    """Print a note if the base is quantised differently than when the adapter was trained, which has learnt to correct those rounding errors."""
    then, now = record_of(files.adapter, f"{who}.model").get("quantization", now), now and now.type
    then = then["type"] if isinstance(then, dict) else then and then.type
    if then != now:
        was, now = then or "an unquantised base", now or "an unquantised one"
        warn(f"note: {who}.quantization: the adapter {files.adapter} was trained on {was}, and is used on {now}")
