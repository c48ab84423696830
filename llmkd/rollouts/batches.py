"""Which prompts are written together. No torch."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
_SORTED = 16  # batches whose prompts are sorted by length together: a file's order is about that of its rows


def by_length(items: Sequence[T], size: int, length: Callable[[T], int]) -> Iterator[list[T]]:
    """Items of like lengths, always the same ones together."""
    for start in range(0, len(items), size * _SORTED):
        block = sorted(items[start : start + size * _SORTED], key=lambda one: -length(one))
        yield from (block[i : i + size] for i in range(0, len(block), size))
