"""Rows of token ids: they are checked against the student's tokenizer and used as they are. Nothing is added, not even an end token."""

import hashlib
import json
import weakref
from collections.abc import Iterator

import numpy as np

from ...config.recipe import Data
from ..reading.problems import ErrorCollector
from ..reading.sources import Rows
from .marked_turns import refuse_unhonoured_marks
from .teacher_context import Tokens
from .tokenizer import vocab_size

_KNOWN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def of_tokens(
    rows: Rows, data: Data, tokenizer, counts: dict[str, int], errors: ErrorCollector
) -> Iterator[tuple[int, tuple[Tokens, ...], str]]:
    """(row number, tokens, "unsupervised") of every example, as `encode` takes them."""
    counts["unnamed"] = sum(not row.get("tokenizer") for row in rows.rows)
    for i, row in enumerate(rows.rows):
        place = rows.places[i]
        try:
            refuse_unhonoured_marks(row, data)
            refuse_foreign(row, tokenizer)
            if row.get("train") is False:
                continue
            examples = split(row, data.train_on_input)
        except Foreign as error:
            errors.add(f"{place}: {error}", alike="made by another tokenizer")
            continue
        except ValueError as error:
            errors.add(f"{place}: {error}")
            continue
        if examples is None:
            errors.add(
                f"{place}: no column says which tokens are targets (loss_mask, labels, completion_mask or assistant_masks); add one, name it in "
                "fields, or set data.train_on_input: true to train on all of them",
                alike="no column says which tokens are targets",
            )
        for example in examples or ():
            yield i, (example,), "unsupervised"


class Foreign(ValueError):
    """Tokens of another tokenizer."""


def refuse_foreign(row: dict, tokenizer) -> None:
    """ValueError if another tokenizer made the row, or it has an id without a token here."""
    known, own = _known(tokenizer)
    if (named := row.get("tokenizer")) and named != own:
        raise Foreign(
            f"its ids were made by the tokenizer {named[:40]!r}, and the student's is {own!r} (see docs/data.md); make the rows again, or set "
            "ignore: [tokenizer] if the ids are the same"
        )
    ids = row["input_ids"]
    wrong = np.flatnonzero(ids >= len(known))
    wrong = wrong if len(wrong) else np.flatnonzero(~known[ids])
    if len(wrong):
        raise ValueError(
            f"input_ids[{wrong[0]}] is {ids[wrong[0]]}, and the student's tokenizer has no such token (its ids are below {len(known)}); the rows "
            "are another tokenizer's"
        )


def split(row: dict, whole: bool) -> list[Tokens] | None:
    """The examples of a row. None if the row does not say what is supervised and not all of it is (`whole`)."""
    ids, loss_mask = row["input_ids"], row["loss_mask"]
    if loss_mask is None and not whole:
        return None
    out = []
    for stop, length in zip(np.cumsum(row["lengths"]), row["lengths"], strict=True):
        part = slice(stop - length, stop)
        own = np.ones(length, bool) if loss_mask is None or (whole and loss_mask[part].any()) else loss_mask[part].copy()
        own[:1] = False  # nothing predicts the first token
        out.append((ids[part], own))
    return out


def vocabulary_hash(tokenizer) -> str:
    """A hash of the tokens of all ids, as 16 hex digits: equal for tokenizers whose ids mean the same, whatever their templates and named tokens."""
    return _known(tokenizer)[1]


def _known(tokenizer) -> tuple[np.ndarray, str]:
    """The ids that have a token, bool [vocabulary], and `vocabulary_hash`."""
    if tokenizer not in _KNOWN:
        vocab = tokenizer.get_vocab()
        known = np.zeros(vocab_size(tokenizer), bool)
        known[list(vocab.values())] = True
        _KNOWN[tokenizer] = known, hashlib.sha256(json.dumps(sorted(vocab.items())).encode()).hexdigest()[:16]
    return _KNOWN[tokenizer]
