"""The number of characters that a text may have and still fit. Also used in the process of `template_worker.py`."""

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Bound:
    """A text with more than `most` characters is longer than data.max_length tokens.

    counted   the characters that count; None for all
    cut       whether a longer text is cut at its end instead of left out
    """

    most: int
    counted: str | None = None
    cut: bool = False

    def exceeded(self, text: str) -> bool:
        if len(text) <= self.most:
            return False
        return self.counted is None or any(number > self.most for number in itertools.accumulate(map(text.count, self.counted)))
