"""Examples of a source and a target: what an encoder reads of each, in a form of its own for text or sound, and the tokens that a decoder predicts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .examples import ALL_TEACHERS, Draw, Weighed, digest
from .labelled import Inputs

if TYPE_CHECKING:  # batches are torch's, and checking data loads no torch
    from torch import Tensor

    from ..batch import Batch, View

_NONE = np.zeros(0, np.int64)


@dataclass
class SequenceExamples(Weighed):
    """Examples of encoder-decoder models; the decoder's sequence i is `ids[offsets[i] : offsets[i + 1]]`.

    A sequence is whole: the token that a decoder starts from, those that a target begins with in any case, the text, and the token that ends
    it. So what the decoder reads and its labels are one sequence, a position apart: `batch` cuts them, and no other code shifts them.

    texts        of each, its target as it was written
    of_teacher   what the teachers' encoder reads, where that is another input, such as another extractor's
    clean        whether teachers read what is not augmented
    """

    inputs: Inputs
    ids: np.ndarray  # int32 [tokens]
    loss_mask: np.ndarray  # bool [tokens]: the supervised tokens, of which the first of a sequence is none
    offsets: np.ndarray  # int64 [examples + 1]
    row: np.ndarray  # int64 [examples]
    texts: list[str]
    pad: int
    counts: dict[str, int] = field(default_factory=dict)
    source: np.ndarray | None = None
    teacher_index: np.ndarray | None = None
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    of_teacher: Inputs | None = None
    clean: bool = False

    def __post_init__(self):
        if self.source is None:
            self.source = np.zeros(len(self.row), np.int64)
        if self.teacher_index is None:
            self.teacher_index = np.full(len(self.row), ALL_TEACHERS, np.int64)

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The decoder's sequence and its loss mask."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part], self.loss_mask[part]

    @property
    def num_targets(self) -> np.ndarray:
        return np.add.reduceat(self.loss_mask.astype(np.int64), self.offsets[:-1]) if len(self) else _NONE

    @property
    def lengths(self) -> np.ndarray:
        return self.inputs.lengths + np.diff(self.offsets)

    @property
    def max_lengths(self) -> np.ndarray:
        return self.lengths if self.of_teacher is None else np.maximum(self.lengths, self.of_teacher.lengths + np.diff(self.offsets))

    @property
    def one_input(self) -> bool:
        return self.of_teacher is None and not self.clean

    @property
    def described(self) -> str:
        return f"{int(self.inputs.lengths.sum()):,} {'tokens' if self.inputs.positions else 'hundredths of a second'} read, {int(self.loss_mask.sum()):,} targets"

    def content_hash(self, i: int) -> str:
        theirs = b"" if self.of_teacher is None else b"|" + self.of_teacher.content(i)
        return digest(self._own(i) + theirs)

    def student_hash(self, i: int) -> str:
        return digest(self._own(i))

    def _own(self, i: int) -> bytes:
        ids, mask = self.example(i)
        return self.inputs.content(i) + b"|" + ids.tobytes() + mask.tobytes()

    def take(self, chosen: np.ndarray) -> "SequenceExamples":
        lengths = np.diff(self.offsets)[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return replace(
            self,
            inputs=self.inputs.take(chosen),
            ids=self.ids[tokens],
            loss_mask=self.loss_mask[tokens],
            offsets=offsets,
            row=self.row[chosen],
            texts=[self.texts[i] for i in chosen],
            counts={},
            source=self.source[chosen],
            teacher_index=self.teacher_index[chosen],
            weights={name: w_E[chosen] for name, w_E in self.weights.items()},
            of_teacher=self.of_teacher and self.of_teacher.take(chosen),
        )

    @staticmethod
    def joined(
        parts: "list[SequenceExamples]", before: list[int], counts: dict[str, int], source: np.ndarray | None = None
    ) -> "SequenceExamples":
        """See `examples.concat`."""
        first, names = parts[0], dict.fromkeys(name for part in parts for name in part.weights)
        starts = np.cumsum([0, *(len(part.ids) for part in parts)])
        ends = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
        return replace(
            first,
            inputs=first.inputs.joined([part.inputs for part in parts]),
            ids=np.concatenate([part.ids for part in parts]),
            loss_mask=np.concatenate([part.loss_mask for part in parts]),
            offsets=np.concatenate([[0], *ends]).astype(np.int64),
            row=np.concatenate([part.row + start for part, start in zip(parts, before, strict=True)]),
            texts=[text for part in parts for text in part.texts],
            counts=counts,
            source=source if source is not None else np.zeros(sum(map(len, parts)), np.int64),
            teacher_index=np.concatenate([part.teacher_index for part in parts]),
            weights={name: np.concatenate([part.weight(name) for part in parts]) for name in names},
            of_teacher=first.of_teacher and first.of_teacher.joined([part.of_teacher for part in parts]),
        )

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> "Batch":
        """See `Examples`. A batch of no examples has the sources of the first one, one token of padding for the decoder, and no target."""
        import torch

        from ..batch import Batch, Example

        indices = [int(i) for i in indices]
        decoder = self._decoder(indices)
        student = self._view(self.inputs, indices, draw, decoder, dropout=draw is not None)
        own, seen = self.of_teacher or self.inputs, None if self.clean else draw
        same = own is self.inputs and seen == draw
        teacher = student if same else self._view(own, indices, seen, decoder)
        labels = [ids[1:][mask[1:]] for ids, mask in map(self.example, indices)]
        known = tuple(
            Example(self.content_hash(i), len(y), int(self.teacher_index[i]), int(self.source[i]))
            for i, y in zip(indices, labels, strict=True)
        )
        example_N = np.repeat(np.array(indices, np.int64), [len(y) for y in labels])
        weights = {name: torch.from_numpy(w_E[example_N]) for name, w_E in self.weights.items()}
        labels_N = np.concatenate([_NONE, *labels]).astype(np.int64)
        return Batch(torch.from_numpy(labels_N), torch.from_numpy(example_N), student, teacher, known, weights)

    def _decoder(self, indices: list[int]) -> "tuple[Tensor, Tensor]":
        """What the decoder reads [B, T], and the flattened positions that predict the targets [N]: position t predicts token t + 1."""
        import torch

        rows, ids = [], []
        for own, mask in map(self.example, indices):
            rows.append(np.flatnonzero(mask[1:]))
            ids.append(own[: rows[-1][-1] + 1])
        T = max(map(len, ids), default=1)
        ids_BT = np.full((max(1, len(ids)), T), self.pad, np.int64)
        for b, own in enumerate(ids):
            ids_BT[b, : len(own)] = own
        rows_N = np.concatenate([_NONE, *(own + b * T for b, own in enumerate(rows))])
        return torch.from_numpy(ids_BT), torch.from_numpy(rows_N)

    def _view(
        self, inputs: Inputs, indices: list[int], draw: Draw | None, decoder: "tuple[Tensor, Tensor]", dropout: bool = False
    ) -> "View":
        import torch

        from ..batch import View
        from .collate import position_keys

        ids_BT, rows_N = decoder
        keys = [position_keys((draw.seed, draw.step, self.content_hash(i)), 1) for i in indices or [0]] if dropout else None
        read = inputs.batch(indices or [0], draw) | {"decoder_input_ids": ids_BT}
        return View(read, rows_N, None, None if keys is None else torch.from_numpy(np.stack(keys)), given=ids_BT.shape[1])
