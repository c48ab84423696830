"""The stages by the name that `do:` has. Their settings, under the same names, are in `config/make_stages.py`. No torch."""

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

STAGES: dict[str, type[Stage]] = {
    "answer": Answer,
    "explain": Explain,
    "expand": Expand,
    "topics": Topics,
    "evolve": Evolve,
    "paraphrase": Paraphrase,
    "back_translate": BackTranslate,
    "reflect_instruction": ReflectInstruction,
    "reflect_response": ReflectResponse,
    "keep": Keep,
    "score": Score,
    "select": Select,
}
