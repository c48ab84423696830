"""The process in which chat templates run: JSON in, JSON out, little memory, and CPU time for each rendering.

It ignores the signals of a terminal and of a launcher: it ends with the process that started it, when its input does, or when idle.
Besides the standard library it imports Jinja only, so that it starts in a tenth of a second.
"""

import contextlib
import json
import os
import re
import resource
import select
import signal
import traceback
from pathlib import Path
from typing import BinaryIO

from .bound import Bound
from .forms import prompt, settle
from .locate import NotShown, texts
from .template import OutOfTime, begin_row

MEMORY = 1 << 30  # bytes
OUT_OF_MEMORY = 77  # the exit code
_IDLE = 60  # seconds


def rendered(job: dict) -> str:
    return prompt(job["template"], job["tokens"], job["messages"])


def conversation(job: dict) -> dict:
    """The texts of a conversation, see `chat.conversation`, and what the template does not show."""
    probe, text, unshown = settle(
        job["template"],
        job["tokens"],
        job["messages"],
        job["tools"],
        job["marker"],
        re.compile(job["control"]),
        job["end"],
        job["call_values"],
    )
    if job["plain"]:  # the same without guards
        messages, tools = job["plain"]
        if text.replace(job["guard"], "") != probe.render(messages, tools=tools):
            raise ValueError("a message contains a control token that the chat template acts on; remove it from the text")
    bound = Bound(**job["bound"]) if job["bound"] else None
    out = texts(job["messages"], job["turns"], probe, text, bound, job["guard"])
    names = {key if key == "tools" else f"messages[].{key}" for i, key in unshown if (i, key) not in probe.found}
    return {"texts": out, "unshown": sorted(names)}


def read(file: BinaryIO) -> dict | None:
    """The next message; None at the end."""
    head = file.read(8)
    body = file.read(int.from_bytes(head)) if len(head) == 8 else b""
    return json.loads(body) if body else None


def write(file: BinaryIO, message: dict) -> None:
    body = json.dumps(message, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>").encode("utf-8", "surrogatepass")
    file.write(len(body).to_bytes(8) + body)
    file.flush()


def _address_space() -> int:
    """Bytes, before any template."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux
        return 0


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for kind, most in ((resource.RLIMIT_AS, _address_space() + MEMORY), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # a system without this limit, or with a lower one
            resource.setrlimit(kind, (most, most))
    with open(0, "rb") as jobs, open(1, "wb") as replies:
        while select.select([jobs], [], [], _IDLE)[0] and (job := read(jobs)):
            begin_row()
            try:
                answer = {"result": {"rendered": rendered, "conversation": conversation}[job["do"]](job)}
            except ValueError as error:
                answer = {"refused": str(error), "not_shown": isinstance(error, NotShown)}
            except OutOfTime:
                answer = {"out_of_time": True}
            except RecursionError:
                answer = {"refused": "nested too deeply; give it fewer levels"}
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
            except Exception:
                answer = {"bug": traceback.format_exc()}
            try:
                write(replies, answer)
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
