"""The means of groups of tasks, as the harness defines them, and records of groups for comparisons."""

from pathlib import Path
from typing import Any

from llmkd import __version__

from . import record_files
from .benchmarks import harness_version


def group_means(groups: dict[str, Any], records: dict[str, dict]) -> list[dict]:
    """A row for each group and metric with a mean in the harness: value and standard error over its tasks.

    groups   the harness's groups, of `benchmarks.find_groups`
    records  one model's records by task

    The group says which metrics, and whether its tasks weigh by their items or alike. A mean is left out where a task is not
    among the records or lacks the metric.
    """
    measured = {name: _as_of_the_harness(record) for name, record in records.items()}
    out = []
    for name, group in groups.items():
        names = [task.task_name for task in group.get_all_tasks()]
        if not measured.keys() >= set(names):
            continue
        found, shots = group.aggregate(measured), {records[task]["fewshot"] for task in names}
        for wanted in group.aggregate_metric_list:
            for key in [key for key in found if _of(wanted, key)]:
                if not all(key in measured[task] for task in names):
                    continue
                metric, _, how = key.partition(",")
                error, named = found.get(f"{metric}_stderr,{how}"), metric if how == "none" else key
                better = {records[task]["metrics"][named].get("higher_is_better") for task in names}
                out.append(
                    {
                        "task": name,
                        "tasks": names,
                        "weighting": "items" if wanted.weight_by_size else "tasks",
                        "shots": shots.pop() if len(shots) == 1 else None,
                        "items": sum(records[task]["n"] for task in names),
                        "metric": named,
                        "value": found[key],
                        "stderr": error if isinstance(error, float) else None,
                        "higher_is_better": better.pop() if len(better) == 1 else None,
                    }
                )
    return out


def write_groups(folder: Path, groups: dict[str, Any], records: dict[str, dict]) -> None:
    """Write a file next to a model's results for each group whose tasks all have a record: its tasks, and the metrics and weights of its mean."""
    rows = group_means(groups, records)
    for name, group in groups.items():
        names = [task.task_name for task in group.get_all_tasks()]
        if names and records.keys() >= set(names):
            means = {row["metric"]: row["weighting"] for row in rows if row["task"] == name}
            stated = {"group": name, "version": group.version, "harness": harness_version(), "llmkd": __version__}
            record_files.write_group(folder, stated | {"tasks": names, "means": means})


def _of(wanted, key: str) -> bool:
    """Whether this part of a group's definition asks for a metric."""
    metric, comma, how = key.partition(",")
    return bool(comma) and metric == wanted.metric and (wanted.filter_list is None or how in wanted.filter_list)


def _as_of_the_harness(record: dict) -> dict[str, Any]:
    """A task's results under the harness's names."""
    out: dict[str, Any] = {"sample_len": record["n"]}
    for name, metric in record["metrics"].items():
        key, how = name.partition(",")[0], name.partition(",")[2] or "none"
        out |= {f"{key},{how}": metric["value"], f"{key}_stderr,{how}": "N/A" if metric["stderr"] is None else metric["stderr"]}
    return out
