"""Building blocks of the settings' dataclasses: fields with metadata, and settings that hold one item or a list.

A field is declared with `fixed` or `changeable`: whether a resumed run may change it. `shapes` names the caches on disk whose
content depends on it, `path` the kind of path that it holds. `metadata` reads these.
"""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

#: A frozen dataclass that refuses unknown names, converts no types and knows no NaN.
config_dataclass = dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
#: A temperature. The limits keep its square, and logits divided by it, away from 0, rounding and infinity in float32.
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]
#: Seconds of waiting; the limit is far below what the system's clocks hold.
Seconds = Annotated[float, Field(ge=0.01, le=1e6)]
Patience = Annotated[float, Field(ge=0, le=1e6)]

CacheName = Literal["tokens", "teacher"]
PathKind = Literal["model", "data", "folder", "file", "output"]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """Metadata of a setting.

    `changeable`: a resumed run may give it another value, since the result does not depend on it. Of a section: all its settings.
    `shapes`: the caches whose content depends on it: tokens (the token cache of a source) and teacher (the teacher cache).
    `path`: a model's folder or hub id, data (a file, a folder or a hub id), another folder or file that is read, or an output.
    """

    changeable: bool | None = None
    shapes: tuple[CacheName, ...] = ()
    path: PathKind | None = None


def fixed(*default, shapes: tuple[CacheName, ...] = (), path: PathKind | None = None, **field) -> Any:
    """A field that a resumed run may not change. `field`: arguments of pydantic's Field."""
    return Field(*default, **field, json_schema_extra={"changeable": False, "shapes": shapes, "path": path})


def changeable(*default, path: PathKind | None = None, **field) -> Any:
    """A field that a resumed run may change."""
    return Field(*default, **field, json_schema_extra={"changeable": True, "path": path})


def path_to(path: PathKind, *default, **field) -> Any:
    """A field of a pipeline's or sweep's file that is a path."""
    return Field(*default, **field, json_schema_extra={"path": path})


def metadata(kind: type, name: str) -> Metadata:
    """Metadata of one field of a settings class. `changeable` is None if it was not declared, as for the sections of a recipe."""
    info = next((field.default for field in dataclasses.fields(kind) if field.name == name), None)
    return Metadata(**(getattr(info, "json_schema_extra", None) or {}))


def shaping(section: Any, cache: CacheName) -> dict[str, Any]:
    """{name: value} of the settings of a section on which a cache's content depends, in the order of their declaration."""
    names = [field.name for field in dataclasses.fields(section)]
    return {name: getattr(section, name) for name in names if cache in metadata(type(section), name).shapes}


# ---- one item or several

T = TypeVar("T")


def form(value) -> str:
    """The form that a value has: one item, several or none."""
    return "none" if value is None else "several" if isinstance(value, list | tuple) else "one"


#: An item, a list of items or null. The tags make pydantic report only the errors of the given form.
OneOrMany = Annotated[
    Annotated[T, Tag("one")] | Annotated[tuple[T, ...], Tag("several")] | Annotated[None, Tag("none")],
    Discriminator(form),
]


@functools.cache
def part_of(share: float, n: int) -> int:
    """ceil(share * n) in decimal arithmetic: 0.07 of 100 is 7, though 0.07 * 100 is more than 7 in floating point."""
    return math.ceil(Fraction(repr(share)) * n)


def as_tuple(value: T | tuple[T, ...] | None) -> tuple[T, ...]:
    """The items of a setting of type OneOrMany."""
    return value if isinstance(value, tuple) else (value,) if value is not None else ()


def with_setting_names(value: T | tuple[T, ...] | None, setting: str) -> list[tuple[str, T]]:
    """Each item with its dotted path: data.train for a single one, data.train.0, data.train.1, ... in a list."""
    return [(f"{setting}.{i}" if isinstance(value, tuple) else setting, item) for i, item in enumerate(as_tuple(value))]
