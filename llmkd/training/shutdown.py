"""SIGTERM, SIGINT and SIGUSR1 ask a run to stop; a second one ends it at once."""

import os
import signal

from ..console import first_process
from ..errors import Stopped


class StopRequest:
    """Installed for as long as it is entered. Calling it tells whether this process was asked to stop."""

    def __init__(self, then: str = "finishing this step and saving"):
        self.asked, self._then = False, then
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        return self.asked

    def _hear(self, number, frame) -> None:
        if self.asked:
            os._exit(Stopped.exit_code)
        self.asked = True
        if first_process():
            os.write(2, f"\nllmkd: asked to stop; {self._then} (a second signal ends at once)\n".encode())

    def anywhere(self, accelerator) -> bool:
        """Whether any process was asked. Reached by all ranks alike."""
        if accelerator.num_processes == 1:
            return self.asked
        import torch

        return bool(accelerator.reduce(torch.tensor(float(self.asked), device=accelerator.device), "sum") > 0)
