"""Examples of classifiers, with a class each, and texts as their inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .examples import Draw
from .flat import chosen_from, joined_offsets
from .inputs import Inputs, Reading, WithInputs

if TYPE_CHECKING:  # batches are torch's, and checking data loads no torch
    from torch import Tensor

    from ..batch import View


@dataclass
class LabelledExamples(WithInputs):
    """Examples with one target each, a class. `names`: of the classes, in their order. The other fields are those of `WithInputs` and `Examples`."""

    inputs: Inputs
    labels: np.ndarray  # int64 [examples]
    row: np.ndarray  # int64 [examples]
    names: tuple[str, ...]
    counts: dict[str, int] = field(default_factory=dict)
    source: np.ndarray | None = None
    teacher_index: np.ndarray | None = None
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    of_teachers: dict[str, Reading] = field(default_factory=dict)

    @property
    def num_targets(self) -> np.ndarray:
        return np.ones(len(self), np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return self.inputs.lengths

    @property
    def max_lengths(self) -> np.ndarray:
        return np.maximum.reduce([self.lengths, *(inputs.lengths for inputs in self.others)])

    @property
    def described(self) -> str:
        found = np.bincount(self.labels, minlength=len(self.names))
        some = [f"{name} {count:,}" for name, count in zip(self.names, found.tolist(), strict=True)]
        return f"{len(some)} classes: {', '.join(some[:12])}{f' and {len(some) - 12} more' if len(some) > 12 else ''}"

    def own_content(self, i: int) -> bytes:
        return self.inputs.content(i) + b"|" + self.names[self.labels[i]].encode()

    def labels_of(self, i: int) -> np.ndarray:
        return self.labels[i : i + 1]

    def take(self, chosen: np.ndarray) -> "LabelledExamples":
        return self._taking(chosen, labels=self.labels[chosen])

    @staticmethod
    def joined(
        parts: "list[LabelledExamples]", before: list[int], counts: dict[str, int], source: np.ndarray | None = None
    ) -> "LabelledExamples":
        """See `examples.concat`."""
        return WithInputs._joining(parts, before, counts, source, labels=np.concatenate([part.labels for part in parts]))

    def view(self, read: Reading, indices: list[int], draw: Draw | None, dropout: bool) -> "View":
        import torch

        from ..batch import View
        from .collate import position_keys

        inputs, some, keys = read.inputs, indices or [0], None
        found = inputs.batch(some, draw)
        if dropout:
            lengths = found["attention_mask"].sum(1).tolist() if inputs.positions else [1] * len(some)  # edits change lengths in each epoch
            of_each = [position_keys((draw.seed, draw.step, self.content_hash(i)), T) for i, T in zip(some, lengths, strict=True)]
            keys = torch.from_numpy(inputs.padded(of_each, [own[0] for own in of_each]) if inputs.positions else np.stack(of_each))
        return View(found, torch.arange(len(indices)), None, keys, given=1)


@dataclass
class TextInputs:
    """Texts as flat arrays of tokens: text i is `ids[offsets[i] : offsets[i + 1]]`. `kinds` tell the first text of a pair from the second."""

    ids: np.ndarray  # int32 [tokens]
    offsets: np.ndarray  # int64 [examples + 1]
    kinds: np.ndarray | None  # int32 [tokens], token_type_ids; None if the tokenizer has none
    pad: int
    left: bool = False  # whether padding is on the left
    positions = True

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def content(self, i: int) -> bytes:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part].tobytes() + (b"" if self.kinds is None else self.kinds[part].tobytes())

    def shown(self, i: int, reader) -> str:
        return reader.decode(self.ids[self.offsets[i] : self.offsets[i + 1]].tolist())

    def take(self, chosen: np.ndarray) -> "TextInputs":
        tokens, offsets = chosen_from(self.offsets, chosen)
        return replace(self, ids=self.ids[tokens], offsets=offsets, kinds=None if self.kinds is None else self.kinds[tokens])

    @staticmethod
    def joined(parts: "Sequence[TextInputs]") -> "TextInputs":
        kinds = None if parts[0].kinds is None else np.concatenate([part.kinds for part in parts])
        offsets = joined_offsets([part.offsets for part in parts])
        return replace(parts[0], ids=np.concatenate([part.ids for part in parts]), offsets=offsets, kinds=kinds)

    def padded(self, values: Sequence[np.ndarray], filled: Sequence[int]) -> np.ndarray:
        """The values of the texts' positions as [B, T]. `filled`: the value of each text's padding."""
        T = max(map(len, values))
        rows = zip(values, filled, strict=True)
        fill = [np.full(T - len(own), one, own.dtype) for own, one in rows]
        return np.stack([np.concatenate([pad, own] if self.left else [own, pad]) for own, pad in zip(values, fill, strict=True)])

    def batch(self, indices: Sequence[int], draw: Draw | None) -> "dict[str, Tensor]":
        import torch

        chosen = [slice(self.offsets[i], self.offsets[i + 1]) for i in indices]
        arrays = {"input_ids": (self.ids, self.pad), "attention_mask": (np.ones(len(self.ids), np.int64), 0)}
        arrays |= {} if self.kinds is None else {"token_type_ids": (self.kinds, 0)}
        return {
            name: torch.from_numpy(self.padded([flat[part].astype(np.int64) for part in chosen], [pad] * len(chosen)))
            for name, (flat, pad) in arrays.items()
        }
