"""The small batch for the startup checks of a model, and measures of the difference of two results."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch import View
from ..head import widen
from .parts import local


def probe_ids(vocab: int, device: torch.device | str = "cpu", length: int = 12) -> Tensor:
    """Token ids [2, length], spread over the vocabulary: (7 i + 3) mod V at position i, counted over both rows."""
    return (torch.arange(2 * length, device=device).reshape(2, length) * 7 + 3) % vocab


def example_view(examples: Any, chosen: Sequence[int], setting: str, device: torch.device | str) -> View:
    """The view that the model of `setting` (student.model, teacher.model, ...) has of some of `data.examples.Examples`."""
    return examples.batch(chosen).view_of(setting).each(lambda x: x.to(device))


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and gradients are off."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two tensors of the same shape, computed in the wider of their dtypes."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return (a.to(wide) - b.to(wide)).abs().max().item()


def relative_gap(these: Sequence[Tensor], those: Sequence[Tensor]) -> float:
    """The largest absolute difference between two lists of tensors, divided by the largest absolute value of the first.

    Infinite if a difference is not finite, or the lists have different lengths.
    """
    if len(these) != len(those):
        return math.inf
    size = max((x.abs().max().item() for x in these), default=0.0)
    gap = max(((x - y).abs().max().item() for x, y in zip(these, those, strict=True)), default=0.0)
    return gap / max(size, 1e-30) if math.isfinite(gap) else math.inf


def hidden_and_gradients(model, view: View) -> list[Tensor]:
    """Hidden states [N, H] of a `LanguageModel` at the view's rows; if it trains, also the gradients of the sum of their cosines. For sharded
    parameters these are this process's parts, without empty ones. Earlier gradients are dropped, and none remain afterwards."""
    parameters = list(model.trainable().values())
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(bool(parameters)):
        hidden_NH = model.hidden(view)
        if parameters:  # sharded ones are not leaves of the graph, so torch.autograd.grad would not reach them
            widen(hidden_NH).cos().sum().backward()
        grads = [p.grad for p in parameters if p.grad is not None]
        model.zero_grad(set_to_none=True)
    return [hidden_NH.detach(), *(part for part in map(local, grads) if part.numel())]
