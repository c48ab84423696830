"""Speech recognition: the encoder reads a sound's features, and the decoder predicts its transcript, as in Whisper."""

from ..config.recipe import Data, Student
from ..data.reading.sources import Rows
from ..errors import UserError
from .readers import READERS, find_readers
from .sequences import SequenceProcessor, TextToText, refuse_decoders_alone, tokens_of_targets
from .target_views import text_readers
from .task import FoundModels


class SpeechRecognition(TextToText):
    """See `Task`: rows of format speech, a sound and its transcript."""

    name = "speech_recognition"

    def find_processor(self, student: Student, models: FoundModels, data: Data, rows: dict[str, list[Rows]]) -> SequenceProcessor:
        others = {f"{one.setting}.model" for one in models.teachers if one.settings.reads}
        refuse_decoders_alone(self.name, {name: config for name, config in models.configs.items() if name not in others})
        if not models.student:
            raise UserError("student.architecture: speech recognition starts from a model with a feature extractor; name student.model")
        if models.configs["student.model"].get("apply_spec_augment"):
            raise UserError(
                "student.model: its config.json says apply_spec_augment: true, which is not done here; set it to false, and mask by data.augment.audio "
                "(TimeMask)"
            )
        readers = find_readers(student, models, data, READERS | {"text": text_readers("text")})
        return SequenceProcessor(*tokens_of_targets(student, models, data), readers, "text")
