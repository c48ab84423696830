"""Prints the rows of a comparison as text for a terminal, as Markdown for a report, and as numbers."""

import math
from dataclasses import asdict
from itertools import groupby

from llmkd import __version__
from llmkd.console import align, text_width
from llmkd.output import markdown

from . import stats
from .compare import Row
from .group_results import WEIGHTINGS
from .item_results import HELD_OUT

#: The meaning of a verdict's words. Shown under every table of the report and of `llmkd compare`.
LEGEND = (
    'Better, worse: Holm\'s p is below 0.05. "No difference shown": it is not; a difference that is too small for these items may exist.',
    '"Shown 4 times in 5": a true difference of that size gives a Holm\'s p below 0.05 with a probability of 80 %.',
    '"Not over seeds": the items show the difference, and its 95 % interval over seeds contains 0. "< 1 se": within one standard error of 0.',
)
EXPLANATION = (
    "A difference is that from the baseline on the same items; ± is one standard error; the 95 % interval is a paired bootstrap over items.",
    "p is two-sided: McNemar's exact test where both have one seed and the metric is 0 or 1, otherwise sign flips of the items' differences.",
    "Holm's p is corrected for the comparisons of one task and metric, not for looking at several tasks and metrics.",
    "The tests resample items, so they are about these trained models. Only several seeds tell whether training again would give the same.",
)
_COLUMNS = 140  # names that would make a table wider get a line of their own


def as_text(rows: list[Row]) -> str:
    """One block for each task and metric, then an explanation of the columns."""
    out = []
    for block in blocks(rows):
        head, *body = cells(block)
        room = _COLUMNS - sum(2 + max(map(text_width, column)) for column in list(zip(head, *body, strict=True))[1:])
        long = {i: line[0] for i, line in enumerate(body, 1) if text_width(line[0]) > room}
        for i in long:
            body[i - 1][0] = ""
        lines = [line.rstrip() for line in align([head, *body], left=(0, len(head) - 1))]
        rule = "-" * max(map(text_width, lines))
        lines = [f"{long[i]}\n{line}" if i in long else line for i, line in enumerate(lines)]
        out.append("\n".join([title(block), lines[0], rule, *lines[1:], *remarks(block)]))
    return "\n\n".join([*out, "\n".join((*LEGEND, *EXPLANATION))])


def as_markdown(rows: list[Row]) -> str:
    """The same as tables in Markdown."""
    out = []
    for block in blocks(rows):
        head, *body = cells(block)
        rule = [":--", *["--:"] * (len(head) - 2), ":--"]
        table = "\n".join(map(markdown.table_row, (head, rule, *body)))
        out.append("\n\n".join([f"**{title(block)}**", table, "\n".join(remarks(block))]))
    return "\n\n".join([*out, " ".join((*LEGEND, *EXPLANATION))])


def as_numbers(rows: list[Row]) -> dict:
    """Every number unrounded, with what the tests rest on."""
    conditions = {"llmkd": __version__, "level": stats.LEVEL, "power": stats.POWER, "resamples": stats.RESAMPLES, "seed": 0}
    return conditions | {"explanation": " ".join((*LEGEND, *EXPLANATION)), "rows": [asdict(row) for row in rows]}


def words(row: Row) -> str:
    """The verdict in a few words."""
    if row.verdict == "no difference shown":
        return row.verdict + (", < 1 se" if row.within_one_stderr else "")
    judged = {True: ", better", False: ", worse", None: ""}[row.better]
    return row.verdict + judged + (", not over seeds" if row.not_over_seeds else "")


def blocks(rows: list[Row]) -> list[list[Row]]:
    return [list(block) for _, block in groupby(rows, key=lambda row: (row.task, row.metric))]


