"""Prefixes that examples of one packed row share, such as a template's first words."""

from collections.abc import Sequence

import numpy as np

#: Shorter prefixes do not repay a segment of their own.
SHORTEST = 8


def shared_prefixes(ids: Sequence[np.ndarray], most: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Groups of examples, each as (length of the shared prefix, the examples), so that the groups save the most tokens.

    ids    the examples' tokens, each [length]
    most   per example, the maximal number of its first tokens that may be shared

    When examples are sorted by their tokens, those with the longest common prefixes are neighbours. Dynamic programming finds the best
    division of that order into groups.
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
