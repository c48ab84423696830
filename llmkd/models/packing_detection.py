"""Answers transformers' question whether a row packs several examples. llmkd knows, so no pass waits for the device to find out."""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from ..batch import View

_ASKS = "find_packed_sequence_indices"
_ONE_EXAMPLE = ContextVar("the rows of this pass hold one example each", default=False)
_LOCK = threading.Lock()


@contextlib.contextmanager
def no_packing_detection(view: View) -> Iterator[None]:
    """For one forward pass: rows without position_ids have one example each. transformers would find that out by reading positions that it has
    just made on the device, before the first layer. Passes of other threads at the same time are not affected."""
    _wrap()
    token = _ONE_EXAMPLE.set("position_ids" not in view.inputs)
    try:
        yield
    finally:
        _ONE_EXAMPLE.reset(token)


def _wrap() -> None:
    # Oddity: a function of transformers is wrapped, once. Passing a mask instead would prevent FlashAttention, and passing positions would not
    # prevent that they are read.
    masks = sys.modules.get("transformers.masking_utils")
    with _LOCK:
        own = getattr(masks, _ASKS, None)
        if own is not None and not hasattr(own, "of_transformers"):
            setattr(masks, _ASKS, _answering(own))


def _answering(own: Callable) -> Callable:
    @functools.wraps(own)
    def asked(*given, **named):
        return None if _ONE_EXAMPLE.get() else own(*given, **named)  # None: one example

    asked.of_transformers = own
    return asked
