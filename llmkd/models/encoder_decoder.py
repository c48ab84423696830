"""Encoder-decoder models for text or speech, such as T5, BART and Whisper: a source is encoded, and a decoder predicts the target's tokens."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import View
from ..console import warn
from ..errors import UserError, brief
from ..head import Head
from ..signals import NO_TAPS, Taps
from .families import base_of, head_of
from .kinds import refuse_few_rows
from .model import Capabilities, Model, ModelOutputs
from .probe import evaluating, example_view, largest_difference
from .startup_checks import parameters_without_gradient, tolerance

DECODER_IDS = "decoder_input_ids"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The encoder's states [B, S, H] of B sources, and the mask [B, S'] that it was given, if any."""

    states_BSH: Tensor
    mask: Tensor | None


class EncoderDecoder(Model):
    """An encoder-decoder model; see `Model`. Its rows are positions of the decoder; its head is the output embedding.

    probe   a view of some examples for the startup checks; None without
    states  a function of the inputs and their encoder that keeps the encoder's states (`encoder_states.py`); None: they are not kept

    An encoder without trainable weights is in eval mode, and keeps nothing for a backward pass.
    """

    probe: View | None = None
    states: Callable[[dict[str, Tensor], Callable], Tensor] | None = None

    def own_head(self, vocab: int, adapter: str | None = None) -> Head:
        return head_of(self.base_model, vocab, adapter)

    def replaced(self, **changes) -> "EncoderDecoder":
        other = super().replaced(**changes)
        other.probe, other.states = self.probe, self.states
        return other

    @property
    def device(self) -> torch.device:
        return self.input_device or self.base_model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base_model.get_input_embeddings().weight.dtype

    @property
    def encoder_trains(self) -> bool:
        return any(p.requires_grad for p in self.base_model.get_encoder().parameters())

    def train(self, mode: bool = True) -> "EncoderDecoder":
        super().train(mode)
        if mode and not self.encoder_trains:
            self.base_model.get_encoder().eval()
        return self

    def outputs(self, view: View, taps: Taps = NO_TAPS) -> ModelOutputs:
        """The decoder's last hidden states at the view's rows. `taps` are not supported and must be empty."""
        self.set_active_adapter()
        if self.dropout_masks:
            self.dropout_masks.begin_examples(view)
        hidden_BTH = self.decoded(self.encoded(view.inputs), view.inputs[DECODER_IDS])[0]
        return ModelOutputs(hidden_BTH.flatten(0, 1).index_select(0, view.rows_N), {}, {})

    def _casting(self) -> torch.autocast:
        """The autocast of all passes, so that kept states do not depend on the pass that computed them."""
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    def encoded(self, inputs: dict[str, Tensor]) -> Encoded:
        """The encoder's states of a batch's sources. `inputs`: as in a view."""
        read = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in inputs.items() if name != DECODER_IDS}
        encoder = self.base_model.get_encoder()
        with self._casting(), torch.set_grad_enabled(torch.is_grad_enabled() and self.encoder_trains):
            states = self.states if "attention_mask" not in read else None
            encode = lambda inputs: _called(encoder, inputs)[0]  # noqa: E731
            return Encoded(states(read, encode) if states else encode(read), read.get("attention_mask"))

    def decoded(self, source: Encoded, ids_BT: Tensor, cache: Any = None, use_cache: bool = False) -> tuple[Tensor, Any]:
        """The decoder's last hidden states [B, T, H], with `own_forward` logits [B, T, V], and the cache after these tokens.

        cache   keys and values of the tokens before; None if there are none
        """
        before = {"use_cache": use_cache} | ({} if cache is None else {"past_key_values": cache})
        if self.capabilities.own_forward:
            from transformers.modeling_outputs import BaseModelOutput

            given = {"encoder_outputs": BaseModelOutput(last_hidden_state=source.states_BSH), "attention_mask": source.mask}
            with self._casting():
                out = self.base_model(**{DECODER_IDS: ids_BT}, **given, **before)
            return out.logits, out.get("past_key_values")
        given = {"encoder_hidden_states": source.states_BSH, "encoder_attention_mask": source.mask}
        with self._casting():
            out = _called(self.base_model.get_decoder(), {"input_ids": ids_BT} | given | before)
        return out[0], out.get("past_key_values")

    def depth(self, setting: str) -> int:
        raise UserError(f"{setting}: hidden states inside encoder-decoder models are not compared; leave loss.features out")


