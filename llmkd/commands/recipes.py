"""`llmkd recipes` and `llmkd init`: the recipes that come with the package, listed and copied to be edited.

They are the folder recipes/ of the repository, installed as the package llmkd_recipes. Every file opens with three comment lines,
Needs, Does and Run, which are what the list shows.
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
    """{name: its files}. A name is a folder of recipes, or a file (with the folder of the same name) at the top."""
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
    """Every recipe with purpose, needs and command, as text."""
    blocks = []
    for name, entries in shipped().items():
        lines = [name]
        for entry in entries:
            lines += [f"  {entry.path.as_posix()}", f"      {entry.does}", f"      needs: {entry.needs}", f"      {entry.command}"]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + f"\n\nllmkd init NAME [FOLDER] copies one (into {DEFAULT_FOLDER}/ where no folder is named)."


def copy_recipe(name: str, folder: Path) -> tuple[list[Path], str]:
    """Copy a recipe with the files it refers to. Returns the files written and the command that runs it.

    Raises UserError for an unknown name, and where another file exists already, or all of them: then nothing is written. What an attempt
    has left that was killed, or met a full disk, is completed.
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
    """What is copied of a file. The comments of a recipe name the commands, for where the files are then."""
    content = path.read_bytes()
    return (
        re.sub(rb"(--config(_file)?) recipes/", lambda found: found[1] + f" {folder.as_posix()}/".encode(), content)
        if path.suffix == ".yaml"
        else content
    )


def _needed(root: Path, recipes: list[Path], folders: list[Path]) -> Iterator[Path]:
    """Files of the folders, and of whatever in them or in the recipes names a file or folder under `root`."""
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
                    # beside another recipe stands what makes its teacher
                    beside = other.suffix == ".yaml" and other.parent != root
                    left += _files(other.parent if beside else other) if beside or other.is_dir() else [other]


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


def _texts(value) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)
    elif isinstance(value, str) and len(value) < 256:
        yield value


def _command(entries: list[Entry], folder: Path) -> str:
    """The command of the first file that is run, for where it is now: a pipeline's or sweep's, or else the first stage's. Where a file makes
    data, that of the sweep that has it as a stage."""
    wholes = {"pipeline", "sweep"} | ({"study"} if entries[0].command.startswith("llmkd make ") else set())
    whole = next((e for e in entries if e.path.stem in (e.path.parts[0].removesuffix(".yaml"), *wholes)), entries[0])
    path = (folder / whole.path).as_posix()
    return f"llmkd train --config {path}" if whole.command.startswith("llmkd ") else whole.command.replace(f"recipes/{whole.path}", path)
