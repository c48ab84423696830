"""What the settings' dataclasses are made of: fields that say what depends on them, and settings that hold one item or a list.

A field is declared by `fixed` or `changeable`, so that each says by itself whether a resumed run may change it. `shapes` names
the caches on disk that follow from it, `path` what kind of path it is. `metadata` reads them back.
"""

import dataclasses
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

#: A frozen dataclass that refuses unknown names, converts no types and knows no NaN.
config_dataclass = dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))

Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]

CacheName = Literal["tokens", "teacher"]
PathKind = Literal["model", "data", "folder", "file", "output"]


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What depends on a setting, beside the run itself.

    `changeable`: a resumed run may give it another value, since it does not touch what is learnt; of a section, everything in it.
    `shapes`: the caches whose content follows from it: tokens (of a source's rows) and teacher (records of a teacher's outputs).
    `path`: a model's folder or hub id, data (a file, a folder or a hub id), another folder or file that is read, or an output.
    """

    changeable: bool | None = None
    shapes: tuple[CacheName, ...] = ()
    path: PathKind | None = None


def fixed(*default, shapes: tuple[CacheName, ...] = (), path: PathKind | None = None, **field) -> Any:
    """A field that a resumed run must have as it was. `field` is as pydantic's Field has it."""
    return Field(*default, **field, json_schema_extra={"changeable": False, "shapes": shapes, "path": path})


def changeable(*default, path: PathKind | None = None, **field) -> Any:
    """A field that a resumed run may change."""
    return Field(*default, **field, json_schema_extra={"changeable": True, "path": path})


def path_to(path: PathKind, *default, **field) -> Any:
    """A field of a pipeline's or sweep's file that is a path."""
    return Field(*default, **field, json_schema_extra={"path": path})


def metadata(kind: type, name: str) -> Metadata:
    """Of one field of a settings class; `changeable` is None where nothing was declared, as of the sections of a recipe."""
    info = next((field.default for field in dataclasses.fields(kind) if field.name == name), None)
    return Metadata(**(getattr(info, "json_schema_extra", None) or {}))


def shaping(section: Any, cache: CacheName) -> dict[str, Any]:
    """The settings of a section that shape a cache, by name, in the order in which they are declared."""
    names = [field.name for field in dataclasses.fields(section)]
    return {name: getattr(section, name) for name in names if cache in metadata(type(section), name).shapes}


# ---- one item or several

T = TypeVar("T")


def _form(value) -> str:
    return "none" if value is None else "several" if isinstance(value, list | tuple) else "one"


#: An item, a list of items or null. The tags keep pydantic from explaining what is wrong with the form that was not meant.
OneOrMany = Annotated[
    Annotated[T, Tag("one")] | Annotated[tuple[T, ...], Tag("several")] | Annotated[None, Tag("none")],
    Discriminator(_form),
]


def as_tuple(value: T | tuple[T, ...] | None) -> tuple[T, ...]:
    """The items of a setting of type OneOrMany."""
    return value if isinstance(value, tuple) else (value,) if value is not None else ()


def with_setting_names(value: T | tuple[T, ...] | None, setting: str) -> list[tuple[str, T]]:
    """Each item with the name of its own setting: data.train where there is one, data.train.0, data.train.1, ... in a list."""
    return [(f"{setting}.{i}" if isinstance(value, tuple) else setting, item) for i, item in enumerate(as_tuple(value))]
