"""Compares the best of several arms with the best of several others: chosen on one half of the items and compared on the other, and vice versa.

Arms that are chosen by the very items that they are compared on look better than they are. Here no item is compared between arms that it
helped to choose (sample splitting with both halves used, as cross-fitting in Chernozhukov et al. 2018, section 3).
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .compare import Row, aligned, rows_of
from .item_results import Measured, seed_of

FIRST, SECOND = "first", "second"


@dataclass(frozen=True)
class CrossFit:
    """`row`: the second side's choices compared with the first's, over all items. `chosen`: for each half, the arms of both sides that it chose."""

    row: Row
    chosen: tuple[tuple[str, str], tuple[str, str]]


def cross_fit(
    first: dict[str, list[Path]], second: dict[str, list[Path]], task: str, metric: str, higher_is_better: bool
) -> CrossFit | None:
    """Each side is {arm: runs}. None if the arms of a side have no seed in common (or one twice), or a half has no items.

    UserError where the runs were not measured on the same items.
    """
    arms = first | second
    measured = aligned(arms, next(iter(arms)), task)
    half = halves(next(iter(measured.values()))[0])
    if half.all() or not half.any():
        return None
    seeds = {arm: [seed_of(run) for run in runs] for arm, runs in arms.items()}
    value = {
        (arm, chooses): np.mean([m.values[metric][half == chooses].sum() for m in measured[arm]])
        for arm in arms
        for chooses in (False, True)
    }
    sides, side_seeds, chosen = {}, {}, []
    for name, side in ((FIRST, first), (SECOND, second)):
        by = [max(side, key=lambda arm: value[arm, chooses] if higher_is_better else -value[arm, chooses]) for chooses in (False, True)]
        shared = [seed for seed in seeds[by[0]] if seed in seeds[by[1]]]
        if not shared or any(len(set(seeds[arm])) < len(seeds[arm]) for arm in by):
            return None
        runs = [{seed: m for seed, m in zip(seeds[arm], measured[arm], strict=True)} for arm in by]
        sides[name] = [_joined(runs[0][seed], runs[1][seed], half) for seed in shared]
        side_seeds[name], chosen = shared, [*chosen, by]
    row = next(row for row in rows_of(task, metric, sides, FIRST, side_seeds) if row.arm == SECOND)
    return CrossFit(row, tuple(zip(*chosen, strict=True)))


def halves(measured: Measured) -> np.ndarray:
    """The half of each item [items], which depends on its content and not on the order. All items of a row of data are in the half of the first."""
    first: dict[str, str] = {}
    names = [str(key[:-1]) for key in measured.keys]  # without the number of the occurrence
    names = [first.setdefault(group, name) for group, name in zip(measured.groups or names, names, strict=True)]
    return np.array([zlib.crc32(name.encode()) & 1 == 1 for name in names])


def _joined(by_false: Measured, by_true: Measured, half: np.ndarray) -> Measured:
    """The items of each half from the run that the other half chose."""
    return replace(
        by_false, values={name: np.where(half, x, by_true.values[name]) for name, x in by_false.values.items() if name in by_true.values}
    )
