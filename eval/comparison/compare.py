"""Paired comparison of runs with a baseline, item by item: differences with standard errors, intervals, tests and verdicts."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmkd.errors import UserError

from ..harness.record_files import GROUP, in_words, results_folder
from . import stats
from .group_results import group_of, joined, read_group
from .item_results import HELD_OUT, Measured, groups_of, read, seed_of, tasks_of

#: Fields of a record that must be equal for two evaluations to have measured the same thing.
CONDITIONS = ("version", "harness", "fewshot", "limit", "seeds", "chat_template")
#: Metrics of held-out rows, and whether higher is better; all but the last are compared unless others are asked for.
HELD_OUT_METRICS = {"ce": False, "forward_kl": False, "top1_agreement": True, "accuracy": True, "reverse_kl": False}
_OF_TEACHER = ("forward_kl", "reverse_kl", "top1_agreement")
_OF_DISTRIBUTION = ("forward_kl", "reverse_kl")  # they are smaller over fewer events
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Row:
    """One arm on one task, or group of tasks, and metric. A value that does not exist is None: a baseline's difference, the spread of one seed."""

    task: str
    metric: str
    arm: str
    n: int  # items, or held-out rows
    value: float  # the mean over seeds, averaged over items, or on held-out rows over targets
    stderr: float | None  # over items
    seeds: int
    seed_spread: float | None  # standard deviation of the value over seeds
    higher_is_better: bool | None
    difference: float | None = None  # the arm minus the baseline
    difference_stderr: float | None = None  # over items, paired
    interval: tuple[float, float] | None = None  # 95 %, over items
    p: float | None = None
    p_adjusted: float | None = None  # Holm, over the arms of this task and metric
    family: int = 0  # their number
    test: str | None = None  # "McNemar", "permutation" or "permutation, exact"
    verdict: str = "baseline"  # or "no difference shown", "higher", "lower"
    better: bool | None = None  # None if no difference is shown
    within_one_stderr: bool | None = None
    detectable: float | None = (
        None  # the true difference that would be shown with a probability of 80 %; None with too few items or no spread
    )
    seed_interval: tuple[float, float] | None = None  # 95 % for the difference, over seeds
    seeds_matched: bool | None = None  # whether both arms have the same seeds
    tasks: tuple[str, ...] | None = None  # the tasks of a group
    weighting: str | None = None  # of a group's tasks: "items", by their number of items, or "tasks", all alike

    @property
    def same(self) -> bool:
        """Whether arm and baseline have the same value for every item, up to rounding."""
        return self.difference_stderr is not None and max(abs(self.difference), self.difference_stderr) <= _ROUNDING * abs(self.value)

    @property
    def not_over_seeds(self) -> bool:
        """Whether the items show a difference and the seeds, if there are two or more, do not."""
        return self.verdict != "no difference shown" and bool(self.seed_interval) and self.seed_interval[0] <= 0 <= self.seed_interval[1]


