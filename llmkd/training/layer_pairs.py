"""Pairs of layers, and the checks of `loss.features` and `loss.attention` before a model is loaded. Only `refuse_by_outline` imports torch."""

import math
from typing import TYPE_CHECKING

from ..config.features import Features, feature_problems
from ..config.terms import AttentionLoss, Layers, layer_pairs
from ..data.examples import Examples
from ..errors import UserError
from ..model_folder.files import attention_heads, layers_of, width_of

if TYPE_CHECKING:
    from ..signals import AttentionInputs

#: Targets per dimension: with fewer, a linear map fits any teacher.
LEAST_PER_DIMENSION = 2


def pairs_of(layers: Layers, setting: str, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """The pairs of layers that `layers` means for two models with `student` and `teacher` layers. UserError for a layer that one lacks.

    setting   the name of the setting, for the message
    """
    try:
        return layer_pairs(layers, student, teacher)
    except ValueError as error:
        raise UserError(f"{setting}: {error}") from None


def refuse_attention(settings: AttentionLoss, student: dict, teacher: dict) -> None:
    """UserError for layers or heads that cannot be compared, as far as the two models' configurations show."""
    depths, heads = (layers_of(student), layers_of(teacher)), (attention_heads(student), attention_heads(teacher))
    if all(depths):
        pairs_of(settings.layers, "loss.attention.layers", *depths)
    if all(heads):
        refuse_heads(settings, *heads)


def refuse_heads(settings: AttentionLoss, student: int, teacher: int) -> None:
    """UserError if attention maps are to be compared head by head, but the two models have different numbers of heads."""
    if settings.what == "maps" and settings.heads != "mean" and student != teacher:
        raise UserError(
            f"loss.attention.what: found maps, but the student has {student} heads and the teacher {teacher}; set loss.attention.heads: mean, "
            "or what: relations"
        )


def refuse_inputs(settings: AttentionLoss, student: "AttentionInputs", teacher: "AttentionInputs") -> None:
    """UserError for two layers whose attention cannot be compared: different numbers of heads, or widths that relation heads do not divide."""
    refuse_heads(settings, student.query.shape[1], teacher.query.shape[1])
    widths = [x.shape[1] * x.shape[3] for one in (student, teacher) for x in (one.query, one.key, one.value)]
    if settings.parts and any(width % settings.parts for width in widths):
        common = math.gcd(*widths)
        fit = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        shown = " and ".join(", ".join(map(str, three)) for three in (widths[:3], widths[3:]))
        raise UserError(
            f"loss.attention.relation_heads: found {settings.parts}, which does not divide the widths of queries, keys and values ({shown} in student "
            f"and teacher); these do: {fit}"
        )


def refuse_by_outline(features: Features | None, attention: AttentionLoss | None, setting: str, configs: dict[str, dict]) -> None:
    """UserError for layers or attention that two models lack, as far as models built without weights show it. It imports torch.

    setting   the teacher's setting: teacher, or teacher.0, ...
    configs   by setting: student.model, teacher.model, ...
    """
    from ..models.outline import listed_layers, not_one_tensor, outline, shapes_inside, show_attention
    from ..signals import Taps

    names = "student.model", f"{setting}.model"
    models = [outline(configs[name]) if name in configs else None for name in names]
    both = [(name, model) for name, model in zip(names, models, strict=True) if model is not None]
    depths = [len(listed_layers(model, name)) for name, model in both]
    for name, model in both if attention else ():
        show_attention(model, name)
    if len(both) < 2:
        return
    compared = pairs_of(features.layers, "loss.features.layers", *depths) if features else ()
    attended = pairs_of(attention.layers, "loss.attention.layers", *depths) if attention else ()
    found = []
    for side, (name, model) in enumerate(both):
        inside = shapes_inside(model, Taps(*(frozenset(pair[side] for pair in pairs) for pairs in (compared, attended))))
        if inside is None:
            return
        if any(hidden.ndim != 2 for hidden in inside[0].values()):
            raise not_one_tensor(model, name)
        found.append(inside)
    (ours, our_inputs), (theirs, their_inputs) = found
    for one, other in compared:
        if one in ours and other in theirs:
            refuse_features(features, (depths[0], ours[one].shape[1]), (depths[1], theirs[other].shape[1]))
    for one, other in attended:
        if one in our_inputs and other in their_inputs:
            refuse_inputs(attention, our_inputs[one], their_inputs[other])


def check_features(features: Features | None, setting: str, configs: dict[str, dict], train: Examples) -> None:
    """UserError, before a model is loaded, if the models or the training data lack what `loss.features` needs.

    setting   the teacher's setting: teacher, or teacher.0, ...
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
    """UserError for layers or widths that the models lack; see `feature_problems`. `student`, `teacher`: (layers, width), None if unknown."""
    if problems := [f"{setting}: {problem}" for setting, problem in feature_problems(features, student, teacher)]:
        raise UserError(*problems)


def refuse_too_few_targets(features: Features, width: int, targets: int) -> None:
    """UserError if the training data has too few targets to compute a map of states `width` wide."""
    needed = -(-LEAST_PER_DIMENSION * (width + 1) * 3 // 2)
    if is_computed(features) and targets < needed:
        raise UserError(
            f"loss.features.init: found least_squares, but a map of states {width} wide needs {needed:,} targets, and the training data (of a "
            f"stream, its first step) has {targets:,}; use xavier"
        )


def is_computed(features: Features) -> bool:
    """Whether the maps start from a least-squares fit."""
    return features.projection == "linear" and features.init == "least_squares"
