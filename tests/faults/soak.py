"""Kill commands at random moments, call them again, and compare what they leave with runs that nobody disturbed.

    python -m tests.faults.soak                       an hour
    python -m tests.faults.soak --minutes 5 --only train cache
    python -m tests.faults.soak --seed 7              other moments

Train, cache, sweep, eval, export and roll, on one and on two processes, are killed by SIGKILL (the whole group, or one process of it),
SIGTERM, SIGINT and SIGHUP, or stopped for a moment, as often as the dice say, and called again with the same words until they are done. Then weights, caches,
metrics, results and the names of all files must be those of the quiet run, and no process may be left. At the end one process
trains, evaluates and exports again and again: its memory, open files and threads must stay what they were.
Exit code 0, or 1 with what differed; the folder of the first difference is kept.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .jobs import Job, jobs, make_inputs
from .rounds import growth

REPO = Path(__file__).parents[2]
MARK = "LLMKD_SOAK"  # an environment variable that every process of a call inherits: so one that is left over is found
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGSTOP)
PAUSE = 3.0  # seconds at most, from SIGSTOP to SIGCONT
LONGEST = 300  # seconds until a call that does not end counts as hanging
LINGER = 90  # seconds that processes of a call may take to end after the one that was called


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description="Random kills and resumes, compared with quiet runs.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="only the commands whose name contains one of the words")
    parser.add_argument("--memory", type=int, default=20, metavar="ROUNDS", help="rounds of one process at the end (20; 0: none)")
    chosen = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="soak-"))
    problems = soak(place, chosen.minutes * 60, chosen.seed, chosen.only) or memory(place, chosen.memory)
    for problem in problems:
        print(f"soak: {problem}", flush=True)
    if not problems:
        shutil.rmtree(place)
    return int(bool(problems))


def soak(place: Path, seconds: float, seed: int, only: list[str]) -> list[str]:
    """Disturb one command after another until the time is over; what was not as it should be, of the first that failed."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    make_inputs(place / "inputs")
    (training,) = [job for job in jobs(place / "inputs", place / "none") if job.name == "train"]
    quiet, took = {}, {}
    quiet["train"], took["train"] = undisturbed(training, place / "quiet")
    chosen = [job for job in jobs(place / "inputs", place / "quiet" / "out") if not only or any(word in job.name for word in only)]
    kills = rounds = 0
    while time.monotonic() < end:
        for job in chosen:
            if job.name not in quiet:
                quiet[job.name], took[job.name] = undisturbed(job, place / f"quiet {job.name}")
            folder = place / "disturbed"
            struck, problems = disturbed(job, folder, took[job.name], rng)
            problems += differences(quiet[job.name], job.result(folder)) if not problems else []
            print(
                f"soak: {job.name}: {', '.join(struck) or 'not struck'}: {'as the quiet run' if not problems else 'NOT as it should be'}",
                flush=True,
            )
            if problems:
                return [f"{job.name}: {problem}" for problem in problems] + [f"see {folder}"]
            shutil.rmtree(folder)
            kills, rounds = kills + len(struck), rounds + 1
            if time.monotonic() > end:
                break
    print(f"soak: {rounds} commands, {kills} signals, seed {seed}", flush=True)
    return []


def undisturbed(job: Job, folder: Path) -> tuple[dict[str, str], float]:
    """What a job leaves when nobody disturbs it, and the seconds it takes."""
    folder.mkdir()
    job.begin(folder)
    before = time.monotonic()
    process = start(job, folder)
    if code := process.wait(LONGEST):
        raise RuntimeError(f"{job.name}: exit code {code} without any kill:\n{(folder / 'log').read_text()[-3000:]}")
    return job.result(folder), time.monotonic() - before


