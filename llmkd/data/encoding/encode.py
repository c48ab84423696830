"""Encodes rows of text as token ids and a mask of the supervised tokens. No torch here.

A text is encoded as a whole and its supervised part is found by character offsets, so the tokens are those that the model
sees in that text. A token across the border of prompt and answer belongs to the answer.
"""

import dataclasses
import itertools
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...config import formats as config
from ...config.recipe import Data, Source
from ...console import warn
from ...errors import UserError
from ..examples import Collator, TokenExamples
from ..reading.problems import ErrorCollector
from ..reading.sources import Rows
from .control_tokens import Span, Text, controls, one_encoder, piecewise, refuse_unmarked
from .formats import FORMATS
from .long_texts import beginning, beginnings, bound_of, is_longer
from .marked_turns import has_marks, refuse_unhonoured_marks
from .rendered_text import listed_turns, turn_token, turn_words
from .stretches import is_long
from .stretches import tokens as tokens_in_stretches
from .teacher_context import Tokens, align, keep_common, teacher_texts
from .token_rows import of_tokens

_BATCH, _MOST_CHARACTERS = 512, 1 << 20
_MANY = 32  # examples of one row
_SLOW = 4.0  # seconds for one row


#: An example as the student reads it and, if the teacher reads a context, as the teacher does.
Views = tuple[Tokens, ...]


@dataclass(frozen=True)
class Rendered:
    """One of the texts of a row, before tokenisation."""

    row: int
    student: Text
    teacher: Text | None  # with the context, if the teacher reads one
    of: int = 1  # how many texts the row has
    last: bool = True


def encode(rows: Rows, source: Source, data: Data, tokenizer, progress=iter) -> TokenExamples:
    """Encode rows; drop, cut, split or refuse examples that are too long; drop those with nothing supervised. UserError names every bad row.

    An example that is too long, or has nothing supervised, for the student or the teacher is treated so for both.

    Keys of the result's `counts`:
        rows, examples, tokens, targets
        too_long         examples that are longer than data.max_length
        unsupervised     examples with nothing supervised
        marked           the same because of a mark in the row
        as_characters    texts that contain the characters of a control token
        endless          texts that a chat template ends without a control token
        rendered TOKEN   rows whose text contains a token of a chat template
        turns WORDS      rows of format text whose text is a conversation
        listed COLUMN    rows with a list of messages as text
        unshown KEY      rows with something that the chat template does not show
        apart            rows that the template turns into several examples; apart_examples and apart_tokens count these, and apart_last the
                         tokens of the last example of each row
        unnamed          rows of format tokens that do not say which tokenizer made them
    """
    errors = ErrorCollector()
    counts = {"rows": len(rows.rows), "unsupervised": 0, "marked": sum(row.get("train") is False for row in rows.rows), "too_long": 0}
    if config.FORMATS[source.format].is_text:
        found = _of_texts(rows, source, data, tokenizer, counts, errors, progress)
    else:
        found = of_tokens(rows, data, tokenizer, counts, errors)
    kept: list[Views] = []
    kept_rows = []
    for row, views, reason in found:
        place = rows.places[row]
        too_long = _too_long(views, data)
        if too_long:
            counts["too_long"] += 1
            if data.too_long == "refuse":
                errors.add(_refused(place, too_long, data))
        for piece in zip(*(_shorten(*view, data) for view in views), strict=True) if too_long else [views]:
            keep_common(piece)
            if piece[0][1].any():
                kept.append(piece)
                kept_rows.append(row)
            else:
                counts[reason] += 1
    errors.raise_if_any()
    of_rows = np.array(kept_rows, np.int64)
    examples = TokenExamples(*_flat([views[0] for views in kept]), of_rows, counts, collator=collator_of(data, tokenizer))
    if any(len(views) > 1 for views in kept):
        examples.teacher_view = TokenExamples(*_flat([views[-1] for views in kept]), of_rows)
    counts |= {"examples": len(kept), "tokens": len(examples.ids), "targets": int(examples.loss_mask.sum())}
    return examples


def collator_of(data: Data, tokenizer) -> Collator:
    return Collator(tokenizer.eos_token_id, data.packing, data.share_prefixes)


def _of_texts(
    rows: Rows, source: Source, data: Data, tokenizer, counts: dict[str, int], errors: ErrorCollector, progress
) -> Iterator[tuple[int, Views, str]]:
    """(row number, tokens, reason) of every example; "unsupervised" or "marked" is the reason to count if nothing of it is supervised."""
    texts = _render(rows, source, data, tokenizer, errors)
    errors.raise_if_any()
    counts |= _oddities(rows, source.format, texts, controls(tokenizer).any)
    texts = _shortened(texts, rows, data, tokenizer, counts, errors)
    for part in progress(batches_of(texts)):
        theirs = iter(tokens_of([text.teacher for text in part if text.teacher], data, tokenizer))
        for text, own in zip(part, tokens_of([text.student for text in part], data, tokenizer), strict=True):
            if text.of > 1:
                counts["apart_tokens"] += len(own[0])
                counts["apart_last"] += len(own[0]) if text.last else 0
            try:
                views = (own, align(own, next(theirs), text.student.raw, tokenizer)) if text.teacher else (own,)
            except ValueError as error:
                errors.add(f"{rows.places[text.row]}: {error}")
                continue
            yield text.row, views, "marked" if has_marks(rows.rows[text.row]) and not text.student.spans else "unsupervised"


