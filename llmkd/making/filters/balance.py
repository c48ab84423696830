"""Balance: no kind of rows has more than a share of those that stay. As many rows as possible stay."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction


def most_of_each(counts: dict[str, int], max_share: float) -> dict[str, int]:
    """How many rows of each kind stay, so that none has more than `max_share` of all that stay, and these are as many as can be.

    With N rows in the end, a kind of c rows has at most min(c, floor(max_share N)), and these must add up to N. Their sum f(N) never
    falls as N rises, so N, f(N), f(f(N)), ... from all rows on falls to the largest N with f(N) = N: the only one looked for. All 0 where there
    are too few kinds.
    """
    share, total = Fraction(repr(float(max_share))), sum(counts.values())
    while (kept := {kind: min(count, int(share * total)) for kind, count in counts.items()}) and sum(kept.values()) != total:
        total = sum(kept.values())
    return kept


def balanced(kinds: Sequence[str], texts: Sequence[str], max_share: float, seed: int) -> list[bool]:
    """Which rows stay. Of a kind with too many they are drawn by the seed and their texts, whatever the order of the rows."""
    left = most_of_each(Counter(kinds), max_share)
    stay = [False] * len(kinds)
    for i in sorted(range(len(kinds)), key=lambda i: (_drawn(seed, texts[i]), i)):
        stay[i] = left[kinds[i]] > 0
        left[kinds[i]] -= stay[i]
    return stay


def _drawn(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed} {text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
