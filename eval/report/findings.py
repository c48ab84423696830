"""The findings of a sweep: rows of the comparison, and sentences made from these rows alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llmkd.errors import UserError

from ..comparison import stats
from ..comparison.compare import HELD_OUT_METRICS, Row, compare
from ..comparison.compare_text import blocks, digits, interval_text, p_text, too_few
from ..comparison.group_results import read_group
from ..comparison.item_results import HELD_OUT, groups_of, read, tasks_of
from .document import Span, Text

#: A row of an arm that could not be compared with the baseline has this for a verdict.
NOT_COMPARED = "not compared"
NAMES = {
    "ce": "Held-out CE",
    "forward_kl": "Held-out KL(teacher || student)",
    "top1_agreement": "Held-out agreement with the teacher",
    "accuracy": "Held-out accuracy",
    "reverse_kl": "Held-out KL(student || teacher)",
}


def measure(arms: dict[str, list[Path]], baseline: str, info: Callable[[str], None]) -> list[Row]:
    """Rows of every task that any arm has, the baseline's first; an arm that cannot be compared stands there with its metrics alone.

    `arms`: finished runs only. One task that cannot be compared doesn't cost the others.
    """
    every = [run for runs in arms.values() for run in runs]
    groups = {name for run in every for name in groups_of(run)}
    tasks = sorted({task for run in every for task in tasks_of(run)}, key=lambda t: (t != HELD_OUT, t in groups, t))
    rows = []
    for task in tasks:
        having = {arm: runs for arm, runs in arms.items() if runs and all(task in tasks_of(run) for run in runs)}
        lacking = [arm for arm in arms if arm not in having]
        if lacking:
            info(f"{task}: not measured in every run of {', '.join(lacking)}")
        try:
            found = compare(having, baseline, [task], info=info) if baseline in having and len(having) > 1 else []
        except UserError as error:
            info(f"{task}: not compared; {error}")
            found = []
        known = {(row.metric, row.arm) for row in found}
        having = {arm: runs for arm, runs in having.items() if _has_more(arm, runs[0], task, known)}
        rows += found + [row for arm, runs in having.items() for row in _alone(arm, runs, task, info) if (row.metric, row.arm) not in known]
    order = {arm: i for i, arm in enumerate([baseline, *arms])} | {baseline: -1}
    metrics = list(dict.fromkeys([*HELD_OUT_METRICS, *(row.metric for row in rows)]))
    return sorted(rows, key=lambda row: (tasks.index(row.task), metrics.index(row.metric), order[row.arm]))


def _has_more(arm: str, run: Path, task: str, known: set[tuple[str, str]]) -> bool:
    """Whether an arm measured what the comparison has no row of it for."""
    try:
        names = read_group(run, task)["means"] if task in groups_of(run) else read(run, task).values
    except UserError:
        return True
    return any((name, arm) not in known for name in names if task != HELD_OUT or name in ("ce", "forward_kl", "top1_agreement", "accuracy"))


def _alone(arm: str, runs: list[Path], task: str, info: Callable[[str], None]) -> list[Row]:
    """An arm's own metrics: those it has as the baseline of a comparison with itself."""
    try:
        rows = compare({arm: runs, "": runs}, arm, [task])
    except UserError as error:
        info(f"{task}: {arm} left out; {error}")
        return []
    return [replace(row, verdict=NOT_COMPARED) for row in rows if row.arm == arm]


def compared(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.difference is not None]


def label(task: str, metric: str) -> str:
    return NAMES.get(metric, f"Held-out {metric}") if task == HELD_OUT else f"{task} {metric}"


def statements(rows: list[Row], baseline: str) -> list[Text]:
    """One sentence for each task and metric, then what holds for all of them."""
    found = [_statement(block, baseline) for block in blocks(rows) if compared(block)]
    every = compared(rows)
    if every:
        found.append(_over_seeds(every))
        pairs = len({(row.task, row.metric) for row in every})
        if pairs > 1:
            found.append(
                f"Holm's correction covers the arms of one task and metric. It does not cover looking at {pairs} tasks and metrics: where no arm differs from "
                f"the baseline, each of them still shows a difference with a probability of {stats.LEVEL:.0%}."
            )
    return found


