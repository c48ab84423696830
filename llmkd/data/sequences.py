"""Examples of encoder-decoder models: the encoder's inputs, of text or sound, and the tokens that the decoder predicts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .examples import Draw, TokenExamples, concat
from .flat import chosen_from, joined_offsets
from .inputs import Inputs, Reading, WithInputs

if TYPE_CHECKING:  # batches are torch's, and checking data loads no torch
    from torch import Tensor

    from ..batch import View

_NONE = np.zeros(0, np.int64)


@dataclass
class SequenceExamples(WithInputs):
    """Examples of encoder-decoder models; the decoder's sequence i is `ids[offsets[i] : offsets[i + 1]]`.

    A sequence has the decoder's start token, the tokens that every target begins with, the target's text and the end token. The decoder's
    input and its labels are this sequence, one position apart: this class shifts them, and no other code does.

    `texts`: the targets as text. The other fields are those of `WithInputs` and `Examples`.
    """

    inputs: Inputs
    ids: np.ndarray  # int32 [tokens]
    loss_mask: np.ndarray  # bool [tokens]: the supervised tokens; False for the first of a sequence
    offsets: np.ndarray  # int64 [examples + 1]
    row: np.ndarray  # int64 [examples]
    texts: list[str]
    pad: int
    counts: dict[str, int] = field(default_factory=dict)
    source: np.ndarray | None = None
    teacher_index: np.ndarray | None = None
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    of_teachers: dict[str, Reading] = field(default_factory=dict)

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
        return np.maximum.reduce([self.inputs.lengths, *(inputs.lengths for inputs in self.others)]) + np.diff(self.offsets)

    @property
    def described(self) -> str:
        return f"{int(self.inputs.lengths.sum()):,} {'tokens' if self.inputs.positions else 'hundredths of a second'} read, {int(self.loss_mask.sum()):,} targets"

    def own_content(self, i: int) -> bytes:
        ids, mask = self.example(i)
        return self.inputs.content(i) + b"|" + ids.tobytes() + mask.tobytes()

    def labels_of(self, i: int) -> np.ndarray:
        ids, mask = self.example(i)
        return ids[1:][mask[1:]]

    def take(self, chosen: np.ndarray) -> "SequenceExamples":
        tokens, offsets = chosen_from(self.offsets, chosen)
        texts = [self.texts[i] for i in chosen]
        return self._taking(chosen, ids=self.ids[tokens], loss_mask=self.loss_mask[tokens], offsets=offsets, texts=texts)

    @staticmethod
    def joined(
        parts: "list[SequenceExamples]", before: list[int], counts: dict[str, int], source: np.ndarray | None = None
    ) -> "SequenceExamples":
        """See `examples.concat`."""
        ids, masks = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "loss_mask"))
        own = {"ids": ids, "loss_mask": masks, "offsets": joined_offsets([part.offsets for part in parts])}
        return WithInputs._joining(parts, before, counts, source, texts=[text for part in parts for text in part.texts], **own)

    def view(self, read: Reading, indices: list[int], draw: Draw | None, dropout: bool) -> "View":
        """Of no examples the decoder reads one token of padding. A language model reads a prompt and the target as one text."""
        if isinstance(read.inputs, PromptedTargets):
            return read.inputs.view(indices)
        import torch

        from ..batch import View
        from .collate import position_keys

        ids_BT, rows_N = self._decoder(indices, read.given)
        keys = [position_keys((draw.seed, draw.step, self.content_hash(i)), 1) for i in indices or [0]] if dropout else None
        inputs = read.inputs.batch(indices or [0], draw) | {"decoder_input_ids": ids_BT}
        return View(inputs, rows_N, None, None if keys is None else torch.from_numpy(np.stack(keys)), given=ids_BT.shape[1])

    def _decoder(self, indices: list[int], given: tuple[int, ...] | None = None) -> "tuple[Tensor, Tensor]":
        """The decoder's input ids [B, T], and the flattened positions [N] that predict the targets: position t predicts token t + 1.

        given   the tokens before the targets, if they differ from those of the sequences
        """
        import torch

        rows, ids = [], []
        for own, mask in map(self.example, indices):
            if given is not None:
                targets = own[mask]
                own, mask = np.concatenate([np.array(given, np.int32), targets]), np.arange(len(given) + len(targets)) >= len(given)
            rows.append(np.flatnonzero(mask[1:]))
            ids.append(own[: rows[-1][-1] + 1])
        T = max(map(len, ids), default=1)
        ids_BT = np.full((max(1, len(ids)), T), self.pad, np.int64)
        for b, own in enumerate(ids):
            ids_BT[b, : len(own)] = own
        rows_N = np.concatenate([_NONE, *(own + b * T for b, own in enumerate(rows))])
        return torch.from_numpy(ids_BT), torch.from_numpy(rows_N)


@dataclass
class PromptedTargets:
    """The inputs of a causal language model that teaches an encoder-decoder student: a prompt and the target as one text. `inputs.Inputs`, and `view`."""

    examples: TokenExamples
    positions = True

    @property
    def lengths(self) -> np.ndarray:
        return self.examples.lengths

    def take(self, chosen: np.ndarray) -> "PromptedTargets":
        return PromptedTargets(self.examples.take(chosen))

    @staticmethod
    def joined(parts: "Sequence[PromptedTargets]") -> "PromptedTargets":
        return PromptedTargets(concat([part.examples for part in parts], [0] * len(parts), {}))

    def content(self, i: int) -> bytes:
        return b"".join(x.tobytes() for x in self.examples.example(i))

    def shown(self, i: int, reader) -> str:
        return reader.decode(self.examples.example(i)[0].tolist())

    def targets(self, i: int) -> np.ndarray:
        ids, mask = self.examples.example(i)
        return ids[1:][mask[1:]]

    def view(self, indices: list[int]) -> "View":
        return self.examples.batch(indices).student
