"""Reads results item by item: <task>.json with <task>.jsonl in `results_folder(RUN)`, and RUN/held_out.jsonl as the task `held_out`."""

import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmkd.errors import UserError, fix_of
from llmkd.files import Damaged, read_file, read_object
from llmkd.output.metrics import WEIGHED_BY
from llmkd.output.run_files import RECIPE, SUMMARY, read_run_file

from ..harness.record_files import GROUP, results_folder

HELD_OUT = "held_out"


@dataclass(frozen=True)
class Measured:
    """One task of one run. An item's key is its document's hash and, where a document occurs several times, which of them it is."""

    run: Path
    record: dict  # <task>.json; empty for held_out
    keys: list[tuple[str, int]]
    values: dict[str, np.ndarray]  # [items] float64; with weights: sums over the item's targets
    weights: np.ndarray | None  # [items], targets
    counted: dict[str, np.ndarray]  # by metric, [items]: the targets that count in it, where examples have weights
    groups: list[str] | None  # [items]: the row of data; examples of one row are resampled together
    others: list[str]  # metrics that are not one number an item
    teacher_parts: list[str | None] | None = None  # [items]: the part of the teacher's distribution that was known, where not all of it was
    strata: np.ndarray | None = None  # [items], of a group of tasks: which of its tasks an item is of


def parse_arms(words: list[str]) -> dict[str, list[Path]]:
    """`RUN` or `NAME=RUN[,RUN...]` each; folders may hold `=` and `,` themselves, as a sweep's do: what exists decides."""
    arms: dict[str, list[Path]] = {}
    problems = []
    for word in words:
        try:
            name, runs = _arm(word)
        except UserError as error:
            problems += error.problems
            continue
        if name in arms:
            problems.append(f"{word}: a second configuration called {name}; name them, as NAME=RUN")
        if len({run.resolve() for run in runs}) < len(runs):
            problems.append(f"{word}: names a run twice; the seeds of a configuration are different runs")
        arms[name] = runs
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return arms


def _arm(word: str) -> tuple[str, list[Path]]:
    if Path(word).is_dir():
        return Path(word).resolve().name, [Path(word)]
    cuts = [i for i, c in enumerate(word) if c == "="]
    for cut in cuts:
        runs, parts = [], word[cut + 1 :].split(",")
        while parts:  # the longest name that exists
            size = next((k for k in range(len(parts), 0, -1) if parts[0] and Path(",".join(parts[:k])).is_dir()), 0)
            if not size:
                break
            runs.append(Path(",".join(parts[:size])))
            parts = parts[size:]
        if cut and runs and not parts:
            return word[:cut], runs
    raise UserError(f"{word}: no such folder; expected RUN or NAME=RUN[,RUN...], runs that were evaluated")


def tasks_of(run: Path) -> list[str]:
    """The tasks that a run's folder has results of, then its groups, `held_out` last. A task without a record, which is written last, was not finished."""
    if not run.is_dir():
        raise UserError(f"{run}: no such folder; name a run that was evaluated, or NAME=RUN[,RUN...]")
    tasks = sorted(path.stem for path in results_folder(run).glob("*.json") if _is_record(path))
    return tasks + groups_of(run) + [HELD_OUT] * (run / f"{HELD_OUT}.jsonl").exists()


def groups_of(run: Path) -> list[str]:
    """The groups of tasks that a run was evaluated on, by their files (`group_results`)."""
    return sorted(path.name.removesuffix(GROUP) for path in results_folder(run).glob(f"*{GROUP}"))


def _is_record(path: Path) -> bool:
    """Whether a file is the record of a task, whose items may be lost, and not another JSON file."""
    if os.path.lexists(path.with_suffix(".jsonl")):
        return True
    try:
        return "items_sha256" in read_object(path)
    except (OSError, Damaged):
        return False


