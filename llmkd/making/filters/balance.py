"""Balance: no kind of row is more than a given share of the rows that stay, and as many rows as possible stay."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction


def most_of_each(counts: dict[str, int], max_share: float) -> dict[str, int]:
    """How many rows of each kind stay: as many in all as possible, with no kind above `max_share` of them. All 0 if there are too few kinds.

    If N rows stay, a kind of c rows has at most min(c, floor(max_share N)) of them, and these numbers must add up to N. Their sum f(N) does
    not decrease with N, so N, f(N), f(f(N)), ... from the number of all rows decreases to the largest N with f(N) = N, which is the answer.
    """
    share, total = Fraction(repr(float(max_share))), sum(counts.values())
    while (kept := {kind: min(count, int(share * total)) for kind, count in counts.items()}) and sum(kept.values()) != total:
        total = sum(kept.values())
    return kept


def balanced(kinds: Sequence[str], texts: Sequence[str], max_share: float, seed: int) -> list[bool]:
    """Whether each row stays. Of a kind with too many rows they are drawn by seed and text, whatever the order of the rows."""
    left = most_of_each(Counter(kinds), max_share)
    stay = [False] * len(kinds)
    for i in sorted(range(len(kinds)), key=lambda i: (_drawn(seed, texts[i]), i)):
        stay[i] = left[kinds[i]] > 0
        left[kinds[i]] -= stay[i]
    return stay


def _drawn(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed} {text}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
