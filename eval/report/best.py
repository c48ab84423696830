"""The first part of a sweep's report: the best arm, and the best distilled arm compared with the best plain one, each at its own best settings."""

from dataclasses import dataclass

from llmkd.errors import UserError

from ..comparison.compare import Row, compare
from ..comparison.compare_text import blocks, digits, interval_text, p_text
from ..comparison.cross_fit import CrossFit, cross_fit
from .document import Heading, Items, Para, Span, Text
from .findings import compared, label
from .sweep_files import Arm, SweepFolder


@dataclass(frozen=True)
class Best:
    """The best arms by one task and metric. `pair`: the best distilled arm compared with the best plain one, row by row."""

    best: Row
    distilled: Row | None
    plain: Row | None
    pair: Row | None
    digits: int


def find_best(sweep: SweepFolder, rows: list[Row]) -> list[Best]:
    """The best arms for each task and metric with a direction, among the arms measured on the same rows as the baseline."""
    out = []
    for block in blocks(rows):
        known = [row for row in block if _known(sweep, row)]
        if block[0].higher_is_better is None or not compared(block):
            continue
        distilled, plain = (_first([row for row in known if sweep.arms[row.arm].distils == kind]) for kind in (True, False))
        out.append(Best(_first(known), distilled, plain, _pair(sweep, plain, distilled), digits(block)))
    return out


def _known(sweep: SweepFolder, row: Row) -> bool:
    """Whether a row's arm was measured on the same rows as the baseline."""
    return row.difference is not None or row.arm == sweep.baseline


def _first(rows: list[Row]) -> Row | None:
    return min(rows, key=lambda row: -row.value if row.higher_is_better else row.value, default=None)


def _pair(sweep: SweepFolder, plain: Row | None, distilled: Row | None) -> Row | None:
    if plain is None or distilled is None:
        return None
    runs = {row.arm: [run.folder for run in sweep.arms[row.arm].done] for row in (plain, distilled)}
    try:
        found = compare(runs, plain.arm, [plain.task], [plain.metric])
    except UserError:
        return None
    return next((row for row in found if row.arm == distilled.arm), None)


def find_cross_fit(sweep: SweepFolder, rows: list[Row], one: Best) -> CrossFit | None:
    """The best distilled arm against the best plain one, each chosen on the half of the rows that it is not compared on. None if there is no
    such comparison, as for a group of tasks."""
    block = [row for row in rows if (row.task, row.metric) == (one.best.task, one.best.metric) and _known(sweep, row)]
    plain, distilled = (
        {row.arm: [run.folder for run in sweep.arms[row.arm].done] for row in block if sweep.arms[row.arm].distils == kind}
        for kind in (False, True)
    )
    if not plain or not distilled:
        return None
    try:
        return cross_fit(plain, distilled, one.best.task, one.best.metric, one.best.higher_is_better)
    except UserError:
        return None


def cross_fit_sentence(one: Best, fit: CrossFit) -> Text:
    """One line with the difference between arms that were chosen on other rows, and the chosen arms."""
    d, row = min(one.digits, 5), fit.row
    seeds = "" if not row.seed_interval else f", over {row.seeds} seeds {interval_text(row.seed_interval, d)}"
    numbers = f" ({row.difference:+.{d}f}, 95 % {interval_text(row.interval, d)}{seeds}, p {p_text(row.p)}). "
    if set(fit.chosen) == {(one.plain.arm, one.distilled.arm)}:
        which: Text = ("Either half chooses these two arms.",)
    else:
        (plain, distilled), (plain_2, distilled_2) = fit.chosen
        which = ("One half chooses ", Span(distilled), " and ", Span(plain), ", the other ", Span(distilled_2), " and ", Span(plain_2), ".")
    return (label(row.task, row.metric), ": distilled against plain ", *_judged(row), numbers, *which)


def headline(sweep: SweepFolder, rows: list[Row]) -> list:
    """Blocks of the report: the best arms by every metric, with caveats. Empty if nothing is compared."""
    found = find_best(sweep, rows)
    if not found:
        return []
    out: list = [Heading("The best arms", "best"), Items([best_sentence(sweep, one) for one in found], "summary")]
    counts = [sum(arm.distils == kind and bool(arm.done) for arm in sweep.arms.values()) for kind in (True, False)]
    if any(one.pair for one in found) and max(counts) > 1:
        kinds = " and ".join(f"{n} {kind}" for n, kind in zip(counts, ("distilled", "plain"), strict=True))
        text = f"Each was chosen out of {kinds} arms by the rows that they are compared on, which makes small differences look surer than they are."
        crossed = [cross_fit_sentence(one, fit) for one in found if one.pair and (fit := find_cross_fit(sweep, rows, one))]
        if crossed:
            out += [
                Para(
                    f"{text} So that no row compares what it chose: one half of the rows chooses, the other compares, both ways round.",
                    "small",
                ),
                Items(crossed),
            ]
        else:
            out.append(Para(f"{text} Confirm one on other rows.", "small"))
    return [*out, *baseline_at_its_best(sweep, rows, found[0]), *learning_rates(sweep, found[0])]


