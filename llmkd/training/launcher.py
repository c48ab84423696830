"""The launcher that started this process (`accelerate launch`, torchrun), and a watch on whether it is still there.

`accelerate launch` on one process forwards no signal to the run: SIGTERM ends the launcher, and the run would train on as an
orphan. SIGUSR1 ends torchrun in the same way. A run therefore stops, with a checkpoint, when its launcher is gone.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

#: One of them is set in the environment of every process that a launcher starts. They are inherited, so the parent is looked at too.
_MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
_COMMANDS = (b"accelerate", b"torchrun", b"torch.distributed")
_SECONDS = 0.25  # between two looks
launchers: dict[int, int | None] = {}  # the launcher by the id of the process that asked


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
    except OSError:  # no /proc on macOS: the environment must do
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
