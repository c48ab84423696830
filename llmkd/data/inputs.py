"""Model inputs other than the tokens of a causal language model, and the common base of examples that have them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from .examples import Draw, Weighed, digest

if TYPE_CHECKING:  # batches are torch's, and checking data loads no torch
    from torch import Tensor

    from ..batch import Batch, View


class Inputs(Protocol):
    """The inputs of some examples.

    lengths     int64 [examples]: the cost of each, such as its number of tokens
    positions   whether the second dimension of the first input is a dimension of positions that all layers keep, as for text; such inputs
                also have `padded`
    """

    lengths: np.ndarray
    positions: bool

    def take(self, chosen: np.ndarray) -> "Inputs": ...

    def content(self, i: int) -> bytes:
        """Bytes that identify an example, to be hashed."""

    def batch(self, indices: Sequence[int], draw: Draw | None) -> "dict[str, Tensor]":
        """The keyword arguments of a model for at least one example, on the CPU; the first dimension of each is that of the examples.

        draw   with the example's content, it determines the augmentation; None: no augmentation
        """

    def shown(self, i: int, reader) -> str:
        """An example as text for people, as the model reads it. `reader`: the tokenizer, extractor or processor that made it."""

    @staticmethod
    def joined(parts: "Sequence[Inputs]") -> "Inputs": ...


class Reading(NamedTuple):
    """A teacher's input, if it is not the same as the student's.

    inputs      of another column, or of the same column by another reader; or the student's own, not augmented
    augmented   whether it is augmented like the student's; never for another column
    given       of an encoder-decoder model, the tokens that its decoder is given before a target, if they are not the student's
    """

    inputs: Inputs
    augmented: bool = True
    given: tuple[int, ...] | None = None


class WithInputs(Weighed):
    """Base class of examples with inputs and targets; the subclasses, dataclasses, define the targets.

    inputs        the student's inputs
    of_teachers   the readings of teachers whose inputs differ, by setting (teacher, or teacher.0, ...). Equal inputs are one object
    """

    inputs: Inputs
    of_teachers: dict[str, Reading]

    def own_content(self, i: int) -> bytes:
        """Bytes that identify the student's input and targets of an example, to be hashed."""
        raise NotImplementedError

    def labels_of(self, i: int) -> np.ndarray:
        """The labels of an example's targets, int64 [targets]."""
        raise NotImplementedError

    def view(self, read: Reading, indices: list[int], draw: Draw | None, dropout: bool) -> "View":
        """One model's view of some examples; without indices, the inputs of the first example and no targets. `dropout`: with the keys of dropout."""
        raise NotImplementedError

    @property
    def one_input(self) -> bool:
        return not self.of_teachers

    @property
    def others(self) -> list[Inputs]:
        """The different inputs of teachers other than the student's, each once."""
        every = {id(one.inputs): one.inputs for one in self.of_teachers.values()}
        return [inputs for key, inputs in every.items() if key != id(self.inputs)]

    def content_hash(self, i: int) -> str:
        return digest(self.own_content(i) + b"".join(b"|" + inputs.content(i) for inputs in self.others))

    def student_hash(self, i: int) -> str:
        return digest(self.own_content(i))

    def _taking(self, chosen: np.ndarray, **own):
        """`take`, with the fields of the subclass."""
        taken = {id(one): one.take(chosen) for one in (self.inputs, *self.others)}
        return replace(
            self,
            inputs=taken[id(self.inputs)],
            row=self.row[chosen],
            counts={},
            source=self.source[chosen],
            teacher_index=self.teacher_index[chosen],
            weights={name: w_E[chosen] for name, w_E in self.weights.items()},
            of_teachers={setting: one._replace(inputs=taken[id(one.inputs)]) for setting, one in self.of_teachers.items()},
            **own,
        )

    @staticmethod
    def _joining(parts: "list[WithInputs]", before: list[int], counts: dict[str, int], source: np.ndarray | None, **own):
        """`examples.concat`, with the fields of the subclass."""
        first, names = parts[0], dict.fromkeys(name for part in parts for name in part.weights)
        every = [(part.inputs, *part.others) for part in parts]
        joined = {id(same[0]): same[0].joined(same) for same in zip(*every, strict=True)}
        return replace(
            first,
            inputs=joined[id(first.inputs)],
            row=np.concatenate([part.row + start for part, start in zip(parts, before, strict=True)]),
            counts=counts,
            source=source if source is not None else np.zeros(sum(map(len, parts)), np.int64),
            teacher_index=np.concatenate([part.teacher_index for part in parts]),
            weights={name: np.concatenate([part.weight(name) for part in parts]) for name in names},
            of_teachers={setting: one._replace(inputs=joined[id(one.inputs)]) for setting, one in first.of_teachers.items()},
            **own,
        )

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> "Batch":
        """See `Examples`."""
        import torch

        from ..batch import Batch, Example

        indices = [int(i) for i in indices]
        student = self.view(Reading(self.inputs), indices, draw, dropout=draw is not None)
        views, theirs = {(id(self.inputs), draw, None): student}, {}
        for setting, one in self.of_teachers.items():
            seen = draw if one.augmented else None
            key = id(one.inputs), seen, one.given
            if key not in views:
                views[key] = self.view(one, indices, seen, dropout=False)
            theirs[setting] = views[key]
        labels = [self.labels_of(i) for i in indices]
        known = tuple(
            Example(self.content_hash(i), len(y), int(self.teacher_index[i]), int(self.source[i]))
            for i, y in zip(indices, labels, strict=True)
        )
        example_N = np.repeat(np.array(indices, np.int64), [len(y) for y in labels])
        weights = {name: torch.from_numpy(w_E[example_N]) for name, w_E in self.weights.items()}
        labels_N = np.concatenate([np.zeros(0, np.int64), *labels]).astype(np.int64)
        targets = torch.from_numpy(labels_N), torch.from_numpy(example_N)
        return Batch(*targets, student, theirs.pop("teacher", student), known, weights, of_teachers=theirs)
