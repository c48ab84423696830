"""The process in which clips are decoded and augmented: jobs in, samples out, by pickles that its own parent writes and reads.

It ignores the signals of a terminal and of a launcher, and ends when its input does. It imports no torch.
"""

import pickle
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ChangedFiles, UserError
from .augment import Augmentation
from .decode import decode


@dataclass(frozen=True)
class Job:
    """One clip. `draw`: (seed, epoch) of its augmentation; None: the clip as it is."""

    sound: Path | bytes
    content_hash: str  # of the file when it was first read
    place: str
    draw: tuple[int, int] | None = None


@dataclass(frozen=True)
class Way:
    """How all clips are read. `augment`: transforms as in a recipe, and `setting` their name in messages."""

    rate: int
    augment: tuple[dict[str, Any], ...] = ()
    setting: str = ""


class Clips:
    """Clips by their jobs, in this process. UserError where one cannot be read or augmented, ChangedFiles where it is not what it was."""

    def __init__(self, way: Way):
        self.way, self._augmentation = way, None

    def __call__(self, job: Job) -> np.ndarray:
        """[S] float32."""
        clip = decode(job.sound, self.way.rate, job.place)
        if clip.content_hash != job.content_hash:
            raise ChangedFiles(f"{job.place}: the file was changed while the run reads it; write it back, and continue with --resume")
        if job.draw is None or not self.way.augment:
            return clip.samples
        if self._augmentation is None:
            self._augmentation = Augmentation(self.way.augment, self.way.rate, self.way.setting)
        return self._augmentation(clip.samples, *job.draw, job.content_hash, job.place)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    jobs, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints must not be taken for a reply
    clips = Clips(pickle.load(jobs))
    while True:
        try:
            some = pickle.load(jobs)
        except EOFError:
            return
        try:
            answer = "clips", [clips(job) for job in some]
        except UserError as error:
            answer = "changed" if isinstance(error, ChangedFiles) else "refused", error.problems
        except Exception:
            answer = "bug", traceback.format_exc()
        pickle.dump(answer, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()
