"""Maps the names of tensors in adapter files to the names that PEFT gives them on this base. No torch.

PEFT saves `base_model.model.` + the module's name + the tensor's own part, such as `lora_A.weight`. Files that were saved under
torch.compile, FSDP, DDP or activation checkpointing, from a state dict with the adapter's name in it, or on the text part of a larger
model, differ in parts that name no layer.
"""

from collections import Counter
from collections.abc import Iterable

#: Parts of names that wrappers add: torch.compile, FSDP, activation checkpointing, DeepSpeed and DDP.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module")
_PREFIX = ("base_model", "model")
_NO_LAYER = {*_PREFIX, "language_model", "text_model", "transformer", "default"}  # these depend on the form of the model, not on the layer
_BESIDE = ("modules_to_save", "original_module", "token_adapter", "base_layer")  # PEFT adds them between a module and its tensor


def without_wrappers(name: str) -> str:
    """A tensor's name without the parts that torch's wrappers add. `module` is such a part only at the beginning."""
    parts = [part for part in name.split(".") if part not in WRAPPERS[:-1]]
    while parts[1:] and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def regular_names(names: Iterable[str], modules: Iterable[str], prefix: str | None) -> dict[str, str]:
    """For each tensor of an adapter's file the name that PEFT would give it on a base with these modules; often it is the same.

    A name is changed only if that is certain: a part that names no layer is dropped, or replaced by that of the only module whose name
    differs in such parts alone. If two tensors would get the same name, all keep their own.

    modules  the names of the base's modules, without those of adapters
    prefix   the prefix of the tuner's tensors, such as lora_
    """
    names, modules = list(names), set(modules)
    by_layer: dict[tuple, list[str]] = {}
    for module in modules:
        by_layer.setdefault(_layer(module.split(".")), []).append(module)
    adapter = _adapter_name(names, prefix)
    found = {name: _regular(name, modules, by_layer, prefix, adapter) for name in names}
    return found if max(Counter(found.values()).values(), default=1) == 1 else {name: name for name in names}


def regular_module(name: str, modules: Iterable[str]) -> str | None:
    """The only module whose name differs from `name` in nothing but parts that name no layer; None if there is none or more than one."""
    same = [module for module in modules if _layer(module.split(".")) == _layer(name.split("."))]
    return same[0] if len(same) == 1 else None


def layer_of(name: str, prefix: str | None) -> str | None:
    """The base's module to which a tensor of the tuner belongs, by the tensor's regular name; None for other tensors."""
    parts = name.split(".")[len(_PREFIX) :]
    at = next((i for i, part in enumerate(parts) if prefix and part.startswith(prefix)), 0)
    return ".".join(part for part in parts[:at] if part != "base_layer") or None


def _regular(name: str, modules: set[str], by_layer: dict[tuple, list[str]], prefix: str | None, adapter: set[str]) -> str:
    parts = without_wrappers(name).split(".")
    # Parts before PEFT's prefix do not belong to the model.
    after = [i + 2 for i in range(len(parts)) if tuple(parts[i : i + 2]) == _PREFIX]
    parts = parts[after[-1] if after else 0 :]
    while parts[1:] and parts[0] == "module":  # base_model.model.module....
        parts = parts[1:]
    if parts[0] == _PREFIX[0]:  # base_model.vera_A: shared by all modules
        return ".".join(part for part in parts if part not in adapter)
    at = next((i for i, part in enumerate(parts) if part in _BESIDE or (prefix and part.startswith(prefix))), len(parts) - 1)
    module, tail = ".".join(parts[:at]), [part for part in parts[at:] if part not in adapter and part != "modules_to_save"]
    if module not in modules and len(same := by_layer.get(_layer(parts[:at]), [])) == 1:
        module = same[0]
    return ".".join([*_PREFIX, *filter(None, [module]), *tail])


def _layer(parts: list[str]) -> tuple[str, ...]:
    return tuple(part for part in parts if part not in _NO_LAYER and part not in WRAPPERS)


def _adapter_name(names: list[str], prefix: str | None) -> set[str]:
    """The adapter's name in the tensors' names, as in lora_A.default.weight, if all agree on one; `default` in any case."""
    after = set()
    for name in names:
        parts = name.split(".")
        for one, following in zip(parts, [*parts[1:], ""], strict=True):
            if one == "modules_to_save" or (prefix and one.startswith(prefix)):
                after.add(following if following not in ("", "weight", "bias") else None)
    return {"default"} | (after if len(after) == 1 else set())