def disturbed(job: Job, folder: Path, seconds: float, rng: random.Random) -> tuple[list[str], list[str]]:
    """Call a job until it is done, and strike it at random moments: the signals, and what was not as it should be."""
    folder.mkdir()
    job.begin(folder)
    struck: list[str] = []
    for _ in range(40):
        process, patience = start(job, folder), rng.uniform(0.1, 1.3) * seconds if rng.random() < 0.8 else LONGEST
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            struck.append(strike(process, rng))
            try:
                code = process.wait(LONGEST)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                return struck, [f"does not end within {LONGEST} s after {struck[-1]}"]
        if left := left_over(process.pid):
            return struck, [f"process {left} is still there after {struck[-1:] or 'the end'}"]
        said = (folder / "log").read_text(errors="replace")
        if "llmkd: bug" in said:
            return struck, [f"says bug after {struck[-1:]}: {said[-2000:]}"]
        if code == 0:
            return struck, []
        if patience == LONGEST:
            return struck, [f"exit code {code} in a call that was not struck, after {struck}: {said[-2000:]}"]
    return struck, ["not done after 40 calls"]


def start(job: Job, folder: Path) -> subprocess.Popen:
    environment = os.environ | {
        MARK: str(os.getpid()),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "LLMKD_CACHE": str(folder / "tokens"),
    }
    environment |= {"PYTHONPATH": str(REPO), "HF_DATASETS_CACHE": str(folder.parent / "datasets")}
    with open(folder / "log", "w") as log:
        return subprocess.Popen(job.command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def strike(process: subprocess.Popen, rng: random.Random) -> str:
    """Send a signal: to the process that was called, to its whole group, or to one of its group. After SIGSTOP it is let go on."""
    number, whom = rng.choice(SIGNALS), rng.choice(("one", "group", "any"))
    name = f"{number.name} to {whom}"
    try:
        send, to = (
            (os.killpg, process.pid) if whom == "group" else (os.kill, process.pid if whom == "one" else rng.choice(of_group(process.pid)))
        )
        send(to, number)
        if number == signal.SIGSTOP:
            time.sleep(rng.uniform(0.1, PAUSE))
            send(to, signal.SIGCONT)
    except ProcessLookupError:
        name += ", too late"
    return name


def of_group(group: int) -> list[int]:
    """The processes that were started by this program and have this session, without zombies."""
    found = []
    for path in Path("/proc").iterdir():
        try:
            if path.name.isdigit() and f"{MARK}={os.getpid()}".encode() in (path / "environ").read_bytes().split(b"\0"):
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z" and int(fields[3]) == group:
                    found.append(int(path.name))
        except OSError:
            continue
    return found or [group]


def left_over(group: int) -> int | None:
    """A process of a call that is still there LINGER seconds after the one that was called has ended."""
    end = time.monotonic() + LINGER
    while (found := [one for one in of_group(group) if one != group]) and time.monotonic() < end:
        time.sleep(0.2)
    for one in found:
        os.kill(one, signal.SIGKILL)
    return found[0] if found else None


def differences(quiet: dict[str, str], found: dict[str, str]) -> list[str]:
    """What differs between two results, by name; without the log and the folder of a launcher's logs."""
    problems = []
    for name in sorted(quiet.keys() | found.keys()):
        old, new = quiet.get(name, "missing"), found.get(name, "missing")
        if old != new:
            more, less = set(new.split()) - set(old.split()), set(old.split()) - set(new.split())
            problems.append(f"{name} differs: more {' '.join(sorted(more))[:600]}; less {' '.join(sorted(less))[:600]}")
    return problems


def memory(place: Path, rounds: int) -> list[str]:
    """Train, export and evaluate again and again in one process: memory, open files and threads, in the second half as in the first."""
    if not rounds:
        return []
    folder = place / "memory"
    folder.mkdir()
    if not (place / "inputs").exists():
        make_inputs(place / "inputs")
    words = [sys.executable, "-m", "tests.faults.rounds", str(place / "inputs/train.json"), str(place / "inputs/tasks"), str(rounds)]
    process = start(Job("memory", words, lambda folder: None, lambda folder: {}), folder)
    if code := process.wait(60 + 60 * rounds):
        return [f"memory: exit code {code}: {(folder / 'log').read_text()[-2000:]}"]
    found = [json.loads(line) for line in (folder / "rounds").read_text().splitlines()]
    print(f"soak: {rounds} rounds in one process: in the middle {found[len(found) // 2]}, at the end {found[-1]}", flush=True)
    return growth(found)


if __name__ == "__main__":
    sys.exit(main())
