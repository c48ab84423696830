"""Messages, progress bars and tables on the console. Only rank 0 of a launch writes them.

Messages go to `logging.getLogger("llmkd")`, so a program that imports llmkd can route or silence them like those of any library. The
command line shows them as plain lines on stderr (`show_messages`); stdout is for results.
"""

import itertools
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Sequence

logger = logging.getLogger("llmkd")


def several_processes() -> bool:
    """Whether this process is one of a launch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def first_process() -> bool:
    """Whether this is rank 0 of a launch, or the only process. Works before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def _from_first_process(record: logging.LogRecord) -> bool:
    return first_process()


logger.addFilter(_from_first_process)  # so it holds for every handler: llmkd's and the program's own


def info(text: str) -> None:
    logger.info(text)


def warn(text: str) -> None:
    """A message that may call for a change: it begins with "note:" or "warning:"."""
    logger.warning(text)


class _Stderr(logging.Handler):
    """Prints the bare message above any progress bar, on the current sys.stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # imported if any bar is shown
        text = printable(record.getMessage())
        if tqdm is None:
            print(text, file=sys.stderr, flush=True)
        else:
            tqdm.tqdm.write(text, file=sys.stderr, nolock=True)


def open_streams() -> None:
    """Open stdin, stdout and stderr on /dev/null where they are closed (`llmkd ... >&-`, some daemons).

    Otherwise the next file that is opened would get the number of the closed one, and be written to as stdout or stderr.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115 open as long as the process


def show_messages() -> None:
    """Show llmkd's messages on stderr and nowhere else, as the command line does. A second call changes nothing."""
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def progress_bar(name: str):
    """A function that wraps an iterable in a progress bar, which disappears at the end. On rank 0, and only if stderr is a terminal."""
    from tqdm import tqdm

    return lambda items: tqdm(items, name, leave=False, disable=None if first_process() else True)


def duration(seconds: float) -> str:
    """Seconds in words: "90 seconds", "2.5 minutes", "3 hours"."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else "a second"


def count(number: int, noun: str, several: str | None = None) -> str:
    """ "1 run", "2 runs"; `several` is the plural where it is not noun + s."""
    return f"{number:,} {noun if number == 1 else several or noun + 's'}"


def printable(text: str) -> str:
    """The text with unprintable characters escaped, such as \\x1b for those of a terminal's control sequences; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def text_width(text: str) -> int:
    """The number of terminal columns of a text: two for a wide character such as a Chinese one, none for a combining accent."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrap(text: str, width: int) -> list[str]:
    """The lines of a text, each at most `width` columns wide: broken at spaces, and inside words that are wider than that."""
    out = []
    for line in printable(text).expandtabs(4).split("\n"):
        now = ""
        for word in re.findall(r"\s+|\S+", line):
            if text_width(now + word) <= width:
                now += word
                continue
            if now:
                out.append(now.rstrip())
            *full, now = [""] if word.isspace() else _pieces(word, width)
            out += full
        out.append(now.rstrip())
    return out


def _pieces(word: str, width: int) -> list[str]:
    """A word in pieces of at most `width` columns."""
    out, taken = [""], 0
    for c in word:
        wide = text_width(c)
        if taken + wide > width and out[-1]:
            out.append("")
            taken = 0
        out[-1] += c
        taken += wide
    return out


def in_columns(texts: Sequence[str], width: int, gap: int = 3) -> list[str]:
    """Texts next to one another, in columns of equal width that together fill `width`, as lines."""
    each = (width + gap) // len(texts) - gap
    columns = [wrap(text, each) for text in texts]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return [(" " * gap).join(cell + " " * (each - text_width(cell)) for cell in row).rstrip() for row in rows]


def align(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows of cells as lines of text: the columns numbered in `left` are left-aligned, the others right-aligned."""
    widths = [max(map(text_width, column)) for column in zip(*lines, strict=True)]

    def padded(cell: str, column: int) -> str:
        space = " " * (widths[column] - text_width(cell))
        return cell + space if column in left else space + cell

    return ["  ".join(padded(cell, i) for i, cell in enumerate(line)) for line in lines]


def table(rows: list[dict[str, object]]) -> str:
    """Rows with the same keys as aligned text under a header: floats with four decimals, None as an empty cell."""
    names = list(rows[0])
    header, *body = align([names, *([_cell(row.get(name)) for name in names] for row in rows)])
    return "\n".join([header, "-" * text_width(header), *body])


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)
