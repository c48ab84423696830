"""Speech recognition: the encoder reads a sound's features, and the decoder predicts its transcript (Whisper and its kind)."""

import functools
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..config.recipe import Data, Student
from ..data.audio.sounds import read_sounds, way_of
from ..data.audio.workers import ClipWorkers
from ..data.reading.sources import Rows
from ..errors import UserError
from .sequences import SequenceProcessor, TextToText, refuse_decoders_alone, tokens_of_targets
from .sound import SoundInputs, find_extractor, fitting, limit_of, same_extractor, settings_of
from .task import FoundModels


@dataclass(frozen=True)
class SpeechProcessor(SequenceProcessor):
    """The tokenizer of transcripts, and the models' feature extractors.

    teacher   the teachers' extractor, where it is another one than the student's
    """

    extractor: Any = None
    teacher: Any | None = None
    workers: ClipWorkers | None = field(default=None, compare=False)
    auto: ClassVar[str] = "AutoModelForSpeechSeq2Seq"
    pipeline: ClassVar[str] = "automatic-speech-recognition"

    @functools.cached_property
    def provenance(self) -> dict[str, str]:
        read = "".join(settings_of(one) for one in (self.extractor, self.teacher) if one is not None)
        of_text = SequenceProcessor.provenance.func(self)
        return of_text | {"extractor": hashlib.sha256(read.encode()).hexdigest()}

    @property
    def identity(self) -> dict[str, str]:
        return super().identity | {"the feature extractor": self.provenance["extractor"]}

    def source_and_target(self, row: dict) -> tuple[Any, str]:
        return row["audio"], row["text"]

    def inputs(self, read: Rows, data: Data, setting: str) -> tuple[SoundInputs, SoundInputs | None, np.ndarray, dict[str, int]]:
        """See `SequenceProcessor`; clips that are longer than an extractor reads are as `data.too_long` says."""
        counts = {"rows": len(read.rows), "too_long": 0, "unsupervised": 0, "marked": 0}
        trained = [i for i, row in enumerate(read.rows) if row.get("train") is not False]
        counts["marked"] = len(read.rows) - len(trained)
        rows, places = [read.rows[i] for i in trained], [read.places[i] for i in trained]
        sounds, kept, rate = read_sounds(rows, "audio", places, self.workers, setting), np.array(trained, np.int64), self.workers.way.rate
        limits = (limit_of(one, rate) for one in (self.extractor, self.teacher) if one is not None)
        most = min((one for one in limits if one), default=None)
        used = fitting(sounds.num_samples, most, rate, data.too_long, places.__getitem__, setting)
        counts["too_long"] = 0 if most is None else int((sounds.num_samples > most).sum())
        chosen = np.flatnonzero(used)
        sounds, kept = sounds.take(chosen), kept[chosen]
        if not len(kept):
            raise UserError(
                f"{setting}: none of its {counts['rows']} clips can be used ({counts['too_long']} are too long); check the rows"
            )
        theirs = SoundInputs(sounds, self.teacher) if self.teacher is not None else None
        return SoundInputs(sounds, self.extractor), theirs, kept, counts

    def save(self, folder: Path) -> None:
        super().save(folder)
        self.extractor.save_pretrained(folder)


class SpeechRecognition(TextToText):
    """See `Task`: rows of format speech, a sound and its transcript."""

    name = "speech_recognition"

    def find_processor(self, student: Student, models: FoundModels, data: Data, rows: dict[str, list[Rows]]) -> SpeechProcessor:
        refuse_decoders_alone(self.name, models.configs)
        if not models.student:
            raise UserError("student.architecture: speech recognition starts from a model with a feature extractor; name student.model")
        if models.configs["student.model"].get("apply_spec_augment"):
            raise UserError(
                "student.model: its config.json says apply_spec_augment: true, which is not done here; set it to false, and mask by data.augment.audio "
                "(TimeMask)"
            )
        extractor = find_extractor(models.student.base, None, "student.model")
        theirs = {one.setting: find_extractor(one.files.base, None, f"{one.setting}.model") for one in models.teachers if one.files}
        teacher = next(iter(theirs.values()), extractor)
        for setting, other in theirs.items():
            if not same_extractor(other, teacher):
                raise UserError(
                    f"{setting}.model: its feature extractor is another than the first teacher's; use teachers that read sounds alike"
                )
        teacher = None if same_extractor(teacher, extractor) else teacher
        rate = max(one.sampling_rate for one in (extractor, teacher) if one is not None)
        workers = ClipWorkers(way_of(rate, data.augment.audio if data.augment else ()), data.workers)
        clean = data.augment is not None and data.augment.teacher_sees == "clean"
        found = tokens_of_targets(student, models, data)
        return SpeechProcessor(*found, clean=clean, extractor=extractor, teacher=teacher, workers=workers)
