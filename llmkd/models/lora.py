"""New LoRA adapters, made with PEFT; modules that the base lacks are refused before its weights are loaded."""

import dataclasses
import difflib
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.recipe import Lora, Student
from ..console import warn
from ..errors import UserError, brief
from ..model_folder.files import ModelFiles
from ..model_folder.identity import is_made_here
from ..model_folder.weights import modules_are_named
from .adapters import refuse_dora_in_8bit
from .families import non_text_parameters


class _MissingModule(UserError):
    """A module in `student.lora` that the model does not have."""


def add_new_adapter(
    model: nn.Module, files: ModelFiles, settings: Student, name: str, kind: str | None = "CAUSAL_LM", copies: tuple[str, ...] = ()
) -> nn.Module:
    """A student's base with a new adapter by its settings; the adapter's configuration names the base."""
    made = is_made_here(files.base)
    revision = None if made else settings.revision
    adapted = add_lora(model, settings.lora or Lora(), revision, name, kind, copies, settings.freeze is not None)
    path = files.base if made else Path(settings.model)
    adapted.peft_config[name].base_model_name_or_path = str(path.resolve()) if path.is_dir() else settings.model
    return adapted


def add_lora(
    model: nn.Module,
    lora: Lora,
    revision: str | None,
    name: str = "default",
    kind: str | None = "CAUSAL_LM",
    copies: tuple[str, ...] = (),
    without_encoder: bool = False,
) -> nn.Module:
    """The base with a new LoRA adapter; only the adapter requires a gradient. A model that already has adapters keeps them.

    kind             PEFT's task type of the adapter
    copies           modules that train in full in addition, such as a classifier's head
    without_encoder  put no adapter on the encoder of an encoder-decoder model
    """
    from peft import LoraConfig, PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    refuse_dora_in_8bit(base, lora.dora, "student")
    _refuse_missing_copies(base, lora)
    excluded = _without_adapter(base, lora) + list(copies)
    if without_encoder:
        inside = {id(module) for module in base.get_encoder().modules()}
        excluded += [where for where, module in base.named_modules() if id(module) in inside]
    config = LoraConfig(
        task_type=kind,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules),
        exclude_modules=excluded or None,
        modules_to_save=list(dict.fromkeys((*lora.modules_to_save, *copies))) or None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        revision=revision,
    )
    linear = _linear_modules(base)
    try:
        adapted = _put_on(model, config, name)
    except Exception as error:
        mamba = [where for where, _ in base.named_modules() if where.endswith((".out_proj", ".conv1d"))]
        # Oddity: only the text of PEFT's error says which of its checks failed.
        if "Mamba" in str(error) and lora.target_modules == "all-linear" and not set(mamba) & set(excluded):
            warn("note: student.lora.target_modules: all-linear leaves out out_proj, whose weight Mamba's kernels use past any adapter")
            config.exclude_modules = excluded + mamba
            return _put_on(model, config, name)
        raise _translated(error, lora, base, linear) from error
    _refuse_missing_targets(adapted, name, linear)
    _refuse_zero_norms(adapted, name)
    return adapted


def refuse_missing_modules(settings: Student, files: ModelFiles) -> None:
    """UserError for modules of `student.lora` that the model does not have, before its weights are loaded.

    Names that occur in the weight files are accepted; others are tried on the model without weights (torch's meta device). A model that
    cannot be built there is checked after loading.
    """
    lora = settings.lora
    if not lora or files.adapter or modules_are_named(files.base, lora.target_modules, lora.modules_to_save):
        return
    try:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(files.base, trust_remote_code=False))
        _refuse_missing_copies(model, lora)
        if lora.target_modules != "all-linear":
            add_lora(model, dataclasses.replace(lora, dora=False), None)
    except _MissingModule:
        raise
    except Exception:  # a model that cannot be built without weights, or a damaged file: loading will report it
        return


def _put_on(model: nn.Module, config, name: str) -> nn.Module:
    from peft import PeftModel, get_peft_model

    if not isinstance(model, PeftModel):
        return get_peft_model(model, config, adapter_name=name)
    if config.target_modules == "all-linear":  # PEFT would count the other adapters' matrices among the linear layers
        first = next(iter(model.peft_config.values()))
        config.target_modules, config.exclude_modules = first.target_modules, first.exclude_modules
    model.add_adapter(name, config)
    return model


