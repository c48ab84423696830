"""Threads for several requests to a server at a time. No torch."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future


class Workers:
    """A pool of daemon threads: a request that hangs does not keep the process alive."""

    def __init__(self, count: int):
        self._count, self._queue, self._started = count, queue.SimpleQueue(), False

    def submit(self, work: Callable[[], object]) -> Future:
        if not self._started:
            self._started = True
            for _ in range(self._count):
                threading.Thread(target=self._work, name="llmkd-server", daemon=True).start()
        future = Future()
        self._queue.put((work, future))
        return future

    def _work(self) -> None:
        while True:
            work, future = self._queue.get()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
