"""A causal LM, parted into its body (token ids to last hidden states) and its head."""

import inspect
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch import View
from ..head import Head
from ..signals import NO_TAPS, AttentionInputs, Taps
from .dropout import dropout_masks_of
from .families import base_of, body_of, decoder_of, head_of
from .last_layer import LastLayer, at_rows
from .packing_detection import no_packing_detection
from .sharding import reshard
from .taps import attention_tapped, tapped


@dataclass(frozen=True)
class Capabilities:
    """What the startup checks found of a model, and so how it is run. The defaults are right for every model whose head is known.

    own_forward                  the head is not known: `hidden` returns the logits of the model's own forward pass, `head` passes them on
    packed_attention             packed rows get llmkd's variable-length attention
    last_layer                   the hooks that compute the last layer at the target positions alone; None where that is not exact
    parameters_without_gradient  trainable parameters that a small batch gave no gradient
    """

    own_forward: bool = False
    packed_attention: bool = False
    last_layer: LastLayer | None = None
    parameters_without_gradient: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelOutputs:
    """What a model computed at the N rows of a view.

    hidden_NH   last hidden states; with `own_forward` logits [N, V], whose columns past the vocabulary are not cut
    layers      the hidden states [N, H] of the layers that were asked for, by number
    attention   what the attention of the layers that were asked for computes with, by number
    """

    hidden_NH: Tensor
    layers: dict[int, Tensor]
    attention: dict[int, AttentionInputs]


class LanguageModel(nn.Module):
    """A causal language model, with or without an adapter: `outputs(view)` and `head`. `load.py` makes finished ones.

    model         a transformers model, or PEFT's wrapper of one
    vocab         the tokenizer's size
    adapter       its adapter's name where several students have adapters on one base; it is activated before each use
    autocast      the dtype of the body's matrix products, where that is not the weights' own
    input_device  where its inputs go, if that is not where its embedding is
    head          the head, where that is not the model's own output embedding
    capabilities  what the startup checks found
    fidelity      how far a transformed teacher is from the loaded one (`teachers/fidelity.py`)
    """

    def __init__(
        self,
        model: nn.Module,
        vocab: int,
        adapter: str | None = None,
        *,
        autocast: torch.dtype | None = None,
        input_device: torch.device | None = None,
        head: Head | None = None,
        capabilities: Capabilities | None = None,
        fidelity: dict[str, float] | None = None,
    ):
        super().__init__()
        self.model, self.adapter = model, adapter
        self.autocast, self.input_device = autocast, input_device
        self.capabilities, self.fidelity = capabilities or Capabilities(), fidelity or {}
        self.head = Head(nn.Identity(), vocab) if self.capabilities.own_forward else head or head_of(self.base_model, vocab, adapter)
        self.dropout_masks = dropout_masks_of(model)
        if self.dropout_masks:
            self.head.choose = self.dropout_masks.choose

    def replaced(self, **changes) -> "LanguageModel":
        """Another one on the same modules, with other arguments than this one's for those in `changes`."""
        own = {"autocast": self.autocast, "input_device": self.input_device, "capabilities": self.capabilities, "fidelity": self.fidelity}
        own |= {} if self.capabilities.own_forward else {"head": self.head}
        return LanguageModel(self.model, self.head.vocab, self.adapter, **own | changes).train(self.training)

    def set_active_adapter(self) -> None:
        """Of several adapters in `model`, this one alone is used and requires a gradient."""
        if self.adapter and self.model.active_adapter != self.adapter:
            reshard(self.model)
            self.model.set_adapter(self.adapter)

    @property
    def base_model(self) -> nn.Module:
        """The transformers model, with the adapter's layers in it but without PEFT's wrapper."""
        return base_of(self.model)

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.input_device or self.base_model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the unquantised weights."""
        return self.base_model.get_input_embeddings().weight.dtype

    def replace_with(self, model: nn.Module) -> None:
        """Use another form of the same model from now on, frozen and in eval mode, such as one with its adapter merged."""
        self.model = model.requires_grad_(False).eval()
        if not self.capabilities.own_forward:
            self.head = head_of(self.base_model, self.head.vocab)

    def hidden(self, view: View) -> Tensor:
        """The `hidden_NH` of `outputs`."""
        return self.outputs(view).hidden_NH

    def outputs(self, view: View, taps: Taps = NO_TAPS) -> ModelOutputs:
        """One forward pass: the last hidden states at the view's rows, and what `taps` ask for."""
        self.set_active_adapter()
        if self.dropout_masks:
            self.dropout_masks.begin(view)
        # Without autocast's cache of weights, each of which is read once: it would hold all of them in a second type until the pass has ended.
        autocast = torch.autocast(view.rows_N.device.type, self.autocast, enabled=self.autocast is not None, cache_enabled=False)
        base, last = self.base_model, None if taps.queries else self.capabilities.last_layer
        within = at_rows(last, view), tapped(base, taps.layers, view.rows_N), attention_tapped(base, taps.attention)
        with autocast, no_packing_detection(view), within[0], within[1] as layers, within[2] as attention:
            if self.capabilities.own_forward:
                return ModelOutputs(self._logits(view), layers, attention)
            hidden_BTH = body_of(self.base_model)(**self.model_inputs(view), use_cache=False)[0]
        return ModelOutputs(hidden_BTH.flatten(0, 1).index_select(0, view.rows_N), layers, attention)

    def model_inputs(self, view: View) -> dict[str, Tensor]:
        packed = view.packed and self.capabilities.packed_attention
        return view.inputs | ({"attention_mask": view.packed.mask()} if packed else {})

    def _logits(self, view: View) -> Tensor:
        """The model's own logits [N, V] at the view's rows; of the other positions only those in the same column are computed."""
        T = view.T
        columns, wanted = (view.rows_N % T).unique(return_inverse=True)
        if "logits_to_keep" not in inspect.signature(self.base_model.forward).parameters or not len(columns):
            return self.base_model(**self.model_inputs(view), use_cache=False).logits.flatten(0, 1).index_select(0, view.rows_N)
        logits_BCV = self.base_model(**self.model_inputs(view), use_cache=False, logits_to_keep=columns).logits
        return logits_BCV.flatten(0, 1).index_select(0, view.rows_N // T * len(columns) + wanted)

    def next_logits(self, inputs: dict[str, Tensor], cache=None, use_cache: bool = True) -> tuple[Tensor, object | None]:
        """Logits [B, V] of the token after the last one of each row, and with `use_cache` the keys and values of all tokens so far.

        inputs  input_ids and position_ids [B, T] of tokens that are not in the cache; attention_mask of all, those in the cache too
        cache   of the tokens before; None for none
        """
        self.set_active_adapter()
        own = self.capabilities.own_forward
        known = inspect.signature((self.base_model if own else decoder_of(self.base_model)).forward).parameters
        inputs = {name: value for name, value in inputs.items() if name in known or name == "input_ids"}
        last = {"logits_to_keep": 1} if own and "logits_to_keep" in known else {}
        before = {} if cache is None else {"past_key_values": cache}
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            out = (self.base_model if own else body_of(self.base_model))(**inputs, **before, **last, use_cache=use_cache)
            logits_BV = self.head.logits(out[0][:, -1])
        return logits_BV, out.get("past_key_values") if use_cache else None

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by the names that they have where the student is alone."""
        self.set_active_adapter()
        reshard(self.model)
        own = re.compile(rf"\.{self.adapter}(?=\.|$)")
        return {own.sub(".default", name): p for name, p in self.model.named_parameters() if p.requires_grad}
