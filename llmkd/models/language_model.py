"""A causal LM as its body (hidden states) and its head."""

import inspect
import re

import torch
from torch import Tensor, nn

from ..batch import View
from ..head import Head
from . import last_layer
from .families import decoder_of, head_of


class LanguageModel(nn.Module):
    """A causal language model, with or without an adapter, parted into its body (`hidden`) and its `head`.

    `autocast` is the type in which the body's products are computed, where that is not the weights' own. Several students may be
    adapters on one base, side by side in `model`: then `adapter` is this one's name there, and it is switched to when it is used.
    """

    def __init__(self, model: nn.Module, vocab: int, adapter: str | None = None):
        super().__init__()
        self.model, self.adapter = model, adapter
        self.autocast: torch.dtype | None = None
        self.own_forward = False
        self.varlen = False  # whether packed rows have llmkd's attention
        self.last_layer: last_layer.LastLayer | None = None  # where it is computed at the rows alone
        self.input_device: torch.device | None = None  # where its inputs go, if that is not where its weights are
        self.parameters_without_gradient: list[str] = []  # trainable parameters that a small batch gave no gradient
        self.fidelity: dict[str, float] = {}  # how far it was moved since it was loaded: see `honing.compare`
        self.head = head_of(self.base_model, vocab, adapter)

    def set_active_adapter(self) -> None:
        """Of several adapters in `model`, this one alone is used, and requires a gradient."""
        if self.adapter and self.model.active_adapter != self.adapter:
            self.model.set_adapter(self.adapter)

    @property
    def base_model(self) -> nn.Module:
        """The transformers model, with the adapter's layers in it but without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        return self.input_device or self.base_model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the unquantised weights are held in."""
        return self.base_model.get_input_embeddings().weight.dtype

    def replace_with(self, model: nn.Module) -> None:
        """Go on as another form of the same model, frozen and in eval mode: with its adapter merged, say."""
        self.model = model.requires_grad_(False).eval()
        if not self.own_forward:
            self.head = head_of(self.base_model, self.head.vocab)

    def use_own_forward(self) -> None:
        """For a family whose head is not known: what `hidden` gives are the model's own logits, and the head passes them on."""
        self.own_forward = True
        self.head = Head(nn.Identity(), self.head.vocab)

    def hidden(self, view: View) -> Tensor:
        """Last hidden states [N, H] at the view's rows."""
        self.set_active_adapter()
        autocast = torch.autocast(view.rows_N.device.type, self.autocast, enabled=self.autocast is not None)
        with autocast, last_layer.at_rows(self.last_layer, view):
            if self.own_forward:
                return self._logits(view)
            hidden_BTH = decoder_of(self.base_model)(**self._inputs(view), use_cache=False)[0]
        return hidden_BTH.flatten(0, 1).index_select(0, view.rows_N)

    def _inputs(self, view: View) -> dict[str, Tensor]:
        return view.inputs | ({"attention_mask": view.packed.mask()} if view.packed and self.varlen else {})

    def _logits(self, view: View) -> Tensor:
        """The model's own logits [N, V] at the view's rows; of the other positions no more than those in the same column."""
        T = view.inputs["input_ids"].shape[1]
        columns, wanted = (view.rows_N % T).unique(return_inverse=True)
        if "logits_to_keep" not in inspect.signature(self.base_model.forward).parameters or not len(columns):
            return self.base_model(**self._inputs(view), use_cache=False).logits.flatten(0, 1).index_select(0, view.rows_N)
        logits_BCV = self.base_model(**self._inputs(view), use_cache=False, logits_to_keep=columns).logits
        return logits_BCV.flatten(0, 1).index_select(0, view.rows_N // T * len(columns) + wanted)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What trains, by the names that it has where the student is alone."""
        self.set_active_adapter()
        own = re.compile(rf"\.{self.adapter}(?=\.|$)")
        return {own.sub(".default", name): p for name, p in self.model.named_parameters() if p.requires_grad}
