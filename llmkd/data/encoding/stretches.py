"""Tokenises long texts in stretches, so that memory stays bounded and a caller may stop after the first tokens.

Neighbouring stretches overlap, and are joined where both have the same tokens at the same places for a while. So the result does not contain
the edges of a stretch, which a tokenizer may treat differently from the inside of a text. If two stretches agree nowhere (one unknown token
covers the overlap, say), the text is cut between two tokens of the first.
"""

from collections.abc import Callable, Iterator

import numpy as np

_AT_ONCE = 1 << 19  # characters: a tokenizer's output takes about a hundred times the memory of its input
_STRETCH, _OVERLAP = 1 << 18, 1 << 12  # characters
_ALIKE = 8  # tokens that must be the same in both stretches where they are joined

#: Token ids of a text [tokens], and the first and one past the last character of each [tokens, 2].
Placed = tuple[np.ndarray, np.ndarray]
#: A function from a text to its token ids and their character offsets.
Encoder = Callable[[str], tuple[list[int], list[tuple[int, int]]]]


def is_long(text: str) -> bool:
    """Whether a text is tokenised in stretches instead of at once."""
    return len(text) > _AT_ONCE


def tokens(text: str, encode: Encoder) -> Placed:
    """All tokens of a text."""
    ids, places = zip(*stretches(text, encode), strict=True)
    return np.concatenate(ids), np.concatenate(places)


def end_of_first(text: str, encode: Encoder, most: int) -> int | None:
    """A position after the first `most` tokens of a long text: cutting there does not change these. None if it has no more tokens, or is not
    long."""
    count = 0
    for ids, places in stretches(text, encode) if is_long(text) else ():
        count += len(ids)
        if count > most:
            return min(int(places[-1, 1]) + _OVERLAP, len(text))
    return None


def stretches(text: str, encode: Encoder) -> Iterator[Placed]:
    """The tokens of a text, stretch by stretch; all at once if it is not long."""
    if not is_long(text):
        ids, places = encode(text)
        yield np.array(ids, np.int32), np.array(places, np.int64).reshape(-1, 2)
        return

    def encoded(begin: int) -> Placed:
        ids, places = encode(text[begin : begin + _STRETCH])
        return np.array(ids, np.int32), np.array(places, np.int64).reshape(-1, 2) + begin

    begin, (ids, places) = 0, encoded(0)
    while begin + _STRETCH < len(text):
        begin += _STRETCH - _OVERLAP
        after = encoded(begin)
        if joint := _joint((ids, places), after, begin):
            end, first = joint
        else:
            end, first = len(ids), 0
            cuts = np.flatnonzero((places[1:, 0] >= places[:-1, 1]) & (places[:-1, 1] > begin)) + 1
            if len(cuts):
                end = int(cuts[len(cuts) // 2])
            begin = int(places[end - 1, 1]) if len(cuts) else begin + _OVERLAP
            after = encoded(begin)
        yield ids[:end], places[:end]
        ids, places = after[0][first:], after[1][first:]
    yield ids, places


def _joint(one: Placed, other: Placed, begin: int) -> tuple[int, int] | None:
    """An index into each from which both have the same tokens, in the middle of their overlap; None if there is none.

    `begin`: the first character of the overlap.
    """
    (ids, places), (their_ids, their_places) = one, other
    start, stop = int(np.searchsorted(places[:, 0], begin + _OVERLAP // 4)), int(np.searchsorted(places[:, 0], begin + 3 * _OVERLAP // 4))
    for i in range(max(start, 1), stop):
        j = int(np.searchsorted(their_places[:, 0], places[i, 0]))
        ours, theirs = slice(i, i + _ALIKE), slice(j, j + _ALIKE)
        between = places[i - 1, 1] <= places[i, 0]  # not inside a character of several tokens
        if between and np.array_equal(ids[ours], their_ids[theirs]) and np.array_equal(places[ours], their_places[theirs]):
            return i, j
    return None
