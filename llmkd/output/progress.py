"""Progress of a run on the console: a bar on a terminal, a line every ten seconds or more in a log file."""

import statistics
import sys
import time

from ..console import info
from .metrics import peak_memory

FIRST = 5  # the median of so many speeds is the speed at the beginning
SLOWER, IN_A_ROW = 3.0, 3  # a note is printed if the run is SLOWER times slower, IN_A_ROW times in a row


class Slowdown:
    """Notices, once, that training has become far slower than at its beginning."""

    def __init__(self):
        self.first: list[float] = []
        self.slow: list[float] = []

    def __call__(self, speed: float) -> str | None:
        """The note after another speed, in targets per second; None if there is nothing to report."""
        if len(self.first) < FIRST:
            self.first.append(speed)
            return None
        before = statistics.median(self.first)
        if len(self.slow) < IN_A_ROW:
            self.slow = [*self.slow, speed] if speed * SLOWER < before else []
            if len(self.slow) == IN_A_ROW:
                now = statistics.median(self.slow)
                return (
                    f"note: {now:.0f} targets/s, but {before:.0f} at the beginning: other programs may use the same cores or GPU, or it throttles "
                    "(top, nvidia-smi)"
                )
        return None


class ProgressDisplay:
    """Shows the progress of training on stderr: a bar on a terminal, lines in a file. Silent on every rank but the first."""

    def __init__(self, total_steps: int, done: int, main: bool):
        from tqdm import tqdm

        self.lines = main and not sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps,
            initial=done,
            unit="step",
            disable=not main or self.lines,
            dynamic_ncols=True,
            mininterval=0.5,
            file=sys.stderr,
        )
        self.total, self.first, self.started, self.shown = total_steps, done, time.monotonic(), 0.0
        self.targets_since, self.time_since, self.seconds = 0, self.started, 0.0
        self.slowdown = Slowdown()

    def count(self, targets: int) -> None:
        """Count a finished step with so many targets."""
        self.targets_since += targets
        self.bar.update()

    def speed(self, without: float = 0.0) -> float:
        """Targets per second since the last call, excluding `without` seconds. Sets `seconds` to the time that counts."""
        now = time.monotonic()
        self.seconds = max(now - self.time_since - without, 1e-9)
        speed = self.targets_since / self.seconds
        self.targets_since, self.time_since = 0, now
        return speed

    def show(self, step: int, shown: dict[str, str], speed: float) -> None:
        """Show metrics of a step: in the bar, or as a line if the last one is ten seconds old."""
        if text := self.slowdown(speed):
            self.info(text)
        shown = shown | {"targets/s": f"{speed:.0f}", "mem": f"{peak_memory() / 2**30:.1f}G"}
        self.bar.set_postfix(shown, refresh=False)
        now = time.monotonic()
        if self.lines and (now - self.shown > 10 or step == self.total):
            self.shown = now
            left = (now - self.started) / (step - self.first) * (self.total - step)
            metrics = "  ".join(f"{k} {v}" for k, v in shown.items())
            info(f"step {step}/{self.total}  {metrics}  {left:.0f} s left")

    def info(self, text: str) -> None:
        info(text)

    def close(self) -> None:
        self.bar.close()
