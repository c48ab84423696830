"""What is said to the person at the console: only by the first process, on stderr."""

import os
import sys


def first_process() -> bool:
    """Whether this is rank 0 of a launch, or the only process. Known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    if first_process():
        print(text, file=sys.stderr, flush=True)


def bar(name: str):
    """A progress bar round an iterable, gone when it is done; none where nobody looks."""
    from tqdm import tqdm

    return lambda items: tqdm(items, name, leave=False, disable=None if first_process() else True)
