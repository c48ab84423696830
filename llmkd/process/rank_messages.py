"""A mistake that several processes of a launch meet is said once, and by the process that met it.

They agree by the key-value server of their launcher (torchrun, or accelerate launch with several processes), which outlives each of them. No
torch without a launch.
"""

import contextlib
import hashlib
import os
import time

from .machine_errors import DEAD_PEER, machine_error

_SECONDS = 3  # for the server to answer, and for the process that died first to say why
_PREFIX = "llmkd/said/"


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
                    if server.add(f"{_PREFIX}count", 0):
                        return False
                    time.sleep(0.1)
        key = "lost" if lost else hashlib.sha256(text.encode()).hexdigest()
        server.add(f"{_PREFIX}count", 1)
        return server.add(_PREFIX + key, 1) == 1
    return True


def connect():
    """A connection to the launcher's server. RuntimeError where there is none."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() != "true":
        raise RuntimeError("the launcher has no key-value server")
    from datetime import timedelta

    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(host, port, None, False, timedelta(seconds=_SECONDS), False)
