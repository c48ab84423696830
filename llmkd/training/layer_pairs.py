"""Pairs of layers, and what of `loss.features` and `loss.attention` is refused before a model is loaded. No torch here."""

from ..config.features import Features, feature_problems
from ..config.terms import AttentionLoss, Layers, layer_pairs
from ..data.examples import Examples
from ..errors import UserError
from ..model_folder.files import attention_heads, layers_of, width_of

#: With fewer for each dimension a linear map fits any teacher.
LEAST_PER_DIMENSION = 2


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


def check_features(features: Features | None, setting: str, configs: dict[str, dict], train: Examples) -> None:
    """UserError, before a model is loaded, where models of such configurations, or the training data, do not have what `loss.features` needs.

    setting   the teacher's name in the recipe: teacher, or teacher.0, ...
    configs   by setting: student.model, teacher.model, ...
    """
    if not features:
        return
    settings = "student.model", f"{setting}.model"
    shapes = [(layers_of(config), width_of(config)) for config in (configs.get(setting, {}) for setting in settings)]
    refuse_features(features, *shapes)
    if width := shapes[0][1]:
        refuse_too_few_targets(features, width, int(train.num_targets[train.weight("features") != 0].sum()))


def refuse_features(features: Features, student: tuple[int | None, int | None], teacher: tuple[int | None, int | None]) -> None:
    """UserError for what models of so many layers and of such widths do not have; see `feature_problems`."""
    if problems := [f"{setting}: {problem}" for setting, problem in feature_problems(features, student, teacher)]:
        raise UserError(*problems)


def refuse_too_few_targets(features: Features, width: int, targets: int) -> None:
    """UserError where the training data has too few targets to compute a map of states of that width."""
    needed = -(-LEAST_PER_DIMENSION * (width + 1) * 3 // 2)
    if is_computed(features) and targets < needed:
        raise UserError(
            f"loss.features.init: found least_squares, and a map of states that are {width} wide needs {needed:,} targets, of which the "
            f"training data (of a stream, its first step) has {targets:,}; use xavier"
        )


def is_computed(features: Features) -> bool:
    """Whether the maps start from what is computed."""
    return features.projection == "linear" and features.init == "least_squares"
