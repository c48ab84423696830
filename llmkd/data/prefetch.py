"""Prefetch: the next item is built while the present one is used."""

import contextlib
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


def prefetch(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items in the same order, each begun in a thread of its own when the one before it is handed over.

    What `items` raises arrives with the item that it stands in place of. When this is closed, or ends, it waits for the item in the
    making, closes `items`, and leaves no thread behind: close it (`contextlib.closing`) where the loop over it may end by an exception.
    """
    with contextlib.closing(items), ThreadPoolExecutor(1, "llmkd-prefetch") as thread:
        coming = thread.submit(next, items, _END)
        while (item := coming.result()) is not _END:
            coming = thread.submit(next, items, _END)
            yield item
