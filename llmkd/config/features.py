"""Settings of the hidden states that a student is to have in common with its teacher. A part of `recipe.py`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from .data import Data
from .fields import config_dataclass, fixed, with_setting_names
from .schedule import Scheduled
from .teacher import Teacher
from .terms import LAYERS, Layers, layer_pairs


@config_dataclass
class Features:
    """Hidden states: the student's, mapped to the teacher's width by a linear map that trains with it, are to be the teacher's.

    The map is no part of the student: it is in the run's checkpoints alone.
    """

    weight: Scheduled[Annotated[float, Field(ge=0, le=1e6)]] = fixed(
        1.0,
        description="Weight of this term, which is added to the loss; the weights of the other terms are unchanged. Or a schedule, as for "
        "kd_ratio.",
    )
    layers: Layers = fixed(
        "middle",
        description=f"Pairs of layers that are compared; the term is their mean. {LAYERS} 0 is the embeddings; the last layer's states are those "
        "before the final norm.",
    )
    distance: Literal["mse", "normalized_mse", "cosine"] = fixed(
        "mse",
        description="mse: squared difference, mean over the width; normalized_mse: squared distance of the states scaled to length 1; cosine: 1 - cosine.",
    )
    projection: Literal["linear", "none"] = fixed(
        "linear",
        description="linear: for each pair a map with a bias from the student's width to the teacher's; none: no map, for equal widths.",
    )
    init: Literal["least_squares", "xavier", "identity"] = fixed(
        "least_squares",
        description="Initial value of the map. least_squares: the best linear map from the untrained student's states, computed on training "
        "examples; xavier: random; identity: for equal widths.",
    )
    scale: Literal["teacher_variance", "none"] = fixed(
        "teacher_variance",
        description="teacher_variance: divide the distance by the distance of the teacher's states from their mean (with mse their variance), "
        "measured once before the first step. The term is then the unexplained share; 1 is no better than the mean. none: no "
        "division.",
    )
    lr: float | None = fixed(
        None,
        gt=0,
        le=1000,
        description="Peak learning rate of the maps, on the schedule of optim; null: optim.lr. They have no weight decay.",
    )
    teacher: str | None = fixed(None, description="With several teachers: the name of the one whose hidden states are used.")


def feature_problems(
    features: Features, student: tuple[int | None, int | None], teacher: tuple[int | None, int | None]
) -> Iterator[tuple[str, str]]:
    """Contradictions with the numbers of layers and widths of the two models, None if not known yet: yields (setting, problem and fix)."""
    if student[0] and teacher[0]:
        try:
            layer_pairs(features.layers, student[0], teacher[0])
        except ValueError as error:
            yield "loss.features.layers", str(error)
    widths = student[1], teacher[1]
    if None not in widths and widths[0] != widths[1]:
        apart = f"and the student's states are {widths[0]} wide, the teacher's {widths[1]}"
        if features.projection == "none":
            yield "loss.features.projection", f"found none, {apart}; use linear"
        elif features.init == "identity":
            yield "loss.features.init", f"found identity, {apart}; use least_squares"


def feature_contradictions(
    features: Features, new_weights: bool, setting: Teacher | tuple[Teacher, ...] | None, data: Data
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of `loss.features`, in the form of `contradictions.contradictions`. `new_weights`: whether student.architecture is given."""
    teachers = with_setting_names(setting, "teacher")
    if not features.weight:
        yield ("loss.features.weight",), "found 0; leave loss.features out"
    if features.projection == "none":
        for name, default in (("init", "least_squares"), ("lr", None)):
            if getattr(features, name) != default:
                yield (
                    (f"loss.features.{name}", "loss.features.projection"),
                    "set with projection: none, where there is no map; leave it out",
                )
    elif new_weights and features.init == "least_squares":
        yield (
            ("loss.features.init", "student.architecture"),
            "found least_squares with new weights, whose states are so small that their map is very large, and the first steps move the mapped states by "
            "many times their size; use xavier",
        )
    if not teachers:
        yield ("loss.features", "teacher"), "set without a teacher; give teacher.model, or leave it out"
        return
    if len(teachers) == 1:
        (path, source), named = teachers[0], features.teacher
        if named is not None and named != source.name:
            yield ("loss.features.teacher", f"{path}.name"), f"found {named!r}, and there is one teacher only; leave it out"
    else:
        names = [one.name for _, one in teachers if one.name]
        known = f"the names are: {', '.join(names) or 'none; set teacher.name'}"
        if features.teacher not in names:
            found = "not given, and there are several teachers" if features.teacher is None else f"found {features.teacher!r}"
            yield ("loss.features.teacher", "teacher"), f"{found}; name the one whose hidden states the student learns; {known}"
            return
        path, source = next((path, one) for path, one in teachers if one.name == features.teacher)
        for at, rows in with_setting_names(data.train, "data.train"):
            if rows.teacher not in (None, features.teacher):
                yield (
                    (f"{at}.teacher", "loss.features.teacher"),
                    f"found {rows.teacher!r}, and on these rows nobody would ask {features.teacher!r} for its hidden states; leave one of them out",
                )
    if source.server is not None:
        yield (
            (f"{path}.server", "loss.features"),
            "a server gives no hidden states of inner layers; leave it out, and name the teacher as model, or leave loss.features out",
        )
    elif source.cache is not None:
        yield (
            (f"{path}.cache", "loss.features"),
            "a teacher cache holds no hidden states of inner layers; leave the cache out, and the teacher is loaded, or leave loss.features out",
        )


def feature_teacher(features: Features | None, setting: Teacher | tuple[Teacher, ...] | None) -> str:
    """The setting of the teacher whose hidden states are learned: teacher, or teacher.0, ...; "" if none are."""
    named = with_setting_names(setting, "teacher") if features else []
    return next((path for path, one in named if len(named) == 1 or one.name == features.teacher), "")
