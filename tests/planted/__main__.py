"""Plant every fault in a copy of the repository, run the tests that should notice it, and print the survivors.

    python -m tests.planted                      all of them: about an hour of one idle core, 3 s each
    python -m tests.planted --only losses        those whose ROOM/NAME contains one of the words
    python -m tests.planted --list               their names and what they say; nothing is run
    python -m tests.planted --jobs 4             four copies at a time

Exit code 0 if every fault is noticed, and every equivalent is not; 1 otherwise. Before the first fault the same tests run once on
a copy without one, where they must pass. Seconds are those of a processor; `--limit` is one of the clock, to be raised where
other programs use the same cores.
"""

import argparse
import concurrent.futures
import importlib
import os
import queue
import sys
import tempfile
from pathlib import Path

from .copies import HEAVY, Copy
from .fault import Fault, every_fault


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description="Plant faults, and see whether the tests notice.")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only faults whose ROOM/NAME contains one of the words")
    parser.add_argument("--list", action="store_true", help="print the faults, and run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="copies that are worked on at a time (1)")
    parser.add_argument(
        "--limit", type=float, default=300, metavar="SECONDS", help="longest time by the clock for the tests of one fault (300)"
    )
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests without a fault first")
    parser.add_argument("--show", action="store_true", help="print pytest's output for every fault that is not noticed")
    chosen = parser.parse_args()
    faults = {key: fault for key, fault in every_fault().items() if not chosen.only or any(word in key for word in chosen.only)}
    if chosen.list or not faults:
        for key, fault in faults.items():
            print(f"{key:40} {fault.says}" + (f" (equivalent: {fault.equivalent})" if fault.equivalent else ""))
        print(f"{len(faults)} faults")
        return 0 if faults else 1
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in HEAVY:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        copies = [Path(folder, str(job)) for job in range(chosen.jobs)]
        for path in copies:
            path.mkdir()
        return plant([Copy(path) for path in copies], faults, chosen)


def plant(copies: list[Copy], faults: dict[str, Fault], chosen: argparse.Namespace) -> int:
    if not chosen.unchecked:
        clean = copies[0].run(
            sorted({node for fault in faults.values() for node in fault.nodes}), 60 + len(faults) * chosen.limit, first=False
        )
        print(f"without a fault: {clean.name}, {clean.seconds:.0f} s", flush=True)
        if clean.name != "passed":
            print(clean.output[-6000:])
            return 1
    free: queue.Queue[Copy] = queue.Queue()
    for copy in copies:
        free.put(copy)

    def one(fault: Fault):
        copy = free.get()
        try:
            with copy.planted(fault):
                return copy.run(fault.nodes, chosen.limit)
        finally:
            free.put(copy)

    wrong, seconds, words = [], 0.0, {"passed": "SURVIVES", "failed": "noticed", "broken": "BROKEN", "stuck": "STUCK"}
    with concurrent.futures.ThreadPoolExecutor(len(copies)) as pool:
        for number, (key, found) in enumerate(zip(faults, pool.map(one, faults.values()), strict=True), 1):
            fault, seconds = faults[key], seconds + found.seconds
            right = found.name == ("passed" if fault.equivalent else "failed")
            word = "equivalent" if right and fault.equivalent else "NOTICED" if found.name == "failed" and not right else words[found.name]
            print(f"{number:4} of {len(faults)}  {word:10} {found.seconds:5.1f} s  {key}", flush=True)
            if not right:
                wrong.append(f"{word:10} {key}: {fault.says} ({fault.file}); {fault.tests}")
                if chosen.show:
                    print(found.output[-4000:])
    print(f"{len(faults) - len(wrong)} of {len(faults)} as they should be, in {seconds:.0f} s" + (":" if wrong else ""))
    for line in wrong:
        print(f"  {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
