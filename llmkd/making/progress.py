"""How far a stage is, and for how long it goes on: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ..console import count, duration, first_process, info

T = TypeVar("T")

_SECONDS = 15.0  # between two lines


def shown(
    items: Iterable[T],
    label: str,
    total: int,
    noun: str,
    size: Callable[[T], int] = lambda item: 1,
    tokens: Callable[[T], int] | None = None,
) -> Iterator[T]:
    """The items, while it is shown how many of `total` are done.

    size    of an item, in what `total` counts, such as the rows of a batch
    tokens  that an item has cost, for a speed

    The time that is left is that of the others at the mean speed so far.
    """
    from tqdm import tqdm

    began = last = time.monotonic()
    done = written = 0
    in_lines = not sys.stderr.isatty()
    if in_lines and total:
        info(f"{label}: {count(total, noun)}")
    with tqdm(desc=label, total=total, unit=f" {noun}s", leave=False, disable=in_lines or not first_process()) as bar:
        for item in items:
            done += size(item)
            written += tokens(item) if tokens else 0
            bar.update(size(item))
            now = time.monotonic()
            if in_lines and now - last >= _SECONDS and done < total:
                last, spent = now, now - began
                speed = f", {written / spent:,.0f} tokens a second" if tokens else ""
                info(f"{label}: {done:,} of {count(total, noun)}{speed}, about {duration(spent / done * (total - done))} left")
            yield item
