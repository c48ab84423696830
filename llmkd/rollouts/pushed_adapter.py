"""The student's adapter on a server: saved in a folder that the server sees, loaded there under a name of its own, and taken away again."""

import contextlib
import hashlib
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from ..console import warn
from ..errors import UserError
from ..models import adapters
from ..models.language_model import LanguageModel
from ..servers.adapters import load_adapter, unload_adapter
from ..servers.client import Refused, Server
from ..servers.logprobs import ServedModel, WrongAnswer, served_models

SETTING = "on_policy.engine"


class PushedAdapter:
    """The adapter of one run's student. Every push has a new name, so that nothing that a server keeps for a name is taken for another's.

    folder   where it is saved; the server must see it under the same path
    run      what tells this run's adapters from those of others on the server, such as its own folder's path

    `push` and `close` are for one process; the others say what it has pushed (`name`, `path`).
    """

    def __init__(self, server: Server, student: LanguageModel, folder: Path, run: str):
        self.server, self.student, self.folder = server, student, folder.absolute()
        self.prefix = f"llmkd-{hashlib.blake2b(run.encode(), digest_size=4).hexdigest()}-"
        self._token, self._pushes = secrets.token_hex(3), 0  # the same steps of another process may have other weights
        self._lock = threading.Lock()
        self.name: str | None = None

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def rank(self) -> int:
        """Of the adapter's matrices, the largest."""
        config = self.student.model.peft_config[self.student.adapter or "default"]
        return max([config.r, *(config.rank_pattern or {}).values()])

    def push(self, ask: Callable[[Callable[[], None]], None]) -> str:
        """Save the adapter as it is now and load it at the server; the one before is unloaded and removed. Returns its name there.

        ask   calls a function that asks the server
        """
        before, self._pushes = self.name, self._pushes + 1
        if before is None:
            self.remove_others()
        self.name = f"{self.prefix}{self._token}-{self._pushes}"
        self.path.mkdir(parents=True)
        adapters.save(self.student.model, self.path, self.student.adapter or "default")
        ask(self._load)
        if before is not None:
            self._remove(before)
        return self.name

    def again(self) -> None:
        """Load it once more, where the server was started anew and has it no longer. Several threads may ask for it at once."""
        with self._lock:
            if self.name in self._served():
                return
            warn(f"note: {SETTING}.server: {self.server.address} has lost the adapter, so it was started anew; it is pushed again")
            self._load()

    def _load(self) -> None:
        load_adapter(self.server, self.name, str(self.path), self.rank, SETTING)

    def remove_others(self) -> None:
        """Take away what a process of this run that was killed has left, at the server and in the folder."""
        for name in self._served():
            if name.startswith(self.prefix):
                unload_adapter(self.server, name)
        for path in self.folder.glob(f"{self.prefix}*"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Take the adapter away. A server that does not answer keeps it until the run is started again."""
        if self.name is not None:
            self._remove(self.name)
            self.name = None
            with contextlib.suppress(OSError):  # others use the folder too
                self.folder.rmdir()

    def _remove(self, name: str) -> None:
        with contextlib.suppress(UserError, Refused):
            unload_adapter(self.server, name, patience=0.0)
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def _served(self) -> list[str]:
        try:
            return [one.name for one in served_models(self.server)]
        except (WrongAnswer, Refused) as error:
            raise UserError(f"{SETTING}.server: {self.server.address} {error}") from None

    def served(self, base: ServedModel) -> ServedModel:
        """The adapter as a model of the server, on that base."""
        return ServedModel(self.name, base.name, base.positions)
