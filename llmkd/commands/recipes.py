"""`llmkd recipes` and `llmkd init`: list the recipes that come with the package, and copy one to be edited.

They are the repository's folder recipes/, installed as the package llmkd_recipes. Every file begins with three comment lines, Needs, Does
and Run, which the list shows.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import UserError
from ..files import remove_leftovers, write_atomic
from ..output.run_folder import refuse_unwritable
from .parser import did_you_mean

DEFAULT_FOLDER = "recipes"


@dataclass(frozen=True)
class Entry:
    """One file of a shipped recipe. `path` is relative to the folder of recipes."""

    path: Path
    does: str
    needs: str
    command: str


def recipes_folder() -> Path:
    """The recipes of the checkout, or those of the installed wheel."""
    checkout = Path(__file__).resolve().parents[2] / "recipes"
    if (checkout / "README.md").is_file():
        return checkout
    spec = importlib.util.find_spec("llmkd_recipes")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("llmkd_recipes: this installation has no recipes; install llmkd again (pip install --force-reinstall llmkd)")
    return Path(next(iter(spec.submodule_search_locations)))


def shipped() -> dict[str, list[Entry]]:
    """The shipped recipes by name, each with its files. A name is that of a folder, or of a file at the top and of a folder with the same name."""
    root = recipes_folder()
    out: dict[str, list[Entry]] = {}
    for path in sorted(
        root.rglob("*.yaml"), key=lambda path: (path.relative_to(root).parts[0].removesuffix(".yaml"), len(path.parts), path)
    ):
        place = path.relative_to(root)
        out.setdefault(place.parts[0].removesuffix(".yaml"), []).append(_entry(path, place))
    return out


def _entry(path: Path, place: Path) -> Entry:
    lines = path.read_text(encoding="utf-8").splitlines()
    said = dict(re.findall(r"^# (Needs|Does|Run): (.*)$", "\n".join(lines), re.MULTILINE))
    return Entry(place, said.get("Does", ""), said.get("Needs", ""), said.get("Run", f"llmkd train --config recipes/{place.as_posix()}"))


def list_recipes() -> str:
    """Every recipe with its purpose, needs and command, as text."""
    blocks = []
    for name, entries in shipped().items():
        lines = [name]
        for entry in entries:
            lines += [f"  {entry.path.as_posix()}", f"      {entry.does}", f"      needs: {entry.needs}", f"      {entry.command}"]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + f"\n\nllmkd init NAME [FOLDER] copies one (into {DEFAULT_FOLDER}/ where no folder is named)."


def copy_recipe(name: str, folder: Path) -> tuple[list[Path], str]:
    """Copy a recipe with the files it refers to. Returns the files written and the command that runs it.

    UserError, and nothing is written, for an unknown name, if a file with other content exists, or if all files exist already. An
    incomplete copy, after a kill or a full disk, is completed.
    """
    entries = shipped()
    if name not in entries:
        hint = did_you_mean(name, entries) or f"; there are {', '.join(entries)}"
        raise UserError(f"init: there is no recipe {name}{hint} (see llmkd recipes)")
    root = recipes_folder()
    places = sorted(set(_needed(root, [entry.path for entry in entries[name]], [root / name])))
    contents = {place: _content(root / place, folder) for place in places}
    there = [place for place in places if os.path.lexists(folder / place)]
    other = [place for place in there if not (folder / place).is_file() or (folder / place).read_bytes() != contents[place]]
    if other or there == places:
        raise UserError(f"init: {folder / (other or there)[0]} exists; name another folder: llmkd init {name} FOLDER")
    refuse_unwritable(folder, "init")
    for place, content in contents.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers((folder / place).parent, place.name)
        write_atomic(folder / place, content)
    return [folder / place for place in places], _command(entries[name], folder)


def _content(path: Path, folder: Path) -> bytes:
    """The content of the copy of a file. In a recipe's comments the commands name the new folder."""
    content = path.read_bytes()
    return (
        re.sub(rb"(--config(_file)?) recipes/", lambda found: found[1] + f" {folder.as_posix()}/".encode(), content)
        if path.suffix == ".yaml"
        else content
    )


def _needed(root: Path, recipes: list[Path], folders: list[Path]) -> Iterator[Path]:
    """The recipes, the files of the folders, and every file and folder under `root` that one of them names."""
    seen: set[Path] = set()
    left = [root / path for path in recipes] + [path for folder in folders if folder.is_dir() for path in _files(folder)]
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        yield path.relative_to(root)
        if path.suffix == ".yaml":
            for text in _texts(yaml.safe_load(path.read_text(encoding="utf-8"))):
                other = (path.parent / text).resolve()
                if "\n" not in text and other != root.resolve() and other.is_relative_to(root.resolve()) and other.exists():
                    other = root / other.relative_to(root.resolve())
                    in_folder = other.suffix == ".yaml" and other.parent != root  # the recipe of its teacher is in the same folder
                    left += _files(other.parent if in_folder else other) if in_folder or other.is_dir() else [other]


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


def _texts(value) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
    elif isinstance(value, str) and len(value) < 256:
        yield value


def _command(entries: list[Entry], folder: Path) -> str:
    """The command that runs the copy: that of the pipeline or sweep, or else of the first file. If the first file makes data, the command of
    the sweep that has it as a stage."""
    wholes = {"pipeline", "sweep"} | ({"study"} if entries[0].command.startswith("llmkd make ") else set())
    whole = next((e for e in entries if e.path.stem in (e.path.parts[0].removesuffix(".yaml"), *wholes)), entries[0])
    path = (folder / whole.path).as_posix()
    return f"llmkd train --config {path}" if whole.command.startswith("llmkd ") else whole.command.replace(f"recipes/{whole.path}", path)
