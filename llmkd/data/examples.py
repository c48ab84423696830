"""The protocol `Examples`, by which a run sees its data, and its implementation for tokens, with their loss masks and the rows that they came from."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from .flat import chosen_from, joined_offsets

if TYPE_CHECKING:  # batches are torch's, and checking data loads no torch
    from ..batch import Batch

ALL_TEACHERS = -1  # `Examples.teacher_index` of an example that all teachers answer together


class Draw(NamedTuple):
    """The seed of the run, the epoch (from 0) and the step (from 1), which with the examples' content determine all randomness of a training batch."""

    seed: int
    epoch: int
    step: int


class Examples(Protocol):
    """The examples of a run, whatever their task: their origins, lengths, weights and batches.

    row, source, teacher_index   int64 [examples]: the row and the source of each example, and the index of its teacher, or ALL_TEACHERS
    counts                       how many rows were used, or left out for which reason
    weights                      float32 [examples] by part of the loss, see `Batch.weights`; 1 for a part without an entry
    num_targets                  int64 [examples]
    lengths                      int64 [examples]: the cost of each for the student (of text, its tokens), by which batches are formed
    max_lengths                  int64 [examples]: the same for the student or the teacher, whichever is more
    """

    row: np.ndarray
    source: np.ndarray
    teacher_index: np.ndarray
    counts: dict[str, int]
    weights: dict[str, np.ndarray]

    @property
    def num_targets(self) -> np.ndarray: ...

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def max_lengths(self) -> np.ndarray: ...

    @property
    def described(self) -> str:
        """Their size in a few words, such as "900 tokens, 120 targets"."""

    @property
    def one_input(self) -> bool:
        """Whether teachers read the same input as the student."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> "Batch":
        """The examples `indices` as a batch on the CPU. Without indices, a batch without targets that a model can still read.

        draw   determines the randomness of a training batch; None: nothing is random, as in validation
        """

    def content_hash(self, i: int) -> str:
        """A hash of the student's and the teacher's input and targets, 16 hex digits. It does not depend on the other examples."""

    def student_hash(self, i: int) -> str:
        """The same, without the teacher's input."""

    def take(self, chosen: np.ndarray) -> "Examples":
        """The examples with these indices, in this order. `counts` are not kept."""

    def subset(self, keep: np.ndarray) -> "Examples":
        """The examples where the boolean array `keep` [examples] is true."""

    def weigh(self, weights: dict[str, float]) -> None:
        """Set the weights of all examples, by part of the loss."""

    def unweighted(self) -> "Examples":
        """The same examples with all weights 1."""

    def weight(self, name: str) -> np.ndarray:
        """The weight of each example in a part of the loss, float32 [examples]."""

    def weighted(self, chosen: Sequence[int]) -> dict[str, tuple[float, int]]:
        """For each part of the loss in which one of the examples `chosen` has a weight other than 1: the sum of the targets' absolute weights,
        and the number of targets whose weight is not 0."""


class Collator(NamedTuple):
    """How examples of tokens become a batch, see `collate.collate`: the padding token, and whether training batches are packed."""

    pad: int = 0
    packing: bool = False
    share_prefixes: bool = False


class Weighed:
    """The methods of `Examples` that are the same for all tasks. A base class of dataclasses with the fields of `Examples`."""

    def __post_init__(self):
        if self.source is None:
            self.source = np.zeros(len(self.row), np.int64)
        if self.teacher_index is None:
            self.teacher_index = np.full(len(self.row), ALL_TEACHERS, np.int64)

    def __len__(self) -> int:
        return len(self.row)

    def subset(self, keep: np.ndarray):
        """The examples where the boolean array `keep` [examples] is true."""
        return self.take(np.flatnonzero(keep))

    def weigh(self, weights: dict[str, float]) -> None:
        """Set the weights of all examples, by part of the loss."""
        self.weights = {name: np.full(len(self), weight, np.float32) for name, weight in weights.items() if weight != 1}

    def unweighted(self):
        """The same examples with all weights 1."""
        return replace(self, weights={})

    def weight(self, name: str) -> np.ndarray:
        """The weight of each example in a part of the loss, float32 [examples]."""
        return self.weights.get(name, np.ones(len(self), np.float32))

    def weighted(self, chosen: Sequence[int]) -> dict[str, tuple[float, int]]:
        """See `Examples.weighted`."""
        counts, found = self.num_targets[chosen], {}
        for name, w_E in self.weights.items():
            own = w_E[chosen]
            if (own != 1).any():
                found[name] = float((np.abs(own.astype(np.float64)) * counts).sum()), int(counts[own != 0].sum())
        return found


