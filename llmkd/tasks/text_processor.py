"""What reads the rows of text classifiers: the student's tokenizer, the teachers' where it is another, and the classes."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config.recipe import Data, Student
from ..data.dataset import refuse_too_few_positions
from ..data.encoding import token_cache
from ..data.encoding.labelled_text import text_inputs
from ..data.encoding.tokenizer import load_tokenizer, save_tokenizer
from ..data.inputs import Inputs
from ..data.reading.sources import Rows
from ..errors import UserError
from .task import FoundModels


@dataclass(frozen=True)
class TextProcessor:
    """The tokenizers of text classifiers as a `Processor`, and their classes.

    teacher   the teachers' tokenizer, where it is another one than the student's
    """

    reader: object
    labels: tuple[str, ...]
    pad: int
    teacher: object | None = None
    teacher_pad: int = 0
    auto = "AutoModelForSequenceClassification"
    pipeline = "text-classification"

    @property
    def vocab(self) -> int:
        return len(self.labels)

    @property
    def tokens(self) -> tuple[int, int]:
        return len(self.reader), len(self.reader if self.teacher is None else self.teacher)

    @functools.cached_property
    def provenance(self) -> dict[str, str]:
        both = [one for one in (self.reader, self.teacher) if one is not None]
        names = hashlib.sha256(json.dumps(self.labels).encode()).hexdigest()
        return {"tokenizer": " ".join(token_cache.tokenizer_hash(one, template=False) for one in both), "labels": names}

    @property
    def identity(self) -> dict[str, str]:
        return {"the tokenizer": self.provenance["tokenizer"], "the labels": self.provenance["labels"]}

    def inputs(self, read: Rows, data: Data, setting: str) -> tuple[Inputs, Inputs | None, np.ndarray, dict[str, int]]:
        """What student and teachers read of a source's rows, None where it is the same, the rows' numbers, and counts."""
        own, kept, counts = text_inputs(read, data, self.reader, self.pad, setting)
        if self.teacher is None:
            return own, None, kept, counts
        theirs, kept_too, counts_too = text_inputs(read, data, self.teacher, self.teacher_pad, setting)
        both = np.intersect1d(kept, kept_too)
        counts["too_long"] = max(counts["too_long"], counts_too["too_long"])
        return own.take(np.searchsorted(kept, both)), theirs.take(np.searchsorted(kept_too, both)), both, counts

    def save(self, folder: Path) -> None:
        save_tokenizer(self.reader, folder)


def text_processor(student: Student, models: FoundModels, data: Data, labels: tuple[str, ...]) -> TextProcessor:
    """UserError where a model is too short for data.max_length, names no token of padding, or teachers have several tokenizers."""
    refuse_too_few_positions(data, models.configs)
    named, setting = (
        (student.tokenizer, "student.tokenizer") if student.tokenizer else (str(models.student.with_tokenizer), "student.model")
    )
    reader = load_tokenizer(named, setting, ends=False)
    pad = padding_of(reader, models.configs["student.model"], "student.model")
    return TextProcessor(reader, labels, pad, **_of_teachers(models, reader))


def _of_teachers(models: FoundModels, reader) -> dict:
    """The teachers' tokenizer, where it is not the student's. UserError where there are several of these."""
    found: dict[str, tuple] = {}
    for teacher in models.teachers:
        if teacher.files:
            setting = f"{teacher.setting}.model"
            theirs = load_tokenizer(str(teacher.files.with_tokenizer), setting, ends=False)
            found.setdefault(
                token_cache.tokenizer_hash(theirs, template=False), (theirs, padding_of(theirs, teacher.files.config, setting), setting)
            )
    if found.keys() <= {token_cache.tokenizer_hash(reader, template=False)}:
        return {}
    if len(found) > 1:
        names = " and ".join(setting for *_, setting in found.values())
        raise UserError(
            f"teacher: {names} have different tokenizers; all teachers of one run read the same tokens: use teachers of one tokenizer"
        )
    ((theirs, pad, _),) = found.values()
    return {"teacher": theirs, "teacher_pad": pad}


def padding_of(tokenizer, config: dict, setting: str) -> int:
    """The token that a model knows for padding. UserError where there is none."""
    found = config.get("pad_token_id")
    found = tokenizer.pad_token_id if found is None else found
    if found is None:
        raise UserError(
            f"{setting}: neither its config.json nor its tokenizer names a token of padding; write pad_token_id into its config.json"
        )
    return found
