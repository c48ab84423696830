"""Models as tests want them: one student alone."""

from llmkd.config.recipe import Student
from llmkd.models.language_model import LanguageModel
from llmkd.models.load import LoadContext, load_students


def load_student(settings: Student, vocab: int, device, seed: int, packing: int = 0) -> LanguageModel:
    return load_students([settings], LoadContext(vocab, device, seed, packing))[0]
