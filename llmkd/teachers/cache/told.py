"""Log-probabilities from elsewhere at an example's targets: ids and log-probabilities of the listed tokens, as arrays. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .import_lines import SLACK

Entry = dict[int, float]  # for one target: token id to log-probability

_MOST_ROUNDED = 1.05  # sum of probabilities that were packed with few bits
_NEAR = 1e-6  # more than the error of a sum in float64; sums as near to a limit as that are computed exactly


@dataclass
class Told:
    """The listed tokens at N targets, at most M each.

    ids_NM     int64 token ids; any value where log_p_NM is -inf
    log_p_NM   float64 natural logarithms; -inf where no token is listed
    """

    ids_NM: np.ndarray
    log_p_NM: np.ndarray

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Told":
        """From one entry for each target, {id below 2^63: log-probability}."""
        most = max(1, *map(len, entries))
        told = cls(np.full((len(entries), most), -1, np.int64), np.full((len(entries), most), -math.inf))
        for n, entry in enumerate(entries):
            told.put(n, entry)
        return told

    def put(self, n: int, entry: Entry) -> None:
        """Replace a target's tokens by those of an entry."""
        self.log_p_NM[n] = -math.inf
        self.ids_NM[n, : len(entry)], self.log_p_NM[n, : len(entry)] = list(entry), list(entry.values())

    @property
    def known_NM(self) -> np.ndarray:
        """Where a token is listed, bool [N, M]."""
        return self.log_p_NM != -math.inf

    def entry(self, n: int) -> Entry:
        """A target's tokens as an entry; of a token that is listed twice, the later one."""
        known_M = self.known_NM[n]
        return dict(zip(self.ids_NM[n, known_M].tolist(), self.log_p_NM[n, known_M].tolist(), strict=True))

    def of_labels(self, labels_N: np.ndarray) -> np.ndarray:
        """The log-probability of each target's own token, float64 [N]; NaN where it is not listed."""
        own_NM = (self.ids_NM == np.asarray(labels_N)[:, None]) & self.known_NM
        values_N = self.log_p_NM[np.arange(len(own_NM)), own_NM.argmax(1)]
        return np.where(own_NM.any(1), values_N, math.nan)

    def twice_N(self) -> np.ndarray:
        """Whether a target lists a token twice, bool [N]."""
        spaced_NM = np.where(self.known_NM, self.ids_NM, np.iinfo(np.int64).min + np.arange(self.ids_NM.shape[1]))
        return (np.diff(np.sort(spaced_NM, 1), axis=1) == 0).any(1)

    def doubtful(self, vocab: int) -> np.ndarray:
        """The indices of targets to look at one by one: no token listed, an id outside the vocabulary, a value that is no log-probability, or
        probabilities that sum to about 1 or more."""
        known_NM = self.known_NM
        wrong_NM = known_NM & ((self.ids_NM < 0) | (self.ids_NM >= vocab) | ~(self.log_p_NM <= SLACK))
        return np.flatnonzero(wrong_NM.any(1) | ~known_NM.any(1) | ~(self._sums_N() <= 1 + SLACK - _NEAR))

    def scale_rounded(self) -> int:
        """Scale probabilities whose sum exceeds 1 by at most 5 %, which is rounding, so that they sum to 1. Returns the number of such targets."""
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
