"""What a step reads: Batch, View, Example, how a packed row lies."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedLayout:
    """How a packed row lies in segments. Tensors are where the row is; `lengths` and `prefix_of` are known without asking a device."""

    lengths: tuple[int, ...]  # of the segments, S of them
    prefix_of: tuple[int, ...]  # for each the number of the segment that it goes on from, or -1
    examples: tuple[int, ...]  # for each the number in the batch of the example that it is of, or -1 where several share it
    kv_lengths: tuple[int, ...]  # for each how many tokens it sees: its own, and those of the segment that it goes on from
    cu_seqlens_q: Tensor  # where the segments begin and the last ends [S + 1], int32
    cu_seqlens_k: Tensor  # the same, counting for each segment all that it sees
    kv_index: Tensor | None  # the places in the row of all that each segment sees; None where that is itself alone

    @classmethod
    def of(cls, lengths: Sequence[int], prefix_of: Sequence[int] | None = None, examples: Sequence[int] | None = None) -> "PackedLayout":
        S = len(lengths)
        prefix_of, examples = tuple(prefix_of or [-1] * S), tuple(range(S) if examples is None else examples)
        starts = [0, *accumulate(lengths)]
        place, kv_index = torch.arange(starts[-1]), None
        if any(before >= 0 for before in prefix_of):
            spans = [span for segment, before in enumerate(prefix_of) for span in ((before, segment) if before >= 0 else (segment,))]
            kv_index = torch.cat([place[starts[span] : starts[span + 1]] for span in spans])
        kv_lengths = tuple(length + (lengths[before] if before >= 0 else 0) for length, before in zip(lengths, prefix_of, strict=True))
        ends = [torch.tensor([0, *accumulate(sizes)], dtype=torch.int32) for sizes in (lengths, kv_lengths)]
        return cls(tuple(lengths), prefix_of, examples, kv_lengths, *ends, kv_index)

    def each(self, change: Callable[[Tensor], Tensor]) -> "PackedLayout":
        tensors = change(self.cu_seqlens_q), change(self.cu_seqlens_k), None if self.kv_index is None else change(self.kv_index)
        return PackedLayout(self.lengths, self.prefix_of, self.examples, self.kv_lengths, *tensors)

    def select(self, mine: Sequence[bool]) -> tuple["PackedLayout", list[bool]]:
        """The segments of some of the examples, as they lie without the others; and which segments those are."""
        keep = [example >= 0 and mine[example] for example in self.examples]
        for segment, before in enumerate(self.prefix_of):
            if keep[segment] and before >= 0:
                keep[before] = True
        number = [count - 1 for count in accumulate(keep)]
        example = [count - 1 for count in accumulate(mine)]
        kept = [segment for segment, one in enumerate(keep) if one]
        prefix_of = [number[self.prefix_of[segment]] if self.prefix_of[segment] >= 0 else -1 for segment in kept]
        of = [example[self.examples[segment]] if self.examples[segment] >= 0 else -1 for segment in kept]
        return PackedLayout.of([self.lengths[segment] for segment in kept], prefix_of, of), keep

    def mask(self) -> Tensor:
        """What stands for this as a model's attention_mask: of four dimensions, so that transformers hands it on to every layer as it is."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.cu_seqlens_q.device)
        mask.packed = self
        return mask


#: Which targets of a batch: a part of them, or their numbers.
Rows = slice | Tensor


@dataclass(frozen=True)
class View:
    """What one model reads of a batch, and which of its flattened positions predict the N targets."""

    inputs: dict[str, Tensor]  # keyword arguments of the model, each [B, T]
    rows_N: Tensor  # positions in the flattened [B * T] that predict the targets, each once
    packed: PackedLayout | None = None  # how examples lie in a packed row

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
