"""The stages by their names in `do:`, the same as those of their settings in `config/make_stages.py`. No torch."""

from ..config.make_stages import STAGES as SETTINGS
from .stage import Stage
from .stages.answer import Answer
from .stages.evolve import Evolve
from .stages.expand import Expand
from .stages.explain import Explain
from .stages.keep import Keep
from .stages.reflect import ReflectInstruction, ReflectResponse
from .stages.reworded import BackTranslate, Paraphrase
from .stages.score import Score
from .stages.select import Select
from .stages.topics import Topics
from .stages.transcribe import Transcribe

_CLASSES = (
    Answer,
    BackTranslate,
    Evolve,
    Expand,
    Explain,
    Keep,
    Paraphrase,
    ReflectInstruction,
    ReflectResponse,
    Score,
    Select,
    Topics,
    Transcribe,
)
_BY_CLASS = {one.__name__: one for one in _CLASSES}

#: A stage's class has the same name as the class of its settings.
STAGES: dict[str, type[Stage]] = {do: _BY_CLASS[kind.__name__] for do, kind in SETTINGS.items()}