def _without_adapter(base: nn.Module, lora: Lora) -> list[str]:
    """Modules that get no adapter: those that text does not pass through, and with all-linear a family's own kinds of linear layers."""
    unused = {id(p) for p in non_text_parameters(base)}
    out = [where for where, module in base.named_modules() if any(id(p) in unused for p in module.parameters(recurse=False))]
    if lora.target_modules == "all-linear" and (custom := [where for where, module in base.named_modules() if _is_custom_linear(module)]):
        kinds = ", ".join(sorted({type(base.get_submodule(where)).__name__ for where in custom}))
        warn(f"note: student.lora.target_modules: all-linear leaves out {kinds}, which is more than a linear layer")
        out += custom
    return out


def _is_custom_linear(module: nn.Module) -> bool:
    """Whether a module is a family's own subclass of Linear that returns something else, such as a router's choice: it takes no adapter."""
    if not isinstance(module, nn.Linear) or not type(module).__module__.startswith("transformers.models."):
        return False
    try:
        with torch.no_grad():
            out = module(module.weight.new_zeros(2, module.in_features))
    except Exception:
        return True
    return not (isinstance(out, Tensor) and out.shape == (2, module.out_features))


def _translated(error: Exception, lora: Lora, base: nn.Module, linear: list[str]) -> UserError:
    """PEFT's error as one that names the setting."""
    text = str(error)
    if "ParamWrapper" in text:  # PEFT's way to adapt parameters that belong to no linear layer
        which = "dora" if lora.dora else "dropout"
        return UserError(
            f"student.lora.{which}: found {getattr(lora, which)}, which PEFT does not support for experts that are not linear layers; leave it out, or "
            "give student.lora.target_modules without the experts, such as [q_proj, k_proj, v_proj, o_proj]"
        )
    if "not found in the base model" in text:
        targets = lora.target_modules
        missing = targets if isinstance(targets, str) else next((one for one in targets if one not in linear), targets[0])
        return _missing_module("target_modules", missing, ["all-linear", *linear] if isinstance(targets, str) else linear, linear)
    setting = "student.lora.target_modules" if "target modules" in text.lower() else "student.lora"
    return UserError(f"{setting}: no such adapter can be put on {base.config.model_type} ({brief(error)})")


def _missing_module(setting: str, name: str, candidates: list[str], linear: list[str]) -> _MissingModule:
    near = difflib.get_close_matches(name, candidates, 1, 0.6)
    hint = f"did you mean {near[0]}? The model's" if near else "leave it out, or name another; the model's"
    return _MissingModule(f"student.lora.{setting}: the model has no module {name!r}; {hint} linear modules are {', '.join(linear)}")


def _linear_modules(base: nn.Module) -> list[str]:
    """The last parts of the names of the base's linear layers, with or without adapters on them."""
    conv = [where for where, module in base.named_modules() if type(module).__name__ == "Conv1D"]  # GPT-2's form of a linear layer
    found = [where for where, module in base.named_modules() if isinstance(module, nn.Linear)]
    own = [where for where in found + conv if not re.search(r"\.(lora_\w+|modules_to_save)(\.|$)", where)]
    return sorted({re.sub(r"\.(base_layer|original_module)$", "", where).rpartition(".")[2] for where in own})


def _refuse_missing_copies(base: nn.Module, lora: Lora) -> None:
    names = {where.rsplit(".", 1)[-1] for where, _ in base.named_modules()}
    for one in lora.modules_to_save:
        if one.rsplit(".", 1)[-1] not in names:
            raise _missing_module("modules_to_save", one, sorted(names), _linear_modules(base))


def _refuse_missing_targets(adapted: nn.Module, name: str, linear: list[str]) -> None:
    """UserError for a module in `target_modules` that the model lacks: PEFT silently skips names that it does not find."""
    targets = adapted.peft_config[name].target_modules  # without those that PEFT turned into parameters of experts
    modules = [f".{where}" for where, _ in adapted.named_modules()]
    for target in () if isinstance(targets, str) else sorted(targets or ()):
        if not any(where.endswith(f".{target}") for where in modules):
            raise _missing_module("target_modules", target, linear, linear)


def _refuse_zero_norms(adapted: nn.Module, name: str) -> None:
    """UserError for weights with a row of zeros, by whose norm DoRA would divide."""
    for where, module in adapted.named_modules():
        norms = getattr(module, "lora_magnitude_vector", {})
        if name in norms and not norms[name].weight.all():
            raise UserError(
                f"student.lora.dora: {where.removeprefix('base_model.model.')} has rows of zeros, by whose norm DoRA divides; "
                "leave it out of student.lora.target_modules"
            )
