"""What models read of examples that are not plain tokens of a language model, and what all examples of such inputs do alike."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .examples import Draw, Weighed, digest

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


class WithInputs(Weighed):
    """Examples that are inputs and targets: a base of dataclasses, which say what a target is.

    inputs       what the student reads
    of_teacher   what the teachers read, where that is another input, such as another tokenizer's or extractor's
    clean        whether teachers read what is not augmented
    """

    inputs: Inputs
    of_teacher: Inputs | None
    clean: bool

    def own_content(self, i: int) -> bytes:
        """What identifies an example to the student."""
        raise NotImplementedError

    def labels_of(self, i: int) -> np.ndarray:
        """What an example's targets must be, int64 [targets]."""
        raise NotImplementedError

    def view(self, inputs: Inputs, indices: list[int], draw: Draw | None, dropout: bool) -> "View":
        """What one model reads of some examples; of none the inputs of the first one, and no target. `dropout`: with keys that it follows from."""
        raise NotImplementedError

    @property
    def one_input(self) -> bool:
        return self.of_teacher is None and not self.clean

    def content_hash(self, i: int) -> str:
        theirs = b"" if self.of_teacher is None else b"|" + self.of_teacher.content(i)
        return digest(self.own_content(i) + theirs)

    def student_hash(self, i: int) -> str:
        return digest(self.own_content(i))

    def _taking(self, chosen: np.ndarray, **own):
        """`take`, with the fields of the subclass."""
        return replace(
            self,
            inputs=self.inputs.take(chosen),
            row=self.row[chosen],
            counts={},
            source=self.source[chosen],
            teacher_index=self.teacher_index[chosen],
            weights={name: w_E[chosen] for name, w_E in self.weights.items()},
            of_teacher=self.of_teacher and self.of_teacher.take(chosen),
            **own,
        )

    @staticmethod
    def _joining(parts: "list[WithInputs]", before: list[int], counts: dict[str, int], source: np.ndarray | None, **own):
        """`examples.concat`, with the fields of the subclass."""
        first, names = parts[0], dict.fromkeys(name for part in parts for name in part.weights)
        return replace(
            first,
            inputs=first.inputs.joined([part.inputs for part in parts]),
            row=np.concatenate([part.row + start for part, start in zip(parts, before, strict=True)]),
            counts=counts,
            source=source if source is not None else np.zeros(sum(map(len, parts)), np.int64),
            teacher_index=np.concatenate([part.teacher_index for part in parts]),
            weights={name: np.concatenate([part.weight(name) for part in parts]) for name in names},
            of_teacher=first.of_teacher and first.of_teacher.joined([part.of_teacher for part in parts]),
            **own,
        )

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> "Batch":
        """See `Examples`."""
        import torch

        from ..batch import Batch, Example

        indices = [int(i) for i in indices]
        student = self.view(self.inputs, indices, draw, dropout=draw is not None)
        own, seen = self.of_teacher or self.inputs, None if self.clean else draw
        same = own is self.inputs and seen == draw
        teacher = student if same else self.view(own, indices, seen, dropout=False)
        labels = [self.labels_of(i) for i in indices]
        known = tuple(
            Example(self.content_hash(i), len(y), int(self.teacher_index[i]), int(self.source[i]))
            for i, y in zip(indices, labels, strict=True)
        )
        example_N = np.repeat(np.array(indices, np.int64), [len(y) for y in labels])
        weights = {name: torch.from_numpy(w_E[example_N]) for name, w_E in self.weights.items()}
        labels_N = np.concatenate([np.zeros(0, np.int64), *labels]).astype(np.int64)
        return Batch(torch.from_numpy(labels_N), torch.from_numpy(example_N), student, teacher, known, weights)
