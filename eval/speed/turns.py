"""Training loops that take their steps in turns, each turn in another order, so that what else runs on the machine slows all of them; and their
table, in which a step is compared with the first row's of its own turn."""

import statistics
from collections.abc import Callable, Iterator, Sequence

from llmkd.training.step_result import StepResult

from .step_cases import Clock
from .step_setup import Setup


def in_turns(
    setup: Setup,
    rows: Sequence[str],
    loop_of: Callable[[str], Iterator[StepResult]],
    before: Callable[[str], None] = lambda row: None,
    check: Callable[[str, StepResult], None] = lambda row, found: None,
) -> dict[str, list[float]]:
    """Seconds of each measured step by row, turn by turn; on a CPU of CPU time, of all threads. Each round's first turn warms up.

    loop_of   a row's training loop, of one step more than are measured
    before    what a row changes before each of its steps
    check     what raises where a step was not the row's
    """
    seconds, clock = {row: [] for row in rows}, Clock(setup.device)
    for _ in range(setup.options.repeats):
        loops = {row: loop_of(row) for row in rows}
        for turn in range(setup.options.steps + 1):
            for row in (*rows[turn % len(rows) :], *rows[: turn % len(rows)]):
                before(row)
                begun = clock.now()
                found = next(loops[row])
                if turn:
                    seconds[row].append(clock.now() - begun)
                check(row, found)
        for steps in loops.values():
            steps.close()
    return seconds


def report(seconds: dict[str, list[float]], what: str, of: str = "a step without") -> list[str]:
    """A Markdown table and the number of turns. `of`: what the first row is called in the heading of the ratios."""
    first = next(iter(seconds.values()))
    lines = [f"| {what} | ms a step (median) | of {of} (median; middle half of the turns) |", "| --- | --- | --- |"]
    for row, own in seconds.items():
        ratios = [a / b for a, b in zip(own, first, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        lines.append(f"| {row} | {statistics.median(own) * 1e3:.1f} | {middle:.3f} ({low:.3f} to {high:.3f}) |")
    return [*lines, "", f"{len(first)} turns."]
