"""Groups of tasks, item by item: RUN/eval/<group>.group.json says of which tasks a group is the mean, and how they weigh."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from llmkd.errors import UserError
from llmkd.output.run_files import read_run_file

from ..harness.record_files import GROUP, results_folder
from .item_results import Measured

WEIGHTINGS = {"items": "by items", "tasks": "each alike"}


def read_group(run: Path, name: str) -> dict:
    """A group's file: its `tasks`, and the weighting of each metric in `means`. UserError where it is damaged."""
    path, fix = results_folder(run) / f"{name}{GROUP}", f"evaluate {run} on {name} again, which measures nothing twice"
    found = read_run_file(path, fix)
    tasks, means = found.get("tasks"), found.get("means")
    if not (isinstance(tasks, list) and tasks and isinstance(means, dict) and set(means.values()) <= WEIGHTINGS.keys()):
        raise UserError(f"{path}: is damaged (it names no tasks and means); {fix}")
    return found


def group_of(runs: list[Path], name: str) -> dict:
    """The group's file that all runs have. UserError where they do not say the same of it."""
    first, *others = [(run, read_group(run, name)) for run in runs]
    for run, found in others:
        for part in ("tasks", "means"):
            if found[part] != first[1][part]:
                raise UserError(
                    f"{name}: {first[0]} was evaluated with other {part} of this group than {run}; evaluate one of them on {name} again, "
                    "or name other tasks with --tasks"
                )
    return first[1]


def joined(group: dict, of_tasks: dict[str, list[Measured]], info: Callable[[str], None]) -> list[Measured]:
    """The items of all tasks of a group, for each run of one arm.

    An item's value is times a weight, so that the mean over all items is the group's: 1 where tasks weigh by their items, n / (k n_t) for
    an item of a task with n_t of the n items where each of the k tasks weighs alike.

    of_tasks  an arm's runs by task, their items aligned with those of the other arms
    """
    tasks = list(of_tasks)
    sizes = np.array([len(of_tasks[task][0].keys) for task in tasks])
    strata = np.repeat(np.arange(len(tasks)), sizes)
    alike = (sizes.sum() / (len(tasks) * sizes))[strata]
    out = []
    for parts in zip(*of_tasks.values(), strict=True):  # those of one run
        metrics, values = {}, {}
        for name, weighting in group["means"].items():
            lacking = [task for task, m in zip(tasks, parts, strict=True) if name not in m.values]
            if lacking:
                info(f"{group['group']} {name}: left out for {parts[0].run}; {', '.join(lacking)} has no such mean of one number an item")
                continue
            x = np.concatenate([m.values[name] for m in parts])
            values[name] = x if weighting == "items" else x * alike
            better = {m.record["metrics"][name].get("higher_is_better") for m in parts}
            metrics[name] = {"higher_is_better": better.pop() if len(better) == 1 else None, "weighting": weighting}
        keys = [(task, *key) for task, m in zip(tasks, parts, strict=True) for key in m.keys]
        out.append(replace(parts[0], record={"metrics": metrics, "tasks": tasks}, keys=keys, values=values, others=[], strata=strata))
    return out
