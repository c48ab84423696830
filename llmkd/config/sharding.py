"""Models that are sharded over the processes of a run: the settings for it, and those that it cannot be combined with."""

from collections.abc import Iterator
from typing import Literal

from .fields import with_setting_names

#: `none`: every process holds the whole model; `full`: a part of every weight, of its gradient and of the optimizer's state.
Shard = Literal["none", "full"]


def sharded_student(train) -> bool:
    return train.shard == "full"


def sharded_teacher(train, teacher) -> bool:
    """Whether a teacher has a model to load that is sharded."""
    return (teacher.shard or train.shard) == "full"


def sharding_contradictions(recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of a sharded student or teacher, in the form of `contradictions.contradictions`."""
    train, student = recipe.train, recipe.student
    loaded = [(path, one) for path, one in with_setting_names(recipe.teacher, "teacher") if one.model_path and not one.cache]
    teachers = [(path, one) for path, one in loaded if sharded_teacher(train, one)]
    for path, one in with_setting_names(recipe.teacher, "teacher"):
        if one.ema is not None:
            if one.shard not in (None, train.shard):
                found = f"found {one.shard} with train.shard: {train.shard}, and the average of a student is held as the student is"
                yield (f"{path}.shard", "train.shard"), f"{found}; leave it out"
        elif one.shard == "full" and (path, one) not in loaded:
            yield (f"{path}.shard", f"{path}.model"), "found full, and no model is loaded for this teacher; leave it out"
    for path, one in teachers:
        for name, value in (("device", one.device), ("quantization.type", _uncut(one.quantization))):
            if value is not None:
                yield (
                    (f"{path}.{name}", *_asked(path, one)),
                    f"found {value}, which a sharded teacher cannot have; set {path}.shard: none, or leave it out",
                )
    own = [
        ("student.quantization.type", _uncut(student.quantization), "the scales of 8-bit weights are not cut with them; use nf4"),
        ("optim.name", recipe.optim.name != "adamw" and recipe.optim.name, "bitsandbytes takes whole weights; use adamw"),
        (
            "on_policy.engine",
            recipe.on_policy and recipe.on_policy.engine != "local" and "settings",
            "one process alone compares the server with the student; train.shard: none goes, also with a sharded teacher",
        ),
    ]
    for path, value, why in own if sharded_student(train) else ():
        if value:
            yield (path, "train.shard"), f"found {value} with train.shard: full, where {why}; leave one of them out"


def _uncut(quantization) -> str | None:
    """The quantisation whose weights cannot be sharded: 8 bits by bitsandbytes."""
    return quantization.type if quantization and quantization.type == "int8" else None


def _asked(path: str, teacher) -> tuple[str, ...]:
    return (f"{path}.shard",) if teacher.shard else ("train.shard",)
