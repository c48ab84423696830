"""Attention distillation between two loaded models: the pairs of layers, and the check that their attention can be compared."""

from collections.abc import Sequence

from ..config.schedule import middle
from ..config.terms import AttentionLoss
from ..losses.attention import AttentionTerm
from ..models.attention_taps import enable_taps
from ..models.language_model import LanguageModel
from ..models.outline import listed_layers
from .layer_pairs import pairs_of, refuse_inputs


def attention_terms(settings: AttentionLoss | None, student: LanguageModel, teachers: Sequence[LanguageModel]) -> list[AttentionTerm]:
    """The term of `loss.attention` for loaded models; [] without it. There is one teacher only."""
    if not settings:
        return []
    return [AttentionTerm(middle(settings.weight), _pairs(settings, student, teachers[0]), settings.heads == "mean", settings.parts)]


def enable_attention(settings: AttentionLoss, student: LanguageModel, teacher: LanguageModel, setting: str, packing: bool) -> None:
    """Make the two models' attention readable in the layers that the term compares. UserError where it cannot be read or compared.

    setting   the teacher's name in the recipe
    """
    pairs = _pairs(settings, student, teacher)
    named = ("student.model", student), (f"{setting}.model", teacher)
    ours, theirs = (enable_taps(model, {pair[i] for pair in pairs}, name, packing) for i, (name, model) in enumerate(named))
    for one, other in pairs:
        refuse_inputs(settings, ours[one], theirs[other])


def _pairs(settings: AttentionLoss, student: LanguageModel, teacher: LanguageModel) -> tuple[tuple[int, int], ...]:
    named = ("student.model", student), ("teacher.model", teacher)
    return pairs_of(settings.layers, "loss.attention.layers", *(len(listed_layers(one.base_model, name)) for name, one in named))
