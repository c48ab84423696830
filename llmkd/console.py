"""What is said to the person at the console: only by the first process, on stderr."""

import os
import sys


def first_process() -> bool:
    """Whether this is rank 0 of a launch, or the only process. Known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def info(text: str) -> None:
    if first_process():
        print(text, file=sys.stderr, flush=True)


def progress_bar(name: str):
    """A progress bar round an iterable, gone when it is done; none where nobody looks."""
    from tqdm import tqdm

    return lambda items: tqdm(items, name, leave=False, disable=None if first_process() else True)


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"


def table(rows: list[dict[str, object]]) -> str:
    """Rows of the same keys as aligned text."""
    names = list(rows[0])
    cells = [names] + [
        [f"{v:.4f}" if isinstance(v, float) else "" if v is None else str(v) for v in (row.get(n) for n in names)] for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
