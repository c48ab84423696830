"""Batches of prompts of similar length. No torch."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
_SORTED = 16  # batches whose prompts are sorted together: with few of them, answers are in roughly the order of the rows


def by_length(items: Sequence[T], size: int, length: Callable[[T], int]) -> Iterator[list[T]]:
    """Batches of at most `size` items of similar length; always the same items together."""
    for start in range(0, len(items), size * _SORTED):
        block = sorted(items[start : start + size * _SORTED], key=lambda one: -length(one))
        yield from (block[i : i + size] for i in range(0, len(block), size))
