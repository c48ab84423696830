"""The folder of a run: locked by one run at a time, never silently overwritten, and resumed only with the same recipe, data and models."""

import errno
import os
import socket
from pathlib import Path

from ..config.loader import comparable, dump, load_recipe
from ..config.recipe import Recipe
from ..config.schema import may_change_on_resume
from ..errors import UserError
from ..files import FileLocked, is_leftover, lock_file, remove_leftovers, try_to_make_in, write_atomic
from .run_files import (
    IDENTITY,
    OF_THE_RUN,
    RECIPE,
    SUMMARY,
    other_settings,
    read_identity,
    read_summary,
    recipe_is_changed,
    write_identity,
)


class RunFolder:
    """The folder of a run. `check()` refuses early and leaves nothing behind; `claim()` creates and locks the folder.

    run   the identity of the run, see `run_files.run_of`; known after `claim`
    """

    def __init__(self, recipe: Recipe, resume: bool):
        self.recipe, self.resume = recipe, resume
        self.run: dict[str, str] = {}
        self.path = Path(recipe.output_dir).expanduser()
        self.checkpoints = self.path / "checkpoints"
        self._lock = None

    @property
    def finished(self) -> bool:
        return (self.path / SUMMARY).exists()

    def summary(self) -> dict:
        path, fix = self.path / SUMMARY, "--resume writes it again from the last checkpoint, once it is deleted"
        found = read_summary(self.path, fix)
        if lacking := {"steps", "output"} - found.keys():
            raise UserError(f"{path}: is damaged (it has no {min(lacking)}); {fix}")
        return found

    @property
    def started(self) -> bool:
        """Whether it holds a run. `recipe.yaml` is written first; it may be lost later."""
        return (self.path / RECIPE).exists() or (self.path / IDENTITY).exists()

    def check(self) -> None:
        """UserError if the folder cannot be used, or holds something else than the run that is to be resumed."""
        refuse_unwritable(self.path, "output_dir")
        if self.path.is_dir() and not self.started and any(self._foreign()):
            raise UserError(f"output_dir: {self.path} is not empty and holds no run of llmkd; choose another folder")
        if not self.resume:
            if self.finished:
                raise UserError(f"output_dir: {self.path} holds a finished run; choose another folder, or remove it")
            if self.started:
                raise UserError(f"output_dir: {self.path} holds an unfinished run; continue it with --resume, or choose another folder")
        elif self.started:
            self._compare_settings()

    def _compare_settings(self) -> None:
        """UserError for each setting that a resumed run may not change."""
        path, fix = self.path / RECIPE, f"restore it, or delete it: --resume then compares with {IDENTITY}"
        if not path.exists():
            if other_settings(self.path, self.recipe):
                raise UserError(
                    f"output_dir: the settings differ from those with which the run in {self.path} was started, and {path}, which lists "
                    "those, is missing; use the former settings, or choose another output_dir"
                )
            return
        try:
            before, now = (comparable(one) for one in (load_recipe(path), self.recipe))
        except UserError as error:
            if recipe_is_changed(self.path) or not path.is_file():
                raise UserError(f"{path}: is damaged ({error.problems[0]}); {fix}") from error
            raise
        differing = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
        changed = [k for k in differing if not may_change_on_resume(k)]
        if changed and recipe_is_changed(self.path):
            raise UserError(f"{path}: is damaged (it is not what was written); {fix}")
        if changed:
            raise UserError(
                *(
                    f"{k}: {before.get(k)!r} in the run that is to be resumed and {now.get(k)!r} now; use the former value, or choose another output_dir"
                    for k in changed
                )
            )

    def _foreign(self):
        """The entries of the folder other than a lock and leftovers of a kill during the first writes."""
        return (p for p in self.path.iterdir() if p.name != ".lock" and not is_leftover(p))

    def claim(self, identity: dict[str, str]) -> dict[str, str]:
        """Create the folder, lock it until `release` or the end of the process, and compare `identity` (hashes of data, models, tokenizer). Returns
        `run`. UserError if it belongs to another run."""
        self._lock = lock_folder(self.path)
        self.check()  # another run may have used the folder meanwhile
        for folder in (self.path, self.checkpoints, self.path / "trackers"):
            remove_leftovers(folder)
        if (self.path / IDENTITY).exists():
            before = read_identity(self.path)
            if before.keys() & {"the student's base", "the teacher"}:
                raise UserError(
                    f"output_dir: {self.path} was started by an earlier version of llmkd, which recorded samples of the models' weights; "
                    "finish it with that version, or choose another output_dir"
                )
            for what in (*identity, *sorted(before.keys() - identity.keys() - OF_THE_RUN)):
                if before.get(what) != identity.get(what):
                    raise UserError(
                        f"{what} {'has changed' if what in identity else 'is gone'} since the run in {self.path} was started; restore it, or choose another output_dir"
                    )
            identity = before  # with the hash of the settings, which a later version may compute differently
        # the recipe first: it marks the folder as that of a run, so that a run killed here can be resumed
        write_atomic(self.path / RECIPE, dump(self.recipe, self.path))
        self.run = write_identity(self.path, self.recipe, identity)
        return self.run

    def check_there(self) -> None:
        """OSError if the folder was moved, removed or taken by another run since it was claimed: then nothing may be written to it.

        It compares the lock's content, since inodes may change on network drives.
        """
        path = self.path / ".lock"
        self._lock.seek(0)
        if path.read_text(encoding="utf-8") != self._lock.read():
            raise FileNotFoundError(errno.ENOENT, "another run has taken its place", str(path))

    def release(self) -> None:
        if self._lock and not self._lock.closed:
            self._lock.truncate(0)
            self._lock.close()


def refuse_unwritable(path: Path, setting: str) -> None:
    """UserError unless there is a writable folder at `path`, or one can be created. Nothing is left behind."""
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{setting}: {path} is a {'file' if path.exists() else 'link that leads nowhere'}; name a folder")
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{setting}: {nearest} cannot be written to; choose another folder")
    if not path.exists():
        try:
            try_to_make_in(nearest)
        except OSError as error:
            raise UserError(f"{setting}: {path} cannot be created ({error.strerror}); choose another folder") from error


def lock_folder(folder: Path, setting: str = "output_dir"):
    """Create the folder and lock it for one process, until the returned file is closed. UserError if another process holds the lock."""
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
    held.write(f"process {os.getpid()} on {socket.gethostname()}".encode(errors="replace").decode())  # a host name may not be UTF-8
    held.flush()
    return held