def best_sentence(sweep: SweepFolder, one: Best) -> Text:
    """One line: the best arm by a metric, compared with the best of the other kind."""
    d, pair = min(one.digits, 5), one.pair
    out: list[str | Span] = [label(one.best.task, one.best.metric), ": ", *_named(sweep, one.best), f" is the best ({one.best.value:.{d}f}"]
    if pair is None:
        return (*out, ").")
    kind, versus = ("distilled", one.plain) if one.best.arm == one.distilled.arm else ("plain", one.distilled)
    seeds = "" if not pair.seed_interval else f", over {pair.seeds} seeds {interval_text(pair.seed_interval, d)}"
    out += [
        f", {kind}). The best {'plain' if kind == 'distilled' else 'distilled'} arm is ",
        *_named(sweep, versus),
        f" ({versus.value:.{d}f}). ",
    ]
    out += [
        "Distilled against plain: ",
        *_judged(pair),
        f" ({pair.difference:+.{d}f}, 95 % {interval_text(pair.interval, d)}{seeds}, p {p_text(pair.p)}).",
    ]
    return tuple(out)


def _judged(row: Row) -> Text:
    return (
        {True: Span("better", "better"), False: Span("worse", "worse"), None: "no difference shown"}[row.better],
        ", not over seeds" * row.not_over_seeds,
    )


def _named(sweep: SweepFolder, row: Row) -> list[str | Span]:
    """The arm's name, with its learning rate if the arms differ in it and the name does not have it."""
    rates, own = {_lr(arm) for arm in sweep.arms.values()}, _lr(sweep.arms[row.arm])
    return [Span(row.arm), f" at lr {own:g}" if own and len(rates) > 1 and "lr-" not in row.arm else ""]


def _lr(arm: Arm) -> float | None:
    value = arm.setting("optim.lr")
    return float(value) if isinstance(value, int | float) else None


def baseline_at_its_best(sweep: SweepFolder, rows: list[Row], one: Best) -> list:
    """A warning if an arm that differs from the baseline only in optimizer settings is better by that metric."""
    base = sweep.arms[sweep.baseline]
    block = [row for row in rows if (row.task, row.metric) == (one.best.task, one.best.metric)]
    alike = [row for row in block if _without_optimizer(sweep.arms[row.arm]) == _without_optimizer(base)]
    best, own = _first(alike), next((row for row in alike if row.arm == base.name), None)
    if own is None or best.value == own.value:
        return []
    what = label(best.task, best.metric)
    text = f"{what} {best.value:.{one.digits}f} instead of {own.value:.{one.digits}f}. A difference from this baseline may come from these settings"
    text += "; name the better arm as the sweep's baseline, or judge by the best arms above."
    return [
        Para(
            ("The baseline ", Span(base.name), " is not at its best: ", Span(best.arm), " has other optimizer settings alone, and ", text),
            "warn",
        )
    ]


def _without_optimizer(arm: Arm) -> dict:
    return {key: value for key, value in arm.settings.items() if not key.startswith("optim.")}


def learning_rates(sweep: SweepFolder, one: Best) -> list:
    """A caveat on the best learning rates of the two arms that are compared."""
    items: list[Text] = []
    for kind, row in (("distilled", one.distilled), ("plain", one.plain)) if one.pair else ():
        arm = sweep.arms[row.arm]
        tried, own = sorted({lr for other in sweep.arms.values() if other.distils == arm.distils and (lr := _lr(other))}), _lr(arm)
        if len(tried) == 1:
            items.append(f"The {kind} arms were tried at one learning rate, {own:g}: at their best one they may be better.")
        elif own in tried[:1] + tried[-1:]:
            end = "smallest" if own == tried[0] else "largest"
            items.append(f"The best {kind} arm has the {end} learning rate that was tried, {own:g}: a better one may lie beyond it.")
    return [Items(items)] if items else []
