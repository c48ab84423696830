"""The same work again and again in one process: resident memory, open files and threads after each round.

python -m tests.faults.rounds RECIPE TASKS ROUNDS      trains, exports and evaluates; writes to the file `rounds` of this folder
"""

import ctypes
import gc
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

MB_A_ROUND = 1.0  # what memory may grow in the second half of the rounds, the mean of a round


def again(work: Callable[[], object], rounds: int, file: Path) -> None:
    """Do it so many times, and add a line to the file after each: {mb, files, threads}."""
    for _ in range(rounds):
        work()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        line = {"mb": resident / 2**20, "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}
        with open(file, "a") as lines:
            print(json.dumps(line), file=lines)


def growth(found: list[dict]) -> list[str]:
    """What is more at the end than it was in the middle."""
    half, last, rounds = found[len(found) // 2], found[-1], len(found) - len(found) // 2 - 1
    grown = [what for what in ("files", "threads") if last[what] > half[what]]
    grown += ["mb"] if last["mb"] - half["mb"] > MB_A_ROUND * rounds else []
    return [f"memory: {what}: {half[what]:.0f} in the middle, {last[what]:.0f} at the end" for what in grown]


def train_export_evaluate(recipe: str, tasks: str) -> None:
    from llmkd.cli import main

    commands = (
        ["train", "--config", recipe],
        ["export", "out"],
        ["eval", "out", "--tasks", "soak", "--tasks_dir", tasks, "--batch_size", "8"],
    )
    for command in commands:
        if code := main(command):
            sys.exit(code)
    shutil.rmtree("out")


if __name__ == "__main__":
    again(lambda: train_export_evaluate(sys.argv[1], sys.argv[2]), int(sys.argv[3]), Path("rounds"))
