"""Settings of the terms of the loss that compare layers of student and teacher. A part of `recipe.py`."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from .data import Data
from .fields import Count, as_tuple, config_dataclass, fixed, with_setting_names
from .schedule import Scheduled
from .teacher import Teacher

Layer = Annotated[int, Field(ge=0)]
Layers = Literal["middle", "uniform", "last"] | Annotated[tuple[tuple[Layer, Layer], ...], Field(min_length=1)]
#: What `layers` means, for descriptions.
LAYERS = (
    "middle: half of each model's layers, rounded up; last: the last of both; uniform: each of the student's but the last with the teacher's at the "
    "same relative depth; or a list of pairs [student's, teacher's], counted from 1."
)


@config_dataclass
class AttentionLoss:
    """A further term of the loss: at the targets, the student's attention is drawn towards the teacher's."""

    weight: Scheduled[Annotated[float, Field(gt=0, le=1e6)]] = fixed(
        1.0,
        description="Weight of this term, which is added to the loss: (1 - kd_ratio) CE + kd_ratio T^2 D + weight A. Or a schedule, as for "
        "kd_ratio.",
    )
    layers: Layers = fixed("last", description=f"Pairs of layers that are compared; A is their mean. {LAYERS}")
    what: Literal["maps", "relations"] = fixed(
        "maps",
        description="maps: KL between the two models' attention maps, over the positions that both see, mean over heads. relations: KL between "
        "relations of queries, keys and values, each split into relation_heads parts (MiniLMv2), for models of any heads and widths.",
    )
    heads: Literal["each", "mean"] | None = fixed(
        None,
        description="maps: each (default): head by head, for models with equally many heads; mean: the mean map of all heads, for any number.",
    )
    relation_heads: Count | None = fixed(
        None, description="relations: number of parts (32); it must divide the widths of queries, keys and values of both models."
    )

    @property
    def parts(self) -> int | None:
        """The number of relation heads with `what: relations`; None for maps."""
        return (self.relation_heads or 32) if self.what == "relations" else None


def layer_pairs(layers: Layers, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """The pairs (student's layer, teacher's layer) for models with `student` and `teacher` layers. ValueError for a layer beyond the last, a pair
    given twice, and `uniform` for a student of one layer."""
    if layers == "middle":
        return (((student + 1) // 2, (teacher + 1) // 2),)
    if layers == "last":
        return ((student, teacher),)
    if layers == "uniform":  # TinyBERT's map (arXiv:1909.10351, section 4), for depths that need not divide one another
        if student < 2:
            raise ValueError("found uniform, and the student has one layer; use last")
        return tuple((i, (2 * i * teacher + student) // (2 * student)) for i in range(1, student))
    for i, (one, other) in enumerate(layers):
        for number, count, whose in ((one, student, "student"), (other, teacher, "teacher")):
            if number > count:
                raise ValueError(f"found layer {number} of the {whose}, which has {count} layers; name one up to {count}")
        if (one, other) in layers[:i]:
            raise ValueError(f"found the pair [{one}, {other}] twice; give it once")
    return layers


def attention_contradictions(
    settings: AttentionLoss, implementation: str, teacher: Teacher | tuple[Teacher, ...] | None, data: Data
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of `loss.attention`, in the form of `contradictions.contradictions`. `implementation`: student.attention."""
    here, leave = "loss.attention", "leave one of them out"
    if len(as_tuple(teacher)) != 1:
        found = f"{len(as_tuple(teacher))} teachers" if as_tuple(teacher) else "no teacher"
        yield (here, "teacher"), f"set with {found}, and it compares the student with one teacher; name one, or leave it out"
    for path, one in with_setting_names(teacher, "teacher"):
        if one.server is not None:
            yield (here, f"{path}.server"), f"set with {path}.server, and a server gives nothing of the teacher's attention; {leave}"
        elif one.cache is not None:
            yield (here, f"{path}.cache"), f"set with {path}.cache, and a cache holds nothing of the teacher's attention; {leave}"
    named = ((path, one.attention) for path, one in with_setting_names(teacher, "teacher"))
    for path, chosen in (("student", implementation), *named):
        if chosen != "auto":
            yield (
                (here, f"{path}.attention"),
                f"set with {path}.attention, and only llmkd's own attention shows its queries and keys; {leave}",
            )
    if data.teacher_context is not None:
        yield (here, "data.teacher_context"), f"set with data.teacher_context, which gives the teacher other positions; {leave}"
    for name, kind in (("heads", "maps"), ("relation_heads", "relations")):
        if getattr(settings, name) is not None and settings.what != kind:
            yield (f"{here}.{name}", f"{here}.what"), f"belongs to what: {kind}, but what is {settings.what}; leave it out"
    if not isinstance(settings.layers, str) and any(0 in pair for pair in settings.layers):
        yield (f"{here}.layers",), "found layer 0, the embeddings, which have no attention; layers are counted from 1"
