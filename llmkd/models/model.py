"""`Model`: a teacher or student as training uses it, with its outputs at a view's rows, its head, its adapter and its trainable parameters."""

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
    """The results of the startup checks, which decide how a model is run. The defaults are right for every model whose head is known.

    own_forward                  the head is unknown: `hidden` returns the logits of the model's own forward pass, and `head` passes them on
    packed_attention             packed rows use llmkd's variable-length attention
    last_layer                   hooks that compute the last layer only at the target positions; None if that is not exact
    parameters_without_gradient  trainable parameters that got no gradient from a small batch
    """

    own_forward: bool = False
    packed_attention: bool = False
    last_layer: LastLayer | None = None
    parameters_without_gradient: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelOutputs:
    """A model's outputs at the N rows of a view.

    hidden_NH           last hidden states; with `own_forward` logits [N, V], whose columns past the vocabulary are not cut
    layers, attention   the outputs of `Taps`, by layer: hidden states [N, H], and inputs of attention
    """

    hidden_NH: Tensor
    layers: dict[int, Tensor]
    attention: dict[int, AttentionInputs]


class Model(nn.Module):
    """A model with or without an adapter: `outputs(view)` and `head`. Each subclass calls one kind of model.

    model         a transformers model, or PEFT's wrapper of one
    vocab         the number of the head's outputs: the tokenizer's size, or the number of classes
    adapter       the name of its adapter, if several students have adapters on one base; it is activated before each use
    autocast      the dtype of the body's matrix products; None for the weights' own
    input_device  the device of its inputs; None for that of its first weights
    head          None for the model's own
    capabilities  the results of the startup checks
    fidelity      how far a transformed teacher is from the original (`teachers/fidelity.py`)
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
        """One forward pass: the head's inputs at the view's rows, and the tensors of `taps`."""
        raise NotImplementedError

    def replaced(self, **changes) -> "Model":
        """Another model on the same modules, with the constructor's arguments in `changes` replaced."""
        own = {"autocast": self.autocast, "input_device": self.input_device, "capabilities": self.capabilities, "fidelity": self.fidelity}
        own |= {} if self.capabilities.own_forward else {"head": self.head}
        return type(self)(self.model, self.head.vocab, self.adapter, **own | changes).train(self.training)

    def set_active_adapter(self) -> None:
        """Activate this model's adapter: of several in `model`, only this one is used and requires a gradient."""
        if self.adapter and self.model.active_adapter != self.adapter:
            reshard(self.model)
            self.model.set_adapter(self.adapter)

    @property
    def base_model(self) -> nn.Module:
        """The transformers model, with the adapter's layers in it but without PEFT's wrapper."""
        return base_of(self.model)

    def replace_with(self, model: nn.Module) -> None:
        """Replace the modules by another form of the same model, such as one with its adapter merged; frozen and in eval mode."""
        self.model = model.requires_grad_(False).eval()
        if not self.capabilities.own_forward:
            self.head = self.own_head(self.head.vocab)

    def hidden(self, view: View) -> Tensor:
        """The `hidden_NH` of `outputs`."""
        return self.outputs(view).hidden_NH

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that train, under the names that they have if the student is alone."""
        self.set_active_adapter()
        reshard(self.model)
        own = re.compile(rf"\.{self.adapter}(?=\.|$)")
        return {own.sub(".default", name): p for name, p in self.model.named_parameters() if p.requires_grad}

    def is_untouched(self) -> bool:
        """Whether it still computes exactly what its base does: only a LoRA adapter trains, and all its B matrices are 0."""
        trained = self.trainable()
        return bool(trained) and all(".lora_A." in name or (".lora_B." in name and not p.any()) for name, p in trained.items())
