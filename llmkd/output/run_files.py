"""identity.json, which says to which run a folder's files belong, and the reading of small files of runs, sweeps and evaluations."""

from pathlib import Path

from ..config.loader import comparable
from ..config.recipe import Recipe
from ..config.schema import may_change_on_resume
from ..errors import UserError, fix_of
from ..files import Damaged, checksum, read_sealed, sha256_file, write_sealed

RECIPE, IDENTITY, SUMMARY = "recipe.yaml", "identity.json", "summary.json"
LAYERS = "the layers of the student"  # in identity.json, if only some of its base's are kept
_SETTINGS = "the settings"  # in identity.json, like the hashes of recipe.yaml, data and models
OF_THE_RUN = {_SETTINGS, RECIPE}


def read_run_file(path: Path, fix: str) -> dict:
    """A JSON file of a run's or a sweep's folder. UserError, with the advice `fix`, if it cannot be read or was changed."""
    try:
        return read_sealed(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix_of(error, fix)}") from error
    except Damaged as error:
        raise UserError(f"{path}: is damaged ({error}); {fix}") from error


def read_summary(folder: Path, fix: str) -> dict:
    """A run's summary.json. UserError, with the advice `fix`, if it cannot be read, is damaged, or belongs to another run."""
    path, recipe = folder / SUMMARY, folder / RECIPE
    found = read_run_file(path, fix)
    files = found.get("files")
    stated = files.get(RECIPE) if isinstance(files, dict) else None
    if stated and recipe.is_file() and sha256_file(recipe) != stated and not recipe_is_changed(folder):
        raise UserError(f"{path}: belongs to another run (with another {RECIPE}); {fix}")
    return found


def read_identity(folder: Path) -> dict[str, str]:
    """By name, hashes of what a run was started with. UserError if the file is damaged."""
    path, fix = folder / IDENTITY, "restore it, or delete it: --resume then compares with what the checkpoints hold"
    found = read_run_file(path, fix)
    if not found or not all(isinstance(value, str) for value in found.values()):
        raise UserError(f"{path}: is damaged (it names no data and models); {fix}")
    return found


def write_identity(folder: Path, recipe: Recipe, identity: dict[str, str]) -> dict[str, str]:
    """Write identity.json; returns `run_of` the folder. `identity`: hashes of data and models, and that of the settings for a resumed run."""
    found = {_SETTINGS: settings_hash(recipe)} | identity | {RECIPE: sha256_file(folder / RECIPE)}
    write_sealed(folder / IDENTITY, found)
    return _run(found)


def run_of(folder: Path) -> dict[str, str]:
    """The identity of a run as recorded in its checkpoints: hashes of the settings that --resume may not change, and of data and models."""
    return _run(read_identity(folder))


def _run(identity: dict[str, str]) -> dict[str, str]:
    rest = {name: value for name, value in identity.items() if name not in OF_THE_RUN}
    return {"settings": identity.get(_SETTINGS, ""), "data or models": checksum(rest)}


def recorded_layers(folder: Path) -> tuple[int, ...] | None:
    """The layers of its base that a run's student keeps; None for all, and if the run has not begun."""
    text = read_identity(folder).get(LAYERS) if (folder / IDENTITY).exists() else None
    return tuple(map(int, text.split(", "))) if text else None


def settings_hash(recipe: Recipe) -> str:
    """A hash of the settings that --resume may not change."""
    return checksum({key: value for key, value in comparable(recipe).items() if not may_change_on_resume(key)})


def other_settings(folder: Path, recipe: Recipe) -> bool:
    """Whether a run was started with other settings, by its identity.json."""
    known = read_identity(folder).get(_SETTINGS)
    return known is not None and known != settings_hash(recipe)


def recipe_is_changed(folder: Path) -> bool:
    """Whether recipe.yaml is known to have been changed since it was written."""
    try:
        return read_identity(folder).get(RECIPE, (now := sha256_file(folder / RECIPE))) != now
    except (UserError, OSError):
        return False
