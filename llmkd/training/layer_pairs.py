"""Pairs of layers, and what of them is refused by two models' configurations alone. No torch here."""

from ..config.terms import AttentionLoss, Layers, layer_pairs
from ..errors import UserError
from ..model_folder.files import attention_heads, layers_of


def pairs_of(layers: Layers, setting: str, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """The pairs that `layers`, a setting of that name, means for two models with so many layers. UserError for a layer that one lacks."""
    try:
        return layer_pairs(layers, student, teacher)
    except ValueError as error:
        raise UserError(f"{setting}: {error}") from None


def refuse_attention(settings: AttentionLoss, student: dict, teacher: dict) -> None:
    """UserError for layers or heads that cannot be compared, as far as the two models' configurations say."""
    depths, heads = (layers_of(student), layers_of(teacher)), (attention_heads(student), attention_heads(teacher))
    if all(depths):
        pairs_of(settings.layers, "loss.attention.layers", *depths)
    if all(heads):
        refuse_heads(settings, *heads)


def refuse_heads(settings: AttentionLoss, student: int, teacher: int) -> None:
    """UserError for maps, head by head, of two models with so many heads that are not equally many."""
    if settings.what == "maps" and settings.heads != "mean" and student != teacher:
        raise UserError(
            f"loss.attention.what: found maps, and the student has {student} heads and the teacher {teacher}; set loss.attention.heads: mean, "
            "or what: relations"
        )
