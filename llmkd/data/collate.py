"""From examples to a batch: padding to the right or none at all, labels aligned once. Nobody shifts again."""

import numpy as np
import torch

from ..signals import IGNORE, Batch, Example, View
from .encode import Encoded


def collate(encoded: Encoded, examples: list[int], pad: int, packing: bool = False) -> Batch:
    """A batch of those examples, on the CPU. No examples give one padding token and no targets.

    Position t of the input predicts token t + 1, so an input ends before its last supervised token; no attention
    mask is needed, since a causal model never looks at the padding to the right. With `packing` the examples stand
    one after another in a single row, and positions that start again at 0 tell the model where one begins.
    """
    ids, labels = [], []
    for i in examples:
        ids_L, marks_L = encoded.example(i)
        last = int(np.flatnonzero(marks_L)[-1])
        ids.append(ids_L[:last])
        labels.append(np.where(marks_L[1 : last + 1], ids_L[1 : last + 1], IGNORE))
    lengths = [len(x) for x in ids] or [1]
    inputs = {}
    if packing:
        ids_BT = np.concatenate(ids or [[pad]]).astype(np.int64)[None]
        labels_BT = np.concatenate(labels or [[IGNORE]]).astype(np.int64)[None]
        inputs["position_ids"] = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])[None])
        example_BT = np.repeat(np.array(examples or [-1], np.int64), lengths)[None]
    else:
        ids_BT = np.full((len(lengths), max(lengths)), pad, np.int64)
        labels_BT = np.full_like(ids_BT, IGNORE)
        for b, (x, y) in enumerate(zip(ids, labels, strict=True)):
            ids_BT[b, : len(x)] = x
            labels_BT[b, : len(y)] = y
        example_BT = np.broadcast_to(np.array(examples or [-1], np.int64)[:, None], ids_BT.shape)
    inputs["input_ids"] = torch.from_numpy(ids_BT)
    rows_N = np.flatnonzero(labels_BT != IGNORE)
    view = View(inputs, torch.from_numpy(rows_N))
    known = tuple(
        Example(encoded.identity(i), int((y != IGNORE).sum()), int(encoded.taught_by[i])) for i, y in zip(examples, labels, strict=True)
    )
    labels_N, example_N = (torch.from_numpy(x_BT.reshape(-1)[rows_N]) for x_BT in (labels_BT, example_BT))
    return Batch(labels_N, example_N, view, view, known)
