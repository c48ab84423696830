"""Adapters from a folder, or fresh ones, onto a base by PEFT, strictly: what it would load without a word is refused here."""

import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.recipe import Lora, Quantization
from ..config.recipe import Student as StudentSettings
from ..console import info, warn
from ..errors import UserError, brief
from ..model_files import ModelFiles, read_json, record_of, tensors
from .families import beside_text

#: PEFT's types that change what the model reads, or need PEFT's own forward pass, and not (only) its weights.
_NO_WEIGHTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "ADAPTION_PROMPT", "CARTRIDGE", "XLORA")
#: Ways to initialise LoRA that take something out of the base's weights, whenever the adapter is loaded.
_CHANGE_BASE = ("pissa", "olora", "OLORA", "corda", "loftq", "lora_ga", "mica")


def load(model: nn.Module, files: ModelFiles, setting: str, trainable: bool = False, name: str = "default") -> nn.Module:
    """PEFT loads an adapter of another depth or base without a word: the keys must match exactly, and be finite.

    A model that has adapters already gets this one beside them, as `name`.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    path = files.adapter / "adapter_model.safetensors"
    config = read_json(files.adapter / "adapter_config.json", setting)
    kind = "aLoRA" if config.get("alora_invocation_tokens") else config.get("peft_type")
    if kind == "aLoRA" or kind in _NO_WEIGHTS:
        raise UserError(
            f"{setting}: {files.adapter} is an adapter of type {kind}, which is more than a change of weights; only those, such as LORA, are supported"
        )
    _refuse_dora_in_8bit(model, config.get("use_dora"), setting.removesuffix(".model"))
    init = str(config.get("init_lora_weights"))
    if init.startswith("pissa_niter"):
        raise UserError(
            f"{setting}: {files.adapter} was initialised by {init}, which changes the base by chance each time it is loaded; save it by PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) as a plain adapter"
        )
    if name != "default" and init in _CHANGE_BASE:
        raise UserError(f"{setting}: {files.adapter} was initialised by {init}, which changes the base; train it alone, not beside others")
    try:
        tensors(path)  # whole
        weights = load_file(path)
        if isinstance(model, PeftModel):
            model.load_adapter(files.adapter, adapter_name=name, is_trainable=trainable)
            adapted = model
        else:
            adapted = PeftModel.from_pretrained(model, files.adapter, adapter_name=name, is_trainable=trainable)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{setting}: the adapter {files.adapter} cannot be loaded ({brief(error)})") from error
    for name_, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{setting}: the adapter {files.adapter} holds values that are not finite, in {name_}; train or copy it again")
    expected = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
    renamed = {key: key if key in expected else _renamed(adapted, key) for key in weights}
    found = {renamed[key] if renamed[key] in expected else key: value for key, value in weights.items()}
    copies = {key for key in found.keys() - expected.keys() if _is_base_weight(adapted, key, found[key])}
    for what, keys in (("lacks", expected.keys() - found.keys()), ("holds left-over", found.keys() - expected.keys() - copies)):
        if keys:
            raise UserError(
                f"{setting}: the adapter {files.adapter} {what} {len(keys)} tensors for the base {files.base}, such as {min(keys)}; it belongs to another base"
            )
    _read_in_full(adapted, {key: found[key] for key in expected}, name, f"{setting}: the adapter {files.adapter}")
    return adapted


def _read_in_full(adapted: nn.Module, weights: dict[str, Tensor], name: str, whose: str) -> None:
    """PEFT renames tensors as transformers does a checkpoint's, and leaves those at their initial values whose new name is none."""
    from peft import get_peft_model_state_dict

    for attempt in range(2):
        own = get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
        lost = [key for key, value in weights.items() if not torch.equal(own[key].cpu(), value.to(own[key].dtype))]
        if lost and attempt:
            raise UserError(f"{whose} cannot be read: PEFT gives {len(lost)} tensors, such as {min(lost)}, other values than the file")
        for key in lost:
            own[key].copy_(weights[key])


