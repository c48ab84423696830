"""Attention distillation between two loaded models: pairs of their layers, and heads or widths that can be compared."""

import math
from collections.abc import Sequence

from ..config.schedule import middle
from ..config.terms import AttentionLoss
from ..errors import UserError
from ..losses.attention import AttentionTerm
from ..models.attention_taps import enable_taps
from ..models.families import layers_of
from ..models.language_model import LanguageModel
from ..signals import AttentionInputs
from .layer_pairs import pairs_of, refuse_heads


def attention_terms(settings: AttentionLoss | None, student: LanguageModel, teachers: Sequence[LanguageModel]) -> list[AttentionTerm]:
    """The term of `loss.attention` for loaded models, if there is one: the teacher is the only one."""
    if not settings:
        return []
    return [AttentionTerm(middle(settings.weight), _pairs(settings, student, teachers[0]), settings.heads == "mean", settings.parts)]


def enable_attention(settings: AttentionLoss, student: LanguageModel, teacher: LanguageModel, setting: str, packing: bool) -> None:
    """Let the two models' attention be read in the layers that the term compares. UserError where it cannot be read or compared.

    setting   the teacher's name in the recipe
    """
    pairs = _pairs(settings, student, teacher)
    named = ("student.model", student), (f"{setting}.model", teacher)
    ours, theirs = (enable_taps(model, {pair[i] for pair in pairs}, name, packing) for i, (name, model) in enumerate(named))
    for one, other in pairs:
        refuse_heads(settings, ours[one].query.shape[1], theirs[other].query.shape[1])
        if settings.parts:
            _refuse_widths(settings.parts, (ours[one], theirs[other]))


def _pairs(settings: AttentionLoss, student: LanguageModel, teacher: LanguageModel) -> tuple[tuple[int, int], ...]:
    counts = []
    for whose, model in (("student", student), ("teacher", teacher)):
        if (layers := layers_of(model.base_model)) is None:
            family = model.base_model.config.model_type
            raise UserError(
                f"loss.attention: the {whose} ({family}) does not keep its layers in a list; leave it out, or use another model"
            )
        counts.append(len(layers))
    return pairs_of(settings.layers, "loss.attention.layers", *counts)


def _refuse_widths(heads: int, both: Sequence[AttentionInputs]) -> None:
    widths = [x.shape[1] * x.shape[3] for one in both for x in (one.query, one.key, one.value)]
    if any(width % heads for width in widths):
        common = math.gcd(*widths)
        fit = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        shown = " and ".join(", ".join(map(str, three)) for three in (widths[:3], widths[3:]))
        raise UserError(
            f"loss.attention.relation_heads: found {heads}, which does not divide the widths of queries, keys and values ({shown} in student and "
            f"teacher); these do: {fit}"
        )