def title(block: list[Row]) -> str:
    way = {True: ", higher is better", False: ", lower is better", None: ""}[block[0].higher_is_better]
    tests = list(dict.fromkeys(row.test for row in block if row.test))
    what = "rows" if block[0].task == HELD_OUT else "items"
    of = f"mean of {len(block[0].tasks)} tasks, {WEIGHTINGS[block[0].weighting]}, " if block[0].tasks else ""
    return f"{block[0].task} {block[0].metric}: {of}{block[0].n:,} {what}{way}" + (f"; {' or '.join(tests)}" if tests else "")


def cells(block: list[Row]) -> list[list[str]]:
    """The head and the lines of a table."""
    d, seeds = digits(block), any(row.seeds > 1 for row in block)
    out = [["configuration", "value", *["seeds"] * seeds, "difference", "95 % interval", "p", "Holm's p", ""]]
    for row in block:
        spread = f"{row.seeds}" if row.seed_spread is None else f"{row.seeds}, sd {row.seed_spread:.{d}f}"
        line = [row.arm, _plus_minus(row.value, row.stderr, d, ""), *[spread] * seeds]
        if row.difference is None:
            out.append([*line, "", "", "", "", words(row)])
            continue
        between = interval_text(row.interval, d)
        out.append(
            [*line, _plus_minus(row.difference, row.difference_stderr, d, "+"), between, p_text(row.p), p_text(row.p_adjusted), words(row)]
        )
    return out


def remarks(block: list[Row]) -> list[str]:
    """The text below a table: the detectable difference, and what the seeds show."""
    d, out = digits(block), reach(block)
    for row in block:
        if row.seed_interval:
            kind = f"{row.seeds} matching seeds (paired t)" if row.seeds_matched else "seeds (Welch's t)"
            zero = "contains 0" if row.seed_interval[0] <= 0 <= row.seed_interval[1] else "excludes 0"
            out.append(f"{row.arm}: 95 % interval over {kind} {interval_text(row.seed_interval, d)}, {zero}.")
    return out


def reach(block: list[Row]) -> list[str]:
    """The sentence on the difference that could have been detected."""
    others = [row for row in block if row.difference is not None]
    if none := too_few(others):
        return [none]
    d, out, least = digits(block), [], [row.detectable for row in others if row.detectable is not None]
    if least:
        low, high, family = f"{min(least):.{d}f}", f"{max(least):.{d}f}", others[0].family
        after = f", after the correction for {family} comparisons" if family > 1 else ""
        out.append(f"A true difference of {low if low == high else f'{low} to {high}'} would have been shown 4 times in 5{after}.")
    same = [row.arm for row in others if row.same]
    if same:
        names = ", ".join(same) if len(same) <= 4 else f"{len(same)} of them"
        what = "row" if block[0].task == HELD_OUT else "item"
        out.append(f"{names}: the same as the baseline on every {what}, so the smallest difference that could be shown is not known.")
    return out


def too_few(others: list[Row]) -> str:
    """The sentence on so few items that no difference could be shown, or ""."""
    if not others or stats.least_p(others[0].n, others[0].family) < stats.LEVEL:
        return ""
    n, family = others[0].n, others[0].family
    what = ("row" if others[0].task == HELD_OUT else "item") + "s" * (n > 1)
    holm = f"Holm's p for {family} comparisons" if family > 1 else "p"
    return f"{n} {what} cannot show any difference: {holm} cannot be below {stats.least_p(n, family):.4f}."


def digits(block: list[Row]) -> int:
    """The decimals that show two digits of the smallest standard error of a difference, at least four."""
    errors = [row.difference_stderr for row in block if row.difference_stderr]
    return min(8, max(4, 1 - math.floor(math.log10(min(errors))))) if errors else 4


def _plus_minus(value: float, stderr: float | None, d: int, sign: str) -> str:
    return f"{value:{sign}.{d}f}" + ("" if stderr is None else f" ±{stderr:.{d}f}")


def interval_text(interval: tuple[float, float] | None, d: int) -> str:
    return "unknown" if interval is None else f"{interval[0]:+.{d}f} to {interval[1]:+.{d}f}"


def p_text(p: float) -> str:
    return f"{p:.4f}" if p >= 0.00005 else f"{p:.0e}"
