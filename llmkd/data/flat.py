"""Sequences of different lengths, concatenated in flat arrays: sequence i is `values[offsets[i] : offsets[i + 1]]`."""

from collections.abc import Sequence

import numpy as np


def chosen_from(offsets: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions of the sequences with these indices, in this order, int64 [values], and their new offsets."""
    lengths = np.diff(offsets)[chosen]
    ends = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.repeat(offsets[chosen] - ends[:-1], lengths) + np.arange(ends[-1]), ends


def joined_offsets(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The offsets of several flat arrays when concatenated."""
    starts = np.cumsum([0, *(offsets[-1] for offsets in parts)])
    return np.concatenate([[0], *(offsets[1:] + start for offsets, start in zip(parts, starts, strict=False))]).astype(np.int64)
