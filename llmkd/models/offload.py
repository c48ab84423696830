"""Teachers that are not on the student's device: on another device, or in CPU memory and copied to the GPU layer by layer."""

import copy
import functools
from collections.abc import Iterator

import torch
from torch import nn

from ..config.teacher import OFFLOAD
from ..errors import UserError, brief
from ..head import Head
from .shared_weights import copy_sharing_weights


def resolve_device(setting: str, name: str | None, student: torch.device | str) -> torch.device:
    """The device to which the teacher's weights are loaded. UserError for a device that this machine does not have. `student`: the student's."""
    if name is None or name == OFFLOAD:
        return torch.device(student if name is None else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise ValueError("it holds no weights")
        torch.empty(0, device=device)
    except Exception as error:
        here = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), OFFLOAD])
        raise UserError(f"{setting}.device: found {name}, which cannot be used here ({brief(error)}); this machine has {here}") from None
    return device


def offload(plain: nn.Module, device: torch.device | str) -> None:
    """Keep the weights of a frozen transformers model in CPU memory; those of a layer are on `device` while it runs.

    accelerate's cpu_offload does not work here: it treats a module that is passed to another one, as PEFT does for DoRA, as an input to move.
    """
    on_gpu = torch.device(device).type == "cuda"
    for module, parts in list(_units(plain, set(getattr(plain, "_no_split_modules", None) or ()))):
        slots = [(part, name, p) for part in parts for name, p in part._parameters.items() if p is not None]
        if on_gpu:  # from pinned memory copies need no intermediate buffer
            for _, _, parameter in slots:
                parameter.data = parameter.data.pin_memory()
        module.register_forward_pre_hook(functools.partial(_load_layer, slots, device))
        module.register_forward_hook(functools.partial(_unload_layer, slots), always_call=True)
    for part in plain.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else buffer.to(device)


def _units(module: nn.Module, layers: set[str]) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Pairs of a module and the modules whose weights are loaded when it is called.

    A layer or a module with an adapter is loaded as a whole, since it may use a submodule's weights without calling it. Any other module
    loads only its own parameters.
    """
    if type(module).__name__ in layers or hasattr(module, "base_layer"):
        yield module, list(module.modules())
        return
    if any(p is not None for p in module._parameters.values()):
        yield module, [module]
    for child in module.children():
        yield from _units(child, layers)


def _load_layer(slots: list[tuple[nn.Module, str, nn.Parameter]], device, *_) -> None:
    for part, name, parameter in slots:
        part._parameters[name] = nn.Parameter(parameter.data.to(device, non_blocking=True), requires_grad=False)


def _unload_layer(slots: list[tuple[nn.Module, str, nn.Parameter]], *_) -> None:
    for part, name, parameter in slots:
        part._parameters[name] = parameter


def head_on(head: Head, device: torch.device) -> Head:
    """The same head on `device`, as a new module without the original's hooks; it uses the same weights if they are there already."""
    project = head.project
    there = all(p.device == device for p in project.parameters())
    return Head(copy_sharing_weights(project) if there else copy.deepcopy(project).to(device), head.vocab, head.scale, head.softcap)
