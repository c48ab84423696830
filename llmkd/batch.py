"""What a step reads: Batch, View, Example, how a packed row lies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """How a packed row lies in pieces. Tensors are where the row is; `lengths` and `follows` are known without asking a device."""

    lengths: tuple[int, ...]  # of the pieces, S of them
    follows: tuple[int, ...]  # for each the number of the piece that it goes on from, or -1
    examples: tuple[int, ...]  # for each the number in the batch of the example that it is of, or -1 where several share it
    sees: tuple[int, ...]  # for each how many tokens it sees: its own, and those of the piece that it goes on from
    queries: Tensor  # where the pieces begin and the last ends [S + 1], int32
    keys: Tensor  # the same, counting for each piece all that it sees
    seen: Tensor | None  # the places in the row of all that each piece sees; None where that is itself alone

    @classmethod
    def of(cls, lengths: Sequence[int], follows: Sequence[int] | None = None, examples: Sequence[int] | None = None) -> "Packed":
        S = len(lengths)
        follows, examples = tuple(follows or [-1] * S), tuple(range(S) if examples is None else examples)
        starts = [0, *accumulate(lengths)]
        place, seen = torch.arange(starts[-1]), None
        if any(before >= 0 for before in follows):
            spans = [span for piece, before in enumerate(follows) for span in ((before, piece) if before >= 0 else (piece,))]
            seen = torch.cat([place[starts[span] : starts[span + 1]] for span in spans])
        sees = tuple(length + (lengths[before] if before >= 0 else 0) for length, before in zip(lengths, follows, strict=True))
        ends = [torch.tensor([0, *accumulate(sizes)], dtype=torch.int32) for sizes in (lengths, sees)]
        return cls(tuple(lengths), follows, examples, sees, *ends, seen)

    def each(self, change: Callable[[Tensor], Tensor]) -> "Packed":
        tensors = change(self.queries), change(self.keys), None if self.seen is None else change(self.seen)
        return Packed(self.lengths, self.follows, self.examples, self.sees, *tensors)

    def part(self, mine: Sequence[bool]) -> tuple["Packed", list[bool]]:
        """The pieces of some of the examples, as they lie without the others; and which pieces those are."""
        keep = [example >= 0 and mine[example] for example in self.examples]
        for piece, before in enumerate(self.follows):
            if keep[piece] and before >= 0:
                keep[before] = True
        number = [count - 1 for count in accumulate(keep)]
        example = [count - 1 for count in accumulate(mine)]
        kept = [piece for piece, one in enumerate(keep) if one]
        follows = [number[self.follows[piece]] if self.follows[piece] >= 0 else -1 for piece in kept]
        of = [example[self.examples[piece]] if self.examples[piece] >= 0 else -1 for piece in kept]
        return Packed.of([self.lengths[piece] for piece in kept], follows, of), keep

    def mask(self) -> Tensor:
        """What stands for this as a model's attention_mask: of four dimensions, so that transformers hands it on to every layer as it is."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.queries.device)
        mask.packed = self
        return mask


#: Which targets of a batch: a part of them, or their numbers.
Rows = slice | Tensor


@dataclass(frozen=True)
class View:
    """What one model reads of a batch, and which of its flattened positions predict the N targets."""

    inputs: dict[str, Tensor]  # keyword arguments of the model, each [B, T]
    rows_N: Tensor  # positions in the flattened [B * T] that predict the targets, each once
    packed: Packed | None = None  # how examples lie in a packed row

    def each(self, change: Callable[[Tensor], Tensor]) -> "View":
        return View({k: change(v) for k, v in self.inputs.items()}, change(self.rows_N), self.packed and self.packed.each(change))


@dataclass(frozen=True)
class Example:
    """What is known of one example of a batch: who it is (see `Examples.content_hash`), its targets, and who teaches it."""

    content_hash: str
    num_targets: int
    teacher: int  # its number among several, or -1 for all of them together


@dataclass(frozen=True)
class Batch:
    """Targets, and the views from which student and teacher predict them.

    `labels_N[i]` is the token that position `rows_N[i]` of either view must predict: aligned once, in the collator.
    The targets of one example stand together, in the order of `examples`.
    """

    labels_N: Tensor
    example_N: Tensor  # which example of the data set each target belongs to
    student: View
    teacher: View
    examples: tuple[Example, ...] = ()

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same with every tensor changed."""
        student = self.student.each(change)
        teacher = student if self.teacher is self.student else self.teacher.each(change)
        return Batch(change(self.labels_N), change(self.example_N), student, teacher, self.examples)

    def to(self, device) -> "Batch":
        return self.each(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """In memory that a GPU copies from without waiting."""
        return self.each(Tensor.pin_memory)

    @property
    def num_targets(self) -> int:
        return self.labels_N.numel()
