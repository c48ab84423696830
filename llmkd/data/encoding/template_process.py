"""The client of the process in which chat templates run (`template_worker.py`)."""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from ...errors import UserError
from . import template, template_worker
from .locate import NotShown

_FIX = "it may have an endless loop; use a tokenizer with another chat template, or correct it"
_MANY = "it renders each answer of a row with all turns before it; set answers: last, or write rows of fewer turns"
_START = "import sys; sys.path[:0] = sys.argv[1:]; from llmkd.data.encoding.template_worker import main; main()"


class _Process:
    """The process for all threads. It is started at the first job, and again after it has ended."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, job: dict) -> dict:
        with self._lock:
            for attempt in (1, 2):
                try:
                    process = self._running()
                    template_worker.write(process.stdin, job)
                    answer = template_worker.read(process.stdout)
                except (BrokenPipeError, ConnectionResetError):
                    answer = None
                except BaseException:  # such as a signal: the answer to this job must not be taken for that to the next one
                    self.close(kill=True)
                    raise
                if answer is not None:
                    return answer
                code = self.close()
                if attempt == 2 or code in (-signal.SIGPROF, template_worker.OUT_OF_MEMORY):
                    raise UserError(_ended(code))

    def close(self, kill: bool = False) -> int | None:
        """End the process and return its exit code."""
        process, self._process = self._process, None
        if not process:
            return None
        if kill:
            process.kill()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()
        return process.wait()

    def forget(self) -> None:
        """Forget the process in the child of a fork: it belongs to the parent."""
        self._process, self._lock = None, threading.Lock()

    def _running(self) -> subprocess.Popen:
        if not self._process:
            path = [str(Path(__file__).parents[3]), *sys.path]
            command = [sys.executable, "-S", "-E", "-c", _START, *filter(None, path)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        return self._process


def _ended(code: int | None) -> str:
    if code == -signal.SIGPROF:
        return f"the tokenizer's chat template takes more than {template.SECONDS} s for one conversation; {_FIX}"
    if code == template_worker.OUT_OF_MEMORY:
        return f"the tokenizer's chat template takes more than {template_worker.MEMORY >> 30} GB of memory for one conversation; {_FIX}; or {_MANY}"
    how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
    return f"the tokenizer's chat template ended the process in which it runs ({how}); {_FIX}"


_PROCESS = _Process()
close = _PROCESS.close
atexit.register(close)
os.register_at_fork(after_in_child=_PROCESS.forget)


def rendered(template: str, tokens: dict[str, str], messages: list[dict]) -> str:
    """The messages in a chat template, with the generation prompt. ValueError if it raises, UserError if it takes too much time or memory."""
    return _result({"do": "rendered", "template": template, "tokens": tokens, "messages": messages})


def conversation(job: dict) -> dict:
    """See `template_worker.conversation`. ValueError if the row is refused, UserError if the template takes too much time or memory."""
    return _result({"do": "conversation", **job})


def _result(job: dict):
    answer = _PROCESS.ask(job)
    if "refused" in answer:
        raise (NotShown if answer.get("not_shown") else ValueError)(answer["refused"])
    if "out_of_time" in answer:
        raise UserError(f"the tokenizer's chat template takes more than {template.ROW_SECONDS} s for one row: {_MANY}")
    if "bug" in answer:
        raise RuntimeError(answer["bug"])
    return answer["result"]
