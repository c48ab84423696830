"""Edits of a prompt's words, as a pure function of (seed, epoch, content). Targets stay as they are.

Swapping and deleting words are two of the four operations of Wei and Zou 2019, "EDA: Easy Data Augmentation Techniques" (1901.11196); here
each word is drawn by itself with the given probability. Line breaks and runs of spaces stay where they are.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence


def edited(text: str, edits: Sequence[Mapping[str, float]], seed: int, epoch: int, content_hash: str) -> str:
    """The text after one edit after another. `edits`: [{name: probability}, ...] by the names of EDITS.

    A text of one word keeps that word, and a text without letters is as it was.
    """
    draw = random.Random(f"{seed} {epoch} {content_hash}")
    parts = re.split(r"(\s+)", text)  # words at even places, the white space between them at odd ones
    for edit in edits:
        for name, probability in edit.items():
            EDITS[name](parts, probability, draw)
    return "".join(parts)


def _words(parts: list[str]) -> list[int]:
    return [i for i in range(0, len(parts), 2) if parts[i]]


def _swap(parts: list[str], probability: float, draw: random.Random) -> None:
    """A word changes places with the next one, which then stays."""
    places, i = _words(parts), 0
    while i + 1 < len(places):
        if chosen := draw.random() < probability:
            here, there = places[i], places[i + 1]
            parts[here], parts[there] = parts[there], parts[here]
        i += 1 + chosen


def _delete(parts: list[str], probability: float, draw: random.Random) -> None:
    """A word is dropped with the white space before it; one word is always left."""
    places = _words(parts)
    gone = [i for i in places if draw.random() < probability]
    if len(gone) == len(places) and gone:
        gone.remove(draw.choice(gone))
    first = next((i for i in places if i not in gone), None)
    for i in gone:
        parts[i] = ""
        between = i - 1 if first is not None and i > first else i + 1
        if 0 < between < len(parts):
            parts[between] = ""


def _typo(parts: list[str], probability: float, draw: random.Random) -> None:
    """Two neighbouring letters of a word change places."""
    for i in _words(parts):
        if draw.random() >= probability:
            continue
        word = parts[i]
        pairs = [k for k in range(len(word) - 1) if word[k].isalpha() and word[k + 1].isalpha() and word[k] != word[k + 1]]
        if pairs:
            k = draw.choice(pairs)
            parts[i] = word[:k] + word[k + 1] + word[k] + word[k + 2 :]


EDITS: dict[str, Callable[[list[str], float, random.Random], None]] = {"swap": _swap, "delete": _delete, "typo": _typo}
