"""What transformers asks of every row: whether several examples are packed in it. llmkd knows, so that no pass waits for the device."""

import contextlib
import sys
from collections.abc import Iterator

from ..batch import View

_ASKS = "find_packed_sequence_indices"


@contextlib.contextmanager
def no_packing_detection(view: View) -> Iterator[None]:
    """For one forward pass: rows without position_ids hold one example each, which transformers would find by reading positions that it has
    just made, on the device, before its first layer."""
    # Oddity: a function of transformers is replaced while its model runs. A mask in its place would keep FlashAttention from being used, and
    # positions would be read all the same.
    masks = sys.modules.get("transformers.masking_utils")
    own = getattr(masks, _ASKS, None)
    if own is None or "position_ids" in view.inputs:
        yield
        return
    setattr(masks, _ASKS, _apart)
    try:
        yield
    finally:
        setattr(masks, _ASKS, own)


def _apart(position_ids) -> None:
    """As transformers answers for rows of one example."""
