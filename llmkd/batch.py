"""The input of a step: Batch with its target weights, View, Example, and the layout of a packed row."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """An example's place among the flattened positions of a view: the positions of its prefix segment, if it has one, and its own."""

    prefix: int  # first position of the prefix segment
    shared: int  # number of positions of the prefix segment; 0 without one
    own: int  # first position of its own
    length: int  # number of positions of its own


@dataclass(frozen=True)
class PackedLayout:
    """The S segments of a packed row [1, T], in order. Tensors are on the row's device; everything else is on the host.

    A segment attends causally to itself and to all of its prefix segment, if it has one. So a prompt prefix that several examples share is
    computed once.
    """

    lengths: tuple[int, ...]  # tokens of each segment
    prefix_of: tuple[int, ...]  # the index of each segment's prefix segment, or -1
    examples: tuple[int, ...]  # the index in the batch of each segment's example, or -1 where several share the segment
    kv_lengths: tuple[int, ...]  # keys of each segment: its own tokens and those of its prefix segment
    cu_seqlens_q: Tensor  # [S + 1] int32, cumulated lengths from 0
    cu_seqlens_k: Tensor  # [S + 1] int32, cumulated kv_lengths from 0
    kv_index: Tensor | None  # [sum of kv_lengths] positions in the row of each segment's keys; None without prefix segments

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
        """The layout of some of the examples, and for each of the S segments whether it is kept.

        mine   for each example of the batch, whether to keep it
        """
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

    @property
    def spans(self) -> list[Span]:
        """The span of each example."""
        starts = [0, *accumulate(self.lengths)]
        own = {example: segment for segment, example in enumerate(self.examples) if example >= 0}
        spans = []
        for segment in (own[i] for i in range(len(own))):
            prefix = self.prefix_of[segment]
            shared = (starts[prefix], self.lengths[prefix]) if prefix >= 0 else (0, 0)
            spans.append(Span(*shared, starts[segment], self.lengths[segment]))
        return spans

    def mask(self) -> Tensor:
        """An attention_mask [1, 1, 1, 1] that carries this layout to `models/attention.py`."""
        # Oddity: the layout travels as an attribute of a tensor. transformers passes a four-dimensional attention_mask to every layer unchanged;
        # other arguments reach the layers in some families only, and a dictionary would be taken for masks by kind of layer.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.cu_seqlens_q.device)
        mask.packed = self
        return mask


#: Targets of a batch: a slice of them, or their indices.
Rows = slice | Tensor


@dataclass(frozen=True)
class View:
    """The inputs of one model, and the positions that predict the N targets. Student and teacher may have different views.

    inputs   keyword arguments of the model; the first dimension of each is B
    rows_N   the flattened positions [B * T] of the model's outputs that predict the targets, each once
    packed   the layout of a packed row; None without packing
    keys     [B, T] int32, the seed of each position's dropout (`models/dropout.py`)
    given    T, if the model's outputs have another number of positions than its inputs
    """

    inputs: dict[str, Tensor]
    rows_N: Tensor
    packed: PackedLayout | None = None
    keys: Tensor | None = None
    given: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the model's first input: B, and for text the positions of a row, padding included."""
        return tuple(next(iter(self.inputs.values())).shape)

    @property
    def size(self) -> int:
        """The number of elements of the model's first input; for text the tokens, padding included."""
        return math.prod(self.shape)

    @property
    def B(self) -> int:
        return self.shape[0]

    @property
    def T(self) -> int:
        """The number of positions of the model's outputs, per row."""
        return self.shape[1] if self.given is None else self.given

    @property
    def spans(self) -> list[Span]:
        """The span of each example; without packing a whole row, padding included."""
        B, T = self.B, self.T
        return self.packed.spans if self.packed else [Span(0, 0, b * T, T) for b in range(B)]

    def each(self, change: Callable[[Tensor], Tensor]) -> "View":
        inputs, keys = {k: change(v) for k, v in self.inputs.items()}, None if self.keys is None else change(self.keys)
        return View(inputs, change(self.rows_N), self.packed and self.packed.each(change), keys, self.given)


@dataclass(frozen=True)
class Example:
    """One example of a batch: its identity (`Examples.content_hash`), its number of targets, its teacher and its source."""

    content_hash: str
    num_targets: int
    teacher: int  # the index of its teacher, or -1 for all teachers together
    source: int = 0  # the index of its data source


