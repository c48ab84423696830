"""Messages, progress bars and tables on the console. Only rank 0 of a launch writes them.

Messages go to `logging.getLogger("llmkd")`, so a program that imports llmkd routes or silences them as it does those of any library.
The command line shows them as plain lines on stderr (`show_messages`); stdout is for results.
"""

import itertools
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Sequence

logger = logging.getLogger("llmkd")


def first_process() -> bool:
    """Whether this is rank 0 of a launch, or the only process. Known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def _from_first_process(record: logging.LogRecord) -> bool:
    return first_process()


logger.addFilter(_from_first_process)  # for every handler, llmkd's or the program's own


def info(text: str) -> None:
    logger.info(text)


def warn(text: str) -> None:
    """A message that may call for a change: it begins with "note:" or "warning:"."""
    logger.warning(text)


class _Stderr(logging.Handler):
    """The message alone, on what sys.stderr is at that moment, above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm = sys.modules.get("tqdm")  # a bar that is shown has loaded it
        text = printable(record.getMessage())
        if tqdm is None:
            print(text, file=sys.stderr, flush=True)
        else:
            tqdm.tqdm.write(text, file=sys.stderr, nolock=True)


def open_streams() -> None:
    """Open what of stdin, stdout and stderr is closed (`llmkd ... >&-`, some daemons), on /dev/null: the next file would get its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115 open as long as the process


def show_messages() -> None:
    """Show llmkd's messages on stderr, and there alone, as the command line does. Called again, it changes nothing."""
    if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
        logger.addHandler(_Stderr())
        logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def progress_bar(name: str):
    """A function that wraps an iterable in a progress bar on stderr, removed at the end. No bar off a terminal or on other ranks."""
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
    """A text whose characters that do not print, such as the escape sequences of a terminal, stand there as \\x1b; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def text_width(text: str) -> int:
    """The columns that a text takes on a terminal: a Chinese character takes two, an accent that is put on a letter none."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrap(text: str, width: int) -> list[str]:
    """The lines of a text, each at most `width` columns wide: broken at spaces, and within a word that is wider."""
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
    """A word cut where it is wider than `width`."""
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
    """Texts as columns of one width that fill `width` columns together."""
    each = (width + gap) // len(texts) - gap
    columns = [wrap(text, each) for text in texts]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return [(" " * gap).join(cell + " " * (each - text_width(cell)) for cell in row).rstrip() for row in rows]


def align(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lines of equally many cells as text: the columns numbered in `left` are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]


def table(rows: list[dict[str, object]]) -> str:
    """Rows with the same keys as aligned text with a header; floats with four decimals, None as nothing."""
    names = list(rows[0])
    header, *body = align([names, *([_cell(row.get(name)) for name in names] for row in rows)])
    return "\n".join([header, "-" * len(header), *body])


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else str(value)
