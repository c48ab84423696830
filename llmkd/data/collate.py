"""Makes a batch of examples, padded on the right or packed. Labels are aligned with positions here: no other code shifts them."""

import hashlib

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Example, PackedLayout, View
from .examples import TokenExamples
from .shared_prefixes import shared_prefixes

_NONE = np.zeros(0, np.int64)


def collate(
    data: TokenExamples, indices: list[int], pad: int, packing: bool = False, share: bool = False, key: tuple[int, ...] | None = None
) -> Batch:
    """A batch of the examples `indices`, on the CPU. Without examples it has one padding token and no targets.

    pad       the padding token
    packing   put all examples into one row, without padding
    share     with packing: put a prefix that several examples share into the row once
    key       (seed, step): with the example's content and the position it determines the student's dropout; None: without dropout's keys

    Position t of the input predicts token t + 1, so an input ends before its last supervised token. No attention mask is needed, since
    a causal model does not attend to padding on its right. If the teacher's view differs, it has the same labels at other positions. The
    weight of a target is its example's, times its own.
    """
    student = build_view(data, indices, pad, packing, share, key)
    teacher = student if data.teacher_view is None else build_view(data.teacher_view, indices, pad, packing, share)
    labels = [ids_L[1:][mask_L[1:]] for ids_L, mask_L in map(data.example, indices)]
    known = tuple(
        Example(data.content_hash(i), len(y), int(data.teacher_index[i]), int(data.source[i])) for i, y in zip(indices, labels, strict=True)
    )
    labels_N = np.concatenate([_NONE, *labels])
    example_N = np.repeat(np.array(indices, np.int64), [len(y) for y in labels])
    weights = {name: torch.from_numpy(w_E[example_N]) for name, w_E in data.weights.items()}
    for name in data.token_weights:
        own = [data.target_weights(i, name) for i in indices]
        weights[name] = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *own]))
    return Batch(torch.from_numpy(labels_N), torch.from_numpy(example_N), student, teacher, known, weights)


def build_view(data: TokenExamples, indices: list[int], pad: int, packing: bool, share: bool, key: tuple[int, ...] | None = None) -> View:
    ids, rows = [], []
    for ids_L, mask_L in map(data.example, indices):
        rows.append(np.flatnonzero(mask_L[1:]))
        ids.append(ids_L[: rows[-1][-1] + 1])
    keys = key and [position_keys((*key, data.content_hash(i)), len(x)) for i, x in zip(indices, ids, strict=True)]
    if packing and indices:
        return packed_view(ids, rows, share, keys)
    lengths = [len(x) for x in ids] or [1]
    ids_BT, keys_BT = np.full((len(lengths), max(lengths)), pad, np.int64), np.zeros((len(lengths), max(lengths)), np.int32)
    for b, x in enumerate(ids):
        ids_BT[b, : len(x)] = x
        keys_BT[b, : len(x)] = keys[b] if keys else 0
    rows_N = np.concatenate([_NONE, *(x + b * max(lengths) for b, x in enumerate(rows))])
    return View({"input_ids": torch.from_numpy(ids_BT)}, torch.from_numpy(rows_N), None, torch.from_numpy(keys_BT) if key else None)


def position_keys(key: tuple, length: int) -> np.ndarray:
    """A pseudorandom key for each position of an example, int32 [length]: the high halves of SplitMix64 (Steele et al., OOPSLA 2014), seeded by a
    hash of `key`."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
    x = np.uint64(seed) + np.arange(1, length + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return ((x ^ x >> np.uint64(31)) >> np.uint64(32)).astype(np.uint32).view(np.int32)


def packed_view(ids: list[np.ndarray], rows: list[np.ndarray], share: bool, keys: list[np.ndarray] | None = None) -> View:
    """All examples as one row: for each group the shared prefix, if it has one, and then the rest of each example.

    ids    int32 [tokens] of each example
    rows   the positions in each example that predict its targets
    keys   of the positions of each example, see `position_keys`; a shared prefix takes those of its first example
    """
    groups = shared_prefixes(ids, [x[0] for x in rows]) if share else [(0, list(range(len(ids))))]
    segments, positions, prefix_of, example_of, of_segments = [], [], [], [], []
    target_rows, length = [_NONE] * len(ids), 0  # `length` of the row so far
    for shared, members in groups:
        prefix = len(segments) if shared else -1
        for example, start, end in [(-1, 0, shared)] * bool(shared) + [(i, shared, len(ids[i])) for i in members]:
            segments.append(ids[members[0] if example < 0 else example][start:end])
            of_segments += [keys[members[0] if example < 0 else example][start:end]] if keys else []
            positions.append(np.arange(start, end))
            prefix_of.append(prefix if start else -1)
            example_of.append(example)
            if example >= 0:
                target_rows[example] = rows[example] - start + length
            length += end - start
    inputs = {
        "input_ids": torch.from_numpy(np.concatenate(segments).astype(np.int64)[None]),
        "position_ids": torch.from_numpy(np.concatenate(positions)[None]),
    }
    layout = PackedLayout.of([len(x) for x in segments], prefix_of, example_of)
    keys_1T = torch.from_numpy(np.concatenate(of_segments)[None]) if keys else None
    return View(inputs, torch.from_numpy(np.concatenate(target_rows)), layout, keys_1T)


def select_examples(batch: Batch, mine: list[bool]) -> Batch:
    """The examples of a batch for which `mine` [examples] is true, for a teacher: the student's view is not kept, and is the teacher's here."""
    keep_N = per_target(batch, mine).to(batch.labels_N.device)
    part, *others = (_selected(view, mine, keep_N) for view in (batch.teacher, *batch.of_teachers.values()))
    examples = tuple(example for example, keep in zip(batch.examples, mine, strict=True) if keep)
    own = dict(zip(batch.of_teachers, others, strict=True))
    return Batch(batch.labels_N[keep_N], batch.example_N[keep_N], part, part, examples, of_teachers=own)


def _selected(view: View, mine: list[bool], keep_N: Tensor) -> View:
    """The view of the examples for which `mine` is true. `keep_N`: whether each target belongs to one of them."""
    kept_N, device, packed, T = view.rows_N[keep_N], keep_N.device, None, view.T
    if view.packed:
        packed, keep = view.packed.select(mine)
        keep_T = torch.tensor(keep).repeat_interleave(torch.tensor(view.packed.lengths)).to(device)
        packed = packed.each(lambda x: x.to(device))
        inputs = {name: x_BT[:, keep_T] for name, x_BT in view.inputs.items()}
        rows_N = (keep_T.cumsum(0) - 1)[kept_N]
    else:
        wanted = torch.tensor(mine, device=device)
        inputs = {name: x_BT[wanted] for name, x_BT in view.inputs.items()}
        rows_N = (wanted.cumsum(0) - 1)[kept_N // T] * T + kept_N % T
    return View(inputs, rows_N, packed, given=view.given)


def per_target(batch: Batch, of_example: list[bool]) -> Tensor:
    """The values of the examples repeated for each of their targets, bool [N], on the CPU."""
    return torch.tensor(of_example).repeat_interleave(torch.tensor([example.num_targets for example in batch.examples]))
