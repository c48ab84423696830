"""A model as training sees it: from a view to what it computes at the view's rows, with its head, its adapter and what trains."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch import View
from ..head import Head
from ..signals import NO_TAPS, AttentionInputs, Taps
from .dropout import dropout_masks_of
from .families import base_of
from .last_layer import LastLayer
from .sharding import reshard


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


class Model(nn.Module):
    """A model with or without an adapter: `outputs(view)` and `head`. Its subclasses know how one kind of models is called.

    model         a transformers model, or PEFT's wrapper of one
    vocab         the events of its head: the tokenizer's size, or the classes
    adapter       its adapter's name where several students have adapters on one base; it is activated before each use
    autocast      the dtype of the body's matrix products, where that is not the weights' own
    input_device  where its inputs go, if that is not where its first weights are
    head          the head, where that is not the model's own
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
        self.head = Head(nn.Identity(), vocab) if self.capabilities.own_forward else head or self.own_head(vocab, adapter)
        self.dropout_masks = dropout_masks_of(model)
        if self.dropout_masks:
            self.head.choose = self.dropout_masks.choose

    def own_head(self, vocab: int, adapter: str | None = None) -> Head:
        """The head of `model`."""
        raise NotImplementedError

    def outputs(self, view: View, taps: Taps = NO_TAPS) -> ModelOutputs:
        """One forward pass: what the head reads at the view's rows, and what `taps` ask for."""
        raise NotImplementedError

    def replaced(self, **changes) -> "Model":
        """Another one on the same modules, with other arguments than this one's for those in `changes`."""
        own = {"autocast": self.autocast, "input_device": self.input_device, "capabilities": self.capabilities, "fidelity": self.fidelity}
        own |= {} if self.capabilities.own_forward else {"head": self.head}
        return type(self)(self.model, self.head.vocab, self.adapter, **own | changes).train(self.training)

    def set_active_adapter(self) -> None:
        """Of several adapters in `model`, this one alone is used and requires a gradient."""
        if self.adapter and self.model.active_adapter != self.adapter:
            reshard(self.model)
            self.model.set_adapter(self.adapter)

    @property
    def base_model(self) -> nn.Module:
        """The transformers model, with the adapter's layers in it but without PEFT's wrapper."""
        return base_of(self.model)

    def replace_with(self, model: nn.Module) -> None:
        """Use another form of the same model from now on, frozen and in eval mode, such as one with its adapter merged."""
        self.model = model.requires_grad_(False).eval()
        if not self.capabilities.own_forward:
            self.head = self.own_head(self.head.vocab)

    def hidden(self, view: View) -> Tensor:
        """The `hidden_NH` of `outputs`."""
        return self.outputs(view).hidden_NH

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by the names that they have where the student is alone."""
        self.set_active_adapter()
        reshard(self.model)
        own = re.compile(rf"\.{self.adapter}(?=\.|$)")
        return {own.sub(".default", name): p for name, p in self.model.named_parameters() if p.requires_grad}

    def is_untouched(self) -> bool:
        """Whether it computes what its base does, to the last bit: it trains a LoRA adapter and nothing else, and every B of it is still 0."""
        trained = self.trainable()
        return bool(trained) and all(".lora_A." in name or (".lora_B." in name and not p.any()) for name, p in trained.items())
