"""Classifiers of text, sound or images: any transformers model for sequence, audio or image classification."""

import dataclasses
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import View
from ..console import warn
from ..errors import UserError, brief
from ..head import Head, Passed, widen
from ..signals import NO_TAPS, Taps
from .kinds import refuse_few_rows
from .model import Model, ModelOutputs
from .probe import evaluating, example_view, largest_difference
from .startup_checks import parameters_without_gradient, tolerance

_MAY_BE_LEFT_OUT = ("token_type_ids", "attention_mask")  # some families have no such argument


class Classifier(Model):
    """A classifier; see `Model`. Its outputs are the model's own logits [N, C], which its head passes on in at least float32.

    probe   a view of some examples for the startup checks; None without
    """

    probe: View | None = None

    def own_head(self, vocab: int, adapter: str | None = None) -> Head:
        return Head(Passed(), vocab)

    def replaced(self, **changes) -> "Classifier":
        other = super().replaced(**changes)
        other.probe = self.probe
        return other

    @property
    def device(self) -> torch.device:
        return self.input_device or next(self.base_model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.base_model.parameters()).dtype

    def outputs(self, view: View, taps: Taps = NO_TAPS) -> ModelOutputs:
        """The logits, and for each tapped layer its hidden states averaged over an example's positions, without padding."""
        self.set_active_adapter()
        if self.dropout_masks and view.keys is not None and tuple(view.keys.shape) == view.shape:
            # Text has a key for each position. A module with one row per example uses the key of the example's first position.
            first_B = torch.arange(view.B, device=view.rows_N.device) * view.shape[1]
            self.dropout_masks.begin(dataclasses.replace(view, rows_N=first_B))
        elif self.dropout_masks:
            self.dropout_masks.begin_examples(view)
        with (
            torch.autocast(view.rows_N.device.type, self.autocast, enabled=self.autocast is not None),
            _tapped(self.base_model, taps.layers) as states,
        ):
            logits_BC = self.base_model(**self.model_inputs(view)).logits
        layers = {number: self._mean(x_BTH, view).index_select(0, view.rows_N) for number, x_BTH in states.items()}
        return ModelOutputs(logits_BC.index_select(0, view.rows_N), layers, {})

    def model_inputs(self, view: View) -> dict[str, Tensor]:
        known = inspect.signature(self.base_model.forward).parameters
        wide = {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in view.inputs.items()}
        return {name: x for name, x in wide.items() if name in known or name not in _MAY_BE_LEFT_OUT}

    def _mean(self, x_BTH: Tensor, view: View) -> Tensor:
        """The mean over an example's positions [B, H], in at least float32."""
        x_BTH = widen(x_BTH)
        mask, T = view.inputs.get("attention_mask"), x_BTH.shape[1]
        if mask is not None and mask.shape[1] != T:
            shorter = getattr(self.base_model, "_get_feature_vector_attention_mask", None)  # of families that shorten sound
            mask = shorter(T, mask) if shorter else None
        if mask is None:
            return x_BTH.mean(1)
        weight_BT1 = (mask.to(x_BTH.dtype) / mask.sum(1, keepdim=True).clamp_min(1))[:, :, None]
        return (x_BTH * weight_BT1).sum(1)

    def depth(self, setting: str) -> int:
        """The number of its layers. UserError for a family without a list of layers."""
        return len(_layers(self.base_model, setting))

    def widths(self, layers: Sequence[int], setting: str) -> dict[int, int]:
        """The width of the hidden states after each of `layers`, by number, found on the probe."""
        count = self.depth(setting)
        if beyond := [n for n in sorted(layers) if not 0 <= n <= count]:
            raise UserError(f"{setting} has {count} layers: found layer {beyond[0]}, expected 0 (embeddings) to {count}")
        if not layers:
            return {}
        with evaluating(self):
            taken = self.outputs(self.probe, Taps(frozenset(layers))).layers
        return {number: x_NH.shape[-1] for number, x_NH in taken.items()}


