"""Processes that start at once: a server that has imported what a run needs forks them.

A fresh interpreter spends more time on its imports than a run of the small world takes. What depends on the launcher itself (its signals,
its variables) is tested with `accelerate launch` and torchrun in test_parity.py and test_launcher.py.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

REPO = Path(__file__).parents[2]
IMPORTED = ("datasets", "peft", "accelerate", "transformers.models.llama.modeling_llama", "matplotlib.pyplot", "torch.distributed")
IMPORTED += (
    "torch.nn.parallel.distributed",
    "llmkd.training.trainer",
    "llmkd.training.run",
    "llmkd.commands.sweep",
    "llmkd.commands.cache",
)


class Server:
    """Starts the processes of launches, one launch after another, under the variables that it was given and those of each launch."""

    def __init__(self, **environment: str):
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        command = [sys.executable, "-m", "tests.kit.processes"]
        self.process = subprocess.Popen(command, cwd=REPO, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def launch(self, count: int, function: Callable, *arguments, cwd: Path | None = None, limit: float = 300, **environment: str | None):
        """`function(*arguments)` in `count` processes, ranks of one launch, on one thread each; what it returns is their exit code.

        Returns a CompletedProcess: the exit code of the first that failed, or 0, and what all of them wrote. As with torchrun, the others
        are ended some seconds after one has failed, and all after `limit` seconds. A variable that is None is taken away.
        """
        variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        variables = {name: value for name, value in variables.items() if value is not None}
        with tempfile.TemporaryDirectory() as written:
            request = (count, function, arguments, variables, str(cwd or Path.cwd()), limit, written)
            pickle.dump(request, self.process.stdin)
            self.process.stdin.flush()
            codes = pickle.load(self.process.stdout)
            out, err = (Path(written, name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(function, next((code for code in codes if code), 0), out, err)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@functools.cache
def _usual() -> Server:
    server = Server()
    atexit.register(server.close)
    return server


def launch(count: int, function: Callable, *arguments, **options) -> subprocess.CompletedProcess:
    """See `Server.launch`."""
    return _usual().launch(count, function, *arguments, **options)


def train_on_two(words: list[str]) -> subprocess.CompletedProcess:
    """`llmkd train` with these words in two processes."""
    from llmkd.cli import main

    return launch(2, main, ["train", *words])


def train_each(runs: list[list[str]]) -> int:
    """`llmkd train` with each list of words, one after the other; to be launched in several processes. Returns the first exit code that is not 0."""
    from llmkd.cli import main

    return next((code for words in runs if (code := main(["train", *words]))), 0)


def assert_one_end(one: Path, two: Path) -> None:
    """Two runs' folders hold the same weights, and what was measured at their ends is the same, up to the order of sums in float64."""
    from safetensors.torch import load_file

    ours, theirs = (json.loads((out / "summary.json").read_text())["validation"] for out in (one, two))
    assert ours.keys() == theirs.keys()
    far = {name: (value, theirs[name]) for name, value in ours.items() if not abs(value - theirs[name]) <= 1e-9}  # NaN is far from all
    assert not far
    ours, theirs = (load_file(out / "model/model.safetensors") for out in (one, two))
    assert max((ours[name] - theirs[name]).abs().max() for name in ours if ours[name].is_floating_point()) < 1e-9


def serve() -> None:
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for name in IMPORTED:
        importlib.import_module(name)
    from tests.kit.quick_runs import leave_out

    leave_out(setattr)
    gc.collect()
    gc.freeze()  # of what is imported, a fork's collections look at nothing and copy nothing
    while True:
        try:
            count, function, arguments, variables, cwd, limit, written = pickle.load(sys.stdin.buffer)
        except EOFError:
            os._exit(0)
        going, port = set(), _free_port()
        for rank in range(count):
            process = os.fork()
            if not process:
                _become(rank, count, port, variables, cwd, Path(written))
                _end(function, arguments)
            going.add(process)
        pickle.dump(_wait(going, time.monotonic() + limit), replies)
        replies.flush()


def _become(rank: int, count: int, port: int, variables: dict[str, str], cwd: str, written: Path) -> None:
    import torch

    os.environ.clear()
    os.environ.update(variables)
    if count > 1:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in place.items()})
    os.chdir(cwd)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(written / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)


def _end(function: Callable, arguments: tuple) -> NoReturn:
    """Leave the process as an interpreter does, but for the server's own modules, which nobody has to take down."""
    code = 1
    try:
        code = function(*arguments)
    except BaseException:
        traceback.print_exc()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait(going: set[int], end: float) -> list[int]:
    """The exit codes in the order in which the processes ended."""
    codes = []
    while going:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process in going:
            going.remove(process)
            codes.append(os.waitstatus_to_exitcode(status))
            end = min(end, time.monotonic() + 15) if codes[-1] else end
            continue
        if time.monotonic() > end:
            for one in going:
                os.kill(one, 9)
        time.sleep(0.01)
    return codes


if __name__ == "__main__":
    serve()
