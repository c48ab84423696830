"""Examples: token ids, which are supervised, where they came from."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

ALL_TEACHERS = -1  # `Encoded.taught_by` of what all teachers teach together


@dataclass
class Encoded:
    """Examples as flat arrays, and what became of the rows."""

    ids: np.ndarray  # int32, all examples one after another
    supervised: np.ndarray  # bool, alike
    offsets: np.ndarray  # int64, [examples + 1]
    row: np.ndarray  # int64, [examples]: the row each example came from
    counts: dict[str, int] = field(default_factory=dict)  # see `encode`
    source: np.ndarray | None = None  # int64, [examples]: the source it came from, where there are several
    taught_by: np.ndarray | None = None  # int64, [examples]: the number of its teacher, or ALL_TEACHERS
    for_teacher: "Encoded | None" = None  # the same examples and targets as the teacher reads them, where that is something else

    def __post_init__(self):
        if self.source is None:
            self.source = np.zeros(len(self.row), np.int64)
        if self.taught_by is None:
            self.taught_by = np.full(len(self.row), ALL_TEACHERS, np.int64)

    def __len__(self) -> int:
        return len(self.row)

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part], self.supervised[part]

    def identity(self, i: int) -> str:
        """16 hex digits that tell an example, its tokens and what is supervised of them, from all others.

        What the teacher reads counts where it is something else, so an example is the same beside whatever others it stands.
        """
        said, read = (b"".join(x.tobytes() for x in of.example(i)) for of in (self, self.for_teacher or self))
        return _digest(said if read == said else said + b"|" + read)

    def seen(self, i: int) -> str:
        """The same of what the student sees alone: equal with and without a context for the teacher."""
        return _digest(b"".join(x.tobytes() for x in self.example(i)))

    def subset(self, keep: np.ndarray) -> "Encoded":
        """The examples where the boolean `keep` is true."""
        return self.take(np.flatnonzero(keep))

    def take(self, chosen: np.ndarray) -> "Encoded":
        """Those examples, by their numbers, in that order."""
        lengths = self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        theirs = None if self.for_teacher is None else self.for_teacher.take(chosen)
        of_each = self.row[chosen], {}, self.source[chosen], self.taught_by[chosen]
        return Encoded(self.ids[tokens], self.supervised[tokens], offsets, *of_each, theirs)

    @property
    def targets(self) -> np.ndarray:
        """How many targets each example has."""
        return np.add.reduceat(self.supervised.astype(np.int64), self.offsets[:-1]) if len(self) else np.zeros(0, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def widths(self) -> np.ndarray:
        """The longer of what student and teacher read of each."""
        return self.lengths if self.for_teacher is None else np.maximum(self.lengths, self.for_teacher.lengths)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def merge(parts: list[Encoded]) -> Encoded:
    """Several sources' examples as one, their rows numbered through."""
    if len(parts) == 1:
        return parts[0]
    before = np.cumsum([0, *(part.counts["rows"] for part in parts)])
    counts = {key: sum(part.counts[key] for part in parts) for key in parts[0].counts}
    return joined(parts, before[:-1].tolist(), counts, np.repeat(np.arange(len(parts)), [len(part) for part in parts]))


def joined(parts: list[Encoded], before: list[int], counts: dict[str, int], source: np.ndarray | None = None) -> Encoded:
    """One after another; the rows of each are numbered from `before` on."""
    of_each = (
        np.concatenate([part.row + start for part, start in zip(parts, before, strict=True)]),
        counts,
        source,
        np.concatenate([part.taught_by for part in parts]),
    )
    theirs = None
    if any(part.for_teacher is not None for part in parts):
        theirs = Encoded(*_one_after_another([part.for_teacher or part for part in parts]), *of_each)
    return Encoded(*_one_after_another(parts), *of_each, theirs)


def _one_after_another(parts: list[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    return (
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.supervised for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts, strict=False))]).astype(np.int64),
    )
