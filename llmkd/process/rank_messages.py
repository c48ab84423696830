"""An error that several processes of a launch meet is said once, and by a process that met it; what one meets ends the others too.

They agree by the key-value server of their launcher (torchrun, or accelerate launch with several processes), which outlives each of them. No
torch without a launch.
"""

import contextlib
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .machine_errors import DEAD_PEER, machine_error

_SECONDS = 3  # for the server to answer, and for the process that died first to say why
_PATIENCE = 10  # seconds that a process has, after another has failed, to end by itself
_LOOKS = 1.0  # seconds between two looks at whether another has


def is_first_to_say(text: str, error: BaseException) -> bool:
    """Whether this process prints `text`, the line of `error`: no other process has said the same.

    That another process is lost is said only where no process has said anything. Without a server every process prints.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    with contextlib.suppress(Exception):  # the launcher may be gone: better twice than never
        server, lost = connect(), machine_error(error) is DEAD_PEER
        if lost:
            with contextlib.suppress(KeyboardInterrupt):  # the launcher ends the processes that are left: say it now
                for _ in range(round(10 * _SECONDS)):
                    if server.add(_key("count"), 0):
                        return False
                    time.sleep(0.1)
        key = "lost" if lost else hashlib.sha256(text.encode()).hexdigest()
        server.add(_key("count"), 1)
        return server.add(_key(key), 1) == 1
    return True


def _key(name: str) -> str:
    """Of the launcher's server, which outlives a launch that is started anew."""
    return f"llmkd/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def which_process() -> str:
    """This process among those of its launch, once they have met; empty before, and for one alone."""
    group = sys.modules.get("torch.distributed")
    if not (group and group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        return ""
    return f"process {group.get_rank()} (of 0 to {group.get_world_size() - 1})"


def tell_launcher(text: str) -> None:
    """Write the error that ends this process where torchrun reads it, for its own report of the processes that failed."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(report), encoding="utf-8")


@contextlib.contextmanager
def ending_with_others() -> Iterator[None]:
    """Inside, this process ends some seconds after another one of its launch has said its error, if it has not ended by then: it may wait for
    that one in a collective for as long as the group's timeout. Nothing happens without the launcher's server."""
    closed = threading.Event()

    def watch() -> None:
        with contextlib.suppress(Exception):
            server, failed = connect(), 0.0
            while not closed.wait(_LOOKS):
                failed = failed or (time.monotonic() if server.add(_key("count"), 0) else 0.0)
                if failed and time.monotonic() - failed > _PATIENCE:
                    os.write(2, f"llmkd: {which_process() or 'this process'} waits for one that has failed, and ends\n".encode())
                    os._exit(1)

    if os.environ.get("WORLD_SIZE", "1") != "1":
        threading.Thread(target=watch, name="ending_with_others", daemon=True).start()
    try:
        yield
    finally:
        closed.set()


def connect():
    """A connection to the launcher's server. RuntimeError where there is none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() != "true":
        raise RuntimeError("the launcher has no key-value server")
    from datetime import timedelta

    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, None, False, timedelta(seconds=_SECONDS), False)
