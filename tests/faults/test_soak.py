"""The soak test itself notices what it is there to notice, shown on programs that take a moment."""

import random
import sys
from pathlib import Path

import pytest

from llmkd.files import read_sealed, sha256_file, write_sealed

from . import soak
from .jobs import Job, run_result

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


def test_a_program_that_goes_on_rightly_passes(tmp_path):
    struck, problems = outcome(COUNTS, tmp_path)
    assert struck >= 3 and not problems


@pytest.mark.parametrize(
    ("program", "words"),
    [(FORGETS, "calls differs"), (LEAVES, "is still there"), (SAYS_BUG, "says bug"), (FAILS, "was not struck")],
    ids=["result", "process", "bug", "exit code"],
)
def test_what_is_wrong_is_noticed(tmp_path, monkeypatch, program, words):
    monkeypatch.setattr(soak, "LINGER", 0.5)
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
