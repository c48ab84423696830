"""The order of the examples and their split into micro-batches: pure functions of (seed, epoch), with no state to restore.

An optimizer step takes `batch_size` examples, however many processes there are. They are sorted by length, split into micro-batches and
dealt to the ranks in turn. The split changes the speed and not the result, since the loss is the sum over the step's targets divided by
their number.
"""

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MOST_TOKENS = 65_536  # largest token budget that `auto` measures: larger micro-batches are not faster
MOST_PACKED = 8_192  # the same for packed rows if the attention also computes the pairs of tokens of different examples
_FLOOR = 1024  # tokens: a GPU takes about as long for fewer, since launching kernels takes the time


@dataclass(frozen=True)
class TokenBudget:
    """The largest number of tokens in a micro-batch, padding included."""

    tokens: int
    packing: bool = False

    def of(self, lengths: np.ndarray) -> int:
        """The tokens of one micro-batch of examples of these lengths."""
        return int(lengths.sum() if self.packing else len(lengths) * lengths.max(initial=0))


@dataclass(frozen=True)
class Batching:
    """How training examples become optimizer steps and micro-batches. Either `epochs` or `max_steps` is given; a stream needs `max_steps`.

    batch_size         examples of an optimizer step, over all processes
    micro_batch_size   examples of a micro-batch, or a budget of tokens
    group_by_length    number of optimizer steps whose examples are sorted by length together
    """

    seed: int
    batch_size: int
    micro_batch_size: int | TokenBudget
    epochs: int | None = None
    max_steps: int | None = None
    group_by_length: int = 1


@dataclass(frozen=True)
class BatchPlan:
    """The order of a run's examples. `lengths[i]` is the number of tokens of example i."""

    lengths: np.ndarray
    seed: int
    batch_size: int
    epochs: int | None
    max_steps: int | None
    group_by_length: int = 1
    sources: np.ndarray | None = None  # the source of each example, if there are several
    weights: tuple[float, ...] = (1.0,)  # passes over each source in an epoch

    @property
    def steps_per_epoch(self) -> int:
        drawn = sum(num_draws(n, weight) for n, weight in zip(self._sizes(), self.weights, strict=True))
        return math.ceil(drawn / self.batch_size)

    def _sizes(self) -> list[int]:
        if self.sources is None:
            return [len(self.lengths)]
        return np.bincount(self.sources, minlength=len(self.weights)).tolist()

    @property
    def total_steps(self) -> int:
        return self.max_steps or self.epochs * self.steps_per_epoch

    def step_batches(self, epoch: int) -> list[list[int]]:
        """The examples of each optimizer step of an epoch. A source's weight is the number of passes over it.

        One step may have fewer examples than `batch_size`: the last one, or with `group_by_length` any.
        """
        rng = random.Random(f"{self.seed} {epoch}")
        order = []
        for source, weight in enumerate(self.weights):
            examples = range(len(self.lengths)) if self.sources is None else np.flatnonzero(self.sources == source).tolist()
            whole, part = divmod(num_draws(len(examples), weight), len(examples))
            order += [*examples] * whole + (rng.sample(examples, part) if part else [])
        rng.shuffle(order)
        group = self.batch_size * self.group_by_length
        if self.group_by_length > 1:
            order = [
                i for start in range(0, len(order), group) for i in sorted(order[start : start + group], key=lambda i: -self.lengths[i])
            ]
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if self.group_by_length > 1:
            rng.shuffle(batches)  # otherwise every group would begin with its longest examples
        return batches

    def steps(self, done: int = 0) -> Iterator[tuple[int, int, list[int]]]:
        """(number, from 1; epoch, from 0; examples of all ranks) of the steps after the first `done`."""
        epoch = None
        for number in range(done + 1, self.total_steps + 1):
            if (number - 1) // self.steps_per_epoch != epoch:
                epoch = (number - 1) // self.steps_per_epoch
                batches = self.step_batches(epoch)
            yield number, epoch, batches[(number - 1) % self.steps_per_epoch]


def num_draws(examples: int, weight: float) -> int:
    """The number of examples that an epoch takes from a source."""
    return round(weight * examples)


def make_micro_batches(examples: list[int], lengths: np.ndarray, size: int | TokenBudget, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """The micro-batches of one rank: the examples are cut into micro-batches of `size`, longest first, which are dealt to the ranks in turn.

    size   the largest number of examples, or of tokens; an example longer than the budget is a micro-batch of its own

    Every rank gets as many; some may be empty. Without packing the examples of a micro-batch have similar lengths.
    """
    longest_first = sorted(examples, key=lambda i: (-lengths[i], i))
    if isinstance(size, TokenBudget):
        micro = (_first_fit_pack if size.packing else _slice_to_budget)([int(lengths[i]) for i in longest_first], size.tokens, ranks)
        micro = [[longest_first[n] for n in one] for one in micro]
    else:
        micro = [longest_first[i : i + size] for i in range(0, len(longest_first), size)]
    micro += [[]] * (-len(micro) % ranks)
    return micro[rank::ranks]


def _slice_to_budget(lengths: list[int], tokens: int, ranks: int) -> list[list[int]]:
    """Slices of the descending `lengths` with largest length x count <= tokens; their number is a multiple of `ranks` if there are examples enough.

    Several numbers of micro-batches are tried, each split as evenly as it allows; the one with the fewest padded tokens is taken, where
    every micro-batch counts at least `_FLOOR` tokens.
    """

    def slices(most: int) -> list[list[int]]:
        out, start = [], 0
        while start < len(lengths):
            count = max(1, most // lengths[start])
            out.append(list(range(start, min(start + count, len(lengths)))))
            start += count
        return out

    def even(count: int) -> list[list[int]]:
        low, high = 1, tokens  # bisection: the smallest budget that needs at most `count` micro-batches
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(slices(middle)) <= count else (middle + 1, high)
        return slices(low)

    best, least, count = [], math.inf, len(slices(tokens))
    while (count := count + -count % ranks) * _FLOOR < least and count < len(lengths) + ranks:
        cut = even(count)
        cost = sum(max(_FLOOR, lengths[one[0]] * len(one)) for one in cut)
        if cost < least:
            best, least = cut, cost
        count += 1 + count // 4
    return best


def _first_fit_pack(lengths: list[int], tokens: int, ranks: int) -> list[list[int]]:
    """Packed rows of at most `tokens`, from descending `lengths`. First-fit decreasing gives their number; the examples are then dealt again, each
    to the emptiest row, so that the rows are about equally long."""
    rows, room = [], []
    for n, length in enumerate(lengths):
        place = next((r for r, free in enumerate(room) if free >= length), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(tokens)
        rows[place].append(n)
        room[place] -= length
    count = len(rows) + -len(rows) % ranks
    even, heap = [[] for _ in range(count)], [(0, r) for r in range(count)]
    for n, length in enumerate(lengths):
        held, place = heapq.heappop(heap)
        if held and held + length > tokens:  # rows of equal length do not hold all examples: keep those of first-fit
            return sorted(rows, key=lambda row: -sum(lengths[n] for n in row))
        even[place].append(n)
        heapq.heappush(heap, (held + length, place))
    return sorted(even, key=lambda row: -sum(lengths[n] for n in row))
