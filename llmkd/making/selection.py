"""Selects rows by their scores: above or below a limit, the highest share, the middle of each cluster; or by the rule of Selective
Reflection-Tuning among four versions of a row. No torch."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config.fields import part_of
from .filters.words import Reason

#: Versions of a row, named by the part that a teacher has rewritten.
ORIGINAL, INSTRUCTION, RESPONSE, BOTH = VERSIONS = ("original", "instruction", "response", "both")


@dataclass(frozen=True)
class ByScore:
    """Limits of a score, in the order in which they apply; None: no limit.

    above, below   exclusive limits
    top            share of each cluster's rows, those with the highest scores
    middle         the rows between two shares of each cluster in the order of the score: [0.25, 0.75] leaves out a quarter at each end
    per_cluster    number of rows of each cluster, spread evenly over the order of the score
    """

    above: float | None = None
    below: float | None = None
    top: float | None = None
    middle: tuple[float, float] | None = None
    per_cluster: int | None = None

    def choose(self, scores: Sequence[float], keys: Sequence[str], clusters: Sequence[int] | None = None) -> list[Reason | None]:
        """The reason why each row is left out; None for rows that stay.

        keys       of the rows: they break ties between equal scores, so that the order of the rows does not matter
        clusters   the cluster of each row; None: all rows are one cluster
        """
        out: list[Reason | None] = [self._outside(score) for score in scores]
        groups: dict[int, list[int]] = defaultdict(list)
        for i in sorted((i for i, reason in enumerate(out) if reason is None), key=lambda i: (scores[i], keys[i])):
            groups[clusters[i] if clusters else 0].append(i)
        for group in groups.values():
            stay = group
            if self.top is not None:
                stay = self._left(out, stay, stay[len(stay) - part_of(self.top, len(stay)) :], "below_the_top")
            if self.middle is not None:
                first, last = (part_of(share, len(stay)) for share in self.middle)
                stay = self._left(out, stay, stay[first:last], "outside_the_middle")
            if self.per_cluster is not None and len(stay) > self.per_cluster:
                spread = [stay[(2 * k + 1) * len(stay) // (2 * self.per_cluster)] for k in range(self.per_cluster)]
                self._left(out, stay, spread, "enough_of_its_cluster")
        return out

    def _outside(self, score: float) -> Reason | None:
        if self.above is not None and not score > self.above:
            return "not_above", f"{score:.4g}, not above {self.above:g}"
        if self.below is not None and not score < self.below:
            return "not_below", f"{score:.4g}, not below {self.below:g}"
        return None

    def _left(self, out: list[Reason | None], before: list[int], stay: list[int], word: str) -> list[int]:
        """Set the reason of the rows that do not stay; returns `stay`."""
        for i in set(before) - set(stay):
            out[i] = word, ""
        return stay


def reflection(scores: Mapping[str, tuple[float, float]], originals: bool) -> tuple[str, Reason | None]:
    """The version of a row that Selective Reflection-Tuning chooses (arXiv:2402.10110, section 3), and a reason if even that one is left out.

    The reflected instruction is taken if IFD rises: it is harder, so there is more to learn. Then the reflected response to it is taken
    if r-IFD falls: the instruction follows more easily from it. The pair stays if both are below 1: above, one does not help with the other.

    scores      (IFD, r-IFD) of each version that exists
    originals   whether rows with their own response may stay; the authors' program drops them all
    """
    chosen = ORIGINAL
    if INSTRUCTION in scores and scores[INSTRUCTION][0] > scores[ORIGINAL][0]:
        chosen = INSTRUCTION
    answered = BOTH if chosen == INSTRUCTION else RESPONSE
    if answered in scores and scores[answered][1] < scores[chosen][1]:
        chosen = answered
    ifd, r_ifd = scores[chosen]
    if not originals and chosen in (ORIGINAL, INSTRUCTION):
        return chosen, ("own_response", "no reflected response is better")
    if not ifd < 1:
        return chosen, ("ifd_not_below_1", f"{ifd:.4g}")
    return chosen, (None if r_ifd < 1 else ("rifd_not_below_1", f"{r_ifd:.4g}"))
