"""Paths in recipes, pipelines and sweeps: the folder that they are relative to, and the expansion of ~ and variables.

Paths that are read (models, tokenizers, data, other recipes) are relative to the file that names them. Paths that are written (`output_dir`,
`teacher.cache.path`, `data.cache_dir`) are relative to the working folder, as is every path on the command line. A path that begins with
`{cwd}` is relative to the working folder in every setting, so that a recipe can read the output of an earlier run.
`~`, `$NAME`, `${NAME}` and `${NAME:-default}` are expanded. A name that may be a hub id, and is not a file or
folder next to the recipe, is left to the hub. Settings that are paths are declared by `fields.path_to`.
"""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_file
from .dotted import replaced
from .fields import PathKind, metadata
from .recipe import Recipe
from .schema import section_of

CWD = "{cwd}"
_HUB_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)?")
_FILE = re.compile(r"\.(jsonl?|csv|parquet|arrow|ya?ml)", re.IGNORECASE)


class Placed(str):
    """A path that `place` has already placed and does not change again, as its text may begin with a special character."""


def paths_in(kind: type | None, data: Any, path: tuple = ()) -> Iterator[tuple[dict, Any, tuple, PathKind]]:
    """Every setting of plain data that is a path, as (the mapping that holds it, its key there, its path, its kind)."""
    if isinstance(data, list):
        for i, item in enumerate(data):
            yield from paths_in(kind, item, (*path, i))
    elif isinstance(data, dict) and kind is not None:
        for dotted, value in data.items():
            *sections, last = str(dotted).split(".")  # keys of `set:` are dotted paths
            inner: type | None = kind
            for section in sections:
                inner = inner if section.isdigit() or inner is None else section_of(inner, section)
            if inner is None:
                continue
            what = metadata(inner, last).path
            if what == "model" and any(data.get(".".join([*sections, other])) for other in ("server", "command")):
                continue  # the name of the model on a server or of a program
            if what and isinstance(value, str):
                yield data, dotted, (*path, dotted), what
            elif isinstance(value, dict | list):
                yield from paths_in(inner if last.isdigit() else section_of(inner, last), value, (*path, dotted))


def place(value: str, what: PathKind, folder: str = "") -> str:
    """A path in a file of `folder`, made such that it can be opened from the working folder. A hub id is returned unchanged. ValueError with the
    problem.

    `folder` is empty for a path from the command line.
    """
    if isinstance(value, Placed) or value.startswith("builtin:"):
        return value
    is_name = not value.startswith(("~", "$", CWD)) and os.path.exists(os.path.join(folder, value))  # a dollar sign may be part of a name
    text = value if is_name else _expand(value)
    if text.startswith(CWD):
        return text.removeprefix(CWD).lstrip("/") or "."
    if what == "output" or not folder or os.path.isabs(text) or not text:
        return text
    here = os.path.normpath(os.path.join(folder, text))
    if os.path.exists(here):
        return here
    if os.path.exists(text):
        raise ValueError(
            f"found {value}, which exists only relative to the working folder {os.getcwd()}; paths in a recipe are relative to its file: "
            f'write {os.path.relpath(text, folder)}, or "{CWD}/{text}"'
        )
    first, _, rest = text.partition("/")
    return text if may_be_on_hub(text, what) and not (rest and os.path.isdir(os.path.join(folder, first))) else here


def may_be_on_hub(text: str, what: PathKind) -> bool:
    return what in ("model", "data") and bool(_HUB_ID.fullmatch(text)) and not _FILE.fullmatch(os.path.splitext(text)[1])


def is_local(text: str, what: PathKind) -> bool:
    """Whether a placed path is on this machine, that is, neither a hub id nor built-in data."""
    return not text.startswith("builtin:") and (os.path.exists(text) or os.path.isabs(text) or not may_be_on_hub(text, what))


def relative_to(text: str, what: PathKind, folder: str | Path | None) -> str:
    """The inverse of `place`: a placed path as it is written in a file of `folder`, or of any folder. Absolute paths, outputs and hub ids stay."""
    if what == "output" or os.path.isabs(text) or not is_local(text, what):
        return text
    if folder is None:
        return f"{CWD}/{text}"
    relative = os.path.relpath(text, folder)
    return relative if relative.startswith("..") else os.path.join(".", relative)


def place_changes(changes: dict[str, Any], folder: str, output_dir: str = "", kind: type | None = Recipe) -> dict[str, Any]:
    """The `set:` of a pipeline or a sweep, or an arm's changes, with paths placed.

    output_dir   the folder that the pipeline or sweep writes, for `{output_dir}`
    kind         the class of the settings that are changed

    The paths are `Placed`, so that the changes may be applied to a recipe or a sweep in any folder. UserError with every problem and the name
    of its setting.
    """
    written, problems = replaced(changes, "{output_dir}", output_dir), []
    for before, after in zip(paths_in(kind, changes), paths_in(kind, written), strict=True):
        (old, key, path, what), (new, *_) = before, after
        try:
            new[key] = Placed(place(new[key], what, "" if "{output_dir}" in old[key] else folder))
        except ValueError as error:
            problems.append(f"--{'.'.join(map(str, path))}: {error}")
    if problems:
        raise UserError(*problems)
    return written


def _expand(value: str) -> str:
    def variable(match: re.Match) -> str:
        name, default = match[1] or match[2], match[3]
        if default is not None:
            return os.environ.get(name) or default
        if name not in os.environ:
            raise ValueError(f"found {value}, and the environment variable {name} is not set; set it, or write the path out")
        return os.environ[name]

    text = os.path.expanduser(re.sub(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?::-([^{}]+))?\})", variable, value))
    if text.startswith("~") and not os.path.lexists(text):
        raise ValueError(f"found {value}, and no home folder of that name is known; set HOME, or write the path out")
    if other := re.search(r"^\{\w+\}|\{(?:output_dir|cwd|seed)\}", text.removeprefix(CWD)):  # elsewhere a brace is part of a name
        places = {
            "{output_dir}": ", or in the set: of a pipeline or sweep with {output_dir}",
            "{seed}": "; {seed} is for the arms of a sweep with seeds",
        }
        also = places.get(other[0], "")
        raise ValueError(f"found {value}, where {other[0]} has no meaning; a path may begin with {CWD}, the working folder{also}")
    return text


def missing(text: str, what: PathKind, folder: str) -> str | None:
    """The problem with a placed path that does not exist; None if it exists or may be on the hub."""
    if what == "output" or not is_local(text, what) or os.path.exists(text):
        return None
    place = Path(os.path.abspath(text))
    noun = {"file": "file", "data": "file or folder"}.get(what, "folder")
    if os.path.islink(place):
        return f"{place} is a link that leads nowhere; fix it, or name what it should lead to"
    found = f"there is no {noun} {place}"
    if writer := written_by(place, Path(folder or ".")):
        return f"{found}; {writer} writes it, so run that first: llmkd train --config {writer}"
    near = difflib.get_close_matches(place.name, os.listdir(place.parent), 1, 0.6) if place.parent.is_dir() else []
    return found + (f"; did you mean {near[0]}?" if near else "; check the path")


def written_by(missing: Path, folder: Path) -> Path | None:
    """The recipe in the same folder whose run would write a path, if there is one."""
    from .yaml_loader import parse_yaml

    for path in sorted(folder.glob("*.yaml")):
        try:
            output_dir = parse_yaml(read_file(path).decode("utf-8"), str(path))[0].get("output_dir")
            written = os.path.abspath(place(output_dir, "output"))
        except Exception:  # not a recipe, or a broken one
            continue
        if missing.is_relative_to(written):
            return path
    return None
