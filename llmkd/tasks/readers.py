"""Readers turn a column of the rows into a model's inputs: one for the student, and one for each teacher, by the kind of its column."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..config.fields import as_tuple
from ..config.formats import FORMATS
from ..config.recipe import Data, Student
from ..data.inputs import Inputs, Reading
from ..data.reading.sources import Rows
from ..errors import UserError
from ..model_folder.files import ModelFiles
from .media import MediaOfRun
from .pictures import PictureReader
from .sound import SoundReader
from .task import FoundModels
from .text_reader import TextReader


class Reader(Protocol):
    """Turns one column of the rows into a model's inputs.

    kind          of the column: text, audio or image
    column        its name in a row
    reader        a tokenizer, a feature extractor or an image processor
    tokens, pad   of text: the number of the tokenizer's entries, and the padding token
    """

    kind: str
    column: str
    reader: Any
    tokens: int | None
    pad: int | None

    @property
    def identity(self) -> str:
        """A text that is equal for readers that make the same inputs of a column."""

    def inputs(self, rows: Sequence[dict], places: Sequence[str], data: Data, setting: str) -> tuple[Inputs, np.ndarray, np.ndarray]:
        """The inputs of the rows that are used, the indices of these rows, and the indices of rows that are too long.

        places    file and line of each row
        setting   of the rows' source

        UserError, with the place, for a row that cannot be read, or is too long where data.too_long says refuse.
        """

    def save(self, folder: Path) -> None: ...


#: By kind, the function that makes a reader, from (column, the model's files or None for new weights, its configuration, its setting, the
#: student's settings or None for a teacher, data, MediaOfRun).
READERS: dict[str, Callable[..., Reader]] = {"text": TextReader.of, "audio": SoundReader.of, "image": PictureReader.of}


@dataclass(frozen=True)
class Readers:
    """The readers of a run.

    student    the student's reader
    teachers   each teacher's reader, by setting (teacher, or teacher.0, ...); the student's object if it makes the same inputs
    clean      whether teachers read examples that are not augmented
    """

    student: Reader
    teachers: dict[str, Reader]
    clean: bool = False

    def of(self, setting: str) -> Reader:
        """The reader of the model of a setting: student.model, teacher.0.model, ..."""
        return self.teachers.get(setting.removesuffix(".model"), self.student)

    @property
    def every(self) -> list[Reader]:
        """All different readers, the student's first."""
        return list({id(one): one for one in (self.student, *self.teachers.values())}.values())

    @functools.cached_property
    def provenance(self) -> dict[str, str]:
        """Hashes on which teacher caches depend, by name: of the tokenizers, and of the readers of files."""
        texts = [one.identity for one in self.every if one.kind == "text"]
        files = [one.identity for one in self.every if one.kind != "text"]
        found = {"tokenizer": " ".join(texts)} if texts else {}
        return found | ({"what reads files": hashlib.sha256(json.dumps(files).encode()).hexdigest()} if files else {})

    @property
    def identity(self) -> dict[str, str]:
        return {"the tokenizer" if name == "tokenizer" else name: value for name, value in self.provenance.items()}

    def inputs(self, read: Rows, data: Data, setting: str) -> tuple[Inputs, dict[str, Reading], np.ndarray, np.ndarray, dict[str, int]]:
        """The inputs of a source's rows: the student's; by setting those of the teachers that read something else; the indices of the rows that are
        used; the indices of rows that are too long for a model (which are used if they are truncated); and counts."""
        trained = np.array([i for i, row in enumerate(read.rows) if row.get("train") is not False], np.int64)
        if not len(trained):
            raise UserError(f"{setting}: all of its {len(read.rows)} rows are marked as not trained on; check the rows")
        rows, places = [read.rows[i] for i in trained], [read.places[i] for i in trained]
        found = {id(one): one.inputs(rows, places, data, setting) for one in self.every}
        kept = functools.reduce(np.intersect1d, [used for _, used, _ in found.values()])
        if not len(kept):
            raise UserError(
                f"{setting}: every one of its {len(rows)} rows is too long for one of the models; check data.max_length and the rows"
            )
        taken = {key: inputs.take(np.searchsorted(used, kept)) for key, (inputs, used, _) in found.items()}
        theirs = {}
        for name, reader in self.teachers.items():
            same = reader.column == self.student.column
            if reader is not self.student or self.clean:
                theirs[name] = Reading(taken[id(reader)], augmented=same and not self.clean)
        marked, longer = len(read.rows) - len(trained), functools.reduce(np.union1d, [long for *_, long in found.values()])
        counts = {"rows": len(read.rows), "marked": marked, "too_long": len(longer), "examples": len(kept), "targets": len(kept)}
        return taken[id(self.student)], theirs, trained[kept], trained[longer], counts


def find_readers(student: Student, models: FoundModels, data: Data, readers: dict[str, Callable[..., Reader]] = READERS) -> Readers:
    """The readers of all models. UserError if a model has no tokenizer, extractor or processor for its column. `readers`: as READERS."""
    (form,) = {source.format for source in as_tuple(data.train)}
    own, media = FORMATS[form].reads, MediaOfRun(data)

    def of(column: str, files: ModelFiles | None, name: str, settings: Student | None = None) -> Reader:
        return readers[FORMATS[form].kind_of(column)](column, files, models.configs[name], name, settings, data, media)

    found = [of(own, models.student, "student.model", student)]
    teachers = {}
    for one in models.teachers:
        reader = of(one.settings.reads or own, one.files, f"{one.setting}.model") if one.files else found[0]
        alike = (other for other in found if other.column == reader.column and other.identity == reader.identity)
        teachers[one.setting] = next(alike, reader)
        found.append(teachers[one.setting])
    return Readers(found[0], teachers, clean=data.augment is not None and data.augment.teacher_sees == "clean")
