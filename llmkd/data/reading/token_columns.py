"""Rows of token ids: which tokens are targets, which are padding, and where the examples of a packed row begin.

The columns are those of transformers, TRL, torchtune and axolotl. Labels stand where the tokens are: llmkd itself moves them by one.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from .problems import ErrorCollector
from .values import kind, parsed

IGNORED = -100  # the label of tokens that are not targets
_MASKS = ("loss_mask", "completion_mask", "assistant_masks")
_BEGINNINGS = ("position_ids", "seq_lengths")
_COUNTED = ("input_ids", "labels", *_BEGINNINGS)  # the other columns hold yes or no

#: In rows of `llmkd roll`: the column of the checksum, and the columns that it covers. Others are for human readers.
ROW_CHECKSUM, _SEALED = "row_checksum", ("input_ids", "loss_mask", "tokenizer", "finished", "key")

#: The end of error messages: how to mark a row's targets.
HOW_MASKED = "set fields: {{loss_mask: {0}}} if it is 1 at targets and 0 elsewhere"


def read_tokens(row: dict, theirs: dict[str, str], place: str, problems: ErrorCollector) -> dict[str, Any]:
    """The row's tokens without padding: input_ids int32 [tokens], loss_mask bool [tokens] or None where no column says, and lengths, the
    tokens of each of its examples.

    `theirs`: the file's own names of the columns. What is wrong is added to `problems`; the row is then without targets.
    """
    try:
        refuse_changed(row)
        return _tokens(row, {c: theirs.get(c, c) for c in ("input_ids", *_MASKS, "labels", "attention_mask", *_BEGINNINGS)})
    except ValueError as error:
        problems.add(f"{place}: {error}")
        return {"input_ids": np.zeros(0, np.int32), "loss_mask": np.zeros(0, bool), "lengths": np.zeros(1, np.int64)}


def row_checksum(row: dict[str, Any]) -> str:
    """The checksum over the columns that matter of an answer, 16 hex digits."""
    return hashlib.blake2b(json.dumps([row[column] for column in _SEALED]).encode(), digest_size=8).hexdigest()


def refuse_changed(row: dict[str, Any]) -> None:
    """ValueError for a row that was changed after `llmkd roll` wrote it. Rows without a checksum, or without a column, and rows of a .csv pass."""
    known = row.keys() >= {ROW_CHECKSUM, *_SEALED} and isinstance(row["input_ids"], list)
    if known and row[ROW_CHECKSUM] != row_checksum(row):
        raise ValueError(
            f"the row is not what llmkd roll wrote (another {ROW_CHECKSUM}); remove it, and roll writes it again, or after a change of your own list "
            f"{ROW_CHECKSUM} under ignore"
        )


def _tokens(row: dict, names: dict[str, str]) -> dict[str, Any]:
    """See `read_tokens`. `names`: the columns' names in the file."""
    given = [column for column in names if column == "input_ids" or row.get(column) is not None]
    arrays = {column: _numbers(row.get(column), names[column], column not in _COUNTED) for column in given}
    ids = arrays.pop("input_ids")
    for column in arrays.keys() - {"seq_lengths"}:
        if len(arrays[column]) != len(ids):
            raise ValueError(f"{names[column]} has {len(arrays[column])} entries and {names['input_ids']} {len(ids)}, expected as many")
    wrong = np.flatnonzero((ids < 0) | (ids > np.iinfo(np.int32).max))
    if len(wrong):
        raise ValueError(f"{names['input_ids']}[{wrong[0]}] is {ids[wrong[0]]}, expected a token id, 0 or more")
    loss_mask = _targets(ids, arrays, names)
    first, stop, starts = _rows_of_attention(arrays.get("attention_mask"), len(ids), names["attention_mask"])
    if loss_mask is not None:
        padding = np.ones(len(ids), bool)
        padding[first:stop] = False
        if len(wrong := np.flatnonzero(loss_mask & padding)):
            raise ValueError(f"token {wrong[0]} is a target, and {names['attention_mask']} says that it is padding; make it no target")
        loss_mask = loss_mask[first:stop]
    found = {names["attention_mask"]: starts} if starts else {}
    if "position_ids" in arrays:
        found[names["position_ids"]] = _restarts(arrays["position_ids"][first:stop], names["position_ids"], first)
    if "seq_lengths" in arrays:
        found[names["seq_lengths"]] = _sums(arrays["seq_lengths"], stop - first, names["seq_lengths"])
    (one, begins), *others = found.items() or [("", [0])]
    if other := next((name for name, also in others if also != begins), None):
        raise ValueError(f"{one} and {other} begin examples at other places; fix one, or list it under ignore")
    return {"input_ids": ids[first:stop].astype(np.int32), "loss_mask": loss_mask, "lengths": np.diff([*begins, stop - first])}