def _render(rows: Rows, source: Source, data: Data, tokenizer, errors: ErrorCollector) -> list[Rendered]:
    """The texts of all rows, for student and teacher. Bad rows are added to `errors`; rows marked as not trained on give no text."""
    texts, control, said, bound = [], controls(tokenizer), set(), bound_of(data, tokenizer)

    def say(what: str) -> None:  # now, since rendering all rows may take hours
        kind = what.partition(" ")[0]
        if kind not in said:
            warn(f"note: {rows.places[i]}: the chat template {what}")
        said.add(kind)

    for i, row in enumerate(rows.rows):
        started = time.monotonic()
        try:
            refuse_unhonoured_marks(row, data)
            if row.get("train") is False:
                continue
            own = FORMATS[source.format].render(row, source, tokenizer, bound=bound)
            refuse_unmarked([text.text for text in own if text.raw], control)
            theirs = teacher_texts(row, own, source, data, tokenizer) or [None] * len(own)
        except ValueError as error:
            errors.add(f"{rows.places[i]}: {error}")
            continue
        except UserError as error:  # the template's process was ended, and would be for every row
            raise UserError(f"{rows.places[i]}: {error}") from None
        except RecursionError:
            errors.add(f"{rows.places[i]}: nested too deeply; give it fewer levels")
            continue
        if len(own) > _MANY:
            say(f"makes {len(own)} examples of it, one for each answer; answers: last makes one")
        if (seconds := time.monotonic() - started) > _SLOW and not own[0].raw:
            say(f"takes {seconds:.1f} s for this row")
        texts += [Rendered(i, *pair, len(own), n == len(own)) for n, pair in enumerate(zip(own, theirs, strict=True), 1)]
    return texts


def _oddities(rows: Rows, format: str, texts: list[Rendered], control: re.Pattern) -> dict[str, int]:
    """Those counts of `encode` that may point to a mistake in the data."""
    found = Counter(f"rendered {token}" for row in rows.rows if (token := turn_token(row, control)))
    columns = config.FORMATS[format].row
    found.update(f"listed {name}" for row in rows.rows if (name := listed_turns(row, columns)))
    if format == "text":
        found.update(f"turns {words}" for row in rows.rows if (words := turn_words(row["text"])))
    found.update(f"unshown {key}" for text in texts if text.last for key in text.student.unshown)
    apart = [text for text in texts if text.of > 1]
    if apart:
        found.update({"apart": sum(text.last for text in apart), "apart_examples": len(apart), "apart_tokens": 0, "apart_last": 0})
    as_characters = sum(bool(t.student.pieces or (t.student.raw and control.search(t.student.text))) for t in texts)
    return {"as_characters": as_characters, "endless": sum(not t.student.ends_with_control for t in texts), **found}


def _shortened(texts: list[Rendered], rows: Rows, data: Data, tokenizer, counts: dict[str, int], errors: ErrorCollector) -> list[Rendered]:
    """Drops texts that are known to be too long, or cuts them to their beginnings, so that they are not tokenised whole."""
    kept = []
    for text in texts:
        both = [one for one in (text.student, text.teacher) if one]
        longest, left_out = max(both, key=lambda one: len(one.text)), max(one.left_out for one in both)
        if left_out and data.too_long == "truncate":  # its answer is behind the cut
            counts["too_long"] += 1
            counts["unsupervised"] += 1
        elif data.too_long == "truncate":
            if text.teacher:
                own, theirs = beginnings(text.student, text.teacher, data.max_length, tokenizer)
            else:
                own, theirs = beginning(text.student, data.max_length, tokenizer), None
            kept.append(dataclasses.replace(text, student=own, teacher=theirs))
        elif left_out or (data.too_long in ("drop", "refuse") and is_longer(longest, data.max_length, tokenizer)):
            counts["too_long"] += 1
            if data.too_long == "refuse":
                errors.add(_refused(rows.places[text.row], f"{left_out or len(longest.text):,} characters", data, " tokens"))
        else:
            kept.append(text)
    return kept


def _refused(place: str, length: str, data: Data, unit: str = "") -> str:
    return f"{place}: {length}, more than data.max_length ({data.max_length}{unit}); raise it, or set data.too_long"


