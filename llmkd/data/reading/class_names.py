"""Replaces class numbers in rows by the names that the data set has for them (ClassLabel of `datasets`). No torch here."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .problems import BadRow


class ClassName(str):
    """The name of a class. `number`: its number in the data set."""

    number: int


Names = Mapping[str, Sequence[ClassName]]  # by column
_UNKNOWN = -1  # the library's number for a row without a class


def names_of_data(data: Any) -> Names:
    """The class names of a data set of the library; a stream may not know its columns."""
    features = getattr(data, "features", None) or {}
    return {column: _numbered(one.names) for column, one in features.items() if getattr(one, "names", None)}


def names_of_schema(schema: Any) -> Names:
    """The class names in the schema of an Arrow or Parquet file, where the library writes them."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        classes = {column: one for column, one in features.items() if isinstance(one, dict) and one.get("_type") == "ClassLabel"}
        return {column: _numbered(one["names"]) for column, one in classes.items()}
    except (KeyError, TypeError, ValueError):
        return {}


def _numbered(names: Sequence[str]) -> list[ClassName]:
    found = [ClassName(name) for name in names]
    for number, name in enumerate(found):
        name.number = number
    return found


def with_names(row: dict[str, Any], names: Names) -> dict[str, Any]:
    """A row with names of classes in place of numbers, None for a missing class. BadRow for a number without a name."""
    return row | {column: _named(row[column], column, known) for column, known in names.items() if column in row}


def _named(value: Any, column: str, known: Sequence[ClassName]) -> Any:
    if type(value) is not int:
        return value
    if not _UNKNOWN <= value < len(known):
        raise BadRow(f"{column} is {value}, and the data set names {len(known)} classes, from 0; write the file again")
    return None if value == _UNKNOWN else known[value]