def compare(
    arms: dict[str, list[Path]],
    baseline: str | None = None,
    tasks: list[str] | None = None,
    metrics: list[str] | None = None,
    common: bool = False,
    info: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Every arm against the baseline (by default the first arm), on the tasks that all have, or only on `tasks`.

    An arm is a list of runs that differ in their seed. Its value for an item is the mean over its seeds, and the test asks whether
    the arms' means differ *on items like these, for these trained models*: items are drawn anew, seeds are not. More seeds make a
    mean that depends less on one lucky run, but the test doesn't know how much runs differ; so the spread over seeds stands next to
    it, and where both arms have two or more, the t interval of the difference over seeds, in which the items are fixed and
    the seeds are drawn (paired where both have the same seeds). A difference that should hold for training again and for other
    questions has to show in both. With one seed an arm nothing is known about training again. Arms with unequal numbers of seeds
    are compared too: the permutation test then holds for many items only, since a mean of three varies less than a single value.

    McNemar's exact test where both arms have one seed and the metric is 0 or 1; sign flips otherwise. Holm's correction over
    the arms of one task and metric; tasks and metrics are not corrected for. Intervals are not corrected.

    `common`: compare on the items that all arms have. Otherwise other items are refused, as are other conditions of measurement.
    A group of tasks is the mean that its file defines, over the same items as its tasks; they are drawn within their task.
    On held-out rows examples of one row of data are one draw, and arms whose teacher was another one than the baseline's, or known in
    another part (its 64 most likely tokens, from a teacher cache), are left out of the divergences. `info` gets a line about everything that is left out. Raises UserError.
    """
    if len(arms) < 2:
        raise UserError("compare: found one configuration, expected two or more (RUN or NAME=RUN[,RUN...] each)")
    baseline = next(iter(arms)) if baseline is None else baseline
    if baseline not in arms:
        raise UserError(f"--baseline {baseline}: no such configuration; there are {', '.join(arms)}")
    seeds = {arm: [seed_of(run) for run in runs] for arm, runs in arms.items()}
    rows, known = [], []
    every = [run for runs in arms.values() for run in runs]

    @functools.cache
    def of_task(task: str) -> dict[str, list[Measured]]:
        return aligned(arms, baseline, task, common, info)

    for task in _tasks(arms, tasks, info):
        if all(task in groups_of(run) for run in every):
            group = group_of(every, task)
            if lost := next(
                (f"{run} has no results of its task {part}" for part in group["tasks"] for run in every if part not in tasks_of(run)), ""
            ):
                if tasks:
                    raise UserError(f"--tasks {task}: {lost}; evaluate it again")
                info(f"{task}: left out; {lost}")
                continue
            if not group["means"]:
                info(f"{task}: left out; its tasks lack the metrics that it is the mean of")
            parts = {part: of_task(part) for part in group["tasks"]}
            measured = {arm: joined(group, {part: of_arm[arm] for part, of_arm in parts.items()}, info) for arm in arms}
        else:
            measured = of_task(task)
        names = list(dict.fromkeys(name for runs in measured.values() for m in runs for name in m.values))
        names = [name for name in HELD_OUT_METRICS if name in names] if task == HELD_OUT else names
        known += names
        for metric in names if metrics is None else [name for name in names if name in metrics]:
            if metrics is None and task == HELD_OUT and metric == "reverse_kl":
                continue
            holders = {arm: runs for arm, runs in measured.items() if _has(arm, runs, measured[baseline][0], task, metric, info)}
            if baseline in holders and len(holders) > 1:
                rows += rows_of(task, metric, holders, baseline, seeds)
    missing = [name for name in metrics or [] if name not in known]
    if missing:
        raise UserError(f"--metrics {missing[0]}: no task has it; there are {', '.join(dict.fromkeys(known))}")
    if not rows:
        raise UserError("compare: the configurations have no metric in common; see the lines above")
    return rows


def _tasks(arms: dict[str, list[Path]], wanted: list[str] | None, info) -> list[str]:
    there = {run: tasks_of(run) for runs in arms.values() for run in runs}
    groups = {name for run in there for name in groups_of(run)}
    every = sorted({task for tasks in there.values() for task in tasks}, key=lambda task: (task == HELD_OUT, task in groups, task))
    lacking = {task: [str(run) for run, tasks in there.items() if task not in tasks] for task in wanted or every}
    for task, runs in lacking.items():
        if not runs:
            continue
        as_group = next((read_group(run, task) for run in there if task in groups_of(run)), None)
        fix = f"; llmkd eval {runs[0]} --tasks {task} records it, and measures nothing twice" if as_group else ""
        if wanted:
            files = f"{task}{GROUP}" if as_group else f"{task}.json with {task}.jsonl"
            place = results_folder(Path(runs[0])).relative_to(runs[0])
            file = f"{HELD_OUT}.jsonl" if task == HELD_OUT else place / files
            raise UserError(f"--tasks {task}: {runs[0]} has no {file}; it has {', '.join(there[Path(runs[0])]) or 'no results'}{fix}")
        info(
            f"{task}: left out; {', '.join(runs)} {'has' if len(runs) == 1 else 'have'} no results of {'this group' if as_group else 'it'}{fix}"
        )
    both = [task for task, runs in lacking.items() if not runs]
    if not both:
        have = "; ".join(f"{run}: {', '.join(tasks) or 'none'}" for run, tasks in there.items())
        raise UserError(
            f"compare: the configurations have no task in common; {have}; evaluate them on the same (llmkd eval RUN ... --tasks TASK)"
        )
    return both


def _measure(run: Path, task: str, info) -> Measured:
    """A run's items of a task with the metrics that are means over items: those whose recorded value can be recomputed from them."""
    m = read(run, task)
    if task == HELD_OUT:
        if "agreement" in m.values:
            info(f"{task} agreement: left out for {run}; its held_out.jsonl has the name of llmkd 0.1.0; rename it to top1_agreement there")
        return m
    kept = {}
    for name, metric in m.record.get("metrics", {}).items():
        stated = metric.get("value") if isinstance(metric, dict) else None
        found = m.values[name].mean() if name in m.values else None
        if isinstance(stated, int | float) and found is not None and abs(found - stated) <= 1e-4 * max(1, abs(stated)):
            kept[name] = m.values[name]
        else:
            info(f"{task} {name}: left out for {run}; it is {stated}, and not the mean of one number an item ({found})")
    return replace(m, values=kept)


def aligned(
    arms: dict[str, list[Path]], baseline: str, task: str, common: bool = False, info: Callable[[str], None] = lambda text: None
) -> dict[str, list[Measured]]:
    """The results of all runs on a task, with the same items in the same order. UserError names the differences."""
    measured = {arm: [_measure(run, task, info) for run in runs] for arm, runs in arms.items()}
    first = measured[baseline][0]
    every = [m for runs in measured.values() for m in runs]
    shared = set(first.keys)
    for m in every:
        for name in CONDITIONS:
            if m.record.get(name) != first.record.get(name) and not (common and name == "limit"):
                raise UserError(
                    f"{task}: {first.run} was evaluated with {name} {in_words(name, first.record.get(name))}, {m.run} with "
                    f"{in_words(name, m.record.get(name))}; "
                    "evaluate one of them again, or name other tasks with --tasks"
                )
        shared &= set(m.keys)
        if not common and (len(m.keys) != len(first.keys) or len(shared) != len(first.keys)):
            raise UserError(
                f"{task}: {first.run} has {len(first.keys)} items, {m.run} {len(m.keys)}, and {len(shared)} are the same; "
                "evaluate one of them again, name other tasks with --tasks, or compare on the same items with --common"
            )
    if not shared:
        raise UserError(f"{task}: the configurations have no item in common; name other tasks with --tasks")
    for name, of in (
        ("truncated prompts", lambda m: m.record.get("truncated")),
        ("dtype", lambda m: (m.record.get("model") or {}).get("dtype")),
    ):
        found = {str(of(m)) for m in every}
        if len(found) > 1:
            info(f"{task}: note that the {name} of the runs differ: {', '.join(sorted(found))}")
    keys = [key for key in first.keys if key in shared]
    if len(keys) < max(len(m.keys) for m in every):
        info(f"{task}: compared on the {len(keys)} items that all runs have; they have {min(len(m.keys) for m in every)} and more")
    out = {arm: [_ordered(m, keys) for m in runs] for arm, runs in measured.items()}
    for m in (m for runs in out.values() for m in runs):
        same = (out[baseline][0].weights, out[baseline][0].counted)
        if m.weights is not None and not (np.array_equal(m.weights, same[0]) and _equal(m.counted, same[1])):
            raise UserError(f"{task}: {m.run} and {first.run} count different targets in the same examples; measure one of them again")
    return out


def _equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a.keys() & b.keys())


