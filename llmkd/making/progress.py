"""The progress of a stage and its remaining time: a bar on a terminal, a line every 15 seconds in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ..console import count, duration, first_process, info

T = TypeVar("T")

_SECONDS = 15.0  # between two lines
_FIRST = 1.0  # seconds that tell a speed


def shown(
    items: Iterable[T],
    label: str,
    total: int,
    noun: str,
    size: Callable[[T], int] = lambda item: 1,
    tokens: Callable[[T], int] | None = None,
) -> Iterator[T]:
    """Yield the items and show how many of `total` are done.

    size     of an item, in the unit of `total`, such as the rows of a batch
    tokens   of an item, to show the speed

    The remaining time is estimated at the mean speed so far. Since items may arrive in batches, a line counts the items before the current
    one, and the time until they had arrived.
    """
    from tqdm import tqdm

    began = said = before = time.monotonic()
    done = written = 0
    in_lines = not sys.stderr.isatty()
    if in_lines and total:
        info(f"{label}: {count(total, noun)}")
    with tqdm(desc=label, total=total, unit=f" {noun}s", leave=False, disable=in_lines or not first_process()) as bar:
        for item in items:
            now, spent = time.monotonic(), before - began
            of_a_batch = done and now - before < spent / done / 2  # it has come with the item before it
            if in_lines and now - said >= _SECONDS and spent >= _FIRST and not of_a_batch:
                said = now
                speed = f", {written / spent:,.3g} tokens a second" if tokens else ""
                left = max(spent / done * (total - done) - (now - before), 0.0)
                info(f"{label}: {done:,} of {count(total, noun)}{speed}, about {duration(left)} left")
            done += size(item)
            written += tokens(item) if tokens else 0
            bar.update(size(item))
            before = now
            yield item
