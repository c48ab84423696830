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

from . import heartbeat
from .heartbeat import Heartbeats
from .machine_errors import DEAD_PEER, machine_error

_SECONDS = 3  # for the server to answer, and for the process that died first to say why
_PATIENCE = 10  # seconds that a process has, after another has failed, to end by itself
_LOOKS = 1.0  # seconds between two looks at whether another has
_AGAIN = "; train.timeout sets the time, and llmkd train and sweep go on with --resume"

#: Whether this process ends with others that fail or stand still.
watched = False


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
    """Inside, this process ends where it may wait for another one of its launch for as long as the group's timeout: some seconds after that one
    has said its error, and when it stands still (`heartbeat`). Nothing happens without the launcher's server."""
    global watched
    closed, answered, launched = threading.Event(), threading.Event(), has_server()
    threads = [threading.Thread(target=one, args=(closed, answered), name=one.__name__, daemon=True) for one in (_watch, _watch_server)]
    for thread in threads if launched else ():
        thread.start()
    watched = launched
    try:
        yield
    finally:
        watched = False
        closed.set()
        for thread in threads if launched else ():
            thread.join(_SECONDS)


def _watch(closed: threading.Event, answered: threading.Event) -> None:
    """Look at the others, until `closed`. Sets `answered` whenever the server has."""
    heartbeats, failed = Heartbeats(_key, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), 0.0
    while not closed.is_set():
        with contextlib.suppress(Exception):  # without its server: then once more
            server = connect()
            for seconds in _looks(closed):
                failed += seconds if server.add(_key("count"), 0) else 0.0
                if failed > _PATIENCE:
                    _end(f"{which_process() or 'this process'} waits for one that has failed, and ends")
                if not failed and (found := heartbeats.look(server, seconds)):
                    tell_launcher(found + _AGAIN)
                    first = server.add(_key("stands"), 1) == 1
                    server.add(_key("count"), 1)
                    _end(found + _AGAIN if first else "")
                answered.set()
            heartbeats.leave(server)


def _watch_server(closed: threading.Event, answered: threading.Event) -> None:
    """End this process where the launcher's server is on another machine, and does not answer for as long as a process may stand still."""
    silent, elsewhere = 0.0, int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    while not (closed.is_set() or answered.wait(_LOOKS)):
        pass  # this process is still importing torch, by which it asks
    for seconds in _looks(closed) if elsewhere else ():
        silent = 0.0 if answered.is_set() else silent + seconds
        answered.clear()
        if silent > heartbeat.timeout():
            _end(f"the launcher on the first machine ({os.environ['MASTER_ADDR']}) has not answered for {silent:,.0f} s" + _AGAIN)


def _looks(closed: threading.Event) -> Iterator[float]:
    """Every second or so, until `closed`, the seconds since the last time, but for those for which this process itself was stopped."""
    last = time.monotonic()
    while not closed.wait(_LOOKS):
        before, last = last, time.monotonic()
        yield min(last - before, 5 * _LOOKS)


def _end(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"llmkd: {text}\n".encode() if text else b"")
    os._exit(1)


def has_server() -> bool:
    """Whether the launcher of several processes has a key-value server for them."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"


def connect():
    """A connection to the launcher's server. RuntimeError where there is none."""
    if not has_server():
        raise RuntimeError("the launcher has no key-value server")
    from datetime import timedelta

    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, None, False, timedelta(seconds=_SECONDS), False)