@dataclass(frozen=True)
class Batch:
    """N targets, and the views from which student and teachers predict them.

    labels_N     the token that position `rows_N[i]` of every view must predict. Labels are aligned once, where batches are made; no other
                 code shifts them. The targets of one example are contiguous, in the order of `examples`
    example_N    for each target the index of its example in the data set
    teacher      the view of every teacher that has none of its own in `of_teachers`
    weights      the weight of each target, [N], by part of the loss ("ce", "kd"): any finite numbers, also 0 and negative ones. A part without
                 an entry has weight 1 everywhere; an entry of all ones is removed
    zeros        all targets, grouped by the parts whose weight there is 0, so that the host knows what need not be computed; empty if no
                 weight is 0. Found when a batch is made: do that on the CPU, as `Examples.batch` does, since on a GPU it waits for the device
    kept         the indices of the targets that count, ascending; the others are in no part of the loss. None: all count
    of_teachers  by setting (teacher.0, teacher.1, ...), the views of teachers that have their own
    """

    labels_N: Tensor
    example_N: Tensor
    student: View
    teacher: View
    examples: tuple[Example, ...] = ()
    weights: dict[str, Tensor] = field(default_factory=dict)
    zeros: dict[tuple[str, ...], Rows] | None = None
    kept: Tensor | None = None
    of_teachers: dict[str, View] = field(default_factory=dict)

    def __post_init__(self):
        if self.weights and self.zeros is None:
            object.__setattr__(self, "weights", {name: w_N for name, w_N in self.weights.items() if not (w_N == 1).all()})
            object.__setattr__(self, "zeros", zeros_of(self.weights))

    def each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with `change` applied to every tensor."""
        views = {
            id(view): view.each(change) for view in {id(v): v for v in (self.student, self.teacher, *self.of_teachers.values())}.values()
        }
        student, teacher = views[id(self.student)], views[id(self.teacher)]
        own = {setting: views[id(view)] for setting, view in self.of_teachers.items()}
        weights = {name: change(w_N) for name, w_N in self.weights.items()}
        zeros = {names: rows if isinstance(rows, slice) else change(rows) for names, rows in (self.zeros or {}).items()}
        kept = None if self.kept is None else change(self.kept)
        return Batch(change(self.labels_N), change(self.example_N), student, teacher, self.examples, weights, zeros, kept, own)

    def view_of(self, setting: str) -> View:
        """The view of the model of a setting: student.model, teacher.model, teacher.1, ..."""
        name = setting.removesuffix(".model")
        return self.student if name == "student" else self.of_teachers.get(name, self.teacher)

    def to(self, device) -> "Batch":
        return self.each(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> "Batch":
        """The same batch in pinned memory, from which copies to a GPU are asynchronous."""
        return self.each(Tensor.pin_memory)

    @property
    def num_targets(self) -> int:
        return self.labels_N.numel()

    @property
    def position_N(self) -> Tensor:
        """The position of each target among its example's targets, from 0: [N], on the CPU. It needs `examples`."""
        return torch.cat([torch.arange(0), *(torch.arange(one.num_targets) for one in self.examples)])

    def weighing(self, more: dict[str, Tensor]) -> "Batch":
        """The same batch with its weights multiplied by `more` ([N] by part). If `more` is on the CPU, this does not wait for a device."""
        device, weights = self.labels_N.device, dict(self.weights)
        for name, w_N in more.items():
            weights[name] = w_N.to(device) * weights[name] if name in weights else w_N.to(device)
        none = {name: torch.zeros(self.num_targets, dtype=torch.bool) for name in weights}
        for without, rows in (self.zeros or {}).items():
            for name in without:
                none[name][rows if isinstance(rows, slice) else rows.cpu()] = True
        for name, w_N in more.items():
            none[name] |= w_N.cpu() == 0
        zeros = {names: rows if isinstance(rows, slice) else rows.to(device) for names, rows in by_pattern(none).items()}
        return replace(self, weights=weights, zeros=zeros)

    def keeping(self, kept: Tensor) -> "Batch":
        """The same batch, in which only the targets `kept` count."""
        return replace(self, kept=kept)

    def only_kept(self, x_N: Tensor) -> Tensor:
        """The values [N], with 0 at targets that do not count."""
        return x_N if self.kept is None else torch.zeros_like(x_N).index_copy_(0, self.kept, x_N[self.kept])

    def counting(self, name: str) -> Tensor:
        """The weight of each target in a part of the loss, [N]: 1 by default, 0 where the target does not count."""
        return self.only_kept(self.weights.get(name, torch.ones(self.num_targets, device=self.labels_N.device)))

    def carriers(self, name: str) -> Rows:
        """The targets that count in a part of the loss: those that are kept and whose weight there is not 0."""
        if not any(name in without for without in self.zeros or {}):
            return slice(0, self.num_targets) if self.kept is None else self.kept
        if self.kept is not None:
            return self.kept[self.weights[name][self.kept] != 0]
        mine = [rows for without, rows in self.zeros.items() if name not in without]
        return mine[0] if len(mine) == 1 else (self.weights[name] != 0).nonzero()[:, 0]

    def counted(self, rows: Rows) -> list[int]:
        """How many of `rows`, which are ascending, each example has."""
        counts = [example.num_targets for example in self.examples]
        if isinstance(rows, slice) and rows == slice(0, self.num_targets):
            return counts
        owner_N = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.long)).to(self.labels_N.device)
        return torch.bincount(owner_N[rows], minlength=len(counts)).tolist()


def zeros_of(weights: dict[str, Tensor]) -> dict[tuple[str, ...], Rows]:
    """`Batch.zeros` for weights [N] by name: all targets, grouped by the names whose weight there is 0; {} if no weight is 0."""
    return by_pattern({name: w_N == 0 for name, w_N in weights.items()})


def by_pattern(none: dict[str, Tensor]) -> dict[tuple[str, ...], Rows]:
    """All targets, grouped by the names whose mask [N] in `none` is true there; {} if no mask is true anywhere."""
    names = list(none)
    if not any(none_N.any() for none_N in none.values()):
        return {}
    pattern_N = sum(none_N.long() << i for i, none_N in enumerate(none.values()))
    parts = {}
    for pattern in pattern_N.unique().tolist():
        key = tuple(name for i, name in enumerate(names) if pattern >> i & 1)
        parts[key] = rows_where(pattern_N == pattern)
    return parts


def rows_where(mask_N: Tensor) -> Rows:
    """The targets where a mask is true, of which there must be one at least: a slice if they are contiguous."""
    rows_n = mask_N.nonzero()[:, 0]
    first, last = int(rows_n[0]), int(rows_n[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows_n) else rows_n
