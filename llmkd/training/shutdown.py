"""SIGTERM, SIGINT and SIGUSR1 ask a run to stop; a second one ends it at once."""

import os
import signal

from ..console import first_process
from ..errors import Stopped


class ShutdownRequest:
    """Handles the signals while it is entered. Calling it returns whether this process was asked to stop."""

    def __init__(self, then: str = "finishing this step and saving"):
        self.asked, self._then = False, then
        self._before: dict[int, object] = {}

    def __enter__(self) -> "ShutdownRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.asked

    def _on_signal(self, number, frame) -> None:
        if self.asked:
            os._exit(Stopped.exit_code)
        self.asked = True
        if first_process():
            os.write(2, f"\nllmkd: asked to stop; {self._then} (a second signal ends at once)\n".encode())

    def any_rank(self, accelerator) -> bool:
        """Whether any process was asked to stop. A collective: every rank must call it."""
        if accelerator.num_processes == 1:
            return self.asked
        import torch

        return bool(accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device), "sum") > 0)
