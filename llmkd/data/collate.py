"""From examples to a batch: right padding, labels aligned once. Nobody shifts again."""

import numpy as np
import torch

from ..signals import IGNORE, Batch, View
from .encode import Encoded


def collate(encoded: Encoded, examples: list[int], pad: int) -> Batch:
    """A batch of those examples, on the CPU. No examples give one padding token and no targets.

    Position t of the input predicts token t + 1, so an input ends before its last supervised token; no attention
    mask is needed, since a causal model never looks at the padding to the right.
    """
    rows = []
    for i in examples:
        ids, marks = encoded.example(i)
        last = int(np.flatnonzero(marks)[-1])
        rows.append((ids[:last], np.where(marks[1 : last + 1], ids[1 : last + 1], IGNORE)))
    B, T = max(1, len(rows)), max((len(ids) for ids, _ in rows), default=1)
    ids_BT = np.full((B, T), pad, np.int64)
    labels_BT = np.full((B, T), IGNORE, np.int64)
    for b, (ids, labels) in enumerate(rows):
        ids_BT[b, : len(ids)] = ids
        labels_BT[b, : len(labels)] = labels
    rows_N = np.flatnonzero(labels_BT != IGNORE)
    example_N = np.array(examples or [-1], np.int64)[rows_N // T]
    view = View({"input_ids": torch.from_numpy(ids_BT)}, torch.from_numpy(rows_N))
    return Batch(torch.from_numpy(labels_BT.reshape(-1)[rows_N]), torch.from_numpy(example_N), view, view)