def _statement(block: list[Row], baseline: str) -> Text:
    others, d = compared(block), digits(block)
    shown = sorted((row for row in others if row.verdict != "no difference shown"), key=lambda row: -abs(row.difference))
    quiet = [row for row in others if row not in shown]
    parts: list[list[str | Span]] = []
    groups: dict[str, list[Row]] = {}
    for row in shown:
        groups.setdefault({True: "better", False: "worse", None: row.verdict}[row.better], []).append(row)
    for kind, members in sorted(groups.items()):
        first, several = members[0], len(members) > 1
        judged = Span(kind, kind) if kind in ("better", "worse") else kind
        most = [", ", Span(first.arm), " the most"] if several else []
        between = "" if first.interval is None else f", 95 % {interval_text(first.interval, d)}"
        numbers = f" (difference {first.difference:+.{d}f}{between}, Holm's p {p_text(first.p_adjusted)})"
        parts.append([*_listed(members, len(others)), " are " if several else " is ", judged, " than ", Span(baseline), *most, numbers])
    if quiet:
        least = f" ({'smallest ' if len(quiet) > 1 else ''}Holm's p {p_text(min(row.p_adjusted for row in quiet))})"
        names = [f"any of the {len(quiet)} arms"] if len(others) == len(quiet) > 4 else _listed(quiet, len(others))
        if 1 < len(quiet) <= 4:
            names = ["any of ", *names]
        if len(others) == 1:
            parts.append(["no difference shown between ", *names, " and ", Span(baseline), least])
        else:
            parts.append(["no difference from the baseline ", Span(baseline), " shown for ", *names, least])
    out: list[str | Span] = [label(block[0].task, block[0].metric), ": "]
    out += [piece for i, part in enumerate(parts) for piece in ([*(["; "] if i else []), *part])] + ["."]
    if none := too_few(others):
        return (*out, f" {none}")
    if least := [row.detectable for row in quiet if row.detectable is not None]:
        out.append(f" A true difference of {max(least):.{d}f} would have been shown 4 times in 5.")
    if same := [row for row in quiet if row.same]:
        verb, what = "is" if len(same) == 1 else "are", "row" if block[0].task == HELD_OUT else "item"
        out += [" ", *_listed(same, len(others)), f" {verb} the same as ", Span(baseline), f" on every {what}."]
    return tuple(out)


def mark(row: Row) -> str:
    """A word for what the comparison shows, with a dagger where the seeds don't show it; "" for no difference."""
    if row.difference is None:
        return row.verdict
    word = {True: "better", False: "worse", None: "" if row.verdict == "no difference shown" else row.verdict}[row.better]
    return word + "†" * row.not_over_seeds


def _over_seeds(rows: list[Row]) -> Text:
    if not any(row.seed_interval for row in rows):
        return (
            "No arm and the baseline both have two seeds or more, so these statements are about these trained models: whether training again "
            "would give the same is not known. Several seeds (seeds: [1, 2, 3] in the sweep) would tell."
        )
    fewest = min(row.seeds for row in rows if row.seed_interval)
    shown = [row for row in rows if row.verdict != "no difference shown" and row.seed_interval]
    lost = [row for row in shown if row.not_over_seeds]
    text = f"Of the {len(shown)} differences that the items show, {len(shown) - len(lost)} show over {fewest} seeds too (the 95 % interval by Student's t excludes 0)."
    if not shown:
        text = f"No difference is shown over items, so the {fewest} seeds have none to confirm."
    return text + (" Two seeds show only very large differences: t is 12.7." if fewest == 2 and lost else "")


def _listed(rows: list[Row], of: int) -> list[str | Span]:
    """Up to four names, or how many arms of `of`; with those of which the seeds don't say the same."""
    if len(rows) > 4:
        lost = sum(row.not_over_seeds for row in rows)
        return [f"{len(rows)} of {of} arms" + (f" ({lost} of them not over seeds)" if lost else "")]
    out: list[str | Span] = []
    for i, row in enumerate(rows):
        out += [
            *([" and " if i == len(rows) - 1 else ", "] if i else []),
            Span(row.arm),
            *([" (not over seeds)"] if row.not_over_seeds else []),
        ]
    return out
