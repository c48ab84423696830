"""Prefetch: the next item is built while the current one is used."""

import contextlib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def prefetch(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items in the same order. While one item is used, the next is computed in another thread.

    An exception of `items` is raised where its item would have been returned. At the end, or when closed, this waits for the item in
    progress, closes `items` and ends the thread: use `contextlib.closing` if the loop over it may end with an exception.
    """
    with contextlib.closing(items), ThreadPoolExecutor(1, "llmkd-prefetch") as thread:
        coming = thread.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)
            yield item
