"""Marks that say whether an answer or a row is good: accepted: false, status: rejected, is_correct: "no".

Those that clearly say that it is bad are refused, since a model would learn from it. Numbers, such as a score of 0, are left alone: each scale is its own.
"""

import functools
from collections.abc import Iterator
from typing import Any

from .values import plain, words_of

#: Words of keys whose truth means good, and of keys whose truth means bad.
_GOOD = set(
    "valid correct accepted accept approved approve usable good passed pass safe solved thumbsup helpful liked acceptable success successful succeeded ok correctness upvote upvoted like".split()
)
_BAD = set(
    "bad wrong rejected reject incorrect invalid failed unsafe harmful toxic broken corrupt corrupted spam buggy erroneous hallucinated hallucination error failure discard discarded dislike disliked downvote downvoted".split()
)
#: Values that mean bad under a key that names a verdict. Spam is not one of them, as it is a class of texts.
_VERDICTS = (_BAD - {"toxic", "spam", "harmful"}) | set(
    "rejection disapproved unaccepted unacceptable discard discarded declined fail failing failure poor verybad terrible unusable dislike disliked"
    " downvote downvoted thumbsdown notaccepted notapproved notcorrect notvalid inaccurate lowquality veryunsafe remove removed delete deleted"
    " exclude excluded skip skipped ignore ignored".split()
)
_ASKS = set(
    "status quality label labels rating verdict judgement judgment judge grade feedback result evaluation eval review state outcome decision tag"
    " flag annotation correctness score reward validity approval moderation assessment vote correct accepted acceptance good valid preference".split()
)
_LABELS = set("label kttag kototag ktotag chosen preferred selected best".split())
_OF_A_KEY = {"low": "quality", "negative": "feedback"}  # bad under these keys only
_NO, _YES = {"false", "no", "n", "0"}, {"true", "yes", "y", "1"}
#: Words in keys that number or identify something.
_ABOUT = set(
    "id ids count num number rate ratio score scores reason reasons explanation index total n percent fraction type by at date".split()
)


def has_sense(key: str, value: Any) -> bool:
    """Whether the truth of a key says that something is good or bad. Numbers or words under KTO's label, or a similar key, mean something else, such
    as a class."""
    return _sense(key)[1] is not None and not (_sense(key)[2] and not isinstance(value, bool | str))


def is_bad(key: str, value: Any) -> bool:
    """Whether a key's value says that an answer is bad: by true or false (also as text, as in tables, or as 1 and 0), or by a word."""
    asks, good, label = _sense(key)
    if isinstance(value, str):
        if not asks and good is None or len(value) > 40:
            return False
        said = plain(value)
        in_a_word = asks and (said in _VERDICTS or _OF_A_KEY.get(said) in words_of(key))
        return in_a_word or said in ({"false"} if label else {True: _NO, False: _YES}.get(good, ()))
    if good is None or not isinstance(value, bool | int | float) or (label and not isinstance(value, bool)):
        return False
    return value == (not good)


@functools.lru_cache(4096)  # every row of a file has the same keys
def _sense(key: str) -> tuple[bool, bool | None, bool]:
    """(whether a key names a verdict; whether its truth means good, None if it is about something else, as in correct_option; whether it is KTO's
    label or similar)."""
    words = words_of(key)
    if not words or _ABOUT.intersection(words):
        return False, None, False
    label, of_being = plain(key) in _LABELS, words[0] in ("is", "was")
    names = {words[-1], plain(key), *(words[1:2] if of_being else ()), plain(key).removeprefix("is")}
    good = True if label or _GOOD & names else False if _BAD & names else None
    if good is not None and {"not", "non"} & set(words):
        good = not good
    return bool((_ASKS | _GOOD).intersection(words)), good, label


def bad_marks(values: dict, skip: tuple[str, ...] = (), depth: int = 2) -> Iterator[tuple[str, Any]]:
    """(path, value) of every place where an object, or one inside it, says that something is bad."""
    for key, value in values.items():
        if key in skip:
            continue
        if is_bad(key, value):
            yield key, value
        elif isinstance(value, dict) and depth:
            yield from ((f"{key}.{inner}", bad) for inner, bad in bad_marks(value, skip, depth - 1))
