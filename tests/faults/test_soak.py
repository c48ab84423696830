"""The soak test itself notices what it is there to notice, shown on programs that take a moment."""

import gc
import json
import os
import random
import sys
import threading
from pathlib import Path

import pytest

from llmkd.files import read_sealed, sha256_file, write_sealed

from . import rounds, soak
from .jobs import Job, jobs, run_result

COUNTS = """
import os, pathlib, time
done = pathlib.Path("done")
for i in range(int(done.read_text()) if done.exists() else 0, 20):
    time.sleep(0.01)
    pathlib.Path("part").write_text(str(i + 1))
    os.replace("part", "done")
"""
FORGETS = "open('calls', 'a').write('x')\n" + COUNTS
LEAVES = "import subprocess, sys\nsubprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n" + COUNTS
SAYS_BUG = "print('llmkd: bug: KeyError', flush=True)\n" + COUNTS
FAILS = COUNTS + "raise SystemExit(2)\n"


def job(program: str) -> Job:
    def result(folder: Path) -> dict[str, str]:
        return {path.name: path.read_text() for path in folder.iterdir() if path.name in ("done", "calls")}

    return Job("toy", [sys.executable, "-S", "-c", program], lambda folder: None, result)


def outcome(program: str, folder: Path) -> tuple[int, list[str]]:
    """Signals, and problems, of a job that was disturbed with several seeds."""
    quiet = soak.undisturbed(job(program), folder / "quiet")[0] if program != FAILS else {}
    struck, problems = 0, []
    for seed in range(5):
        signals, found = soak.disturbed(job(program), folder / str(seed), 0.2, random.Random(seed))
        struck += len(signals)
        problems += found or soak.differences(quiet, job(program).result(folder / str(seed)))
        if problems:
            break
    return struck, problems


def test_a_program_that_goes_on_rightly_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "PAUSE", 0.2)
    struck, problems = outcome(COUNTS, tmp_path)
    assert struck >= 3 and not problems


@pytest.mark.parametrize(
    ("program", "words"),
    [(FORGETS, "calls differs"), (LEAVES, "is still there"), (SAYS_BUG, "says bug"), (FAILS, "was not struck")],
    ids=["result", "process", "bug", "exit code"],
)
def test_what_is_wrong_is_noticed(tmp_path, monkeypatch, program, words):
    monkeypatch.setattr(soak, "LINGER", 0.5)
    monkeypatch.setattr(soak, "PAUSE", 0.2)
    _, problems = outcome(program, tmp_path)
    assert any(words in problem for problem in problems), problems


def test_what_the_clock_says_is_not_compared_and_a_loss_is(command, tmp_path):
    assert command()[0] == 0
    quiet, lines, summary = run_result(tmp_path), tmp_path / "out/metrics.jsonl", tmp_path / "out/summary.json"
    for what, differs in (("targets_per_s", False), ("ce", True)):
        lines.write_text(lines.read_text().replace(f'"{what}": ', f'"{what}": 1'))
        with pytest.raises(AssertionError):
            run_result(tmp_path)
        content = read_sealed(summary)
        content["files"]["metrics.jsonl"] = sha256_file(lines)
        write_sealed(summary, content)
        assert bool(soak.differences(quiet, run_result(tmp_path))) == differs


def test_the_commands_that_last_are_all_disturbed(tmp_path):
    assert {job.command[job.command.index("llmkd") + 1] for job in jobs(tmp_path, tmp_path)} == {
        "train",
        "cache",
        "sweep",
        "eval",
        "export",
        "roll",
        "make",
    }


@pytest.fixture
def grown(tmp_path):
    """What is found to have grown when a program does something six times in this process."""

    def go(work) -> list[str]:
        gc.freeze()  # what is there by now: a collection takes milliseconds then
        try:
            rounds.again(work, 6, tmp_path / "rounds")
        finally:
            gc.unfreeze()
        found = rounds.growth([json.loads(line) for line in (tmp_path / "rounds").read_text().splitlines()])
        return [problem.split(": ")[1] for problem in found]

    return go


def test_work_that_cleans_up_leaves_memory_files_and_threads_as_they_were(grown, tmp_path):
    (tmp_path / "a").touch()

    def work():
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        bytearray(2**24)
        open(tmp_path / "a").close()

    assert grown(work) == []


@pytest.mark.parametrize("what", ["files", "threads", "mb"])
def test_what_stays_after_each_round_is_noticed(grown, tmp_path, what):
    (tmp_path / "a").touch()
    kept, end = [], threading.Event()

    def thread():
        threading.Thread(target=end.wait).start()

    leak = {
        "files": lambda: kept.append(os.open(tmp_path / "a", os.O_RDONLY)),
        "threads": thread,
        "mb": lambda: kept.append(bytearray(b"x" * 2**22)),
    }[what]
    try:
        assert grown(leak) == [what]
    finally:
        end.set()
        for file in kept if what == "files" else ():
            os.close(file)
