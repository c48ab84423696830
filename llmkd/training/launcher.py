"""The launcher that started this process (`accelerate launch`, torchrun), and a watch on whether it is still running.

`accelerate launch` with one process forwards no signal to the run: SIGTERM ends the launcher, and the run would go on as an orphan.
SIGUSR1 ends torchrun in the same way. A run therefore stops, with a checkpoint, when its launcher ends.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

#: Every process that a launcher starts has one of them in its environment. Its own children inherit them, so the parent is checked too.
_MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
_COMMANDS = (b"accelerate", b"torchrun", b"torch.distributed")
_SECONDS = 0.25  # between two checks
launchers: dict[int, int | None] = {}  # the launcher of each process that asked, by process id


def launcher_pid() -> int | None:
    """The process id of the launcher that was this process's parent at the first call, or None without a launcher.

    The command line calls this at its start, since a launcher may end while a run is still reading its data.
    """
    process = os.getpid()  # a fork has a parent of its own
    if process not in launchers:
        launchers[process] = _find_launcher()
    return launchers[process]


def _find_launcher() -> int | None:
    if not any(mark in os.environ for mark in _MARKS):
        return None
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:  # macOS has no /proc: trust the environment
        return parent
    return parent if any(name in command for name in _COMMANDS) else None


@contextlib.contextmanager
def watch_launcher(on_exit: Callable[[], None]) -> Iterator[None]:
    """Call `on_exit` once, from a thread, if the launcher ends while the context is open. Does nothing without a launcher."""
    launcher, closed = launcher_pid(), threading.Event()

    def watch() -> None:
        while not closed.wait(_SECONDS):
            if os.getppid() != launcher:
                return on_exit()

    thread = threading.Thread(target=watch, name="watch_launcher", daemon=True)
    if launcher:
        thread.start()
    try:
        yield
    finally:
        closed.set()
        if launcher:
            thread.join()
