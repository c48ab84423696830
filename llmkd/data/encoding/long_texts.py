"""Texts that are much longer than data.max_length: what becomes of them is known, or cut, before they are tokenised.

A tokenizer whose every token covers at most M characters makes more than max_length tokens of more than max_length * M characters. And where
no entry of its vocabulary goes from another character over a space, the tokens before a space do not depend on what follows it: a text may
be cut there, and its first tokens stay what they are. Both are read off the tokenizer; where they do not hold, a long text is tokenised in
stretches until it has more tokens than fit.
"""

import dataclasses
import itertools
import json
import string
import weakref
from dataclasses import dataclass

from ...config.recipe import Data
from .bound import Bound
from .control_tokens import Text, one_encoder
from .stretches import end_of_first

_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_FEW = 16  # characters for each token of max_length: a text that is no longer is not looked at
_SEARCHED = 1 << 16  # characters behind the shortest cut in which a space is looked for
_LETTERS = "".join(dict.fromkeys("eaotins" + string.ascii_letters + string.digits))  # most of most texts is made of the first few
_SAME = 256  # characters before a cut that two texts must share


@dataclass(frozen=True)
class Cover:
    """What the tokens of a tokenizer may cover.

    most          the most characters of a text that one token covers
    counted       the characters for which this is sure; None for all. Others may be unknown, and any number of those one token
    cut_at_space  the tokens before a space that follows another ASCII character do not depend on the text behind it
    """

    most: int
    counted: str | None
    cut_at_space: bool


def bound_of(data: Data, tokenizer) -> Bound | None:
    """The characters of an example that may fit; None where texts are split, and where the tokenizer does not tell."""
    cover = cover_of(tokenizer)
    if data.too_long == "split" or cover is None:
        return None
    return Bound(max(cover.most, _FEW) * data.max_length, cover.counted, data.too_long == "truncate")


def is_longer(text: Text, max_length: int, tokenizer) -> bool:
    """Whether a text is known to have more than `max_length` tokens. False where it has to be tokenised to know, and may be so at once."""
    return _covers_more(text.text, max_length, tokenizer) or _end_of_first(text, max_length, tokenizer) is not None


def _covers_more(text: str, max_length: int, tokenizer) -> bool:
    """Whether it has more characters than `max_length` tokens cover."""
    if len(text) <= _FEW * max_length:
        return False
    cover = cover_of(tokenizer)
    return cover is not None and Bound(cover.most * max_length, cover.counted).exceeded(text)


def _end_of_first(text: Text, max_length: int, tokenizer) -> int | None:
    return end_of_first(text.text, one_encoder(tokenizer, text.raw), max_length)


def beginning(text: Text, max_length: int, tokenizer) -> Text:
    """A part of a text whose first `max_length` tokens are those of the whole; the text itself where it is not much longer."""
    if not _covers_more(text.text, max_length, tokenizer):
        end = _end_of_first(text, max_length, tokenizer)
        return text if end is None else _cut(text, end)
    cover = cover_of(tokenizer)
    shortest = cover.most * max_length + 1
    while not _covers_more(text.text[:shortest], max_length, tokenizer):
        shortest *= 2
    cut = _space(text.text, shortest) if cover.cut_at_space else None
    end = cut and _space(text.text, cut + 1)  # what a cut may change at its edge is behind the first one
    end = end or _end_of_first(text, max_length, tokenizer)
    return text if end is None else _cut(text, end)


def beginnings(text: Text, longer: Text, max_length: int, tokenizer) -> tuple[Text, Text]:
    """The beginning of a text, and of the same text with a context somewhere before that place: both end at the same character.

    So the supervised tokens of the two stay the same. The texts themselves where the text is not much longer, or where the other goes on
    otherwise.
    """
    short = beginning(text, max_length, tokenizer)
    end = len(short.text)
    stop = len(longer.text) - (len(text.text) - end)
    same = min(_SAME, end)
    if stop < same or longer.text[stop - same :] != text.text[end - same :]:
        return text, longer
    return short, _cut(longer, stop)


def _cut(text: Text, end: int) -> Text:
    spans = [(begin, min(stop, end)) for begin, stop in text.spans if begin < end]
    pieces = tuple((begin, min(stop, end), token) for begin, stop, token in text.pieces if begin < end)
    return dataclasses.replace(text, text=text.text[:end], spans=spans, pieces=pieces)


def _space(text: str, first: int) -> int | None:
    """The place of the first space from `first` on that follows an ASCII character that is none; None if there is none near."""
    at = text.find(" ", first, first + _SEARCHED)
    while at > 0 and not ("!" <= text[at - 1] <= "~"):
        at = text.find(" ", at + 1, first + _SEARCHED)
    return at if at > 0 else None


def cover_of(tokenizer) -> Cover | None:
    """What a tokenizer's tokens cover; None where that cannot be read off it."""
    if tokenizer not in _KNOWN:
        _KNOWN[tokenizer] = cover_of_state(json.loads(tokenizer.backend_tokenizer.to_str()))
    return _KNOWN[tokenizer]


def cover_of_state(state: dict) -> Cover | None:
    model, added, before = state["model"], [token["content"] for token in state["added_tokens"]], state["pre_tokenizer"]
    shrinks = _shrinks(state["normalizer"])
    if (
        model["type"] != "BPE"
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or shrinks is None
        or _drops(before)
    ):
        return None
    byte_level, entries = "ByteLevel" in json.dumps(before), [*model["vocab"], *added]
    counted = None
    if any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"]) or not _every_character(model, byte_level):
        counted = "".join(c for c in _LETTERS if {c, c.lower()} <= model["vocab"].keys())
        if shrinks > 1 or not counted:
            return None
    space = "Ġ" if byte_level else "▁"
    crosses = any("!" <= a <= "~" and b == space for entry in entries if space in entry for a, b in itertools.pairwise(entry))
    crosses |= any(" " in token for token in added) or space not in model["vocab"] or (before is None and bool(model.get("ignore_merges")))
    return Cover(shrinks * max(map(len, entries)), counted, not crosses)


def _shrinks(normalizer: dict | None) -> int | None:
    """At most how many characters a normaliser makes one of; None where it may remove any number."""
    if normalizer is None:
        return 1
    kind = normalizer["type"]
    if kind == "Sequence":
        factors = [_shrinks(one) for one in normalizer["normalizers"]]
        return None if None in factors else max([1, *factors])
    if kind == "Replace":
        pattern = normalizer["pattern"].get("String")
        return 1 if pattern == " " and len(normalizer["content"]) else None
    return {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Lowercase": 1, "Prepend": 1}.get(kind)


def _drops(pre_tokenizer: dict | None) -> bool:
    """Whether a pre-tokenizer may leave characters out."""
    if pre_tokenizer is None:
        return False
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return any(map(_drops, pre_tokenizer["pretokenizers"]))
    return kind not in ("ByteLevel", "Metaspace", "Digits", "Punctuation", "Split") or pre_tokenizer.get("behavior") == "Removed"


def _every_character(model: dict, byte_level: bool) -> bool:
    """Whether every character is in a token, and no token is for a run of unknown ones."""
    if byte_level:
        from tokenizers.pre_tokenizers import ByteLevel

        return set(ByteLevel.alphabet()) <= model["vocab"].keys()
    if model.get("byte_fallback"):
        return {f"<0x{byte:02X}>" for byte in range(256)} <= model["vocab"].keys()
    return model.get("unk_token") is not None and not model.get("fuse_unk")
