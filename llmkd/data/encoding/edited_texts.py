"""Texts of classifiers and encoders that are edited anew in every epoch. They contain no targets."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..examples import Draw, digest
from ..labelled import TextInputs
from ..prompt_edits import edited
from .labelled_text import encoded_texts, flat_texts

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Edits:
    """The settings by which texts are edited and encoded again.

    asked        [{name: probability}, ...], see `prompt_edits.edited`
    columns      the names of the text's column and, for pairs, of the second text's
    tokenizer    a copy, since other threads use theirs meanwhile
    max_length   tokens to which an edited text is cut
    """

    asked: Sequence[Mapping[str, float]]
    columns: Sequence[str]
    tokenizer: Any
    max_length: int

    def texts(self, row: dict, draw: Draw) -> dict[str, str]:
        """The texts of a row as edited for an epoch. They depend on (seed, epoch, the texts) only, so they are the same for all tokenizers."""
        given = {column: row[column] for column in self.columns if row.get(column) is not None}
        key = digest("|".join(given.values()).encode())
        return {column: edited(text, self.asked, draw.seed, draw.epoch, f"{key} {n}") for n, (column, text) in enumerate(given.items(), 1)}


@dataclass
class EditedTexts(TextInputs):
    """Texts that are edited in batches with a draw. Hashes, lengths and batches without a draw belong to the texts as they are.

    rows   the row of each text
    """

    rows: Sequence[dict] = ()
    edits: Edits | None = None

    def take(self, chosen: np.ndarray) -> "EditedTexts":
        return replace(super().take(chosen), rows=[self.rows[i] for i in chosen])

    @staticmethod
    def joined(parts: "Sequence[EditedTexts]") -> "EditedTexts":
        return replace(TextInputs.joined(parts), rows=[row for part in parts for row in part.rows])

    def batch(self, indices: Sequence[int], draw: Draw | None) -> "dict[str, Tensor]":
        if draw is None:
            return super().batch(indices, draw)
        edits, rows = self.edits, [self.edits.texts(self.rows[i], draw) for i in indices]
        found = encoded_texts(rows, edits.columns, edits.tokenizer, truncation=True, max_length=edits.max_length)
        return TextInputs(*flat_texts(found), self.pad, self.left).batch(range(len(rows)), None)


def with_edits(
    texts: TextInputs, rows: Sequence[dict], asked: Sequence[Mapping[str, float]], columns: Sequence[str], max_length: int, tokenizer
) -> EditedTexts:
    """The texts of rows, edited in training batches."""
    plain = {field.name: getattr(texts, field.name) for field in fields(TextInputs)}
    return EditedTexts(**plain, rows=rows, edits=Edits(asked, columns, copy.deepcopy(tokenizer), max_length))
