"""Examples: token ids, which are supervised, where they came from."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

ALL_TEACHERS = -1  # `Examples.teacher_index` of what all teachers teach together


@dataclass
class Examples:
    """Examples as flat arrays, and what became of the rows."""

    ids: np.ndarray  # int32, all examples one after another
    loss_mask: np.ndarray  # bool, alike
    offsets: np.ndarray  # int64, [examples + 1]
    row: np.ndarray  # int64, [examples]: the row each example came from
    counts: dict[str, int] = field(default_factory=dict)  # see `encode`
    source: np.ndarray | None = None  # int64, [examples]: the source it came from, where there are several
    teacher_index: np.ndarray | None = None  # int64, [examples]: the number of its teacher, or ALL_TEACHERS
    teacher_view: "Examples | None" = None  # the same examples and targets as the teacher reads them, where that is something else

    def __post_init__(self):
        if self.source is None:
            self.source = np.zeros(len(self.row), np.int64)
        if self.teacher_index is None:
            self.teacher_index = np.full(len(self.row), ALL_TEACHERS, np.int64)

    def __len__(self) -> int:
        return len(self.row)

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part], self.loss_mask[part]

    def content_hash(self, i: int) -> str:
        """16 hex digits that tell an example, its tokens and what is supervised of them, from all others.

        What the teacher reads counts where it is something else, so an example is the same beside whatever others it stands.
        """
        said, read = (b"".join(x.tobytes() for x in of.example(i)) for of in (self, self.teacher_view or self))
        return _digest(said if read == said else said + b"|" + read)

    def student_hash(self, i: int) -> str:
        """The same of what the student sees alone: equal with and without a context for the teacher."""
        return _digest(b"".join(x.tobytes() for x in self.example(i)))

    def subset(self, keep: np.ndarray) -> "Examples":
        """The examples where the boolean `keep` is true."""
        return self.take(np.flatnonzero(keep))

    def take(self, chosen: np.ndarray) -> "Examples":
        """Those examples, by their numbers, in that order."""
        lengths = self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        theirs = None if self.teacher_view is None else self.teacher_view.take(chosen)
        of_each = self.row[chosen], {}, self.source[chosen], self.teacher_index[chosen]
        return Examples(self.ids[tokens], self.loss_mask[tokens], offsets, *of_each, theirs)

    @property
    def num_targets(self) -> np.ndarray:
        """How many targets each example has."""
        return np.add.reduceat(self.loss_mask.astype(np.int64), self.offsets[:-1]) if len(self) else np.zeros(0, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def max_lengths(self) -> np.ndarray:
        """The longer of what student and teacher read of each."""
        return self.lengths if self.teacher_view is None else np.maximum(self.lengths, self.teacher_view.lengths)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def merge(parts: list[Examples]) -> Examples:
    """Several sources' examples as one, their rows numbered through."""
    if len(parts) == 1:
        return parts[0]
    before = np.cumsum([0, *(part.counts["rows"] for part in parts)])
    counts = {key: sum(part.counts[key] for part in parts) for key in parts[0].counts}
    return concat(parts, before[:-1].tolist(), counts, np.repeat(np.arange(len(parts)), [len(part) for part in parts]))


def concat(parts: list[Examples], before: list[int], counts: dict[str, int], source: np.ndarray | None = None) -> Examples:
    """One after another; the rows of each are numbered from `before` on."""
    of_each = (
        np.concatenate([part.row + start for part, start in zip(parts, before, strict=True)]),
        counts,
        source,
        np.concatenate([part.teacher_index for part in parts]),
    )
    theirs = None
    if any(part.teacher_view is not None for part in parts):
        theirs = Examples(*_one_after_another([part.teacher_view or part for part in parts]), *of_each)
    return Examples(*_one_after_another(parts), *of_each, theirs)


def _one_after_another(parts: list[Examples]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    return (
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.loss_mask for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts, strict=False))]).astype(np.int64),
    )
