"""The process in which sounds and images are decoded and augmented: jobs in, arrays out, by pickles that its own parent writes and reads.

It ignores the signals of a terminal and of a launcher, and ends when its input does. It imports no torch.
"""

import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ...errors import ChangedFiles, UserError
from .augment import Augmentation


@dataclass(frozen=True)
class Job:
    """One file. `draw`: (seed, epoch) of its augmentation; None: the sound or image as it is."""

    file: Path | bytes
    content_hash: str  # of the file when it was first read
    place: str
    draw: tuple[int, int] | None = None


class Way(Protocol):
    """The way in which files are read, which is pickled. `augment`: the transforms as in a recipe."""

    augment: tuple[dict, ...]

    def decoded(self, file: Path | bytes, place: str) -> tuple[np.ndarray, str]:
        """The samples or pixels of a file, and the hash of its bytes. UserError begins with `place`."""

    def augmentation(self) -> Augmentation: ...


class Reader:
    """Reads the files of jobs in this process. UserError if one cannot be read or augmented, ChangedFiles if its content has changed."""

    def __init__(self, way: Way):
        self.way, self._augmentation = way, None

    def __call__(self, job: Job) -> np.ndarray:
        value, content_hash = self.way.decoded(job.file, job.place)
        if content_hash != job.content_hash:
            raise ChangedFiles(f"{job.place}: the file was changed while the run reads it; write it back, and continue with --resume")
        if job.draw is None or not self.way.augment:
            return value
        if self._augmentation is None:
            self._augmentation = self.way.augmentation()
        return self._augmentation(value, *job.draw, content_hash, job.place)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    jobs, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # output of a library must not be taken for a reply
    read = Reader(pickle.load(jobs))
    while True:
        try:
            some = pickle.load(jobs)
        except EOFError:
            return
        try:
            answer = "read", [read(job) for job in some]
        except UserError as error:
            answer = "changed" if isinstance(error, ChangedFiles) else "refused", error.problems
        except Exception:
            answer = "bug", traceback.format_exc()
        pickle.dump(answer, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()
