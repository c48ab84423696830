"""What reads the columns of rows: a reader for the student, and one for each teacher, by the kind of the column that it reads."""

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
    """What reads one column of the rows for a model.

    kind          of the column: text, audio or image
    column        its name in a row
    reader        a tokenizer, a feature extractor or an image processor
    tokens, pad   of text: entries of the tokenizer, and the token of padding
    """

    kind: str
    column: str
    reader: Any
    tokens: int | None
    pad: int | None

    @property
    def identity(self) -> str:
        """What it makes of a column: equal ones read alike."""

    def inputs(self, rows: Sequence[dict], places: Sequence[str], data: Data, setting: str) -> tuple[Inputs, np.ndarray, np.ndarray]:
        """The model's inputs of the rows that are used, the numbers of these rows, and those of rows that are too long.

        UserError, beginning with its place, for a row that cannot be read, or that data.too_long refuses. setting: of the rows' source
        """

    def save(self, folder: Path) -> None: ...


#: By kind, from (column, the model's files or None for new weights, its configuration, the setting of the model, student or None, data, the run's sounds and images).
READERS: dict[str, Callable[..., Reader]] = {"text": TextReader.of, "audio": SoundReader.of, "image": PictureReader.of}


@dataclass(frozen=True)
class Readers:
    """What reads the rows of a run.

    student    its reader
    teachers   by setting (teacher, or teacher.0, ...) that of each teacher: the student's, where it reads alike
    clean      whether teachers read what is not augmented
    """

    student: Reader
    teachers: dict[str, Reader]
    clean: bool = False

    def of(self, setting: str) -> Reader:
        """Of the model of a setting: student.model, teacher.0.model, ..."""
        return self.teachers.get(setting.removesuffix(".model"), self.student)

    @property
    def every(self) -> list[Reader]:
        """Each once, the student's first."""
        return list({id(one): one for one in (self.student, *self.teachers.values())}.values())

    @functools.cached_property
    def provenance(self) -> dict[str, str]:
        """What caches depend on, by name: of text its tokenizers, of files what reads them."""
        texts = [one.identity for one in self.every if one.kind == "text"]
        files = [one.identity for one in self.every if one.kind != "text"]
        found = {"tokenizer": " ".join(texts)} if texts else {}
        return found | ({"what reads files": hashlib.sha256(json.dumps(files).encode()).hexdigest()} if files else {})

    @property
    def identity(self) -> dict[str, str]:
        return {"the tokenizer" if name == "tokenizer" else name: value for name, value in self.provenance.items()}

    def inputs(self, read: Rows, data: Data, setting: str) -> tuple[Inputs, dict[str, Reading], np.ndarray, np.ndarray, dict[str, int]]:
        """Of a source's rows: the student's inputs; by setting those of the teachers that read otherwise; the numbers of the rows that are used;
        the numbers of those that are too long for a model, which are used where they are cut; and counts."""
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
    """What reads the columns for the models. UserError where a model has nothing that reads its column. `readers`: as READERS."""
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
