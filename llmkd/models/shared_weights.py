"""One set of weights in memory for several models: each is a tree of modules of its own, and some of their tensors are one.

Nothing is ever switched between teacher and student: a mode, an adapter, a gradient or a wrapper of one tree cannot reach another.
What is shared does not train, so no model can change it under the others.
"""

import copy
import json
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..config.recipe import Student, Teacher
from ..model_files import ModelFiles, fingerprint, read_json

#: Ways to initialise LoRA that leave the base's weights as they are, beside PEFT's own (a bool).
_LEAVE_BASE = ("gaussian", "eva", "orthogonal")
#: Settings in config.json that say nothing of what a model computes, or that the recipe's stand for.
_NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def base_identity(files: ModelFiles, settings: Student | Teacher, setting: str) -> tuple | None:
    """Equal for two models that stand on the same base, held alike; None where the adapter may change the base that it is put on."""
    if files.adapter and not _leaves_base(read_json(files.adapter / "adapter_config.json", setting)):
        return None
    config = {name: value for name, value in files.config.items() if name not in _NOT_COMPUTED}
    dtype = files.dtype or "auto" if settings.dtype == "auto" else settings.dtype
    how = (dtype, settings.attention, settings.quantization)
    return fingerprint(files.base, setting), json.dumps(config, sort_keys=True), *how


def _leaves_base(adapter: dict) -> bool:
    init = adapter.get("init_lora_weights", True)
    usual = isinstance(init, bool) or init in _LEAVE_BASE
    return usual and adapter.get("peft_type") == "LORA" and adapter.get("bias", "none") == "none"


def copy_sharing_weights(module: nn.Module) -> nn.Module:
    """A second tree of modules on the very parameters (and persistent buffers) of the first. Take it before an adapter is put on."""
    for one in module.modules():
        if getattr(getattr(one, "weight", None), "CB", None) is not None and hasattr(one, "init_8bit_state"):
            one.init_8bit_state()  # bitsandbytes would do it in a first forward pass, and find nothing in the second tree's
    return copy.deepcopy(module, {id(held): held for held in _held(module)})


def _held(module: nn.Module) -> Iterator[object]:
    """What two trees have in common: tensors that are loaded from a checkpoint, and what quantised ones are read by."""
    for one in module.modules():
        state = getattr(one, "state", None)  # bitsandbytes, in 8 bit; quant_state in 4
        kept = [buffer for name, buffer in one._buffers.items() if name not in one._non_persistent_buffers_set]
        kept += [*one._parameters.values(), getattr(one, "quant_state", None), getattr(state, "CB", None), getattr(state, "SCB", None)]
        yield from (held for held in kept if held is not None)


def deduplicate_weights(models: Iterable[nn.Module]) -> None:
    """Frozen parameters that are bit for bit the same in several models, under one name, become one tensor in memory.

    So do embeddings, norms and the head of a base that one model holds in 16 bit and another in 4. `models`: transformers' own, with
    PEFT's layers in them or not.
    """
    first: dict[str, list[nn.Parameter]] = {}
    for model in models:
        for name, parameter in _frozen(model):
            for other in first.setdefault(name, []):
                if _same(parameter, other):
                    parameter.data = other.data
                    break
            else:
                first[name].append(parameter)


def _frozen(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's parameters that do not train, by the names they have without an adapter."""
    adapters = set(getattr(model, "peft_config", ()))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.dtype != torch.int8 and not adapters & set(name.split(".")):
            yield name.replace(".base_layer", "").replace(".original_module", ""), parameter


def _same(a: Tensor, b: Tensor) -> bool:
    if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) or a.is_meta:
        return False
    if a.dtype.itemsize == 1:  # 8-bit floats, which torch does not compare everywhere
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return a.data_ptr() == b.data_ptr() or (torch.equal(a.flatten()[:64], b.flatten()[:64]) and torch.equal(a, b))


def storage_bytes(*models: nn.Module) -> dict[int, int]:
    """Bytes of the parameters by the storage they are in: what is in memory once is counted once."""
    found = [p.untyped_storage() for model in models for p in model.parameters() if not p.is_meta]
    return {storage.data_ptr(): storage.nbytes() for storage in found}
