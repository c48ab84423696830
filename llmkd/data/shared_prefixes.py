"""Beginnings that examples share, such as a template's first words: found among the examples of one packed row."""

from collections.abc import Sequence

import numpy as np

#: Shorter ones are not worth a piece of their own.
SHORTEST = 8


def shared_prefixes(ids: Sequence[np.ndarray], most: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Groups of examples, each with the number of first tokens that it computes once: together as many saved as groups can save.

    ids    the examples' tokens, each [length]
    most   how many of an example's first tokens may be shared, at most

    Sorted, in whatever order of tokens, those that share most are neighbours; which neighbours are one group is found by dynamic programming.
    """
    order = sorted(range(len(ids)), key=lambda i: ids[i].tobytes())
    common = [_common(ids[a], ids[b], min(most[a], most[b])) for a, b in zip(order, order[1:], strict=False)]
    saved, cuts = np.zeros(len(order) + 1), [0]
    for end in range(1, len(order) + 1):
        least = np.minimum.accumulate(np.array(common[: end - 1], np.int64)[::-1])[::-1]  # least[start]: of order[start:end]
        alone = saved[end - 1]
        together = saved[: end - 1] + np.where(least >= SHORTEST, least, 0) * np.arange(end - 1, 0, -1)
        best = int(together.argmax()) if len(together) and together.max() > alone else end - 1
        saved[end] = max(alone, together[best]) if best < end - 1 else alone
        cuts.append(best)
    groups, end = [], len(order)
    while end:
        start = cuts[end]
        shared = min(common[start : end - 1], default=0)
        groups.append((shared, order[start:end]))
        end = start
    return groups[::-1]


def _common(a: np.ndarray, b: np.ndarray, most: int) -> int:
    n = min(len(a), len(b), most)
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