@dataclasses.dataclass(frozen=True)
class EncoderDecoderKind:
    """See `ModelKind`.

    auto      the name of the transformers class that loads it
    tokens    entries of the tokenizer
    examples  `data.examples.Examples` for the startup checks; None: no checks
    """

    auto: str
    tokens: int
    examples: Any | None = None  # models import nothing from data
    wrapper = EncoderDecoder
    peft = "SEQ_2_SEQ_LM"

    def architecture(self, vocab: int) -> dict:
        return {"vocab_size": self.tokens}

    def copies(self, model: nn.Module, base: Path) -> tuple[str, ...]:
        return ()

    def started(self, model: nn.Module, base: Path, seed: int) -> None:
        pass

    def refuse_misfit(self, model: nn.Module, vocab: int, setting: str) -> None:
        refuse_few_rows(base_of(model), vocab, setting)

    def checked(self, model: EncoderDecoder, setting: str, packing: int = 0, implementation: str = "auto") -> EncoderDecoder:
        """The model with its head, if it is known, or with its own forward pass. UserError if it fails, or a token sees later ones.

        A note says if padding of the source has an effect. The batch has one example if all sources have the same length.
        """
        if self.examples is None:
            return model
        order = self.examples.max_lengths.argsort(kind="stable")
        model.probe = alone = example_view(self.examples, [order[0]], setting, model.device)
        if "attention_mask" in alone.inputs:
            model.probe = example_view(self.examples, [order[0], order[-1]], setting, model.device)
        family, vocab, given = model.base_model.config.model_type, model.head.vocab, model
        with evaluating(given):
            model = model.replaced(autocast=None)
            try:
                out = model.base_model(**_known(model, model.probe.inputs), use_cache=False)
                own_NV = out.logits.flatten(0, 1).index_select(0, model.probe.rows_N)[:, :vocab]
                source = model.encoded(model.probe.inputs)
            except Exception as error:
                raise UserError(
                    f"{setting}: {family} fails on a first small batch ({brief(error)}); check its files, or use another model"
                ) from error
            if not math.isfinite(size := own_NV.abs().max().item()):
                raise UserError(f"{setting}: its logits are not finite; load it in another dtype, or use other weights")
            limit = max(tolerance(model, own_NV.dtype) * max(size, 1e-3), 1e-5 * size)
            model = _with_known_head(model, source, own_NV, limit, setting)
            _refuse_looking_ahead(model, source, limit, setting)
            if len(model.probe.inputs[DECODER_IDS]) > 1:
                known_NV = _logits(model, source, model.probe)[: len(alone.rows_N)]
                if not (gap := largest_difference(_logits(model, model.encoded(alone.inputs), alone), known_NV)) <= limit:
                    warn(
                        f"note: {setting}: {family}'s logits for a source change when a longer one is in its batch, by {gap:.2g} of {size:.2g}: padding has "
                        "an effect, so results depend on the micro-batches; train.group_by_length reduces it, and train.micro_batch_size: 1 removes it"
                    )
        return given.replaced(capabilities=model.capabilities)

    def without_gradient(self, model: EncoderDecoder, setting: str) -> list[str]:
        return parameters_without_gradient(model, setting, [model.probe])


def _with_known_head(model: EncoderDecoder, source: Encoded, own_NV: Tensor, limit: float, setting: str) -> EncoderDecoder:
    """The model as it is if its head is known; otherwise with its own forward pass."""
    if _gap(model, source, own_NV) <= limit:
        return model
    family = model.base_model.config.model_type
    model = model.replaced(capabilities=Capabilities(own_forward=True))
    if not (gap := _gap(model, source, own_NV)) <= limit:
        raise UserError(f"{setting}: {family}'s logits differ between two passes by {gap:.2g}; use another model")
    warn(
        f"note: {setting}: llmkd does not know {family}'s head; the model's own forward pass is used, which is exact but holds the logits of a "
        "whole micro-batch in memory"
    )
    return model


def _gap(model: EncoderDecoder, source: Encoded, own_NV: Tensor) -> float:
    try:
        return largest_difference(_logits(model, source, model.probe), own_NV)
    except Exception:
        return math.inf


def _refuse_looking_ahead(model: EncoderDecoder, source: Encoded, limit: float, setting: str) -> None:
    """UserError if the decoder's states at a position change with a later token."""
    ids_BT, vocab = model.probe.inputs[DECODER_IDS], model.head.vocab
    other_BT = ids_BT.clone()
    other_BT[:, -1] = (other_BT[:, -1] + 1) % vocab
    one, other = (model.decoded(source, ids)[0][:, :-1] for ids in (ids_BT, other_BT))
    if one.numel() and not largest_difference(one, other) <= max(limit, 1e-5 * one.abs().max().item()):
        raise UserError(
            f"{setting}: the decoder of {model.base_model.config.model_type} lets a position see the tokens after it; use another model"
        )


def _logits(model: EncoderDecoder, source: Encoded, view: View) -> Tensor:
    """Logits [N, V] at the view's rows."""
    hidden_BTH = model.decoded(source, view.inputs[DECODER_IDS])[0]
    return model.head.logits(hidden_BTH.flatten(0, 1).index_select(0, view.rows_N))


def _known(model: EncoderDecoder, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def _called(module: nn.Module, arguments: dict[str, Any]):
    """Call a module; arguments that are None are left out if it has no such argument, as a speech encoder has no mask."""
    known = inspect.signature(module.forward).parameters
    return module(**{name: value for name, value in arguments.items() if name in known or value is not None})
