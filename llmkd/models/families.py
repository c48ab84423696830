"""The differences between model families: where they keep body and layers, and how they turn last hidden states into logits.

A family that is unknown here is no error: the startup checks notice that its logits differ, and the model's own forward pass is used.
"""

from collections.abc import Callable

from torch import nn

from ..console import info
from ..head import Head

#: Options of config.json that multiply the logits, in whichever family they appear.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
#: Families whose `logits_scaling` multiplies; in all others (Granite, MiniCPM3) it divides.
_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)
#: Options that divide the logits, or the hidden states before the head, which is the same unless the head has a bias.
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_softcap")


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model, with an adapter's layers in it but without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: nn.Module) -> nn.Module:
    """The body, which computes last hidden states from token ids."""
    decoder = model.get_decoder()
    if decoder is model.get_output_embeddings():  # ModernBERT calls its head a decoder
        return getattr(model, model.base_model_prefix)
    return getattr(model, "model", model) if decoder is model else decoder


#: The name of the method that `sharding.shard` adds to a sharded model: it calls the decoder through the hooks of the whole model.
BODY = "llmkd_body"


def body_of(model: nn.Module) -> Callable:
    """The callable that computes last hidden states: the decoder, or the method of a sharded model in its place."""
    return getattr(model, BODY, None) or decoder_of(model)


def layers_of(model: nn.Module) -> nn.ModuleList | None:
    """The body's layers, in order; None for a family without a list of them."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), None)


def non_text_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that text does not pass through, such as those of a vision tower; they get no gradient from text."""
    if model.config.get_text_config() is model.config:
        return []
    used = {id(p) for part in (decoder_of(model), model.get_output_embeddings()) for p in part.parameters()}
    return [p for p in model.parameters() if id(p) not in used]


def freeze_encoder(model: nn.Module) -> None:
    """Freeze the encoder of an encoder-decoder model, including weights that its decoder or head shares."""
    encoder, body = model.get_encoder(), model.get_decoder()
    encoder.requires_grad_(False)
    if any(not p.requires_grad and any(p is own for own in encoder.parameters()) for p in body.parameters()):
        info("student.freeze: the encoder's embedding is the decoder's too, so it is not trained either")


def head_of(model: nn.Module, vocab: int, adapter: str | None = None) -> Head:
    """The head, with the scale and the soft cap of the model's configuration; padding columns past `vocab` are cut.

    adapter  the adapter of this head, if the model has several
    """
    config = model.config.get_text_config()
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= _number(config, name, 1.0)
    for name in _DIVISORS:
        value = _number(config, name, 1.0)
        scale *= value if name == "logits_scaling" and config.model_type in _MULTIPLY_BY_LOGITS_SCALING else 1 / value
    if getattr(config, "scale_decoder_outputs", False):  # T5 with the input's embedding as its head
        scale *= config.d_model**-0.5
    softcap = next((cap for name in _SOFTCAPS if (cap := _number(config, name, 0.0))), None)
    return Head(_without_others(model.get_output_embeddings(), adapter), vocab, scale, softcap)


def _without_others(module: nn.Module, adapter: str | None) -> nn.Module:
    """The module, without PEFT's wrapper if only other adapters than this one are on it."""
    for inner, kept in (("base_layer", "lora_A"), ("base_layer", "lora_embedding_A"), ("original_module", "modules_to_save")):
        if adapter and len(getattr(module, kept, ())) and adapter not in getattr(module, kept):
            return getattr(module, inner)
    return module


def _number(config, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else default