def _ordered(m: Measured, keys: list) -> Measured:
    place = {key: i for i, key in enumerate(m.keys)}
    order = [place[key] for key in keys]
    return replace(
        m,
        keys=keys,
        values={name: x[order] for name, x in m.values.items()},
        weights=None if m.weights is None else m.weights[order],
        counted={name: x[order] for name, x in m.counted.items()},
        groups=None if m.groups is None else [m.groups[i] for i in order],
        teacher_parts=None if m.teacher_parts is None else [m.teacher_parts[i] for i in order],
    )


def _has(arm: str, runs: list[Measured], first: Measured, task: str, metric: str, info) -> bool:
    """Whether an arm has a metric in every seed and, if the metric needs a teacher, with the baseline's teacher."""
    lacking = [str(m.run) for m in runs if metric not in m.values]
    if lacking:
        info(f"{task} {metric}: {arm} left out; {', '.join(lacking)} did not measure it")
    elif task == HELD_OUT and metric in _OF_TEACHER and not all(_same_teacher(m, first) for m in runs):
        info(f"{task} {metric}: {arm} left out; it has another teacher than {first.run}: the teachers' cross-entropies differ")
        return False
    elif (
        task == HELD_OUT
        and metric in _OF_DISTRIBUTION
        and (other := next((m for m in runs if m.teacher_parts != first.teacher_parts), None))
    ):
        info(f"{task} {metric}: {arm} left out; {other.run} measured it on {_part(other)} of its teacher, {first.run} on {_part(first)}")
        return False
    return not lacking


def _part(m: Measured) -> str:
    return " and ".join(sorted(set(filter(None, m.teacher_parts or [])))) or "the whole distribution"


def _same_teacher(m: Measured, first: Measured) -> bool:
    """A divergence from another teacher is another metric. The same teacher's cross-entropies differ by rounding alone, 0.05 % from a teacher cache."""
    a, b = m.values.get("teacher_ce"), first.values.get("teacher_ce")
    return a is None or b is None or bool(np.abs(a - b).sum() <= 0.002 * np.abs(b).sum())


