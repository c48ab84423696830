"""The folder of a run: locked by one run at a time, never silently overwritten, and resumed only by the same recipe, data and models."""

import contextlib
import os
import socket
from pathlib import Path

from ..config.loader import comparable, dump, load_recipe
from ..config.recipe import Recipe
from ..config.schema import may_change_on_resume
from ..errors import UserError
from ..files import Damaged, FileLocked, checksum, is_leftover, lock_file, read_sealed, remove_leftovers, write_atomic, write_sealed

IDENTITY = "identity.json"
SETTINGS = "the settings"  # in it, beside data and models


class RunFolder:
    """`check()` refuses, and leaves nothing behind, before the costly part; `claim()` creates and locks.

    run   which run this is, as its checkpoints say it: hashes of the settings that --resume does not change, and of data and models;
          known when the folder is claimed
    """

    def __init__(self, recipe: Recipe, resume: bool):
        self.recipe, self.resume = recipe, resume
        self.run: dict[str, str] = {}
        self.path = Path(recipe.output_dir).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self._lock = None

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    def summary(self) -> dict:
        return read_run_file(
            self.path / "summary.json",
            "--resume writes it again from the last checkpoint, once it is deleted",
        )

    def check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir: {self.path} is a file; name a folder")
        nearest = next(p for p in (self.path, *self.path.absolute().parents) if p.exists())
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"output_dir: {nearest} cannot be written to; choose another folder")
        if not self.path.exists():
            _try_to_make(nearest / self.path.absolute().relative_to(nearest).parts[0], self.path)
        if self.path.is_dir() and not (self.path / "recipe.yaml").exists() and any(self._foreign()):
            raise UserError(f"output_dir: {self.path} is not empty and holds no run of llmkd; choose another folder")
        if not self.resume:
            if self.finished:
                raise UserError(f"output_dir: {self.path} holds a finished run; choose another folder, or remove it")
            if (self.path / "recipe.yaml").exists():
                raise UserError(f"output_dir: {self.path} holds an unfinished run; continue it with --resume, or choose another folder")
        elif (self.path / "recipe.yaml").exists():
            before, now = (comparable(one) for one in (load_recipe(self.path / "recipe.yaml"), self.recipe))
            differing = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
            changed = [k for k in differing if not may_change_on_resume(k)]
            if changed:
                raise UserError(
                    *(
                        f"{k}: {before.get(k)!r} in the run that is to be resumed and {now.get(k)!r} now; give it as it was, or choose another output_dir"
                        for k in changed
                    )
                )

    def _foreign(self):
        """What lies in the folder beyond a lock and what a kill may leave of the very first writes."""
        return (p for p in self.path.iterdir() if p.name != ".lock" and not is_leftover(p))

    def claim(self, identity: dict[str, str]) -> dict[str, str]:
        """Create the folder, lock it for this process's life, and compare `identity` (hashes of data, models, tokenizer). Returns `run`."""
        self._lock = lock_folder(self.path)
        self.check()  # another run may have come and gone meanwhile
        for name in ("*.yaml", "*.json", "*.jsonl"):
            remove_leftovers(self.path, name)
        known, settings = self.path / IDENTITY, {SETTINGS: _settings_hash(self.recipe)}
        if known.exists():
            before = _identity(self.path)
            if before.keys() & {"the student's base", "the teacher"}:
                raise UserError(
                    f"output_dir: {self.path} was started by an earlier version of llmkd, which recorded samples of the models' weights; "
                    "finish it with that version, or choose another output_dir"
                )
            for what, value in identity.items():
                if before.get(what) != value:
                    raise UserError(
                        f"{what} has changed since the run in {self.path} was started; restore what it was, or choose another output_dir"
                    )
            identity = settings | before  # `check` has compared the settings; a later version may hash them otherwise
        write_atomic(
            self.path / "recipe.yaml", dump(self.recipe, self.path)
        )  # first: it marks the folder as a run's, so that a kill here can be resumed
        write_sealed(known, settings | identity)
        self.run = _run(settings | identity)
        return self.run

    def release(self) -> None:
        if self._lock and not self._lock.closed:
            self._lock.truncate(0)
            self._lock.close()


def run_of(folder: Path) -> dict[str, str]:
    """`RunFolder.run` of a run that was started. UserError where it is not known."""
    return _run(_identity(folder))


def _identity(folder: Path) -> dict:
    return read_run_file(
        folder / IDENTITY, "put it back as it was; if it is lost, delete it, and --resume goes by the checkpoints' own record"
    )


def _run(identity: dict) -> dict[str, str]:
    return {"settings": str(identity.get(SETTINGS)), "data or models": checksum({k: v for k, v in identity.items() if k != SETTINGS})}


def _settings_hash(recipe: Recipe) -> str:
    return checksum({key: value for key, value in comparable(recipe).items() if not may_change_on_resume(key)})


def read_run_file(path: Path, fix: str) -> dict:
    """A JSON file of a run's or a sweep's folder. UserError, which says what to do (`fix`), where it cannot be read or is not what was written."""
    try:
        return read_sealed(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
    except Damaged as error:
        raise UserError(f"{path}: is damaged ({error}); {fix}") from error


def _try_to_make(folder: Path, whole: Path) -> None:
    """UserError where `folder`, the first missing part of the path `whole`, cannot be made: access rights do not tell (/proc, a read-only mount)."""
    try:
        folder.mkdir()
    except FileExistsError:  # another process has made it
        return
    except OSError as error:
        if folder.parent.is_dir():  # else another process had only tried it: `claim` tells
            raise UserError(f"output_dir: {whole} cannot be made ({error.strerror}); choose another folder") from error
        return
    with contextlib.suppress(OSError):  # another process has put something into it
        folder.rmdir()


def lock_folder(folder: Path, setting: str = "output_dir"):
    """Create the folder and lock it: for one process at a time, until the file that is returned is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{setting}: {folder} cannot be created ({error.strerror}); choose another folder") from error
    try:
        held = lock_file(folder / ".lock")
    except FileLocked as owner:
        raise UserError(f"{setting}: {folder} is in use by {str(owner) or 'another run'}; wait for it, or choose another folder") from None
    except OSError as error:
        raise UserError(f"{setting}: {folder} cannot be locked ({error.strerror}); choose a folder on another file system") from error
    held.truncate(0)
    held.write(f"process {os.getpid()} on {socket.gethostname()}")
    held.flush()
    return held
