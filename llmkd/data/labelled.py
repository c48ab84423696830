"""Examples with a class each: what models read of them, in a form of its own for text, sound or images, and the number of the right class."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .examples import ALL_TEACHERS, Draw, Weighed, digest

if TYPE_CHECKING:  # batches are torch's, and checking data loads no torch
    from torch import Tensor

    from ..batch import Batch, View


class Inputs(Protocol):
    """What models read of some examples.

    lengths     int64 [examples]: what each costs, such as its tokens
    positions   whether the second dimension of the first input is of positions that all layers keep, as of text: then `padded` is there
    """

    lengths: np.ndarray
    positions: bool

    def take(self, chosen: np.ndarray) -> "Inputs": ...

    def content(self, i: int) -> bytes:
        """What identifies an example."""

    def batch(self, indices: Sequence[int], draw: Draw | None) -> "dict[str, Tensor]":
        """The keyword arguments of a model for some examples, at least one, on the CPU; the first dimension of each is that of the examples.

        draw   with the example's content all that augmentation follows from; None for none of it
        """

    def shown(self, i: int, reader) -> str:
        """An example for people, as the model reads it. `reader`: what has made it."""

    @staticmethod
    def joined(parts: "Sequence[Inputs]") -> "Inputs": ...


@dataclass
class LabelledExamples(Weighed):
    """Examples of classes: one target each.

    names         of the classes, in their order
    of_teacher    what the teachers read, where that is another input, such as another tokenizer's
    clean         whether teachers read what is not augmented
    """

    inputs: Inputs
    labels: np.ndarray  # int64 [examples]
    row: np.ndarray  # int64 [examples]
    names: tuple[str, ...]
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

    @property
    def num_targets(self) -> np.ndarray:
        return np.ones(len(self), np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return self.inputs.lengths

    @property
    def max_lengths(self) -> np.ndarray:
        return self.lengths if self.of_teacher is None else np.maximum(self.lengths, self.of_teacher.lengths)

    @property
    def one_input(self) -> bool:
        return self.of_teacher is None and not self.clean

    @property
    def described(self) -> str:
        found = np.bincount(self.labels, minlength=len(self.names))
        some = [f"{name} {count:,}" for name, count in zip(self.names, found.tolist(), strict=True)]
        return f"{len(some)} classes: {', '.join(some[:12])}{f' and {len(some) - 12} more' if len(some) > 12 else ''}"

    def content_hash(self, i: int) -> str:
        theirs = b"" if self.of_teacher is None else b"|" + self.of_teacher.content(i)
        return digest(self._own(i) + theirs)

    def student_hash(self, i: int) -> str:
        return digest(self._own(i))

    def _own(self, i: int) -> bytes:
        return self.inputs.content(i) + b"|" + self.names[self.labels[i]].encode()

    def take(self, chosen: np.ndarray) -> "LabelledExamples":
        return replace(
            self,
            inputs=self.inputs.take(chosen),
            labels=self.labels[chosen],
            row=self.row[chosen],
            counts={},
            source=self.source[chosen],
            teacher_index=self.teacher_index[chosen],
            weights={name: w_E[chosen] for name, w_E in self.weights.items()},
            of_teacher=self.of_teacher and self.of_teacher.take(chosen),
        )

    @staticmethod
    def joined(
        parts: "list[LabelledExamples]", before: list[int], counts: dict[str, int], source: np.ndarray | None = None
    ) -> "LabelledExamples":
        """See `examples.concat`."""
        first, names = parts[0], dict.fromkeys(name for part in parts for name in part.weights)
        return replace(
            first,
            inputs=first.inputs.joined([part.inputs for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            row=np.concatenate([part.row + start for part, start in zip(parts, before, strict=True)]),
            counts=counts,
            source=source if source is not None else np.zeros(sum(map(len, parts)), np.int64),
            teacher_index=np.concatenate([part.teacher_index for part in parts]),
            weights={name: np.concatenate([part.weight(name) for part in parts]) for name in names},
            of_teacher=first.of_teacher and first.of_teacher.joined([part.of_teacher for part in parts]),
        )

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> "Batch":
        """See `Examples`. A batch of no examples has the inputs of the first one, and no target."""
        import torch

        from ..batch import Batch, Example

        indices = [int(i) for i in indices]
        student = self._view(self.inputs, indices, draw, dropout=True)
        own, seen = self.of_teacher or self.inputs, None if self.clean else draw
        same = own is self.inputs and seen == draw
        teacher = student if same else self._view(own, indices, seen)
        known = tuple(Example(self.content_hash(i), 1, int(self.teacher_index[i]), int(self.source[i])) for i in indices)
        chosen = np.array(indices, np.int64)
        weights = {name: torch.from_numpy(w_E[chosen]) for name, w_E in self.weights.items()}
        return Batch(torch.from_numpy(self.labels[chosen]), torch.from_numpy(chosen), student, teacher, known, weights)

    def _view(self, inputs: Inputs, indices: list[int], draw: Draw | None, dropout: bool = False) -> "View":
        import torch

        from ..batch import View
        from .collate import position_keys

        read, keys = inputs.batch(indices or [0], draw), None
        if dropout and draw:
            lengths = inputs.lengths if inputs.positions else np.ones(len(self), np.int64)
            of_each = [position_keys((draw.seed, draw.step, self.content_hash(i)), lengths[i]) for i in indices or [0]]
            keys = torch.from_numpy(inputs.padded(of_each, [own[0] for own in of_each]) if inputs.positions else np.stack(of_each))
        return View(read, torch.arange(len(indices)), None, keys, given=1)


@dataclass
class TextInputs:
    """Tokens of texts as flat arrays; text i is `ids[offsets[i] : offsets[i + 1]]`, and `kinds` tell a pair's first text from its second."""

    ids: np.ndarray  # int32 [tokens]
    offsets: np.ndarray  # int64 [examples + 1]
    kinds: np.ndarray | None  # int32 [tokens], token_type_ids; None of a tokenizer that has none
    pad: int
    left: bool = False  # whether padding stands on the left
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
        lengths = self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return replace(self, ids=self.ids[tokens], offsets=offsets, kinds=None if self.kinds is None else self.kinds[tokens])

    @staticmethod
    def joined(parts: "Sequence[TextInputs]") -> "TextInputs":
        starts = np.cumsum([0, *(len(part.ids) for part in parts)])
        ends = [part.offsets[1:] + start for part, start in zip(parts, starts, strict=False)]
        kinds = None if parts[0].kinds is None else np.concatenate([part.kinds for part in parts])
        offsets = np.concatenate([[0], *ends]).astype(np.int64)
        return replace(parts[0], ids=np.concatenate([part.ids for part in parts]), offsets=offsets, kinds=kinds)

    def padded(self, values: Sequence[np.ndarray], filled: Sequence[int]) -> np.ndarray:
        """Values of positions [B, T], one row for each text; `filled` stands in the padding of each."""
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
