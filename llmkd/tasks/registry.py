"""The tasks that a recipe may name."""

from collections.abc import Callable

from .causal_lm import CausalLM
from .classification import Classification
from .sequences import TextToText
from .speech import SpeechRecognition
from .task import Task

TASKS: dict[str, Callable[[], Task]] = {
    "causal_lm": CausalLM,
    "classification": Classification,
    "text_to_text": TextToText,
    "speech_recognition": SpeechRecognition,
}


def task_named(name: str) -> Task:
    return TASKS[name]()
