"""Outlines: models built from their configuration without weights, on torch's meta device, and run on shapes to see what is inside."""

import functools
import json

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..signals import AttentionInputs, Taps
from . import attention
from .families import decoder_of, layers_of
from .taps import attention_tapped, tapped

_B, _T = 2, 12


def outline(config: dict) -> nn.Module | None:
    """A model of that configuration without weights; None if transformers cannot build one from the configuration alone."""
    return _outline(json.dumps(config))


@functools.lru_cache(4)
def _outline(config: str) -> nn.Module | None:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)), dtype=torch.bfloat16).eval()
    except Exception:  # loading the model will report it
        return None


def listed_layers(model: nn.Module, setting: str) -> nn.ModuleList:
    """The layers of a model's body. UserError for a family without a list of layers. `setting`: the model's name in the recipe."""
    if (layers := layers_of(model)) is None:
        raise UserError(
            f"{setting} ({model.config.model_type}) does not keep its layers in a list, so nothing can be read inside it; use another model"
        )
    return layers


def not_one_tensor(model: nn.Module, setting: str) -> UserError:
    """The error for a family whose layers pass on something else than one tensor."""
    return UserError(
        f"{setting} ({model.config.model_type}) does not pass its hidden states from layer to layer as one tensor; use another model"
    )


def show_attention(model: nn.Module, setting: str, packed: bool = True) -> None:
    """Switch a model to llmkd's attention, from which inputs can be read; a family with soft caps keeps its own. UserError for any other.

    packed   whether llmkd's attention may be used for the model's packed rows
    """
    if not (packed and attention.enable(model)) and not attention.enable_own(model):
        raise UserError(
            f"loss.attention: {setting} ({model.config.model_type}) uses its own kind of attention (chunks, sinks, other biases or none at all), whose "
            "queries and keys llmkd cannot read; leave loss.attention out, or use another model"
        )


@torch.no_grad()
def shapes_inside(model: nn.Module, taps: Taps) -> tuple[dict[int, Tensor], dict[int, AttentionInputs]] | None:
    """The outputs of `taps` of an `outline`, without values: hidden states and inputs of attention, by layer. None for a family that needs values."""
    ids_BT, rows_N = (torch.zeros(shape, dtype=torch.long, device="meta") for shape in ((_B, _T), _B * _T))
    mask = torch.ones(1, 1, _T, _T, dtype=torch.bool, device="meta")  # transformers would compute one from values
    for more in ({"attention_mask": mask}, {}):
        try:
            with tapped(model, taps.layers, rows_N) as states, attention_tapped(model, taps.attention) as inputs:
                decoder_of(model)(input_ids=ids_BT, use_cache=False, **more)
            return states, inputs
        except Exception:  # families raise different errors
            continue
    return None
