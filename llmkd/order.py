"""Which examples make up which optimizer step: a pure function of (seed, epoch). Nothing here has state to restore.

An optimizer step is a window of `batch_size` examples, however many processes there are. Inside it examples are sorted
by length, cut into micro-batches and dealt to the ranks in turn; since the loss is a sum over the window's targets
divided by their number, how the window is cut changes nothing but speed.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Step:
    number: int  # from 1
    epoch: int  # from 0
    micro_batches: list[list[int]]  # this rank's examples; a list may be empty, and all ranks have equally many


@dataclass(frozen=True)
class Plan:
    """The whole run's order. `lengths[i]` is the number of tokens of example i."""

    lengths: np.ndarray
    seed: int
    batch_size: int
    micro_batch_size: int
    epochs: int | None
    max_steps: int | None
    length_group: int = 1
    rank: int = 0
    ranks: int = 1
    sources: np.ndarray | None = None  # which source each example is of, where there are several
    weights: tuple[float, ...] = (1.0,)  # passes over each source in an epoch

    @property
    def steps_per_epoch(self) -> int:
        drawn = sum(draws(n, weight) for n, weight in zip(self._sizes(), self.weights, strict=True))
        return math.ceil(drawn / self.batch_size)

    def _sizes(self) -> list[int]:
        if self.sources is None:
            return [len(self.lengths)]
        return np.bincount(self.sources, minlength=len(self.weights)).tolist()

    @property
    def total_steps(self) -> int:
        return self.max_steps or self.epochs * self.steps_per_epoch

    def windows(self, epoch: int) -> list[list[int]]:
        """The epoch's optimizer steps: every example as often as its source weighs (once, by default).

        One of them may be short: the last, unless grouped by length.
        """
        rng = random.Random(f"{self.seed} {epoch}")
        order = []
        for source, weight in enumerate(self.weights):
            examples = range(len(self.lengths)) if self.sources is None else np.flatnonzero(self.sources == source).tolist()
            whole, part = divmod(draws(len(examples), weight), len(examples))
            order += [*examples] * whole + (rng.sample(examples, part) if part else [])
        rng.shuffle(order)
        group = self.batch_size * self.length_group
        if self.length_group > 1:
            order = [
                i for start in range(0, len(order), group) for i in sorted(order[start : start + group], key=lambda i: -self.lengths[i])
            ]
        windows = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        if self.length_group > 1:
            rng.shuffle(windows)  # or every group would begin with its longest examples
        return windows

    def steps(self, done: int = 0) -> Iterator[Step]:
        """The steps after the first `done`."""
        epoch = None
        for number in range(done + 1, self.total_steps + 1):
            if (number - 1) // self.steps_per_epoch != epoch:
                epoch = (number - 1) // self.steps_per_epoch
                windows = self.windows(epoch)
            window = windows[(number - 1) % self.steps_per_epoch]
            yield Step(number, epoch, deal(window, self.lengths, self.micro_batch_size, self.rank, self.ranks))


def draws(examples: int, weight: float) -> int:
    """How many examples an epoch takes of a source."""
    return round(weight * examples)


def deal(examples: list[int], lengths: np.ndarray, micro_batch_size: int, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    """Cut examples into micro-batches of similar length, longest first, and deal them to the ranks in turn."""
    longest_first = sorted(examples, key=lambda i: (-lengths[i], i))
    micro = [longest_first[i : i + micro_batch_size] for i in range(0, len(longest_first), micro_batch_size)]
    micro += [[]] * (-len(micro) % ranks)
    return micro[rank::ranks]


def derived_seed(*parts: int) -> int:
    """A seed for everything random in one micro-batch, from (seed, step, rank, micro-batch)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup: int, min_share: float = 0.0) -> float:
    """The rate of step `step` (from 1): a linear warm-up, then cosine or linear to min_share * peak, or constant."""
    if step <= warmup:
        return peak * step / (warmup + 1)
    if schedule == "constant":
        return peak
    done = (step - 1 - warmup) / max(1, total - warmup)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (min_share + (1 - min_share) * fall)
