"""What a model family does between its last hidden states and its logits, and where its body is.

A family that is not known here is no error: `selftest.py` finds that the logits differ, and the model's own forward
pass is used instead.
"""

from torch import nn

from ..head import Head

#: Settings that multiply the logits, whichever family has them.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
#: Families whose `logits_scaling` multiplies; in all others (Granite, MiniCPM3) it divides.
_MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)
#: Settings that divide the logits, or the hidden states before the head, which is the same unless the head has a bias.
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logit_softcap")


def decoder_of(model: nn.Module) -> nn.Module:
    """The body: from token ids to last hidden states."""
    decoder = model.get_decoder()
    if decoder is model.get_output_embeddings():  # ModernBERT calls its head a decoder
        return getattr(model, model.base_model_prefix)
    return getattr(model, "model", model) if decoder is model else decoder


def layers_of(model: nn.Module) -> nn.ModuleList | None:
    """The body's layers in their order; None where a family keeps them otherwise."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in decoder_of(model).modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), None)


def beside_text(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that text never meets: the eyes and ears of a model that has them. Nothing there can be trained on text."""
    if model.config.get_text_config() is model.config:
        return []
    used = {id(p) for part in (decoder_of(model), model.get_output_embeddings()) for p in part.parameters()}
    return [p for p in model.parameters() if id(p) not in used]


def head_of(model: nn.Module, vocab: int, adapter: str | None = None) -> Head:
    """The head, with the scale and the soft cap that the model's configuration names; padding columns past `vocab` are cut.

    Where several adapters are in the model, the head is what it is with `adapter` alone.
    """
    config = model.config.get_text_config()
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= _number(config, name, 1.0)
    for name in _DIVISORS:
        value = _number(config, name, 1.0)
        scale *= value if name == "logits_scaling" and config.model_type in _MULTIPLY_BY_LOGITS_SCALING else 1 / value
    softcap = next((cap for name in _SOFTCAPS if (cap := _number(config, name, 0.0))), None)
    return Head(_without_others(model.get_output_embeddings(), adapter), vocab, scale, softcap)


def _without_others(module: nn.Module, adapter: str | None) -> nn.Module:
    """A module on which PEFT has put other adapters than this one: the module itself."""
    for inner, kept in (("base_layer", "lora_A"), ("base_layer", "lora_embedding_A"), ("original_module", "modules_to_save")):
        if adapter and len(getattr(module, kept, ())) and adapter not in getattr(module, kept):
            return getattr(module, inner)
    return module


def _number(config, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) and value else default
