"""Tokenizers as readers of text, for classifiers and encoders."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.fields import as_tuple
from ..config.formats import FORMATS
from ..config.recipe import Data, Student
from ..data.dataset import refuse_too_few_positions
from ..data.encoding import token_cache
from ..data.encoding.edited_texts import with_edits
from ..data.encoding.labelled_text import text_inputs
from ..data.encoding.tokenizer import load_tokenizer, save_tokenizer
from ..data.labelled import TextInputs
from ..errors import UserError
from ..model_folder.files import ModelFiles


@dataclass(frozen=True)
class TextReader:
    """A tokenizer as a `Reader`. With the column text, it also reads text_pair."""

    column: str
    reader: Any
    pad: int
    kind = "text"

    @classmethod
    def of(
        cls, column: str, files: ModelFiles | None, config: dict, setting: str, student: Student | None, data: Data, clips
    ) -> "TextReader":
        """The reader of a model. UserError if it has fewer positions than data.max_length, or no padding token."""
        refuse_too_few_positions(data, {setting: config})
        named, of = (student.tokenizer, "student.tokenizer") if student and student.tokenizer else (str(files.with_tokenizer), setting)
        reader = load_tokenizer(named, of, ends=False)
        return cls(column, reader, padding_of(reader, config, setting))

    @property
    def tokens(self) -> int:
        return len(self.reader)

    @functools.cached_property
    def identity(self) -> str:
        return token_cache.tokenizer_hash(self.reader, template=False)

    def inputs(self, rows: list[dict], places: list[str], data: Data, setting: str) -> tuple[TextInputs, np.ndarray, np.ndarray]:
        columns = (self.column, "text_pair") if self.column == "text" else (self.column,)
        found, used, longer = text_inputs(rows, places, columns, data, self.reader, self.pad, setting)
        edits = data.augment.prompt if data.augment else ()
        if edits and self.column == _of_student(data):  # also of held-out rows, which a teacher cache joins with the training rows
            found = with_edits(found, [rows[i] for i in used], edits, columns, data.max_length, self.reader)
        return found, used, longer

    def save(self, folder: Path) -> None:
        save_tokenizer(self.reader, folder)


def _of_student(data: Data) -> str | None:
    """The column that the student reads."""
    return FORMATS[as_tuple(data.train)[0].format].reads


def padding_of(tokenizer, config: dict, setting: str) -> int:
    """The padding token of a model, from its configuration or its tokenizer. UserError if there is none."""
    found = config.get("pad_token_id")
    found = tokenizer.pad_token_id if found is None else found
    if found is None:
        raise UserError(
            f"{setting}: neither its config.json nor its tokenizer names a token of padding; write pad_token_id into its config.json"
        )
    return found
