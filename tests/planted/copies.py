"""Copies of the repository in which faults are planted, and the tests run in a forked process on one of them."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .fault import REPO, Fault

FOLDERS = ("llmkd", "eval", "recipes", "tests", "docs", "examples")
#: What every test needs and no fault is in: imported once, before the processes are forked.
HEAVY = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "peft",
    "accelerate",
    "pytest",
    "pydantic",
    "safetensors.torch",
)


@dataclass(frozen=True)
class Outcome:
    """passed: the fault survives; failed: it is noticed; broken: the tests did not run; stuck: they did not end in time.

    seconds   of a processor's time, of the tests and what they started; of tests that were stuck, those that they had
    """

    name: str
    seconds: float
    output: str


class Copy:
    """A copy of the repository whose packages are imported in place of the installed ones."""

    def __init__(self, folder: Path):
        self.root, self.packages, self.scratch = folder / "tree", folder / "packages", folder / "scratch"
        self.root.mkdir()
        for name in FOLDERS:
            shutil.copytree(REPO / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in REPO.iterdir():
            if path.is_file() and not path.name.startswith("."):
                shutil.copy(path, self.root)
        self.packages.mkdir()
        for name in ("eval", "recipes"):  # installed under these names
            (self.packages / f"llmkd_{name}").symlink_to(self.root / name)

    @contextmanager
    def planted(self, fault: Fault) -> Iterator[None]:
        path = self.root / fault.file
        text = path.read_text(encoding="utf-8")
        path.write_text(fault.planted(self.root), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(text, encoding="utf-8")

    def run(self, nodes: list[str], limit: float, first: bool = True) -> Outcome:
        """pytest on those tests. `first`: stop at the first failure."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        start, log = time.monotonic(), self.scratch / "output.txt"
        child = os.fork()
        if child == 0:
            self._become_pytest(nodes, log, first)
        while (ended := os.wait4(child, os.WNOHANG))[0] == 0 and time.monotonic() - start < limit:
            time.sleep(0.05)
        if stuck := ended[0] == 0:
            os.killpg(child, signal.SIGKILL)
            ended = os.wait4(child, 0)
        name = "stuck" if stuck else {0: "passed", 1: "failed"}.get(os.waitstatus_to_exitcode(ended[1]), "broken")
        return Outcome(name, ended[2].ru_utime + ended[2].ru_stime, log.read_text(errors="replace"))

    def _become_pytest(self, nodes: list[str], log: Path, first: bool) -> None:
        """In the forked process: forget the repository's own modules, and run pytest on the copy."""
        code = 70
        try:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT)
            for stream in (1, 2):
                os.dup2(out, stream)
            os.chdir(self.root)
            here = [str(self.root), str(self.packages)]
            sys.path[:] = here + [one for one in sys.path if one and Path(one).resolve() != REPO]
            os.environ["PYTHONPATH"] = os.pathsep.join(here)
            # a change within a second that keeps the size of a file would otherwise be hidden by its compiled form
            os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
            for name in [name for name in sys.modules if name.split(".")[0] in ("llmkd", "llmkd_eval", "llmkd_recipes", "eval", "tests")]:
                del sys.modules[name]
            import pytest

            options = [
                "-q",
                "-p",
                "no:cacheprovider",
                f"--basetemp={self.scratch / 'tmp'}",
                "--rootdir",
                str(self.root),
                "-x" if first else "-ra",
            ]
            code = int(pytest.main([*options, *nodes]))
        finally:
            sys.stdout.flush()
            os._exit(code)
