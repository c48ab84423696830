"""The client of the processes in which sounds and images are decoded and augmented (`worker.py`).

What is read follows from its job alone, so how many processes there are, and which of them a job goes to, changes nothing but speed.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ...errors import ChangedFiles, UserError
from .worker import Job, Way

_START = "import sys; sys.path[:0] = sys.argv[1:]; from llmkd.data.media.worker import main; main()"


class MediaWorkers:
    """`count` processes. They are started at the first job, and end by `close`, with this object or with this process."""

    def __init__(self, way: Way, count: int):
        self.way, self.count = way, count
        self._lock = threading.Lock()  # validation and the prefetch of a training batch may both ask
        self._processes: list[subprocess.Popen] = []
        self._threads: ThreadPoolExecutor | None = None
        self._end: weakref.finalize | None = None  # ends the processes, at the latest with this object or with the program

    def __call__(self, jobs: Sequence[Job]) -> list[np.ndarray]:
        """The samples or pixels of the jobs, in their order. UserError for the first job of a process that is refused."""
        with self._lock:
            if not self._processes:
                self._start()
            parts = [jobs[i :: self.count] for i in range(self.count)]
            asked = [self._threads.submit(_ask, process, part) for process, part in zip(self._processes, parts, strict=True) if part]
            try:
                answers = [one.result() for one in asked]
            except BaseException:  # answers to this question must not be taken for those to the next one
                self.close()
                raise
        return [answers[i % self.count][i // self.count] for i in range(len(jobs))]

    def close(self) -> None:
        if self._end:
            self._end()
        self._processes, self._threads, self._end = [], None, None

    def _start(self) -> None:
        path = filter(None, [str(Path(__file__).parents[3]), *sys.path])
        command = [sys.executable, "-S", "-E", "-c", _START, *path]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._threads = ThreadPoolExecutor(self.count, "llmkd-media")
        for _ in range(self.count):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
            self._processes.append(process)
            _write(process, self.way)
        self._end = weakref.finalize(self, _close, self._processes, self._threads)


def _close(processes: list[subprocess.Popen], threads: ThreadPoolExecutor) -> None:
    for process in processes:
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        process.wait()
    threads.shutdown(wait=False)


def _write(process: subprocess.Popen, value) -> None:
    pickle.dump(value, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
    process.stdin.flush()


def _ask(process: subprocess.Popen, jobs: Sequence[Job]) -> list[np.ndarray]:
    try:
        _write(process, list(jobs))
        kind, answer = pickle.load(process.stdout)
    except (EOFError, BrokenPipeError, ConnectionResetError, pickle.UnpicklingError) as error:
        ended = f"exit code {process.wait()}" if process.poll() is not None else type(error).__name__
        raise RuntimeError(f"the process that decodes files ended ({ended}) at one of {jobs[0].place} to {jobs[-1].place}") from None
    if kind == "read":
        return answer
    if kind == "bug":
        raise RuntimeError(answer)
    raise (ChangedFiles if kind == "changed" else UserError)(*answer)