def save(adapted: nn.Module, folder: Path, name: str = "default") -> None:
    """The adapter as PEFT saves it; and read back by PEFT, as whoever loads it will, since it may not find every tensor again."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file, save_file

    adapted.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    for file in (folder / name).glob("*"):  # PEFT gives an adapter with a name of its own a folder of its own
        file.rename(folder / file.name)
    shutil.rmtree(folder / name, ignore_errors=True)
    path = folder / "adapter_model.safetensors"
    if set_peft_model_state_dict(adapted, load_file(path), adapter_name=name).unexpected_keys:
        save_file({_renamed(adapted, key, back=True): value for key, value in load_file(path).items()}, path, {"format": "pt"})
        if lost := set_peft_model_state_dict(adapted, load_file(path), adapter_name=name).unexpected_keys:
            warn(
                f"note: {folder}: PEFT alone does not read back {len(lost)} of its tensors, such as {lost[0]}; llmkd does: "
                "give others what llmkd export makes of it"
            )


def _renamed(model: nn.Module, key: str, back: bool = False) -> str:
    """A tensor's name in the model for its name in a checkpoint of transformers, as PEFT renames an adapter's; or `back`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [r for r in get_model_conversion_mapping(model.get_base_model()) if isinstance(r, WeightRenaming)]
    return rename_source_key(key, [r.reverse_transform() for r in reversed(renamings)] if back else renamings, [])[0]


def _is_base_weight(model: nn.Module, name: str, value: Tensor) -> bool:
    """PEFT saves the base's own head or embedding beside an adapter on it; that is no left-over if it is the same."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = parameters.get(name, parameters.get(name.replace(".weight", ".base_layer.weight")))
    return own is not None and own.shape == value.shape and torch.equal(own.cpu(), value.to(own.dtype))


def add_lora(model: nn.Module, lora: Lora, revision: str | None, name: str = "default") -> nn.Module:
    """The base with a fresh LoRA adapter, which alone requires a gradient; beside those that the model has already, as `name`."""
    from peft import LoraConfig, PeftModel, get_peft_model

    several = isinstance(model, PeftModel)
    plain = model.get_base_model() if several else model
    _refuse_dora_in_8bit(plain, lora.dora, "student")
    unused = {id(p) for p in beside_text(plain)}
    beside = [name for name, module in plain.named_modules() if any(id(p) in unused for p in module.parameters(recurse=False))]
    if lora.target_modules == "all-linear" and (others := [name for name, module in plain.named_modules() if _is_custom_linear(module)]):
        kinds = ", ".join(sorted({type(plain.get_submodule(name)).__name__ for name in others}))
        warn(f"note: student.lora.target_modules: all-linear leaves out {kinds}, which is more than a linear layer")
        beside += others
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=beside or None,
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        revision=revision,
    )
    names = {name.rsplit(".", 1)[-1] for name, _ in plain.named_modules()}
    if missing := [name for name in lora.modules_to_save if name.rsplit(".", 1)[-1] not in names]:
        raise UserError(f"student.lora.modules_to_save: the model has no module {missing[0]!r}; leave it out")
    try:
        if several:
            if targets == "all-linear":  # PEFT would count the other adapters' matrices among the linear layers
                first = next(iter(model.peft_config.values()))
                config.target_modules, config.exclude_modules = first.target_modules, first.exclude_modules
            model.add_adapter(name, config)
            return _checked(model, name)
        return _checked(get_peft_model(model, config, adapter_name=name), name)
    except UserError:
        raise
    except Exception as error:
        outs = [name for name, _ in plain.named_modules() if name.endswith((".out_proj", ".conv1d"))]
        if "Mamba" in str(error) and targets == "all-linear" and not set(outs) & set(beside):
            warn("note: student.lora.target_modules: all-linear leaves out out_proj, whose weight Mamba's kernels use past any adapter")
            config.exclude_modules = beside + outs
            return get_peft_model(model, config, adapter_name=name)
        if "ParamWrapper" in str(error):  # PEFT's way to adapt what is no module
            which = "dora" if lora.dora else "dropout"
            raise UserError(
                f"student.lora.{which}: found {getattr(lora, which)}, which is not to be had for experts that are no linear layers; leave it out, or "
                "give student.lora.target_modules without the experts, such as [q_proj, k_proj, v_proj, o_proj]"
            ) from error
        setting = "student.lora.target_modules" if "target modules" in str(error).lower() else "student.lora"
        raise UserError(f"{setting}: no such adapter can be put on {plain.config.model_type} ({brief(error)})") from error


def _checked(adapted: nn.Module, name: str) -> nn.Module:
    """PEFT trains what it finds of a list, and says nothing of the rest; and DoRA divides each row of a weight by its norm."""
    targets = adapted.peft_config[name].target_modules  # less those that became parameters of experts
    modules = [f".{where}" for where, _ in adapted.named_modules()]
    for target in () if isinstance(targets, str) else sorted(targets or ()):
        if not any(where.endswith(f".{target}") for where in modules):
            raise UserError(f"student.lora.target_modules: the model has no module {target!r}; leave it out")
    for where, module in adapted.named_modules():
        norms = getattr(module, "lora_magnitude_vector", {})
        if name in norms and not norms[name].weight.all():
            raise UserError(
                f"student.lora.dora: {where.removeprefix('base_model.model.')} has rows of zeros, by whose norm DoRA divides; "
                "leave it out of student.lora.target_modules"
            )
    return adapted


def _is_custom_linear(module: nn.Module) -> bool:
    """A family's own kind of linear layer that gives something else, such as a router its choice: no adapter can be put on it."""
    if not isinstance(module, nn.Linear) or not type(module).__module__.startswith("transformers.models."):
        return False
    try:
        with torch.no_grad():
            out = module(module.weight.new_zeros(2, module.in_features))
    except Exception:
        return True
    return not (isinstance(out, Tensor) and out.shape == (2, module.out_features))


