"""Near-duplicates, exactly: no two texts that stay have a Jaccard index of the threshold or more.

Candidates are found by prefixes (Bayardo et al. 2007, "Scaling up all pairs similarity search"; Xiao et al. 2008, PPJoin): with shingles in one order,
the rarest first, two sets whose Jaccard index is t or more share one of the first |A| - ceil(t |A|) + 1 shingles of each. Unlike the
bands of MinHash this misses no pair.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .words import shingles

_PER_COMMON = 20  # shingles of a set for each that prefixes must have in common; it changes the time alone


def near_duplicates(texts: Sequence[str], threshold: float, progress=iter) -> dict[int, tuple[int, float]]:
    """The texts to drop: index -> (index of the text that stays in its place, their Jaccard index of 5-character strings).

    The earlier of two texts stays; a text is dropped only for one that stays. threshold: above 0, to 1. Texts without a character are
    left alone.
    """
    share = Fraction(repr(float(threshold)))
    sets = _by_rarity(texts)
    holders: dict[int, list[int]] = defaultdict(list)  # by shingle the texts that stay and have it in their prefix
    dropped: dict[int, tuple[int, float]] = {}
    for i in progress(range(len(sets))):
        own = sets[i]
        if not len(own):
            continue
        prefix = own[: len(own) - math.ceil(share * len(own)) + _common(len(own))].tolist()
        met = Counter(itertools.chain.from_iterable(holders[shingle] for shingle in prefix if shingle in holders))
        for j in sorted(j for j, count in met.items() if count >= _common(min(len(own), len(sets[j])))):
            small, large = sorted((len(own), len(sets[j])))
            if small < share * large:
                continue
            both = len(np.intersect1d(own, sets[j], assume_unique=True))
            if both >= share * (small + large - both):
                dropped[i] = j, both / (small + large - both)
                break
        else:
            for shingle in prefix:
                holders[shingle].append(i)
    return dropped


def _common(size: int) -> int:
    """The number of common shingles that prefixes must have."""
    return max(1, size // _PER_COMMON)


def _by_rarity(texts: Sequence[str]) -> list[np.ndarray]:
    """Each text's shingles as ascending numbers; a smaller number is a rarer shingle."""
    numbers: dict[str, int] = {}
    sets = [np.array([numbers.setdefault(shingle, len(numbers)) for shingle in sorted(shingles(text))], np.int64) for text in texts]
    often = np.zeros(len(numbers), np.int64)
    for own in sets:
        often[own] += 1
    rank = np.empty_like(often)
    rank[np.argsort(often, kind="stable")] = np.arange(len(often))
    return [np.sort(rank[own]) for own in sets]