@dataclass
class TokenExamples(Weighed):
    """Examples of tokens as flat arrays: example i is `ids[offsets[i] : offsets[i + 1]]`."""

    ids: np.ndarray  # int32 [tokens]
    loss_mask: np.ndarray  # bool [tokens]: the supervised tokens
    offsets: np.ndarray  # int64 [examples + 1]
    row: np.ndarray  # int64 [examples]: the row that each example came from
    counts: dict[str, int] = field(default_factory=dict)  # how many rows were used or left out, see `encode`
    source: np.ndarray | None = None  # int64 [examples]: the source that each came from
    teacher_index: np.ndarray | None = None  # int64 [examples]: the index of its teacher, or ALL_TEACHERS
    teacher_view: "TokenExamples | None" = None  # the same examples as the teacher reads them, where its input differs
    weights: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [examples] by part of the loss, see `Batch.weights`; 1 without
    token_weights: dict[str, np.ndarray] = field(default_factory=dict)  # float32 [tokens]: further factors of the weights of single targets
    collator: Collator = Collator()

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part], self.loss_mask[part]

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> "Batch":
        """See `Examples.batch`. Only training batches are packed; their dropout follows from `draw`."""
        from .collate import collate

        pad, *packed = self.collator
        return collate(self, list(indices), pad, *((*packed, (draw.seed, draw.step)) if draw else ()))

    def content_hash(self, i: int) -> str:
        """A hash of an example's tokens and loss mask, 16 hex digits. The teacher's input is included only where it differs, so that the hash does
        not depend on whether other examples have another input for the teacher."""
        student, teacher = (b"".join(x.tobytes() for x in of.example(i)) for of in (self, self.teacher_view or self))
        return digest(student if teacher == student else student + b"|" + teacher)

    def student_hash(self, i: int) -> str:
        """The same hash of the student's input only: equal with and without a context for the teacher."""
        return digest(b"".join(x.tobytes() for x in self.example(i)))

    def take(self, chosen: np.ndarray) -> "TokenExamples":
        """The examples with these indices, in this order. `counts` are not kept."""
        tokens, offsets = chosen_from(self.offsets, chosen)
        theirs = None if self.teacher_view is None else self.teacher_view.take(chosen)
        of_each = self.row[chosen], {}, self.source[chosen], self.teacher_index[chosen]
        weights = {name: w_E[chosen] for name, w_E in self.weights.items()}
        of_tokens = {name: w_T[tokens] for name, w_T in self.token_weights.items()}
        return TokenExamples(self.ids[tokens], self.loss_mask[tokens], offsets, *of_each, theirs, weights, of_tokens, self.collator)

    def unweighted(self) -> "TokenExamples":
        """The same examples with all weights 1."""
        return replace(self, weights={}, token_weights={})

    def target_weights(self, i: int, name: str) -> np.ndarray:
        """The weights of an example's targets in a part of the loss, float32 [targets]."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        own = (
            self.token_weights[name][part][self.loss_mask[part]] if name in self.token_weights else np.ones(self.num_targets[i], np.float32)
        )
        return own * self.weight(name)[i]

    def weighted(self, chosen: Sequence[int]) -> dict[str, tuple[float, int]]:
        found = {name: sums for name, sums in super().weighted(chosen).items() if name not in self.token_weights}
        for name in self.token_weights:
            own = np.concatenate([np.zeros(0, np.float32), *(self.target_weights(i, name) for i in chosen)])
            if (own != 1).any():
                found[name] = float(np.abs(own.astype(np.float64)).sum()), int((own != 0).sum())
        return found

    @property
    def one_input(self) -> bool:
        return self.teacher_view is None

    @property
    def described(self) -> str:
        theirs = "" if self.teacher_view is None else f", {len(self.teacher_view.ids)} tokens for the teacher with its context"
        return f"{len(self.ids)} tokens, {int(self.loss_mask.sum())} targets{theirs}"

    @staticmethod
    def joined(
        parts: "list[TokenExamples]", before: list[int], counts: dict[str, int], source: np.ndarray | None = None
    ) -> "TokenExamples":
        """See `concat`."""
        of_each = (
            np.concatenate([part.row + start for part, start in zip(parts, before, strict=True)]),
            counts,
            source,
            np.concatenate([part.teacher_index for part in parts]),
        )
        theirs = None
        if any(part.teacher_view is not None for part in parts):
            theirs = TokenExamples(*_one_after_another([part.teacher_view or part for part in parts]), *of_each)
        names = dict.fromkeys(name for part in parts for name in part.weights)
        weights = {name: np.concatenate([part.weight(name) for part in parts]) for name in names}
        ones = [np.ones(len(part.ids), np.float32) for part in parts]
        names = dict.fromkeys(name for part in parts for name in part.token_weights)
        of_tokens = {
            name: np.concatenate([part.token_weights.get(name, one) for part, one in zip(parts, ones, strict=True)]) for name in names
        }
        return TokenExamples(*_one_after_another(parts), *of_each, theirs, weights, of_tokens, parts[0].collator)

    @functools.cached_property
    def num_targets(self) -> np.ndarray:
        """The number of targets of each example, int64 [examples]."""
        return np.add.reduceat(self.loss_mask.astype(np.int64), self.offsets[:-1]) if len(self) else np.zeros(0, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def max_lengths(self) -> np.ndarray:
        """The number of tokens of the student's or the teacher's input, whichever is longer, int64 [examples]."""
        return self.lengths if self.teacher_view is None else np.maximum(self.lengths, self.teacher_view.lengths)


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def merge(parts: "list[Examples]") -> "Examples":
    """The examples of several sources as one, with their rows numbered consecutively and `source` set."""
    if len(parts) == 1:
        return parts[0]
    before = np.cumsum([0, *(part.counts["rows"] for part in parts)])
    counts = {key: sum(part.counts.get(key, 0) for part in parts) for part in parts for key in part.counts}
    return concat(parts, before[:-1].tolist(), counts, np.repeat(np.arange(len(parts)), [len(part) for part in parts]))


def concat(parts: "list[Examples]", before: list[int], counts: dict[str, int], source: np.ndarray | None = None) -> "Examples":
    """The parts, all of one class, one after another. The rows of part k are numbered from `before[k]`."""
    return type(parts[0]).joined(parts, before, counts, source)


def _one_after_another(parts: list[TokenExamples]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids, masks = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "loss_mask"))
    return ids, masks, joined_offsets([part.offsets for part in parts])
