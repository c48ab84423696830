"""From rows to token ids and which of them are supervised. No torch here.

A whole text is encoded at once and its supervised part found by character offsets, so that a token is the same token
that the model would meet in that text; a token across the border of prompt and answer counts as answer.
"""

import hashlib
import itertools
from dataclasses import dataclass, field

import numpy as np

from ..recipe import Data, Source
from .context import Tokens, aligned, common, for_teacher
from .control import Span, Text, controls, piecewise, refuse_unmarked
from .formats import FORMATS
from .rows import Problems
from .sources import Rows

_BATCH = 512
EVERYONE = -1  # `Encoded.taught_by` of what all teachers teach together


@dataclass
class Encoded:
    """Examples as flat arrays, and what became of the rows."""

    ids: np.ndarray  # int32, all examples one after another
    supervised: np.ndarray  # bool, alike
    offsets: np.ndarray  # int64, [examples + 1]
    row: np.ndarray  # int64, [examples]: the row each example came from
    counts: dict[str, int] = field(default_factory=dict)  # see `encode`
    source: np.ndarray | None = None  # int64, [examples]: the source it came from, where there are several
    taught_by: np.ndarray | None = None  # int64, [examples]: the number of its teacher, or EVERYONE
    for_teacher: "Encoded | None" = None  # the same examples and targets as the teacher reads them, where that is something else

    def __post_init__(self):
        if self.source is None:
            self.source = np.zeros(len(self.row), np.int64)
        if self.taught_by is None:
            self.taught_by = np.full(len(self.row), EVERYONE, np.int64)

    def __len__(self) -> int:
        return len(self.row)

    def example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[part], self.supervised[part]

    def identity(self, i: int) -> str:
        """16 hex digits that tell an example, its tokens and what is supervised of them, from all others.

        What the teacher reads counts where it is something else, so an example is the same beside whatever others it stands.
        """
        said, read = (b"".join(x.tobytes() for x in of.example(i)) for of in (self, self.for_teacher or self))
        return _digest(said if read == said else said + b"|" + read)

    def seen(self, i: int) -> str:
        """The same of what the student sees alone: equal with and without a context for the teacher."""
        return _digest(b"".join(x.tobytes() for x in self.example(i)))

    def subset(self, keep: np.ndarray) -> "Encoded":
        """The examples where the boolean `keep` is true."""
        return self.take(np.flatnonzero(keep))

    def take(self, chosen: np.ndarray) -> "Encoded":
        """Those examples, by their numbers, in that order."""
        lengths = self.lengths[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.repeat(self.offsets[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        theirs = None if self.for_teacher is None else self.for_teacher.take(chosen)
        of_each = self.row[chosen], {}, self.source[chosen], self.taught_by[chosen]
        return Encoded(self.ids[tokens], self.supervised[tokens], offsets, *of_each, theirs)

    @property
    def targets(self) -> np.ndarray:
        """How many targets each example has."""
        return np.add.reduceat(self.supervised.astype(np.int64), self.offsets[:-1]) if len(self) else np.zeros(0, np.int64)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def widths(self) -> np.ndarray:
        """The longer of what student and teacher read of each."""
        return self.lengths if self.for_teacher is None else np.maximum(self.lengths, self.for_teacher.lengths)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def merge(parts: list[Encoded]) -> Encoded:
    """Several sources' examples as one, their rows numbered through."""
    if len(parts) == 1:
        return parts[0]
    before = np.cumsum([0, *(part.counts["rows"] for part in parts)])
    counts = {key: sum(part.counts[key] for part in parts) for key in parts[0].counts}
    return joined(parts, before[:-1].tolist(), counts, np.repeat(np.arange(len(parts)), [len(part) for part in parts]))


def joined(parts: list[Encoded], before: list[int], counts: dict[str, int], source: np.ndarray | None = None) -> Encoded:
    """One after another; the rows of each are numbered from `before` on."""
    of_each = (
        np.concatenate([part.row + start for part, start in zip(parts, before, strict=True)]),
        counts,
        source,
        np.concatenate([part.taught_by for part in parts]),
    )
    theirs = None
    if any(part.for_teacher is not None for part in parts):
        theirs = Encoded(*_one_after_another([part.for_teacher or part for part in parts]), *of_each)
    return Encoded(*_one_after_another(parts), *of_each, theirs)


def _one_after_another(parts: list[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    return (
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.supervised for part in parts]),
        np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts, strict=False))]).astype(np.int64),
    )


