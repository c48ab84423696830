"""Texts as words, as normalised characters and as sets of character n-grams, which the filters compare. No torch."""

import functools
import itertools
import re
import unicodedata

#: Scripts that are written without spaces: each of their characters counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_VARIANTS = range(0xFE00, 0xFE10)  # marks that choose the form of a sign
#: Why a row is left out: a keyword, by which rows are counted, and a detail on this row.
Reason = tuple[str, str]

SHINGLE = 5  # characters


def words(text: str) -> list[str]:
    """The words of a text in lower case, with straight apostrophes and without punctuation. In Han, kana, Thai, Lao, Khmer and Burmese every character
    is a word."""
    return _word().findall(unicodedata.normalize("NFKC", text).casefold().replace("’", "'"))


@functools.cache
def _word() -> re.Pattern:
    """The pattern of a word: a letter or digit, followed by letters, digits, marks such as the vowels of Hindi, joiners, and inner apostrophes."""
    marks = [c for c in range(0x300, 0x20000) if unicodedata.category(chr(c)) in ("Mn", "Mc") and c not in _VARIANTS]
    runs = [[c for _, c in run] for _, run in itertools.groupby(enumerate(marks), lambda pair: pair[1] - pair[0])]
    ranges = "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)  # single characters would take re a third of a second
    one, more = rf"(?:(?![{_UNSPACED}])\w)", rf"(?:(?![{_UNSPACED}])[\w\u200c\u200d{ranges}])"
    return re.compile(rf"[{_UNSPACED}]|{one}{more}*(?:'{one}{more}*)*")


def plain(text: str) -> str:
    """The text in lower case, with straight apostrophes and single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().replace("’", "'").split())


def shingles(text: str) -> set[str]:
    """All strings of 5 characters in the `plain` text; of a shorter text the whole of it. Empty for an empty text."""
    text = plain(text)
    return {text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} or ({text} if text else set())


def jaccard(one: set, other: set) -> float:
    """|A and B| / |A or B|; 1 for two empty sets."""
    return len(one & other) / len(one | other) if one or other else 1.0
