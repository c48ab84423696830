"""Checks on a small batch whether the attention inside a model can be read, and returns its inputs."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..batch import View
from ..errors import UserError, brief
from ..signals import AttentionInputs
from .language_model import LanguageModel
from .outline import listed_layers, show_attention
from .probe import evaluating, probe_ids, relative_gap
from .startup_checks import tolerance
from .taps import watched


def enable_taps(model: LanguageModel, layers: Iterable[int], setting: str, packing: bool = False) -> dict[int, AttentionInputs]:
    """Switch a `LanguageModel` to llmkd's attention, from which the inputs can be read. Returns those of a small batch, by layer.

    A family with soft caps keeps its own attention. UserError for a layer that the model does not have, and for a layer whose output does
    not follow from its inputs: because of a position bias, or anything else than a softmax of scaled products, capped or not. The batch is
    computed without autocast, whose rounding could hide such a difference.

    setting   the model's name in the recipe, for messages
    packing   whether rows are packed
    """
    base, layers = model.base_model, sorted(layers)
    family, leave = f"{setting} ({base.config.model_type})", "leave loss.attention out"
    modules = listed_layers(base, setting)
    if outside := [number for number in layers if not 1 <= number <= len(modules)]:
        raise UserError(f"loss.attention.layers: found layer {outside[0]}, but {family} has layers 1 to {len(modules)}")
    show_attention(base, setting, not packing or model.capabilities.packed_attention)
    found: dict[int, list[tuple[AttentionInputs, Tensor]]] = {number: [] for number in layers}
    ids_BT = probe_ids(model.head.vocab, model.device)
    view = View({"input_ids": ids_BT}, torch.arange(ids_BT.numel(), device=ids_BT.device))
    try:
        with evaluating(model), watched(base, layers, lambda number, *call: found[number].append(call)):
            model.replaced(autocast=None).hidden(view)
    except Exception as error:
        raise UserError(f"loss.attention: {family}: {brief(error)}; {leave}, or use another model") from error
    for number, calls in found.items():
        if len(calls) != 1:
            raise UserError(f"loss.attention.layers: {family}: layer {number} has {len(calls) or 'no'} attention; name another layer")
        inputs, out = calls[0]
        rounds = () if inputs.softcap is None else (torch.float32,)  # eager softmax is float32, whatever the model's dtype
        if not relative_gap([out.double()], [_textbook(inputs)]) <= tolerance(model, *rounds):
            raise UserError(f"loss.attention: {family}: the attention of layer {number} is more than a softmax of scaled products; {leave}")
    return {number: calls[0][0] for number, calls in found.items()}


def _textbook(inputs: AttentionInputs) -> Tensor:
    """The output [B, T, heads, D] of causal attention with these inputs, in float64."""
    inputs = inputs.each(lambda x: x.double().repeat_interleave(inputs.query.shape[1] // x.shape[1], 1))
    T = inputs.query.shape[2]
    back = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (back < 0) | (back >= (inputs.window or T))
    scores = inputs.query @ inputs.key.mT * inputs.scaling
    if cap := inputs.softcap:
        scores = cap * torch.tanh(scores / cap)
    return (scores.masked_fill(hidden.to(scores.device), float("-inf")).softmax(-1) @ inputs.value).transpose(1, 2)