def rows_of(task: str, metric: str, measured: dict[str, list[Measured]], baseline: str, seeds: dict[str, list[int | None]]) -> list[Row]:
    """Every arm against the baseline by one metric. measured: runs with the same items in the same order; seeds: of these runs."""
    first = measured[baseline][0]
    _, group = np.unique(first.groups, return_inverse=True) if first.groups else (None, np.arange(len(first.keys)))
    counted = first.counted.get(metric, first.weights)
    w = None if counted is None else np.bincount(group, counted)
    total, here = (len(first.keys), slice(None)) if w is None else (w.sum(), w > 0)
    w = None if w is None else w[here]
    of = (
        {"tasks": tuple(first.record["tasks"]), "weighting": first.record["metrics"][metric]["weighting"]}
        if first.strata is not None
        else {}
    )
    up = HELD_OUT_METRICS.get(metric) if task == HELD_OUT else first.record["metrics"][metric].get("higher_is_better")
    x = {arm: np.stack([np.bincount(group, m.values[metric])[here] for m in runs]) for arm, runs in measured.items()}  # [seeds, n]
    rows = []
    for arm in measured:
        value, stderr = stats.ratio_stderr(x[arm].mean(axis=0), w, first.strata)
        spread = stats.seed_spread(x[arm].sum(axis=1) / total)[0]
        row = Row(task, metric, arm, x[arm].shape[1], value, _real(stderr), len(x[arm]), _real(spread), up, **of)
        rows.append(row if arm == baseline else _against(row, x[arm], x[baseline], w, first.strata, total, seeds[arm], seeds[baseline]))
    others = [row for row in rows if row.arm != baseline]
    adjusted = stats.holm(np.array([row.p for row in others]))
    judged = {row.arm: _judged(row, float(p), len(others)) for row, p in zip(others, adjusted, strict=True)}
    return [judged.get(row.arm, row) for row in rows]


def _against(row: Row, a: np.ndarray, b: np.ndarray, w, strata, total: float, seeds_a: list, seeds_b: list) -> Row:
    """A row with its difference, interval and test. a, b: [seeds, items]; w, strata: [items] or None."""
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    difference = stats.paired_difference(mean_a, mean_b, w, strata=strata)
    if w is None and len(a) == len(b) == 1 and np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        p, test = stats.mcnemar(mean_a, mean_b), "McNemar"
    else:
        p, exact = stats.sign_flip(mean_a - mean_b)
        test = "permutation, exact" if exact else "permutation"
    matched = None not in seeds_a and len(set(seeds_a)) == len(seeds_a) == len(seeds_b) and set(seeds_a) == set(seeds_b)
    by_seed = [[x.sum() / total for _, x in sorted(zip(s, m, strict=True), key=lambda pair: pair[0])] if matched else m.sum(axis=1) / total
               for s, m in ((seeds_a, a), (seeds_b, b))]  # fmt: skip
    over_seeds = stats.seed_interval(*map(np.array, by_seed), paired=matched)
    return replace(
        row,
        difference=difference.value,
        difference_stderr=_real(difference.stderr),
        interval=None if np.isnan(difference.interval[0]) else difference.interval,
        p=p,
        test=test,
        within_one_stderr=bool(abs(difference.value) <= difference.stderr),
        seed_interval=over_seeds,
        seeds_matched=None if over_seeds is None else matched,
    )


def _judged(row: Row, p: float, family: int) -> Row:
    """The verdict in words, from the adjusted p value only."""
    verdict, better = "no difference shown", None
    if p < stats.LEVEL:
        verdict = "higher" if row.difference > 0 else "lower"
        better = None if row.higher_is_better is None else row.higher_is_better == (row.difference > 0)
    return replace(row, p_adjusted=p, family=family, verdict=verdict, better=better, detectable=_detectable(row, family))


def _detectable(row: Row, family: int) -> float | None:
    """The detectable difference. None if so few items cannot show any, or if a spread of 0 says nothing about other items."""
    error = row.difference_stderr
    if error is None or stats.least_p(row.n, family) >= stats.LEVEL or error <= _ROUNDING * max(abs(row.value), abs(row.difference)):
        return None
    least = stats.detectable(error, family)
    return min(1.0, least) if row.test == "McNemar" else least  # 0/1 answers cannot differ by more


def _real(x: float) -> float | None:
    return None if np.isnan(x) else float(x)
