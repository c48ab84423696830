"""SIGTERM, SIGINT, SIGHUP, SIGUSR1 and the end of the launcher ask a run to stop; a second signal ends it at once. Other commands end at the first."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from ..console import first_process
from ..errors import Stopped
from ..process.rank_messages import ending_with_others
from .launcher import watch_launcher

#: Windows knows only some of them.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


@contextlib.contextmanager
def end_on_signal(again: str) -> Iterator[None]:
    """Let a signal end the command as Ctrl-C does, with a KeyboardInterrupt, on the way of which half-written files are removed.

    A second signal kills at once. For commands, and phases of them, in which no `ShutdownRequest` handles the signals.

    again   how to continue, for the message
    """

    def interrupt(number: int, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}; nothing half-written is left; {again}")

    with contextlib.ExitStack() as on_exit:
        for number in _SIGNALS if threading.current_thread() is threading.main_thread() else ():
            if (before := signal.getsignal(number)) == signal.SIG_DFL:
                signal.signal(number, interrupt)
                on_exit.callback(signal.signal, number, before)
        yield


class ShutdownRequest:
    """Handles the signals while it is entered. Calling it returns whether this process was asked to stop."""

    def __init__(self, then: str = "finishing this step and saving"):
        self.asked, self._then = False, then
        self._on_exit = contextlib.ExitStack()

    def __enter__(self) -> "ShutdownRequest":
        for number in _SIGNALS:
            before = signal.getsignal(number)
            if before != signal.SIG_IGN:  # nohup ignores SIGHUP, and a background job of a shell SIGINT: stay with that
                signal.signal(number, self._on_signal)
                self._on_exit.callback(signal.signal, number, before)
        self._on_exit.enter_context(watch_launcher(lambda: self.asked or self._ask("the launcher has ended")))
        self._on_exit.enter_context(ending_with_others())
        return self

    def __exit__(self, *_) -> None:
        self._on_exit.close()

    def __call__(self) -> bool:
        return self.asked

    def _on_signal(self, number, frame) -> None:
        if self.asked:
            os._exit(Stopped.exit_code)
        self._ask("asked to stop")

    def _ask(self, why: str) -> None:
        self.asked = True
        if first_process():
            with contextlib.suppress(OSError):  # stderr may be closed
                os.write(2, f"\nllmkd: {why}; {self._then} (a second signal ends at once)\n".encode())

    def any_rank(self, accelerator) -> bool:
        """Whether any process was asked to stop. A collective: every rank must call it."""
        if accelerator.num_processes == 1:
            return self.asked
        import torch

        return bool(accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device), "sum") > 0)
