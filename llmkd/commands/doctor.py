"""`llmkd doctor`: asks the questions of `llmkd/doctor/` about a recipe and prints a line for each."""

import os
import shutil
import sys
import textwrap
from collections import Counter
from typing import TextIO

from .. import __version__
from ..config.recipe import Recipe
from ..console import count, info
from ..doctor.check import Check, ChecksFailed, Result
from ..errors import UserError

ROWS = 64
_INDENT = 11


def doctor(recipe: Recipe, rows: int = ROWS, out: TextIO | None = None) -> list[Result]:
    """Ask every check and print each result as it comes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("doctor: runs in one process; leave accelerate launch, or torchrun, out")
    from ..doctor.examine import examine

    out = out or sys.stdout
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="backslashreplace")  # for terminals that cannot show a character
    headings = set()

    def show(check: Check, result: Result) -> None:
        if check.group not in headings:
            headings.add(check.group)
            print(f"\n{check.group}", file=out)
        print("\n".join(as_text(result)), file=out, flush=True)

    info(f"examining the recipe on at most {rows} rows of each source; a minute or two")
    results = examine(recipe, rows, show)
    print(f"\n{summary(results)}", file=out, flush=True)
    return results


def as_text(result: Result) -> list[str]:
    """A result as lines of the terminal."""
    width = max(60, min(120, shutil.get_terminal_size().columns)) - _INDENT
    status = result.status.upper() if result.status == "failed" else result.status
    lines = [f"{status:<{_INDENT}}{result.check}"]
    for text in (result.found, f"to do: {result.fix}" if result.fix else ""):
        lines += [" " * _INDENT + line for line in textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)]
    return lines + ["    | " + line for line in result.shown]


def summary(results: list[Result]) -> str:
    found = Counter(result.status for result in results)
    parts = [f"{found[status]} {status}" for status in ("passed", "failed", "warned", "not asked") if found[status]]
    return f"{count(len(results), 'check')}: {', '.join(parts)}, in {sum(result.seconds for result in results):.0f} seconds"


def unless_failed(results: list[Result], config: str) -> dict:
    """{llmkd, config, passed, checks}, for --json. ChecksFailed, with which the command ends with 2, where a check failed."""
    wrong = [result.check for result in results if result.status == "failed"]
    whole = {"llmkd": __version__, "config": config, "passed": not wrong, "checks": results}
    if wrong:
        raise ChecksFailed(f"doctor: {count(len(wrong), 'check')} failed: {'; '.join(wrong)}", whole)
    return whole