def batches_of(texts: list[Rendered]) -> list[list[Rendered]]:
    """The texts in batches for the tokenizer; they are bounded because its output takes about a hundred times the memory of its input."""
    batches, size = [], _MOST_CHARACTERS
    for text in texts:
        if size >= _MOST_CHARACTERS or len(batches[-1]) == _BATCH:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += sum(len(one.text) for one in (text.student, text.teacher) if one)
    return batches


def _flat(examples: list[Tokens]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The examples concatenated: ids [tokens], loss mask [tokens] and offsets [examples + 1]."""
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in examples], dtype=np.int64)]).astype(np.int64)
    if not examples:
        return np.zeros(0, np.int32), np.zeros(0, bool), offsets
    return np.concatenate([ids for ids, _ in examples]), np.concatenate([loss_mask for _, loss_mask in examples]), offsets


def tokens_of(texts: list[Text], data: Data, tokenizer) -> list[Tokens]:
    """Ids and loss mask of each text. The texts go through the tokenizer in one call, which uses all cores; long ones one by one."""
    made: list = [None] * len(texts)
    for i, text in enumerate(texts):
        if text.pieces:
            made[i] = piecewise(text, tokenizer)
        elif is_long(text.text):
            made[i] = tokens_in_stretches(text.text, one_encoder(tokenizer, text.raw))
    for raw in (True, False):
        group = [i for i, text in enumerate(texts) if text.raw == raw and made[i] is None]
        if not group:
            continue
        made_batch = tokenizer(
            [texts[i].text for i in group],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            split_special_tokens=raw,
            verbose=False,
        )
        for i, ids, places in zip(group, made_batch["input_ids"], made_batch["offset_mapping"], strict=True):
            made[i] = ids, places
    start, end = edges(tokenizer)
    strips_spaces = controls(tokenizer).strips_spaces
    return [
        with_loss_mask(text, *_narrowed(text, *one, strips_spaces), start, end, data.train_on_input)
        for text, one in zip(texts, made, strict=True)
    ]


def _narrowed(text: Text, ids: list[int], places: list[Span], strips_spaces: dict[int, str]) -> tuple[list[int], list[Span]]:
    """The ids, and offsets without the white space that some control tokens include around their own characters."""
    if strips_spaces:
        places = list(places)
        for n, i in enumerate(ids):
            at = text.text.find(strips_spaces[i], *places[n]) if i in strips_spaces else -1
            if at >= 0:
                places[n] = at, at + len(strips_spaces[i])
    return ids, places


def with_loss_mask(
    text: Text, ids: Sequence[int], places: Sequence, start: list[int], end: list[int], whole: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The ids, int32 [tokens], and the mask of those that overlap a supervised span, bool [tokens].

    places       the first and one past the last character of every id
    start, end   tokens that are added around a raw text
    whole        supervise every token of a text that has a supervised span
    """
    flat = places if isinstance(places, np.ndarray) else np.fromiter(itertools.chain.from_iterable(places), np.int64, 2 * len(ids))
    first, last = flat.reshape(-1, 2).T
    loss_mask = np.zeros(len(ids), bool)
    for begin, stop in text.spans:
        loss_mask |= (first < stop) & (last > begin)
    if text.raw:
        ids = np.concatenate([start, ids, end])
        loss_mask = np.concatenate([np.zeros(len(start), bool), loss_mask, np.full(len(end), bool(text.spans))])
    if whole and text.spans:
        loss_mask[:] = True
    loss_mask[:1] = False  # nothing predicts the first token
    return np.array(ids, np.int32), loss_mask


def _too_long(views: tuple[Tokens, ...], data: Data) -> str:
    """A description of the length if it exceeds data.max_length for student or teacher, else an empty text."""
    for (ids, _), reader in zip(views, ("student", "teacher"), strict=False):
        if len(ids) > data.max_length:
            return f"{len(ids)} tokens" + (f" for the {reader}" if len(views) > 1 else "")
    return ""


def _shorten(ids: np.ndarray, loss_mask: np.ndarray, data: Data) -> list[Tokens]:
    """The pieces that data.too_long leaves of an example that is too long: its beginning, all pieces, or none."""
    most = data.max_length
    if data.too_long == "truncate":
        return [(ids[:most], loss_mask[:most])]
    if data.too_long == "split":  # pieces share one token, so that every token is predicted exactly once
        pieces = [(ids[i : i + most], loss_mask[i : i + most].copy()) for i in range(0, len(ids) - 1, most - 1)]
        for _, piece_mask in pieces:
            piece_mask[0] = False
        return pieces
    return []


def edges(tokenizer) -> tuple[list[int], list[int]]:
    """The start token, if the tokenizer itself adds one, and the end token."""
    bos = tokenizer.bos_token_id
    starts = bos is not None and tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos]
    return ([bos] if starts else []), [tokenizer.eos_token_id]
