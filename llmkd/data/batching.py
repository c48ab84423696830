"""The order of the examples and their split into micro-batches: pure functions of (seed, epoch), with no state to restore.

An optimizer step takes `batch_size` examples, however many processes there are. They are sorted by length, split into
micro-batches and handed to the ranks in turn; since the loss is a sum over the step's targets divided by their number, how
the examples are split changes nothing but speed.
"""

import heapq
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

MOST_TOKENS = 65_536  # upper bound of a measured token budget: larger micro-batches are not faster
MOST_PACKED = 8_192  # the same for a packed row of which a family's own attention computes every pair of tokens, also pairs of two examples
_FLOOR = 1024  # tokens: smaller passes take a GPU about as long, since they are bound by kernel launches


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
    """How training examples become optimizer steps and micro-batches. Of `epochs` and `max_steps` one is given; a stream needs `max_steps`.

    batch_size         examples of an optimizer step, over all processes
    micro_batch_size   examples, or tokens of a budget
    group_by_length    optimizer steps whose examples are sorted together by length
    """

    seed: int
    batch_size: int
    micro_batch_size: int | TokenBudget
    epochs: int | None = None
    max_steps: int | None = None
    group_by_length: int = 1


@dataclass(frozen=True)
class BatchPlan:
    """The whole run's order. `lengths[i]` is the number of tokens of example i."""

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
        """The examples of each optimizer step of an epoch: every example as often as its source's weight (1 by default).

        One of them may be short: the last, unless grouped by length.
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
    """How many examples an epoch takes of a source."""
    return round(weight * examples)


def make_micro_batches(examples: list[int], lengths: np.ndarray, size: int | TokenBudget, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """Cut examples into micro-batches of `size`, examples or tokens, longest first, and deal them to the ranks in turn.

    Without packing a micro-batch has examples of similar length. An example longer than the budget is a micro-batch of its own.
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
    """Slices of falling `lengths` with length x count <= tokens, equally many for each rank.

    For each possible number of micro-batches, split as evenly as possible; choose the number with the least padded tokens, counting
    every micro-batch as at least 1024 tokens (smaller ones are launch-bound).
    """

    def slices(most: int) -> list[list[int]]:
        out, start = [], 0
        while start < len(lengths):
            count = max(1, most // lengths[start])
            out.append(list(range(start, min(start + count, len(lengths)))))
            start += count
        return out

    def even(count: int) -> list[list[int]]:
        low, high = 1, tokens  # the least budget that does with no more
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
    """Rows of at most `tokens`, from falling `lengths`: first-fit decreasing gives their number; the rows are then made as even as that number allows."""
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
    for n, length in enumerate(lengths):  # each to the emptiest
        held, place = heapq.heappop(heap)
        if held and held + length > tokens:
            return sorted(rows, key=lambda row: -sum(lengths[n] for n in row))
        even[place].append(n)
        heapq.heappush(heap, (held + length, place))
    return sorted(even, key=lambda row: -sum(lengths[n] for n in row))
