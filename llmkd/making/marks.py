"""Reads what a writer was asked to put between marks, or after numbers. What is not there as it should be is a problem, never a guess. No torch."""

import re

from .asks import Answer
from .stage import unusable

_NUMBER = re.compile(r"^[ \t]*\**[ \t]*(\d{1,3})[.):][ \t]*\**[ \t]*", re.MULTILINE)


class Unreadable(ValueError):
    """Why an answer cannot be read: `reason` is one word of a few, `detail` says more."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(reason)


def marked(text: str, *names: str) -> tuple[str, ...]:
    """What stands between <name> and </name>, for each name, in this order, each once and not empty. Unreadable otherwise."""
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
        if not inside:
            raise Unreadable("empty", f"{opening} ... {closing}")
        found.append(inside)
        at = stop + len(closing)
    return tuple(found)


def marked_answer(answer: Answer, *names: str) -> tuple[str, ...]:
    """The same of an answer. Unreadable also where it has no text of use, or was cut off."""
    if problem := unusable(answer):
        raise Unreadable(*problem)
    return marked(answer.text, *names)


def numbered(text: str) -> list[str]:
    """The items of a list that is numbered 1., 2., ... in order; other numbers at the beginning of a line are text. Unreadable without one."""
    places = []
    for found in _NUMBER.finditer(text):
        if int(found[1]) == len(places) + 1:
            places.append(found)
    if not places:
        raise Unreadable("marks_missing", "1. ...")
    ends = [*(one.start() for one in places[1:]), len(text)]
    return [text[one.end() : end].strip() for one, end in zip(places, ends, strict=True)]
