"""What a model has inside, by its configuration alone: it is built without weights, on torch's meta device, and run on shapes."""

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
    """A model of that configuration without weights; None where transformers does not build one from it alone."""
    return _outline(json.dumps(config))


@functools.lru_cache(4)
def _outline(config: str) -> nn.Module | None:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(config)), dtype=torch.bfloat16).eval()
    except Exception:  # it will be said when the model is loaded
        return None


def listed_layers(model: nn.Module, setting: str) -> nn.ModuleList:
    """The layers of a model's body. UserError for a family without a list of them. `setting`: the model's name in the recipe."""
    if (layers := layers_of(model)) is None:
        raise UserError(
            f"{setting} ({model.config.model_type}) does not keep its layers in a list, so that nothing can be read inside it; use another model"
        )
    return layers


def not_one_tensor(model: nn.Module, setting: str) -> UserError:
    return UserError(
        f"{setting} ({model.config.model_type}) does not pass its hidden states from layer to layer as one tensor; use another model"
    )


def show_attention(model: nn.Module, setting: str, packed: bool = True) -> None:
    """Give a model llmkd's attention, from which its inputs are taken; a family with soft caps keeps its own. UserError for any other.

    packed   whether its rows may be packed with llmkd's
    """
    if not (packed and attention.enable(model)) and not attention.enable_own(model):
        raise UserError(
            f"loss.attention: {setting} ({model.config.model_type}) uses an attention of its own (chunks, sinks, other biases or none at all), whose "
            "queries and keys llmkd does not see; leave loss.attention out, or use another model"
        )


@torch.no_grad()
def shapes_inside(model: nn.Module, taps: Taps) -> tuple[dict[int, Tensor], dict[int, AttentionInputs]] | None:
    """What `taps` ask of an `outline`, without values: hidden states and inputs of attention, by layer. None where its family needs values to run."""
    ids_BT, rows_N = (torch.zeros(shape, dtype=torch.long, device="meta") for shape in ((_B, _T), _B * _T))
    mask = torch.ones(1, 1, _T, _T, dtype=torch.bool, device="meta")  # transformers would make one from values
    for more in ({"attention_mask": mask}, {}):
        try:
            with tapped(model, taps.layers, rows_N) as states, attention_tapped(model, taps.attention) as inputs:
                decoder_of(model)(input_ids=ids_BT, use_cache=False, **more)
            return states, inputs
        except Exception:  # each family has its own
            continue
    return None
