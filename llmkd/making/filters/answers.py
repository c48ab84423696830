"""Filters of one answer: empty, too short or too long, cut off, a refusal, an echo of its question. Each returns the reason why it is left out, or None.

The phrases of a refusal are English; a recipe may give others.
"""

import re
import unicodedata
from collections.abc import Sequence

from .words import Reason, jaccard, plain, shingles, words

_BEGINNING = 250  # characters at the beginning of an answer that are searched for a refusal
_SHORT = 4  # words: shorter questions may well occur in their answer

#: Phrases with which chat models begin a refusal.
REFUSALS = (
    "as an ai",
    "as a language model",
    "as a large language model",
    "i am an ai",
    "i'm an ai",
    "i am sorry, but",
    "i'm sorry, but",
    "sorry, but i",
    "i apologize, but",
    "i am unable to",
    "i'm unable to",
    "i am not able to",
    "i'm not able to",
    "i cannot assist",
    "i can't assist",
    "i cannot help",
    "i can't help",
    "i cannot provide",
    "i can't provide",
    "i cannot fulfill",
    "i can't fulfill",
    "i cannot answer",
    "i can't answer",
    "i do not have access",
    "i don't have access",
    "i do not have personal",
    "i don't have personal",
)


def empty(answer: str) -> Reason | None:
    """A text of white space, control characters and invisible characters only."""
    return None if any(unicodedata.category(character)[0] not in "ZC" for character in answer) else ("empty", "")


def length(answer: str, least: int | None, most: int | None) -> Reason | None:
    """A text with too few or too many words, punctuation not counted."""
    found = len(words(answer))
    if least is not None and found < least:
        return "too_short", f"{found} words, fewer than {least}"
    if most is not None and found > most:
        return "too_long", f"{found} words, more than {most}"
    return None


def cut_off(answer: str, finish: str | None) -> Reason | None:
    """An answer whose writer did not stop by itself (`finish`, as servers name it; None if unknown), or that ends in a colon."""
    if finish not in (None, "stop"):
        return "cut_off", f"finish is {finish}"
    return ("cut_off", "ends in a colon") if answer.rstrip().endswith((":", "：")) else None


def refusal(answer: str, phrases: Sequence[str] = REFUSALS) -> Reason | None:
    """An answer with one of the phrases in its first 250 characters, whatever the case and the form of the apostrophes."""
    beginning = plain(answer[: 2 * _BEGINNING])[:_BEGINNING]
    for phrase in phrases:
        if re.search(rf"(?<!\w){re.escape(plain(phrase))}(?!\w)", beginning):
            return "refusal", repr(phrase)
    return None


def echo(question: str, answer: str, least: float) -> Reason | None:
    """An answer that is its question, or begins with it: the Jaccard index of their 5-character strings is `least` or more.

    Questions of three words or fewer are not checked, since they may well occur in their answer.
    """
    if len(words(question)) < _SHORT:
        return None
    question, answer = plain(question), plain(answer)
    asked = shingles(question)
    found = max(jaccard(asked, shingles(answer)), jaccard(asked, shingles(answer[: len(question)])))
    return ("echo", f"{found:.2f} of the question") if found >= least else None
