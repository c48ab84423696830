"""Activation checkpointing: layers whose activations are recomputed in the backward pass instead of being kept."""

from torch import nn

from ..errors import UserError
from .activation_offload import Offload
from .families import layers_of


def enable(model: nn.Module, share: bool | float, offload: bool = False) -> None:
    """Recompute a share of the layers, counted from the first; with True all but the last. UserError for a family without support.

    The backward pass reaches the first layers last. By then the activations of the others are freed, so recomputing a layer adds nothing to
    the peak. The last layer's activations are needed at once, so recomputing it would save nothing.

    offload   keep the inputs of recomputed layers in the host's memory
    """
    kind = model.config.model_type
    if not model.supports_gradient_checkpointing:
        raise UserError(f"student.gradient_checkpointing: {kind} does not support it; set it to false")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = layers_of(model) or []
    if not all(hasattr(layer, "gradient_checkpointing") for layer in layers) or len(layers) < 2:
        if share is not True or offload:
            found = "offload" if offload else f"{share:g}"
            raise UserError(f"student.gradient_checkpointing: found {found}, but the layers of {kind} cannot be chosen; set it to true")
        return
    kept = Offload()
    for n, layer in enumerate(layers):
        layer.gradient_checkpointing = n < min(max(1, round(share * len(layers))), len(layers) - 1)
        if offload:
            layer._gradient_checkpointing_func = kept.around(layer._gradient_checkpointing_func)


def is_recomputed(layer: nn.Module) -> bool:
    return getattr(layer, "gradient_checkpointing", False)
