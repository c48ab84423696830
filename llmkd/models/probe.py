"""The small batch on which a model is tried before it is used, and how far two results lie apart."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def probe_ids(vocab: int, device: torch.device | str = "cpu", length: int = 12) -> Tensor:
    """Token ids [2, length], spread over the vocabulary: (7 i + 3) mod V at the i-th position of both rows together."""
    return (torch.arange(2 * length, device=device).reshape(2, length) * 7 + 3) % vocab


def largest_difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of two tensors of one shape, computed in the wider of their types."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return (a.to(wide) - b.to(wide)).abs().max().item()


def relative_gap(these: Sequence[Tensor], those: Sequence[Tensor]) -> float:
    """The largest absolute difference between two lists of tensors, divided by the largest absolute value of the first.

    Infinite where a difference is not finite, or the lists have different lengths.
    """
    if len(these) != len(those):
        return math.inf
    size = max((x.abs().max().item() for x in these), default=0.0)
    gap = max(((x - y).abs().max().item() for x, y in zip(these, those, strict=True)), default=0.0)
    return gap / max(size, 1e-30) if math.isfinite(gap) else math.inf