def _numbers(value: Any, name: str, flags: bool) -> np.ndarray:
    """A list of whole numbers, or such a list as JSON text; ValueError for anything else. `flags`: true and false, or 1.0 and 0.0, become 1 and 0."""
    value = parsed(value)
    if not isinstance(value, list):
        raise ValueError(f"{name} is {kind(value)}, expected a list of whole numbers")
    for i, one in _unlike(value, flags):
        found = repr(one) if isinstance(one, float) else kind(one)
        fix = "; write each list of the batch as a row" if isinstance(one, list) else ""
        raise ValueError(f"{name}[{i}] is {found}, expected a whole number{fix}")
    try:
        return np.array(value, np.int64)
    except OverflowError:
        raise ValueError(f"{name} holds a number that is no token id ({max(value, key=abs)})") from None


def _unlike(value: list, flags: bool) -> Iterator[tuple[int, Any]]:
    return ((i, one) for i, one in enumerate(value) if type(one) is not int and not (flags and one in (False, True)))


def _targets(ids: np.ndarray, arrays: dict[str, np.ndarray], names: dict[str, str]) -> np.ndarray | None:
    """The mask of the targets, which must be the same in all columns that give one; None if none does."""
    found: dict[str, np.ndarray] = {}
    for column in _MASKS:
        if (mask := arrays.get(column)) is not None:
            wrong = np.flatnonzero((mask != 0) & (mask != 1))
            if len(wrong):
                raise ValueError(f"{names[column]}[{wrong[0]}] is {mask[wrong[0]]}, expected 1 for a target and 0 for any other token")
            found[names[column]] = mask == 1
    if (labels := arrays.get("labels")) is not None:
        found[names["labels"]] = _labelled(ids, labels, names["labels"], names["input_ids"])
    (one, mask), *others = found.items() or [("", None)]
    for other, also in others:
        if len(wrong := np.flatnonzero(mask != also)):
            raise ValueError(f"{one} and {other} disagree about token {wrong[0]}; keep one, and list the other under ignore")
    return mask


def _labelled(ids: np.ndarray, labels: np.ndarray, name: str, name_of_ids: str) -> np.ndarray:
    """The mask of the tokens with a label, which must be the token itself."""
    mask = labels != IGNORED
    wrong = np.flatnonzero(mask & (labels != ids))
    if not len(wrong):
        return mask
    at = int(wrong[0])
    if mask[:-1].any() and (labels[:-1] == ids[1:])[mask[:-1]].all():
        raise ValueError(
            f"{name} are moved by one ({name}[{at}] is {name_of_ids}[{at + 1}]); write each where its token is, since llmkd moves them itself"
        )
    raise ValueError(
        f"{name}[{at}] is {labels[at]} and {name_of_ids}[{at}] is {ids[at]}; a label is the token itself, or {IGNORED} for no target"
    )


def _rows_of_attention(mask: np.ndarray | None, count: int, name: str) -> tuple[int, int, list[int]]:
    """From where to where tokens are no padding, and where its examples begin; no beginnings where there is one example only.

    The mask has 0 for padding at its ends, and 1, or 1, 2, 3 ... for the examples of a packed row.
    """
    if mask is None or not len(mask):
        return 0, count, []
    real = np.flatnonzero(mask)
    if not len(real):
        return 0, 0, []
    first, stop = int(real[0]), int(real[-1]) + 1
    steps = np.diff(mask[first:stop])
    wrong = np.flatnonzero((steps != 0) & (steps != 1) | (mask[first:stop][1:] == 0))
    if mask[first] != 1 or len(wrong):
        at = first if mask[first] != 1 else first + 1 + int(wrong[0])
        raise ValueError(
            f"{name}[{at}] is {mask[at]}, expected 1, or 1, 2, 3 ... for the examples of a packed row, and 0 only for padding at its ends"
        )
    starts = [0, *(np.flatnonzero(steps) + 1).tolist()]
    return first, stop, starts if len(starts) > 1 else []


def _restarts(positions: np.ndarray, name: str, first: int) -> list[int]:
    """The places where positions start at 0 again."""
    before = np.concatenate([[-1], positions[:-1]])
    wrong = np.flatnonzero((positions != before + 1) & (positions != 0))
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(f"{name}[{first + at}] is {positions[at]}, expected {before[at] + 1}, or 0 where the next example begins")
    return np.flatnonzero(positions == 0).tolist() or [0]


def _sums(lengths: np.ndarray, count: int, name: str) -> list[int]:
    if (lengths < 1).any() or lengths.sum() != count:
        raise ValueError(f"{name} add up to {lengths.sum()}, expected {count}, the tokens of the row, from lengths of 1 or more")
    return [0, *np.cumsum(lengths)[:-1].tolist()]
