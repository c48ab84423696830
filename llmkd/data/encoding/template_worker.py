"""The process in which chat templates run: JSON in, JSON out, with limits on memory and on the CPU time of a rendering.

It ignores the signals of a terminal and of a launcher: it ends when its input does, with the process that started it, or when it has been
idle. Besides the standard library it imports Jinja only, so that it starts in a tenth of a second.
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
OUT_OF_MEMORY = 77  # exit code
_IDLE = 60  # seconds


def rendered(job: dict) -> str:
    return prompt(job["template"], job["tokens"], job["messages"])


def conversation(job: dict) -> dict:
    """{"texts": see `locate.texts`, "unshown": the names of keys that the template does not show}."""
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
    if job["plain"]:  # the conversation without guards must give the same text
        messages, tools = job["plain"]
        if text.replace(job["guard"], "") != probe.render(messages, tools=tools):
            raise ValueError("a message contains a control token that the chat template acts on; remove it from the text")
    bound = Bound(**job["bound"]) if job["bound"] else None
    out = texts(job["messages"], job["turns"], probe, text, bound, job["guard"])
    names = {key if key == "tools" else f"messages[].{key}" for i, key in unshown if (i, key) not in probe.found}
    return {"texts": out, "unshown": sorted(names)}


def read(file: BinaryIO) -> dict | None:
    """The next message; None at the end, also in the middle of a message: its writer was killed."""
    size = int.from_bytes(file.read(8))
    body = file.read(size)
    return json.loads(body) if body and len(body) == size else None


def write(file: BinaryIO, message: dict) -> None:
    body = json.dumps(message, ensure_ascii=False, default=lambda value: f"<{type(value).__name__}>").encode("utf-8", "surrogatepass")
    file.write(len(body).to_bytes(8) + body)
    file.flush()


def _address_space() -> int:
    """The bytes of address space that the process has before any template."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
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
