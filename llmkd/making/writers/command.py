"""A writer that is a program: it reads asks and writes answers as JSON lines, in any order. No torch."""

import json
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from ...config.make import Writer as Settings
from ...console import printable
from ...errors import UserError
from ..asks import STOP, Answer, Ask, failed
from .outside import MOST_OF_FINISH, Ending, bad_text, counted, in_a_word, told

_LONGEST = 64 << 20  # bytes of a line


class ProgramWriter:
    """The program's stdin gets a line for each ask: `key`, `messages`, `temperature`, `max_tokens`, `top_p`, `top_k`, `min_p`, `seed`, and for a sound
    `audio`. Its stdout gives a line for each answer: `key` and `text`, optionally `finish`, `tokens` and `prompt_tokens`; or `key` and `error`.
    At most `writer.requests` asks are open at a time, and stdin is closed at the end.
    """

    def __init__(self, settings: Settings, stop: Callable[[], bool]):
        self.settings, self.stop = settings, stop
        self.command = list(settings.command)
        self.label = settings.model or self.command[0]
        self.identity: dict[str, Any] = {"model": settings.model} if settings.model else {"command": self.command}
        self._process: subprocess.Popen | None = None
        self._lines: queue.SimpleQueue = queue.SimpleQueue()
        self._asks: queue.SimpleQueue = queue.SimpleQueue()
        self._said: deque[str] = deque(maxlen=1)
        self._messages: threading.Thread | None = None  # reads its stderr

    def check(self) -> None:
        pass

    def write(self, asks: Sequence[Ask], known: Collection[str]) -> Iterator[tuple[Ask, Answer]]:
        waiting, running = deque(ask for ask in asks if ask.key not in known), {}
        most, timeout = self.settings.of_server("requests"), self.settings.of_server("timeout")
        end = Ending(self.stop, "writer.command")
        try:
            until = time.monotonic() + timeout
            while waiting or running:
                end.follow(len(running))
                while waiting and len(running) < most and not end.asked:
                    ask = waiting.popleft()
                    running[ask.key] = ask
                    self._send(ask)
                try:
                    line = self._lines.get(timeout=min(0.5, timeout))
                except queue.Empty:
                    if time.monotonic() > until:
                        raise UserError(
                            f"writer.command: {self._name} has written nothing for {timeout:g} seconds; raise writer.timeout"
                        ) from None
                    continue
                ask, answer = self._read(line, running)
                del running[ask.key]
                until = time.monotonic() + timeout
                yield ask, answer
        except BaseException:
            if self._process is not None:
                self._process.terminate()
            self.close()
            raise

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        self._asks.put(None)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def _name(self) -> str:
        return self.command[0]

    def _start(self) -> subprocess.Popen:
        try:
            process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        except OSError as error:
            raise UserError(f"writer.command: {self._name} cannot be started ({error.strerror}); check its name and its rights") from error
        lines, asks = queue.SimpleQueue(), queue.SimpleQueue()  # new ones, since an earlier process may have left lines in the old ones
        self._lines, self._asks = lines, asks
        said = self._said = deque(maxlen=1)

        def read_answers() -> None:
            with process.stdout:
                while line := process.stdout.readline(_LONGEST):
                    lines.put(line)
            lines.put(None)

        def write_asks() -> None:
            try:
                with process.stdin:
                    while (line := asks.get()) is not None:
                        process.stdin.write(line)
                        process.stdin.flush()
            except OSError:  # the process has ended, which `read_answers` notices
                pass

        def read_messages() -> None:
            with process.stderr:
                for line in process.stderr:
                    said.append(printable(line.decode("utf-8", "replace").rstrip())[:300])

        started = {
            work: threading.Thread(target=work, name="llmkd-command", daemon=True) for work in (read_answers, read_messages, write_asks)
        }
        for thread in started.values():
            thread.start()
        self._messages = started[read_messages]
        return process

    def _send(self, ask: Ask) -> None:
        if self._process is None:
            self._process = self._start()
        sampling = ask.sampling
        line = {
            "key": ask.key,
            "messages": list(ask.messages),
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_new_tokens,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "seed": sampling.seed,
        } | ({"audio": ask.audio.file} if ask.audio else {})
        self._asks.put(json.dumps(line).encode() + b"\n")  # by a thread: a program that does not read must not block this one

    def _read(self, line: bytes | None, running: dict[str, Ask]) -> tuple[Ask, Answer]:
        if line is None:
            raise self._ended()
        try:
            found = json.loads(line)
            ask = running[found["key"]]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"writer.command: {self._name} has written {printable(line[:80].decode('utf-8', 'replace'))!r}, "
                "expected a line of JSON with the key of an ask and text; its messages belong to stderr"
            ) from None
        text, cost = found.get("text"), (told(found.get("tokens"), 0), told(found.get("prompt_tokens"), 0))
        if found.get("error") is not None:
            return ask, failed(f"the program says: {printable(str(found['error']))[:300]}", *cost)
        if not isinstance(text, str) or bad_text(text):
            return ask, failed(bad_text(text) if isinstance(text, str) else "the program's answer has no text", *cost)
        tokens, read = counted(ask, text, found.get("tokens"), found.get("prompt_tokens"))
        finish = found.get("finish")
        return ask, Answer(text, in_a_word(finish, MOST_OF_FINISH) if isinstance(finish, str) else STOP, tokens, read)

    def _ended(self) -> UserError:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        self._messages.join(1)  # its last message may follow the end of its stdout; but a child of it may keep its stderr open forever
        said = f"; its last words: {self._said[-1]}" if self._said else ""
        return UserError(
            f"writer.command: {self._name} has ended {f'with exit code {code} ' if code is not None else ''}before it answered all asks{said}; "
            "what it has written is kept, and the same command goes on"
        )
