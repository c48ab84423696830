"""Contamination: rows that have thirteen words in a row in common with a held-out text (GPT-3, arXiv:2005.14165, appendix C)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .words import Reason, words

NGRAM = 13  # words


class HeldOutTexts:
    """Texts that must not occur in training rows.

    texts   (place, text), the place as file:line
    """

    def __init__(self, texts: Iterable[tuple[str, str]]):
        self.grams: dict[tuple[str, ...], str] = {}
        self.short: dict[tuple[str, ...], str] = {}  # whole texts of fewer words
        for place, text in texts:
            every = words(text)
            if len(every) < NGRAM:
                self.short.setdefault(tuple(every), place)
            for gram in _grams(every):
                self.grams.setdefault(gram, place)
        self.short.pop((), None)

    def contaminated(self, question: str, *others: str) -> Reason | None:
        """A reason if a row is contaminated, else None: its question or another of its texts shares thirteen words in a row with a held-out text, or its
        question equals a shorter held-out text word by word. A short answer, such as a number, proves nothing."""
        for text in (question, *others):
            for gram in _grams(words(text)):
                if gram in self.grams:
                    return "contamination", f"{self.grams[gram]} has {' '.join(gram)!r} too"
        place = self.short.get(tuple(words(question)))
        return ("contamination", f"it asks what {place} has") if place else None


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a row, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from texts_in(one)
    elif isinstance(value, Iterable):
        for one in value:
            yield from texts_in(one)


def _grams(every: list[str]) -> Iterable[tuple[str, ...]]:
    return (tuple(every[i : i + NGRAM]) for i in range(len(every) - NGRAM + 1))