@dataclasses.dataclass(frozen=True)
class ClassifierKind:
    """See `ModelKind`.

    auto       the name of the transformers class that loads it
    names      of the classes
    tokens     entries of the tokenizer; None for data without one
    pad        the padding token, which some families must know
    examples   `data.examples.Examples` for the startup checks; None: no checks
    """

    auto: str
    names: tuple[str, ...]
    tokens: int | None = None
    pad: int | None = None
    examples: Any = None
    wrapper = Classifier

    @property
    def peft(self) -> str | None:
        return "SEQ_CLS" if self.auto == "AutoModelForSequenceClassification" else None

    def architecture(self, vocab: int) -> dict:
        text = {"vocab_size": self.tokens, "pad_token_id": self.pad} if self.tokens else {}
        return text | labelled(self.names)

    def copies(self, model: nn.Module, base: Path) -> tuple[str, ...]:
        """The modules of the head, and others with new weights, such as a pooler that the base lacks."""
        from .new_head import new_modules

        head = head_modules(model)
        return (*head, *(where for where in new_modules(base) if where.split(".")[0] not in head))

    def started(self, model: nn.Module, base: Path, seed: int) -> None:
        from .new_head import new_modules

        torch.manual_seed(seed)
        for where in sorted(new_modules(base)):
            draw(model, model.get_submodule(where))

    def refuse_misfit(self, model: nn.Module, vocab: int, setting: str) -> None:
        from .families import base_of

        if (found := base_of(model).config.num_labels) != vocab:
            raise UserError(f"{setting}: has {found} classes, and the data {vocab}; they do not belong together")
        if self.tokens:
            refuse_few_rows(base_of(model), self.tokens, setting)

    def checked(self, model: Classifier, setting: str, packing: int = 0, implementation: str = "auto") -> Classifier:
        """UserError unless the logits of a small batch are finite and one for each class; a note if they depend on the rest of the batch."""
        if self.examples is None:
            return model
        order = self.examples.max_lengths.argsort(kind="stable")
        both, alone = (example_view(self.examples, some, setting, model.device) for some in ([order[0], order[-1]], [order[0]]))
        model.probe = both
        family = model.base_model.config.model_type
        with evaluating(model):
            try:
                logits_NC = model.head.logits(model.hidden(model.probe))
            except Exception as error:
                raise UserError(
                    f"{setting}: {family} fails on a first small batch ({brief(error)}); check its files, or use another model"
                ) from error
            if logits_NC.ndim != 2 or logits_NC.shape[1] != model.head.vocab:
                raise UserError(
                    f"{setting}: {family} returns logits of shape {tuple(logits_NC.shape)}, expected one for each class; use another model"
                )
            if not math.isfinite(size := logits_NC.abs().max().item()):
                raise UserError(f"{setting}: its logits are not finite; load it in another dtype, or use other weights")
            gap = largest_difference(model.head.logits(model.hidden(alone)), logits_NC[:1])
        if not gap <= tolerance(model) * max(size, 1e-3):
            warn(
                f"note: {setting}: {family}'s logits of an example change when a longer one is in its batch, by {gap:.2g} of {size:.2g}: padding has an "
                "effect, so results depend on the micro-batches; train.group_by_length reduces it, and train.micro_batch_size: 1 removes it"
            )
        return model

    def without_gradient(self, model: Classifier, setting: str) -> list[str]:
        return parameters_without_gradient(model, setting, [model.probe])


def draw(model: nn.Module, module: nn.Module) -> None:
    """Give a module new random weights, as its family initialises them."""
    for parameter in module.parameters(recurse=False):
        parameter.__dict__.pop("_is_hf_initialized", None)  # with this mark transformers would leave the weights as they are
    module.__dict__.pop("_is_hf_initialized", None)
    with torch.no_grad():
        model._init_weights(module)


def labelled(names: Sequence[str]) -> dict:
    """The entries of a configuration that name the classes."""
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {name: i for i, name in enumerate(names)}}


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's modules with weights outside of its body."""
    body = model.base_model_prefix
    return tuple(name for name, module in model.named_children() if name != body and any(True for _ in module.parameters()))


def _layers(model: nn.Module, setting: str) -> nn.ModuleList:
    count = getattr(model.config, "num_hidden_layers", None)
    lists = [one for one in model.modules() if isinstance(one, nn.ModuleList) and len(one) == count]
    # The largest: audio models have their convolutions in a list, too.
    found = max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=None)
    if found is None:
        raise UserError(
            f"{setting} ({model.config.model_type}) does not keep its layers in a list, so nothing can be read inside it; use another model"
        )
    return found


@contextmanager
def _tapped(model: nn.Module, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """A dictionary that a forward pass inside the context fills with the hidden states [B, T, H] after each of `layers`; 0 is the first layer's input."""
    taken: dict[int, Tensor] = {}
    if not layers:
        yield taken
        return
    modules, hooks = _layers(model, "a model"), []

    def before(module, args, kwargs):
        taken[0] = args[0] if args else kwargs["hidden_states"]

    def after(number: int):
        return lambda module, args, out: taken.__setitem__(number, out if isinstance(out, Tensor) else out[0])

    for number in layers:
        if number == 0:
            hooks.append(modules[0].register_forward_pre_hook(before, with_kwargs=True))
        else:
            hooks.append(modules[number - 1].register_forward_hook(after(number)))
    try:
        yield taken
    finally:
        for hook in hooks:
            hook.remove()