def encode(rows: Rows, source: Source, data: Data, tokenizer, progress=iter) -> Encoded:
    """Encode rows; drop, cut, split or refuse what is too long; drop and count what has nothing supervised.

    `counts`: rows, examples, tokens and targets; too_long and unsupervised examples; as_characters, texts that hold the
    characters of a control token; endless, texts that a chat template ends without one. What is too long or has nothing
    supervised for the student or for its teacher is so for both.
    """
    problems, texts, theirs, origin, control = Problems(), [], [], [], controls(tokenizer)
    for i, row in enumerate(rows.rows):
        try:
            new = FORMATS[source.format](row, source, tokenizer)
            refuse_unmarked([text.text for text in new if text.bare], control)
            read = for_teacher(row, new, source, data, tokenizer)
        except ValueError as error:
            problems.add(f"{rows.places[i]}: {error}")
            continue
        except RecursionError:
            problems.add(f"{rows.places[i]}: nested too deeply; give it fewer levels")
            continue
        texts += new
        theirs += read or [None] * len(new)
        origin += [i] * len(new)
    problems.raise_if_any()
    counts = {"rows": len(rows.rows), "unsupervised": 0, "too_long": 0}
    counts |= {"as_characters": sum(bool(t.pieces) for t in texts), "endless": sum(not t.ends for t in texts)}
    kept: list[tuple[Tokens, ...]] = []  # each example as the student reads it, and as its teacher does if that has a context
    kept_rows = []
    for first in progress(range(0, len(texts), _BATCH)):
        part = slice(first, first + _BATCH)
        read = iter(_tokens([text for text in theirs[part] if text], data, tokenizer))
        for i, own in enumerate(_tokens(texts[part], data, tokenizer), first):
            place = rows.places[origin[i]]
            try:
                views = (own, aligned(own, next(read), texts[i].bare, tokenizer)) if theirs[i] else (own,)
            except ValueError as error:
                problems.add(f"{place}: {error}")
                continue
            too_long = _too_long(views, data)
            if too_long:
                counts["too_long"] += 1
                if data.too_long == "refuse":
                    problems.add(f"{place}: {too_long}, more than data.max_length ({data.max_length}); raise it, or set data.too_long")
            for piece in zip(*(_shorten(*view, data) for view in views), strict=True) if too_long else [views]:
                common(piece)
                if piece[0][1].any():
                    kept.append(piece)
                    kept_rows.append(origin[i])
                else:
                    counts["unsupervised"] += 1
    problems.raise_if_any()
    of_rows = np.array(kept_rows, np.int64)
    encoded = Encoded(*_flat([views[0] for views in kept]), of_rows, counts)
    if any(len(views) > 1 for views in kept):
        encoded.for_teacher = Encoded(*_flat([views[-1] for views in kept]), of_rows)
    counts |= {"examples": len(kept), "tokens": len(encoded.ids), "targets": int(encoded.supervised.sum())}
    return encoded


def _flat(examples: list[Tokens]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, marks and offsets of the examples one after another."""
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in examples], dtype=np.int64)]).astype(np.int64)
    if not examples:
        return np.zeros(0, np.int32), np.zeros(0, bool), offsets
    return np.concatenate([ids for ids, _ in examples]), np.concatenate([marks for _, marks in examples]), offsets


def _tokens(texts: list[Text], data: Data, tokenizer) -> list[Tokens]:
    """Each text's ids and marks. The tokenizer's Rust code works on a whole batch at once, on all cores."""
    made: list = [piecewise(text, tokenizer) if text.pieces else None for text in texts]
    for bare in (True, False):
        group = [i for i, text in enumerate(texts) if text.bare == bare and made[i] is None]
        if not group:
            continue
        encoded = tokenizer(
            [texts[i].text for i in group],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=bare,
            verbose=False,
        )
        for i, ids, places in zip(group, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            made[i] = ids, places
    start, end = _edges(tokenizer)
    wide = controls(tokenizer).wide
    return [_marked(text, *_narrowed(text, *one, wide), start, end, data.train_on_input) for text, one in zip(texts, made, strict=True)]


def _narrowed(text: Text, ids: list[int], places: list[Span], wide: dict[int, str]) -> tuple[list[int], list[Span]]:
    """A control token that takes the white space beside it in stands where its own characters do."""
    if wide:
        places = list(places)
        for n, i in enumerate(ids):
            at = text.text.find(wide[i], *places[n]) if i in wide else -1
            if at >= 0:
                places[n] = at, at + len(wide[i])
    return ids, places


def _marked(text: Text, ids: list[int], places: list, start: list[int], end: list[int], all_of_it: bool) -> tuple[np.ndarray, np.ndarray]:
    first, last = np.fromiter(itertools.chain.from_iterable(places), np.int64, 2 * len(ids)).reshape(-1, 2).T
    marks = np.zeros(len(ids), bool)
    for begin, stop in text.spans:
        marks |= (first < stop) & (last > begin)
    if text.bare:
        ids = [*start, *ids, *end]
        marks = np.concatenate([np.zeros(len(start), bool), marks, np.full(len(end), bool(text.spans))])
    if all_of_it and text.spans:
        marks[:] = True
    marks[:1] = False  # nothing predicts the first token
    return np.array(ids, np.int32), marks


def _too_long(views: tuple[Tokens, ...], data: Data) -> str:
    """How many tokens too long an example has, and for whom; empty where it is short enough for student and teacher."""
    for (ids, _), reader in zip(views, ("student", "teacher"), strict=False):
        if len(ids) > data.max_length:
            return f"{len(ids)} tokens" + (f" for the {reader}" if len(views) > 1 else "")
    return ""


def _shorten(ids, marks, data: Data) -> list:
    most = data.max_length
    if data.too_long == "truncate":
        return [(ids[:most], marks[:most])]
    if data.too_long == "split":  # pieces share one token, so that every token is predicted exactly once
        pieces = [(ids[i : i + most], marks[i : i + most].copy()) for i in range(0, len(ids) - 1, most - 1)]
        for _, piece_marks in pieces:
            piece_marks[0] = False
        return pieces
    return []


def _edges(tokenizer) -> tuple[list[int], list[int]]:
    """The start token, where the tokenizer itself puts one, and the end token."""
    bos = tokenizer.bos_token_id
    starts = bos is not None and tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos]
    return ([bos] if starts else []), [tokenizer.eos_token_id]
