"""What is told of an example's targets: ids and log-probabilities of tokens, as arrays. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .import_lines import SLACK

Entry = dict[int, float]  # for one target: token id to log-probability

_MOST_ROUNDED = 1.05  # sum of probabilities that were packed with few bits
_NEAR = 1e-6  # sums in float64 are off by less; those so near a limit are summed exactly


@dataclass
class Told:
    """Of N targets up to M tokens each.

    ids_NM     int64: any where log_p_NM is -inf
    log_p_NM   float64 natural logarithms; -inf: no token is told there
    """

    ids_NM: np.ndarray
    log_p_NM: np.ndarray

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Told":
        """The same of entries with whole numbers below 2^63 and numbers."""
        most = max(1, *map(len, entries))
        told = cls(np.full((len(entries), most), -1, np.int64), np.full((len(entries), most), -math.inf))
        for n, entry in enumerate(entries):
            told.put(n, entry)
        return told

    def put(self, n: int, entry: Entry) -> None:
        """Of a target this alone is told."""
        self.log_p_NM[n] = -math.inf
        self.ids_NM[n, : len(entry)], self.log_p_NM[n, : len(entry)] = list(entry), list(entry.values())

    @property
    def known_NM(self) -> np.ndarray:
        """Where a token is told."""
        return self.log_p_NM != -math.inf

    def entry(self, n: int) -> Entry:
        """What is told of a target; of a token that is told twice, the later one."""
        known_M = self.known_NM[n]
        return dict(zip(self.ids_NM[n, known_M].tolist(), self.log_p_NM[n, known_M].tolist(), strict=True))

    def of_labels(self, labels_N: np.ndarray) -> np.ndarray:
        """The log-probability of each target's own token, float64 [N]; NaN where it is not told."""
        own_NM = (self.ids_NM == np.asarray(labels_N)[:, None]) & self.known_NM
        values_N = self.log_p_NM[np.arange(len(own_NM)), own_NM.argmax(1)]
        return np.where(own_NM.any(1), values_N, math.nan)

    def twice_N(self) -> np.ndarray:
        """The targets of which a token is told twice, bool [N]."""
        spaced_NM = np.where(self.known_NM, self.ids_NM, np.iinfo(np.int64).min + np.arange(self.ids_NM.shape[1]))
        return (np.diff(np.sort(spaced_NM, 1), axis=1) == 0).any(1)

    def doubtful(self, vocab: int) -> np.ndarray:
        """The targets, in order, with nothing told, an id outside the vocabulary, a value that is no log-probability, or a sum above 1, if only just."""
        known_NM = self.known_NM
        wrong_NM = known_NM & ((self.ids_NM < 0) | (self.ids_NM >= vocab) | ~(self.log_p_NM <= SLACK))
        return np.flatnonzero(wrong_NM.any(1) | ~known_NM.any(1) | ~(self._sums_N() <= 1 + SLACK - _NEAR))

    def scale_rounded(self) -> int:
        """Scale to 1 the probabilities that add up to more than it by rounding, by 5 % at most; of how many targets."""
        rounded = 0
        sums_N = self._sums_N()
        for n in np.flatnonzero((sums_N > 1 + SLACK - _NEAR) & (sums_N < _MOST_ROUNDED + _NEAR)):
            total = math.fsum(math.exp(min(value, 1.0)) for value in self.log_p_NM[n].tolist())
            if 1 + SLACK < total <= _MOST_ROUNDED:
                self.log_p_NM[n] -= math.log(total)
                rounded += 1
        return rounded

    def _sums_N(self) -> np.ndarray:
        return np.exp(np.minimum(self.log_p_NM, 1.0)).sum(1)
