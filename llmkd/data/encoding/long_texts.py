"""Recognises texts that are much longer than data.max_length, or cuts them, before they are tokenised.

If every token of a tokenizer covers at most M characters, a text of more than max_length * M characters has more than max_length tokens. And if
no entry of its vocabulary continues from another character into a space, the tokens before a space do not depend on the text after it: a text
may be cut there without changing its first tokens. Both properties are read from the tokenizer. If they do not hold, a long text is tokenised
in stretches until it has more tokens than fit.
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
_FEW = 16  # characters for each token of max_length: shorter texts are not checked
_SEARCHED = 1 << 16  # characters after the shortest cut that are searched for a space
_LETTERS = "".join(dict.fromkeys("eaotins" + string.ascii_letters + string.digits))  # the first few make up most of most texts
_SAME = 256  # characters before a cut that must be the same in both texts


@dataclass(frozen=True)
class Cover:
    """The characters that the tokens of a tokenizer may cover.

    most          the most characters of a text that one token covers
    counted       the characters for which this is certain; None for all. Others may be unknown, and any number of unknown ones one token
    cut_at_space  whether the tokens before a space after another ASCII character do not depend on the text after it
    """

    most: int
    counted: str | None
    cut_at_space: bool


def bound_of(data: Data, tokenizer) -> Bound | None:
    """The number of characters up to which an example may fit. None if texts are split, or the tokenizer does not tell."""
    cover = cover_of(tokenizer)
    if data.too_long == "split" or cover is None:
        return None
    return Bound(max(cover.most, _FEW) * data.max_length, cover.counted, data.too_long == "truncate")


def is_longer(text: Text, max_length: int, tokenizer) -> bool:
    """Whether a text is known to have more than `max_length` tokens. False if only tokenising all of it, which is cheap then, can tell."""
    return _covers_more(text.text, max_length, tokenizer) or _end_of_first(text, max_length, tokenizer) is not None


def _covers_more(text: str, max_length: int, tokenizer) -> bool:
    """Whether the text has more characters than `max_length` tokens can cover."""
    if len(text) <= _FEW * max_length:
        return False
    cover = cover_of(tokenizer)
    return cover is not None and Bound(cover.most * max_length, cover.counted).exceeded(text)


def _end_of_first(text: Text, max_length: int, tokenizer) -> int | None:
    return end_of_first(text.text, one_encoder(tokenizer, text.raw), max_length)


def beginning(text: Text, max_length: int, tokenizer) -> Text:
    """The beginning of a text, with the same first `max_length` tokens as the whole; the text itself if it is not much longer."""
    if not _covers_more(text.text, max_length, tokenizer):
        end = _end_of_first(text, max_length, tokenizer)
        return text if end is None else _cut(text, end)
    cover = cover_of(tokenizer)
    shortest = cover.most * max_length + 1
    while not _covers_more(text.text[:shortest], max_length, tokenizer):
        shortest *= 2
    cut = _space(text.text, shortest) if cover.cut_at_space else None
    end = cut and _space(text.text, cut + 1)  # a cut may change tokens at its edge, all of which are after the first space
    end = end or _end_of_first(text, max_length, tokenizer)
    return text if end is None else _cut(text, end)


def beginnings(text: Text, longer: Text, max_length: int, tokenizer) -> tuple[Text, Text]:
    """The beginnings of a text and of the same text with a context somewhere before the cut. Both end at the same character, so the supervised
    tokens of the two stay the same.

    The texts themselves if the text is not much longer, or if the other one differs before the cut.
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
    """The position of the first space from `first` on that follows a visible ASCII character; None if there is none near."""
    at = text.find(" ", first, first + _SEARCHED)
    while at > 0 and not ("!" <= text[at - 1] <= "~"):
        at = text.find(" ", at + 1, first + _SEARCHED)
    return at if at > 0 else None


def cover_of(tokenizer) -> Cover | None:
    """The cover of a tokenizer; None if it cannot be read from the tokenizer."""
    if tokenizer not in _KNOWN:
        _KNOWN[tokenizer] = cover_of_state(json.loads(tokenizer.backend_tokenizer.to_str()))
    return _KNOWN[tokenizer]


def cover_of_state(state: dict) -> Cover | None:
    """The cover of a tokenizer that is given as the JSON of its tokenizer.json."""
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
    """The most characters that a normaliser turns into one; None if it may remove any number."""
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
    """Whether every character becomes part of a token, and no token stands for a run of unknown ones."""
    if byte_level:
        from tokenizers.pre_tokenizers import ByteLevel

        return set(ByteLevel.alphabet()) <= model["vocab"].keys()
    if model.get("byte_fallback"):
        return {f"<0x{byte:02X}>" for byte in range(256)} <= model["vocab"].keys()
    return model.get("unk_token") is not None and not model.get("fuse_unk")
