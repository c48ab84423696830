"""Sharding of models with FSDP2 (torch's `fully_shard`): where a model is cut, what stays gathered, and its outline without values.

Every layer is a unit, whose weights are gathered while it computes. Everything else (embeddings, last norm, head) is the root's unit: it is
gathered when the body is called, and stays gathered until the end of the backward pass, so that the fused head finds a plain weight, and
tied weights stay one tensor. FSDP2 is called directly: Accelerate's preparation expects one model with its optimizer and a GPU, and supports
neither a frozen teacher nor a body that is called without its head.
"""

import copy
import types
import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..console import info
from ..errors import UserError
from .families import BODY, base_of, decoder_of, layers_of
from .parts import is_part, local

#: For each sharded transformers model that trains: the same modules, with PEFT's wrapper, on torch's meta device, to be filled and saved.
_OUTLINES: "weakref.WeakKeyDictionary[nn.Module, nn.Module]" = weakref.WeakKeyDictionary()


def shard(model: nn.Module, mesh, setting: str, casts: Mapping[int, torch.dtype] | None = None, keep_outline: bool = False) -> None:
    """Shard a model over the processes of a mesh: each then holds its part of every weight, on the mesh's device.

    Layers are moved there one by one, so that weights that are mapped from their files are never all in memory. UserError for a family whose
    layers are not in a list or share weights, and for trainable tensors of several dtypes.

    model         a transformers model, or PEFT's wrapper of one; `requires_grad` is set already
    setting       student, teacher, teacher.0, ...
    casts         by parameter id, the dtype to which a parameter is cast on the way
    keep_outline  keep the outline for `outline_of`
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    base = base_of(model)
    layers = layers_of(base)
    asked = f"{'train' if setting == 'student' else setting}.shard: found full"
    if layers is None:
        raise UserError(f"{asked}, but {base.config.model_type} does not keep its layers in a list; set it to none")
    each = [{id(p) for p in layer.parameters()} for layer in layers]
    if sum(map(len, each)) > len(set().union(*each)):
        raise UserError(f"{asked}, but layers of {base.config.model_type} share weights; set it to none")
    types_of = {id(p): (casts or {}).get(id(p), p.dtype) for p in base.parameters()}
    if len(trained := {types_of[id(p)] for p in model.parameters() if p.requires_grad}) > 1:
        found = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in trained))
        raise UserError(f"{asked}, but the {setting} trains tensors in {found}; set {setting}.dtype: float32, or train.shard: none")
    if keep_outline:
        _OUTLINES[base] = copy.deepcopy(model, dict(_without_values(model, types_of)))
    for unit in (*layers, base):
        for p in unit.parameters():
            if p.dtype != types_of.get(id(p), p.dtype):  # sharded layers, which the root contains, have other parameters
                p.data = p.data.to(types_of[id(p)])
        fully_shard(unit, mesh=mesh, reshard_after_forward=unit is not base)
    setattr(base, BODY, types.MethodType(lambda base, **inputs: decoder_of(base)(**inputs), base))
    register_fsdp_forward_method(base, BODY)
    parameters = list(model.parameters())
    held, every = (sum(size(p).nbytes for p in parameters) / 1e6 for size in (local, Tensor.detach))
    info(f"{setting}: sharded over {mesh.size()} processes; each holds {held:,.1f} of {every:,.1f} MB of weights")


def _without_values(model: nn.Module, types_of: Mapping[int, torch.dtype]) -> Iterator[tuple[int, object]]:
    """By id, the objects that replace the parameters in a copy; the quantisation state of 4-bit weights stays the same object."""
    for p in model.parameters():
        yield id(p), nn.Parameter(torch.empty(p.shape, device="meta", dtype=types_of[id(p)]), p.requires_grad)
    for module in model.modules():
        if state := getattr(module, "quant_state", None):
            yield id(state), state


def outline_of(model: nn.Module) -> nn.Module:
    """The model as it was before it was sharded, without the values of its parameters."""
    return _OUTLINES[base_of(model)]


def sharded_copy(model: nn.Module, setting: str) -> nn.Module:
    """A frozen copy of a sharded model that trains: trainable weights are copied, frozen ones are the same tensors. `setting`: see `shard`."""
    reshard(model)
    own, made = dict(model.named_parameters(remove_duplicate=False)), {}
    found = copy.deepcopy(outline_of(model)).requires_grad_(False)
    shard(found, next(p for p in own.values() if is_part(p)).device_mesh, setting)
    for where, module in found.named_modules():
        for name in module._parameters:
            if (p := own.get(f"{where}.{name}".lstrip("."))) is not None:
                value = p.detach().clone() if p.requires_grad else p.detach()
                module._parameters[name] = made.setdefault(id(p), nn.Parameter(value, requires_grad=False))
    return found


def is_sharded(model: nn.Module) -> bool:
    return hasattr(base_of(model), "reshard")


def reshard(model: nn.Module) -> nn.Module:
    """The transformers model, resharded: a pass without a backward pass leaves the root's weights gathered, and these are other parameters than
    those that train. Without effect on a model that is not sharded."""
    base = base_of(model)
    if is_sharded(model):
        base.reshard()
    return base


def all_agree(model: nn.Module, found: bool) -> bool:
    """For a sharded model, of which each process sees its part: whether `found` is true on every process. For any other model `found` itself."""
    if not is_sharded(model):
        return found
    every = torch.tensor(int(found), device=base_of(model).get_input_embeddings().weight.device)
    torch.distributed.all_reduce(every, torch.distributed.ReduceOp.MIN)
    return bool(every)
