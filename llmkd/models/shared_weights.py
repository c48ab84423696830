"""Several models that share weights in memory: each has its own modules, and some of their parameters are the same tensor.

Nothing is switched between teacher and student: modes, adapters, gradients and wrappers belong to one model's modules. Shared tensors are
frozen, so no model changes them for the others.
"""

import copy
import json
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from ..config.recipe import Student, Teacher
from ..model_folder.files import ModelFiles
from ..model_folder.identity import fingerprint
from ..model_folder.weights import read_json
from .parts import is_part, local
from .sharding import reshard

#: Initialisations of LoRA that do not change the base's weights, in addition to PEFT's default (a bool).
_LEAVE_BASE = ("gaussian", "eva", "orthogonal")
#: Options of config.json that do not change a model's results, or that the recipe overrides.
_NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def base_identity(files: ModelFiles, settings: Student | Teacher, setting: str) -> tuple | None:
    """A key that is equal for models on the same base with the same dtype, attention and quantisation; None if the adapter may change its base."""
    if files.adapter and not _leaves_base(read_json(files.adapter / "adapter_config.json", setting)):
        return None
    config = {name: value for name, value in files.config.items() if name not in _NOT_COMPUTED}
    dtype = files.dtype or "auto" if settings.dtype == "auto" else settings.dtype
    how = (dtype, settings.attention, settings.quantization)
    return fingerprint(files.base, setting), json.dumps(config, sort_keys=True), *how


def _leaves_base(adapter: dict) -> bool:
    init = adapter.get("init_lora_weights", True)
    usual = isinstance(init, bool) or init in _LEAVE_BASE
    # Variants of LoRA have a configuration of their own, and some, such as KaSA, change the base.
    variant = adapter.get("layer_replication") or any(value for name, value in adapter.items() if name.endswith("_config"))
    return usual and not variant and adapter.get("peft_type") == "LORA" and adapter.get("bias", "none") == "none"


def copy_sharing_weights(module: nn.Module, trained: bool = True) -> nn.Module:
    """A copy of a module that uses the same parameters and persistent buffers. Make it before an adapter is put on.

    trained   whether parameters that require a gradient are shared too. If not, the copy has its own, and there may be an adapter
    """
    for one in module.modules():
        if getattr(getattr(one, "weight", None), "CB", None) is not None and hasattr(one, "init_8bit_state"):
            one.init_8bit_state()  # bitsandbytes would do it in the first forward pass, and find nothing to move in the copy
    return copy.deepcopy(module, {id(held): held for held in _held(module) if trained or not getattr(held, "requires_grad", False)})


def _held(module: nn.Module) -> Iterator[object]:
    """The objects that a copy shares: tensors that come from a checkpoint, and their quantisation state."""
    for one in module.modules():
        state = getattr(one, "state", None)  # bitsandbytes, in 8 bit; quant_state in 4
        kept = [buffer for name, buffer in one._buffers.items() if name not in one._non_persistent_buffers_set]
        kept += [*one._parameters.values(), getattr(one, "quant_state", None), getattr(state, "CB", None), getattr(state, "SCB", None)]
        yield from (held for held in kept if held is not None)


def deduplicate_weights(
    models: Iterable[nn.Module], without_values: bool = False, named: Callable[[str], bool] = lambda name: True
) -> None:
    """Keep frozen parameters that have the same name and equal bits in several models only once in memory.

    These are, for example, the embeddings, norms and head of a base that one model has in 16 bit and another in 4 bit.

    models          transformers models, with PEFT's layers in them or not
    without_values  the models have one base and tensors without values, which count as equal if they are `alike`
    named           whether the parameter of that name is considered
    """
    same = alike if without_values else _same
    first: dict[str, list[nn.Parameter]] = {}
    for model in models:
        reshard(model)
        owners, replaced = _owners(model), False
        for name, parameter in [one for one in _frozen(model) if named(one[0])]:
            other = next((one for one in first.setdefault(name, []) if same(parameter, one)), None)
            if other is None:
                first[name].append(parameter)
            elif is_part(parameter) or without_values:  # `.data` of neither can be assigned
                held, replaced = nn.Parameter(other.detach(), requires_grad=False), replaced or is_part(parameter)
                for module, own in owners[id(parameter)]:
                    module._parameters[own] = held
            else:
                parameter.data = other.data
        if replaced:
            model.load_state_dict({}, strict=False)  # makes FSDP2 look up its parameters again


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """By parameter id: the modules that have the parameter, and its name there."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            found.setdefault(id(parameter), []).append((module, name))
    return found


def _frozen(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's frozen parameters, by their names without an adapter."""
    adapters = set(getattr(model, "peft_config", ()))
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and parameter.dtype != torch.int8 and not adapters & set(name.split(".")):
            yield name.replace(".base_layer", "").replace(".original_module", ""), parameter


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in shape, dtype, device and sharding."""
    if (a.shape, a.dtype, a.device, is_part(a)) != (b.shape, b.dtype, b.device, is_part(b)):
        return False
    return not is_part(a) or (a.device_mesh, a.placements) == (b.device_mesh, b.placements)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or not alike(a, b):
        return False
    a, b = local(a), local(b)  # processes need not agree on this: a layer is gathered from equal values either way
    if a.dtype.itemsize == 1:  # torch cannot compare 8-bit floats on every device
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return a.data_ptr() == b.data_ptr() or (torch.equal(a.flatten()[:64], b.flatten()[:64]) and torch.equal(a, b))


def storage_bytes(*models: nn.Module) -> dict[int, int]:
    """The bytes of each storage of the models' parameters, by its address; shared storages are counted once."""
    found = [local(p).untyped_storage() for model in models for p in model.parameters() if not p.is_meta]
    return {storage.data_ptr(): storage.nbytes() for storage in found}