def read(run: Path, task: str) -> Measured:
    """One task's items, in the order of their ids' text. Damaged files are refused with their line."""
    path = run / f"{HELD_OUT}.jsonl" if task == HELD_OUT else results_folder(run) / f"{task}.jsonl"
    of = run / SUMMARY if task == HELD_OUT else path.with_suffix(".json")
    fix = f"name other tasks with --tasks, or train {run} again" if task == HELD_OUT else f"evaluate {run} again"
    made = read_run_file(of, fix) if of.exists() or task != HELD_OUT else {}
    content, stated = _content(path), _stated(made, path.name) if task == HELD_OUT else made.get("items_sha256")
    if stated and hashlib.sha256(content).hexdigest() != stated:
        raise UserError(f"{path}: is not what {of.name} was made of; {fix}")
    record = {} if task == HELD_OUT else made
    part = "sums" if task == HELD_OUT else "metrics"
    items = []
    for number, line in enumerate(
        content.decode(errors="replace").removesuffix("\n").split("\n"), 1
    ):  # splitlines() would cut at what texts may hold
        item = _parse(line, f"{path}:{number}")
        if not isinstance(item.get("hash"), str) or not isinstance(item.get(part), dict):
            raise UserError(f"{path}:{number}: not an item; expected hash and {part}; evaluate {run} again")
        if task == HELD_OUT and not (_number(item.get("targets")) and 0 < item["targets"] < math.inf):
            raise UserError(f"{path}:{number}: targets is {item.get('targets')!r}, expected a number above 0; evaluate {run} again")
        for name, value in item[part].items():
            if _number(value) and not math.isfinite(value):
                raise UserError(f"{path}:{number}: {name} is {value}; nothing can be compared with that, leave {run} or {task} out")
        items.append(item)
    if not items or len(items) != record.get("n", len(items)):
        raise UserError(f"{path}: holds {len(items)} items, its record says {record.get('n', 'nothing')}; evaluate {run} again")
    items.sort(key=lambda item: str(item.get("id")))
    seen: Counter = Counter()
    keys = []
    for item in items:
        keys.append((item["hash"], seen[item["hash"]]))
        seen[item["hash"]] += 1
    names = list(dict.fromkeys(name for item in items for name in item[part]))
    whole = [name for name in names if all(_number(item[part].get(name)) for item in items)]
    values = {name: np.array([item[part][name] for item in items], float) for name in whole}
    others = [name for name in names if name not in whole]
    if task != HELD_OUT:
        return Measured(run, record, keys, values, None, {}, None, others)
    groups = [str(item.get("place") or f"example {i}") for i, item in enumerate(items)]
    targets, counted = np.array([item["targets"] for item in items], float), {}
    for name in values.keys() & WEIGHED_BY.keys():
        given = [(item.get("weights") or {}).get(WEIGHED_BY[name], 1.0) for item in items]
        if any(weight != 1 for weight in given):
            values[name], counted[name] = values[name] * given, targets * given
            if not any(given):
                del values[name]
    parts = [item.get("teacher_part") for item in items]
    return Measured(run, record, keys, values, targets, counted, groups, others, parts if any(parts) else None)


def seed_of(run: Path) -> int | None:
    """The seed that a run was trained with, by its recipe.yaml; None where there is none."""
    from llmkd.config import loader

    path, summary = run / RECIPE, run / SUMMARY
    if not path.exists():
        return None
    stated = _stated(read_run_file(summary, f"train {run} again"), RECIPE) if summary.exists() else None
    if stated and hashlib.sha256(_content(path)).hexdigest() != stated:
        raise UserError(f"{path}: is not what {SUMMARY} was made of; put it back as it was")
    return loader.read(path)[0].get("seed")


def _stated(summary: dict, name: str) -> str | None:
    """The hash of a file by its run's summary."""
    files = summary.get("files")
    return files.get(name) if isinstance(files, dict) else None


def _content(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix_of(error, 'evaluate its run again')}") from error


def _number(value) -> bool:
    return isinstance(value, int | float)


def _parse(text: str, place: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{place}: not a JSON object; the file is damaged, evaluate its run again")
    return value
