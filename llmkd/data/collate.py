"""From examples to a batch: padding to the right or none at all, labels aligned once. Nobody shifts again."""

import numpy as np
import torch
from torch import Tensor

from ..signals import Batch, Example, View
from .encode import Encoded

_NONE = np.zeros(0, np.int64)


def collate(encoded: Encoded, examples: list[int], pad: int, packing: bool = False) -> Batch:
    """A batch of those examples, on the CPU. No examples give one padding token and no targets.

    Position t of the input predicts token t + 1, so an input ends before its last supervised token; no attention
    mask is needed, since a causal model never looks at the padding to the right. With `packing` the examples stand
    one after another in a single row, and positions that start again at 0 tell the model where one begins. What the
    teacher reads, where it is something else, has the same labels at places of its own.
    """
    student = _view(encoded, examples, pad, packing)
    teacher = student if encoded.for_teacher is None else _view(encoded.for_teacher, examples, pad, packing)
    labels = [ids_L[1:][marks_L[1:]] for ids_L, marks_L in map(encoded.example, examples)]
    known = tuple(Example(encoded.identity(i), len(y), int(encoded.taught_by[i])) for i, y in zip(examples, labels, strict=True))
    labels_N = np.concatenate([_NONE, *labels])
    example_N = np.repeat(np.array(examples, np.int64), [len(y) for y in labels])
    return Batch(torch.from_numpy(labels_N), torch.from_numpy(example_N), student, teacher, known)


def _view(encoded: Encoded, examples: list[int], pad: int, packing: bool) -> View:
    ids, rows = [], []
    for ids_L, marks_L in map(encoded.example, examples):
        rows.append(np.flatnonzero(marks_L[1:]))
        ids.append(ids_L[: rows[-1][-1] + 1])
    lengths = [len(x) for x in ids] or [1]
    inputs = {}
    if packing:
        ids_BT = np.concatenate(ids or [[pad]]).astype(np.int64)[None]
        inputs["position_ids"] = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])[None])
        starts = np.cumsum([0, *lengths[:-1]])
    else:
        ids_BT = np.full((len(lengths), max(lengths)), pad, np.int64)
        for b, x in enumerate(ids):
            ids_BT[b, : len(x)] = x
        starts = np.arange(len(lengths)) * max(lengths)
    inputs["input_ids"] = torch.from_numpy(ids_BT)
    rows_N = np.concatenate([_NONE, *(x + start for x, start in zip(rows, starts, strict=False))])
    return View(inputs, torch.from_numpy(rows_N))


def part_of(batch: Batch, mine: list[bool]) -> Batch:
    """Some of a batch's examples, for a teacher: `mine[i]` says whether example i is one. Both views are the teacher's."""
    view, keep_N = batch.teacher, by_target(batch, mine).to(batch.labels_N.device)
    kept_N, wanted = view.rows_N[keep_N], torch.tensor(mine, device=batch.labels_N.device)
    ids_BT = view.inputs["input_ids"]
    T = ids_BT.shape[1]
    if "position_ids" in view.inputs:  # one row, in which an example begins where positions do
        keep_T = wanted[(view.inputs["position_ids"][0] == 0).cumsum(0) - 1]
        inputs = {name: x_BT[:, keep_T] for name, x_BT in view.inputs.items()}
        rows_N = (keep_T.cumsum(0) - 1)[kept_N]
    else:
        inputs = {name: x_BT[wanted] for name, x_BT in view.inputs.items()}
        rows_N = (wanted.cumsum(0) - 1)[kept_N // T] * T + kept_N % T
    part = View(inputs, rows_N)
    examples = tuple(example for example, keep in zip(batch.examples, mine, strict=True) if keep)
    return Batch(batch.labels_N[keep_N], batch.example_N[keep_N], part, part, examples)


def by_target(batch: Batch, of_example: list[bool]) -> Tensor:
    """A mark of each example, repeated for each of its targets; on the CPU."""
    return torch.tensor(of_example).repeat_interleave(torch.tensor([example.targets for example in batch.examples]))
