"""Encodes rows of labelled texts, or pairs of texts, as tokens and class numbers; and the names of classes."""

from collections.abc import Sequence

import numpy as np

from ...config.data import Data
from ...errors import UserError
from ..labelled import TextInputs
from ..reading.problems import ErrorCollector
from ..reading.sources import Rows

_BATCH = 1024  # texts that are tokenised at a time


def label_names(rows: Sequence[Rows]) -> tuple[str, ...]:
    """The names of all classes of these rows, sorted as numbers if all are whole numbers, else as text."""
    found = {row["label"] for read in rows for row in read.rows}
    numbers = all(isinstance(label, int) for label in found)
    return tuple(str(label) for label in sorted(found)) if numbers else tuple(sorted({str(label) for label in found}))


def is_default(names: Sequence[str]) -> bool:
    """Whether the names are the defaults of transformers: LABEL_0, LABEL_1, ..."""
    return list(names) == [f"LABEL_{i}" for i in range(len(names))]


def class_numbers(read: Rows, names: tuple[str, ...], setting: str, whose: str) -> np.ndarray:
    """The class number of each row, int64 [rows]. With default names labels may be class numbers. UserError names the rows with other labels.

    whose   the owner of the names, for messages: the student, say
    """
    known = {name: i for i, name in enumerate(names)}
    if is_default(names):
        known |= {str(i): i for i in range(len(names))}
    problems, out = ErrorCollector(), np.zeros(len(read.rows), np.int64)
    for i, (row, place) in enumerate(zip(read.rows, read.places, strict=True)):
        label = str(row["label"])
        if label not in known:
            fix = f"it has {listed(names)}; correct the label, or leave such rows out (where): a new head has the classes of the training rows"
            if is_default(names):
                fix = f"write its names as id2label into {whose}'s config.json"
            problems.add(f"{place}: the label {label!r} is none of {whose}'s classes; {fix}", alike=f"label {label!r}")
        out[i] = known.get(label, 0)
    problems.raise_if_any()
    return out


def listed(names: Sequence[str]) -> str:
    some = ", ".join(map(repr, names[:12]))
    return some if len(names) <= 12 else f"{some} and {len(names) - 12} more"


def text_inputs(
    rows: Sequence[dict], places: Sequence[str], columns: Sequence[str], data: Data, tokenizer, pad: int, setting: str
) -> tuple[TextInputs, np.ndarray, np.ndarray]:
    """(inputs, kept, too_long): the tokens, and the numbers of the rows that are used and of those longer than data.max_length, int64 each.

    The control tokens that the tokenizer puts around a text are included, as in transformers' pipeline. UserError if data.too_long refuses a
    row, or no row is left.

    columns   the names of the text's column and, for pairs, of the second text's
    """
    problems = ErrorCollector()
    ids, kinds, kept, too_long = [], [], [], []
    for start in range(0, len(rows), _BATCH):
        for i, (own, kind) in enumerate(encoded_texts(rows[start : start + _BATCH], columns, tokenizer), start):
            if len(own) > data.max_length:
                too_long.append(i)
                if data.too_long == "refuse":
                    problems.add(f"{places[i]}: {len(own)} tokens, and data.max_length is {data.max_length}; raise it, or shorten the text")
                if data.too_long != "truncate":
                    continue
                ((own, kind),) = encoded_texts([rows[i]], columns, tokenizer, truncation=True, max_length=data.max_length)
            ids.append(own)
            kinds.append(kind)
            kept.append(i)
    problems.raise_if_any()
    if not kept:
        raise UserError(
            f"{setting}: none of its {len(rows)} rows can be used, since all are longer than data.max_length = {data.max_length}; raise it, or check the rows"
        )
    flat = flat_texts(list(zip(ids, kinds, strict=True)))
    return TextInputs(*flat, pad, tokenizer.padding_side == "left"), np.array(kept, np.int64), np.array(too_long, np.int64)


def flat_texts(encoded: Sequence[tuple[list[int], list[int] | None]]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The fields `ids`, `offsets` and `kinds` of `TextInputs`."""
    ids, kinds = zip(*encoded, strict=True)
    of_pairs = None if kinds[0] is None else np.concatenate(kinds).astype(np.int32)
    return np.concatenate(ids).astype(np.int32), np.cumsum([0, *map(len, ids)], dtype=np.int64), of_pairs


def encoded_texts(rows: Sequence[dict], columns: Sequence[str], tokenizer, **how) -> list[tuple[list[int], list[int] | None]]:
    """(ids, token_type_ids) of each row, the latter None if the tokenizer has none. Rows with and without a second text are encoded apart."""
    out: list = [None] * len(rows)
    for paired in (False, True):
        mine = [i for i, row in enumerate(rows) if (row.get(columns[-1]) is not None and len(columns) > 1) == paired]
        if mine:
            texts = [[rows[i][column] for i in mine] for column in columns[: 1 + paired]]
            made = tokenizer(*texts, add_special_tokens=True, verbose=False, **how)
            kinds = made.get("token_type_ids") or [None] * len(mine)
            for i, ids, kind in zip(mine, made["input_ids"], kinds, strict=True):
                out[i] = ids, kind
    return out