def _refuse_dora_in_8bit(model: nn.Module, dora: bool | None, who: str) -> None:
    if dora and getattr(model, "is_loaded_in_8bit", False):
        raise UserError(f"{who}.quantization: found int8 with a DoRA adapter, whose second forward pass fails in PEFT; use nf4")


def add_new(model: nn.Module, files: ModelFiles, settings: StudentSettings, name: str) -> nn.Module:
    adapted = add_lora(model, settings.lora or Lora(), settings.revision, name)
    path = Path(settings.model)
    adapted.peft_config[name].base_model_name_or_path = str(path.resolve()) if path.is_dir() else settings.model
    return adapted


def load_to_train(model: nn.Module, files: ModelFiles, settings: StudentSettings, name: str) -> nn.Module:
    """An adapter that exists is trained on, with its own rank and modules; a recipe that says otherwise is refused."""
    config = read_json(files.adapter / "adapter_config.json", "student.model")
    if config.get("peft_type") != "LORA":
        raise UserError(f"student.model: {settings.model} is an adapter of type {config.get('peft_type')}; only LORA can be trained on")
    _refuse_other_settings(settings, config)
    note_quantization(files, settings.quantization, "student")
    adapted = load(model, files, "student.model", trainable=True, name=name)
    if settings.base:
        adapted.peft_config[name].base_model_name_or_path = str(files.base.resolve())
    info(f"student: going on with the adapter {settings.model} (rank {config.get('r')}, alpha {config.get('lora_alpha')})")
    return adapted


def _refuse_other_settings(settings: StudentSettings, config: dict) -> None:
    """An adapter keeps its own shape, so a recipe that gives it another one is refused; what was set first, then defaults."""
    lora, default = settings.lora, Lora()
    if lora is None or (lora == default and not Path(settings.model).is_dir()):  # a hub id's defaults were written out unasked
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
                f"student.lora.{name}: found {here}, and the adapter {settings.model} has {there}; leave student.lora out to train it on"
            )


def note_quantization(files: ModelFiles, now: Quantization | None, who: str) -> None:
    """An adapter fits the base it was trained on, errors of its quantisation included."""
    then, now = record_of(files.adapter).get("quantization", now), now and now.type
    then = then["type"] if isinstance(then, dict) else then and then.type
    if then != now:
        was, now = then or "an unquantised base", now or "an unquantised one"
        warn(f"note: {who}.quantization: the adapter {files.adapter} was trained on {was}, and is used on {now}")
