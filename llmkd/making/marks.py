"""Parses answers in which the writer was asked to put text between marks, or to number a list. Nothing is guessed: other answers are unreadable.
No torch."""

import json
import re

from .asks import Answer
from .filters.answers import empty
from .filters.words import Reason, words
from .stage import unusable

#: A number at the beginning of a line, possibly in bold, alone or together with the text after it.
_NUMBER = re.compile(r"^[ \t]*(?:(\*\*)[ \t]*)?(\d{1,3})[.):、．）：][ \t]*(?(1)(?:\*\*)?)[ \t]*", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_DOTS = frozenset(" \t\r\n.…-–—_*·~`'\"")
_COPIED = 8  # words in a row of its prompt that a text of its own does not have


class Unreadable(ValueError):
    """An answer that cannot be parsed. `reason`: a keyword, `detail`: more about this answer."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(reason)


def marked(text: str, *names: str) -> tuple[str, ...]:
    """The texts between <name> and </name>, for each name. Unreadable unless each pair occurs once, in this order, with a text inside."""
    found, at = [], 0
    for name in names:
        opening, closing = f"<{name}>", f"</{name}>"
        if text.count(opening) != 1 or text.count(closing) != 1:
            several = text.count(opening) > 1 or text.count(closing) > 1
            raise Unreadable("marks_repeated" if several else "marks_missing", f"{opening} ... {closing}")
        start, stop = text.index(opening), text.index(closing)
        if start < at or stop < start:
            raise Unreadable("marks_missing", f"{opening} ... {closing} in its place")
        inside = text[start + len(opening) : stop].strip()
        if problem := empty(inside) or (_left_open(inside) if name == "answer" else no_question(inside)):
            raise Unreadable(problem[0], problem[1] or f"{opening} ... {closing}")
        found.append(inside)
        at = stop + len(closing)
    return tuple(found)


def marked_answer(answer: Answer, *names: str, prompt: str = "", given: str = "") -> tuple[str, ...]:
    """`marked` of an answer. Also Unreadable if it has no usable text, was cut off, or copies the prompt between the marks.

    prompt   the prompt, with its places not filled
    given    the text that filled them, whose words may be the prompt's
    """
    if problem := unusable(answer):
        raise Unreadable(*problem)
    found = marked(answer.text, *names)
    for name, text in zip(names, found, strict=True):
        if copied := _copied(name, text, prompt, given):
            raise Unreadable("copies_the_prompt", copied)
    return found


def _copied(name: str, text: str, prompt: str, given: str) -> str | None:
    """The part of the prompt that a text copies: everything between two of its marks (<task> and </task>), or eight words in a row; or None."""
    if text in (between.strip() for between in re.findall(rf"<{name}>(.*?)</{name}>", prompt, re.DOTALL)):
        return text
    own = _runs(text) - _runs(given) if prompt else set()
    return next((" ".join(run) for run in sorted(own & _runs(prompt))), None) if own else None


def _runs(text: str) -> set[tuple[str, ...]]:
    every = words(text)
    return {tuple(every[i : i + _COPIED]) for i in range(len(every) - _COPIED + 1)}


def _left_open(text: str) -> Reason | None:
    """A reason if a text has only dots and dashes, which are a placeholder for an answer."""
    return None if set(text) - _DOTS else ("empty", "")


def no_question(text: str) -> Reason | None:
    """A reason if a text is no question: it has no words, or is a JSON object or list."""
    if not words(text):
        return "empty", ""
    if text[0] in "[{":
        try:
            json.loads(text)
            return "json", "an object or a list, and no text"
        except (ValueError, RecursionError):
            pass
    return None


def numbered(text: str) -> list[str]:
    """The items of a list that is numbered 1., 2., ... in order. Other numbers at the beginning of a line, and those in code blocks, are text.
    Unreadable if there is no item."""
    places, code = [], [found.span() for found in _FENCE.finditer(text)]
    for found in _NUMBER.finditer(text):
        if int(found[2]) == len(places) + 1 and not any(start <= found.start() < stop for start, stop in code):
            places.append(found)
    if not places:
        raise Unreadable("marks_missing", "1. ...")
    ends = [*(one.start() for one in places[1:]), len(text)]
    return [_without_bold(text[one.end() : end].strip(), one) for one, end in zip(places, ends, strict=True)]


def _without_bold(text: str, number: re.Match) -> str:
    """An item without the asterisks that make the whole of it bold, or that its number has opened."""
    if number[1] and not number[0].rstrip().endswith("**"):
        return text.replace("**", "", 1).rstrip()
    whole = text.startswith("**") and text.endswith("**") and text.count("**") == 2
    return text[2:-2].strip() if whole else text
