"""What reads sounds or images for classifiers, as a `Processor`."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config.recipe import Data, Student
from ..data.audio.sounds import read_sounds, way_of
from ..data.audio.workers import ClipWorkers
from ..data.inputs import Inputs
from ..data.reading.sources import Rows
from ..errors import UserError
from .pictures import find_image_processor, read_pictures
from .sound import SoundInputs, find_extractor, fitting, limit_of, same_extractor, settings_of
from .task import FoundModels

_AUTO = {"audio": "AutoModelForAudioClassification", "image": "AutoModelForImageClassification"}


@dataclass(frozen=True)
class FileProcessor:
    """Feature extractors or image processors, and the classes.

    media     audio or image
    teacher   the teachers', where it reads otherwise than the student's
    """

    media: str
    reader: Any
    labels: tuple[str, ...]
    teacher: Any | None = None
    workers: list[ClipWorkers] = field(default_factory=list)  # one set of processes for all sources of a run, once it is needed
    tokens = pad = None

    @property
    def auto(self) -> str:
        return _AUTO[self.media]

    @property
    def pipeline(self) -> str:
        return f"{self.media}-classification"

    @property
    def vocab(self) -> int:
        return len(self.labels)

    @cached_property
    def provenance(self) -> dict[str, str]:
        both = [settings_of(one) for one in (self.reader, self.teacher) if one is not None]
        readers, names = (hashlib.sha256(json.dumps(said).encode()).hexdigest() for said in (both, self.labels))
        return {"what reads files": readers, "labels": names}

    @property
    def identity(self) -> dict[str, str]:
        return {"what reads files": self.provenance["what reads files"], "the labels": self.provenance["labels"]}

    def save(self, folder: Path) -> None:
        self.reader.save_pretrained(folder)

    def inputs(self, read: Rows, data: Data, setting: str) -> tuple[Inputs, Inputs | None, np.ndarray, dict[str, int]]:
        """What student and teachers read of a source's rows, None where it is the same, the rows' numbers, and counts."""
        trained = np.array([i for i, row in enumerate(read.rows) if row.get("train") is not False], np.int64)
        rows, places = [read.rows[i] for i in trained], [read.places[i] for i in trained]
        if not rows:
            raise UserError(f"{setting}: all of its {len(read.rows)} rows are marked as not trained on; check the rows")
        counts = {"rows": len(read.rows), "marked": len(read.rows) - len(rows)}
        if self.media == "image":
            own = read_pictures(rows, "image", places, self.reader)
            theirs = None if self.teacher is None else replace(own, reader=self.teacher)
            return own, theirs, trained, counts | {"examples": len(rows), "targets": len(rows)}
        sounds, rate = read_sounds(rows, "audio", places, self._workers(data), setting), self.rate
        limits = [limit for one in (self.reader, self.teacher) if one is not None and (limit := limit_of(one, rate)) is not None]
        used = fitting(sounds.num_samples, min(limits, default=None), rate, data.too_long, places.__getitem__, setting)
        kept, sounds = trained[used], sounds.take(np.flatnonzero(used))
        if not len(kept):
            raise UserError(
                f"{setting}: all of its {len(used)} clips are longer than {min(limits) / rate:g} s; set data.too_long: truncate, or cut them"
            )
        counts |= {"too_long": int((~used).sum()), "examples": len(kept), "targets": len(kept)}
        return SoundInputs(sounds, self.reader), None if self.teacher is None else SoundInputs(sounds, self.teacher), kept, counts

    @property
    def rate(self) -> int:
        """Samples a second at which clips are decoded: the higher of both models' rates, so that what either reads is in them."""
        return max(one.sampling_rate for one in (self.reader, self.teacher) if one is not None)

    def _workers(self, data: Data) -> ClipWorkers:
        if not self.workers:
            self.workers.append(ClipWorkers(way_of(self.rate, data.augment.audio if data.augment else ()), data.workers))
        return self.workers[0]


def sound_processor(student: Student, models: FoundModels, data: Data, names: tuple[str, ...]) -> FileProcessor:
    return _found("audio", find_extractor, models, data, names)


def image_processor(student: Student, models: FoundModels, data: Data, names: tuple[str, ...]) -> FileProcessor:
    return _found("image", find_image_processor, models, data, names)


def _found(media: str, find: Callable[..., Any], models: FoundModels, data: Data, names: tuple[str, ...]) -> FileProcessor:
    """What reads the files for all models. UserError where a model has nothing that reads them, or teachers read them in several ways."""
    own = find(models.student.base if models.student else None, data.features, "student.model")
    theirs = {f"{one.setting}.model": find(one.files.base, None, f"{one.setting}.model") for one in models.teachers if one.files}
    first = next(iter(theirs.values()), own)
    for setting, other in theirs.items():
        if not same_extractor(first, other):
            raise UserError(
                f"{setting}: it reads files otherwise than the first teacher ({differing(first, other)}); use teachers that read them alike"
            )
    return FileProcessor(media, own, names, None if same_extractor(own, first) else first)


def differing(one: Any, other: Any) -> str:
    """A setting in which two of them differ."""
    mine, theirs = one.to_dict(), other.to_dict()
    name = next((key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)), "their kind")
    return f"{name}: {mine.get(name)!r} and {theirs.get(name)!r}"
