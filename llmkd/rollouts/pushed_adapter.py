"""The student's adapter on a server: saved to a folder that the server sees, loaded there under a unique name, and removed again."""

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
    """The adapter of one run's student. Every push has a new name, so that a server's caches for a name are never those of another adapter.

    folder   where it is saved; the server must see it under the same path
    run      distinguishes this run's adapters from others on the server, such as the path of the run's folder

    Only one process calls `push` and `close`; `name` and `path` describe what was pushed last.
    """

    def __init__(self, server: Server, student: LanguageModel, folder: Path, run: str):
        self.server, self.student, self.folder = server, student, folder.absolute()
        self.prefix = f"llmkd-{hashlib.blake2b(run.encode(), digest_size=4).hexdigest()}-"
        self._token, self._pushes = secrets.token_hex(3), 0  # another process may have other weights at the same step
        self._lock = threading.Lock()
        self.name: str | None = None

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def rank(self) -> int:
        """The largest rank of the adapter's matrices."""
        config = self.student.model.peft_config[self.student.adapter or "default"]
        return max([config.r, *(config.rank_pattern or {}).values()])

    def push(self, ask: Callable[[Callable[[], None]], None]) -> str:
        """Save the current adapter and load it on the server; unload and remove the previous one. Returns its name on the server.

        ask   calls a function that makes a request
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
        """Load the adapter again if the server has lost it, since it was restarted. Several threads may call this at once."""
        with self._lock:
            if self.name in self._served():
                return
            warn(f"note: {SETTING}.server: {self.server.address} has lost the adapter, probably by a restart; it is pushed again")
            self._load()

    def _load(self) -> None:
        load_adapter(self.server, self.name, str(self.path), self.rank, SETTING)

    def remove_others(self) -> None:
        """Remove what a killed process of this run has left on the server and in the folder."""
        for name in self._served():
            if name.startswith(self.prefix):
                unload_adapter(self.server, name)
        for path in self.folder.glob(f"{self.prefix}*"):
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Remove the adapter. A server that does not answer keeps it until the run is started again."""
        if self.name is not None:
            self._remove(self.name)
            self.name = None
            with contextlib.suppress(OSError):  # other runs may use the folder
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
