"""Filters of repetitive text: it compresses too well, repeats sequences of words, or repeats a digit."""

import re
import zlib
from collections import Counter

from .words import Reason, words

_WINDOW = 1000  # characters: about the text that the limit of Whisper is meant for
_NGRAM = 10  # words
_DIGITS = re.compile(r"(\d)\1{8}")


def compression_ratio(text: str) -> float:
    """Bytes of the text over bytes of it compressed by zlib, as in Whisper (arXiv:2212.04356, section 4.5): its largest value over windows of
    1,000 characters, which overlap by half.

    Whisper's limit of 2.4 is meant for half a minute of speech. Any text compresses better the longer it is: a whole book exceeds 2.4.
    """
    starts = range(0, max(1, len(text) - _WINDOW // 2), _WINDOW // 2)
    return max(_ratio(text[start : start + _WINDOW]) for start in starts)


def _ratio(text: str) -> float:
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw) / len(zlib.compress(raw))


def repeated_words(text: str, n: int = _NGRAM) -> float:
    """The share of a text's words that are in a sequence of n words that occurs twice or more (Gopher, arXiv:2112.11446, table A1, but in words instead
    of characters, and with all occurrences counted)."""
    every = words(text)
    grams = [tuple(every[i : i + n]) for i in range(len(every) - n + 1)]
    often, covered, end = Counter(grams), 0, 0
    for start, gram in enumerate(grams):
        if often[gram] > 1:
            covered += start + n - max(start, end)
            end = start + n
    return covered / len(every) if every else 0.0


def repetition(text: str, most_ratio: float | None, most_repeated: float | None) -> Reason | None:
    """A reason if a text is repetitive, by its compression ratio, its share of repeated words, or nine equal digits in a row; else None."""
    if most_ratio is not None and (found := compression_ratio(text)) > most_ratio:
        return "repetition", f"compression ratio {found:.2f}, more than {most_ratio:g}"
    if most_repeated is not None and (found := repeated_words(text)) > most_repeated:
        return "repetition", f"{found:.0%} of its words are in repeated sequences of {_NGRAM}, more than {most_repeated:.0%}"
    digits = _DIGITS.search(text)
    return ("repetition", f"the digit {digits[1]} nine times in a row") if digits else None
