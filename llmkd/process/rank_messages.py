"""Errors in a launch of several processes: the same error is printed once, by a process that met it, and one process's error ends the others.

The processes coordinate through the key-value server of their launcher (torchrun, or accelerate launch with several processes), which
outlives each of them. No torch without a launch.
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

_SECONDS = 3  # for the server to answer, and for the process that failed first to print its error
_PATIENCE = 10  # seconds for a process to end by itself after another has failed
_LOOKS = 1.0  # seconds between two checks whether another has failed
_AGAIN = "; train.timeout sets the time; continue llmkd train and sweep with --resume"

#: Whether this process ends with others that fail or stand still.
watched = False


def is_first_to_say(text: str, error: BaseException) -> bool:
    """Whether this process should print `text`, the line of `error`: true if no other process has printed it.

    The loss of another process is printed only if no process has printed any error. Without a server every process prints.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    with contextlib.suppress(Exception):  # the launcher may be gone: better to print twice than never
        server, lost = connect(), machine_error(error) is DEAD_PEER
        if lost:
            with contextlib.suppress(KeyboardInterrupt):  # the launcher is ending the remaining processes: print now
                for _ in range(round(10 * _SECONDS)):
                    if server.add(_key("count"), 0):
                        return False
                    time.sleep(0.1)
        key = "lost" if lost else hashlib.sha256(text.encode()).hexdigest()
        server.add(_key("count"), 1)
        return server.add(_key(key), 1) == 1
    return True


def _key(name: str) -> str:
    """A key on the launcher's server, with the number of the restart, since the server survives restarts of the launch."""
    return f"llmkd/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"


def which_process() -> str:
    """This process's number in its launch, in words; "" before the process group is initialised, and for a single process."""
    group = sys.modules.get("torch.distributed")
    if not (group and group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        return ""
    return f"process {group.get_rank()} (of 0 to {group.get_world_size() - 1})"


def tell_launcher(text: str) -> None:
    """Write the error that ends this process where torchrun reads it, for torchrun's report of failed processes."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        report = {"message": {"message": text, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(report), encoding="utf-8")


@contextlib.contextmanager
def ending_with_others() -> Iterator[None]:
    """Inside, this process ends some seconds after another process of its launch has printed an error, and when one stands still (`heartbeat`),
    instead of waiting for the process group's timeout. Without effect if the launcher has no server."""
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
    """Watch the other processes until `closed`. Sets `answered` whenever the server answers."""
    heartbeats, failed = Heartbeats(_key, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])), 0.0
    while not closed.is_set():
        with contextlib.suppress(Exception):  # the server did not answer: connect again
            server = connect()
            for seconds in _looks(closed):
                failed += seconds if server.add(_key("count"), 0) else 0.0
                if failed > _PATIENCE:
                    _end(f"{which_process() or 'this process'} ends, since it waits for one that has failed")
                if not failed and (found := heartbeats.look(server, seconds)):
                    tell_launcher(found + _AGAIN)
                    first = server.add(_key("stands"), 1) == 1
                    server.add(_key("count"), 1)
                    _end(found + _AGAIN if first else "")
                answered.set()
            heartbeats.leave(server)


def _watch_server(closed: threading.Event, answered: threading.Event) -> None:
    """End this process if the launcher's server is on another machine and does not answer within the timeout."""
    silent, elsewhere = 0.0, int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    while not (closed.is_set() or answered.wait(_LOOKS)):
        pass  # this process is still importing torch, with which it asks the server
    for seconds in _looks(closed) if elsewhere else ():
        silent = 0.0 if answered.is_set() else silent + seconds
        answered.clear()
        if silent > heartbeat.timeout():
            _end(f"the launcher on the first machine ({os.environ['MASTER_ADDR']}) has not answered for {silent:,.0f} s" + _AGAIN)


def _looks(closed: threading.Event) -> Iterator[float]:
    """Yields about every second, until `closed`, the seconds since the last time, without those for which this process itself was suspended."""
    last = time.monotonic()
    while not closed.wait(_LOOKS):
        before, last = last, time.monotonic()
        yield min(last - before, 5 * _LOOKS)


def _end(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"llmkd: {text}\n".encode() if text else b"")
    os._exit(1)


def has_server() -> bool:
    """Whether the launcher of several processes has a key-value server."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"


def connect():
    """A connection to the launcher's server. RuntimeError if there is none."""
    if not has_server():
        raise RuntimeError("the launcher has no key-value server")
    from datetime import timedelta

    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, None, False, timedelta(seconds=_SECONDS), False)
