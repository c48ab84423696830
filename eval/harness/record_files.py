"""The result files of an evaluation, two for each task: <task>.json with metrics and settings, <task>.jsonl with one item a line.

Of a group of tasks <group>.group.json says which tasks it is of, and how they weigh.
"""

import hashlib
import json
from pathlib import Path

from llmkd.errors import UserError, fix_of
from llmkd.files import read_jsonl, remove_leftovers, sha256_file, write_atomic, write_sealed
from llmkd.model_folder.identity import WHOLE
from llmkd.output.run_files import RECIPE, read_run_file

GROUP = ".group.json"
#: Settings that two evaluations of a task must share to be the same evaluation.
SAME = ("version", "harness", "fewshot", "limit", "chat_template", "seeds")
SAME += ("model.fingerprint", "model.dtype", "model.quantization", "model.chat_template")


def read_record(place: Path | str, task: str) -> dict | None:
    """The record of a task; None if there is none."""
    path = _path(place, task, "json")
    return read_run_file(path, "evaluate again with --force") if path.exists() else None


def read_items(place: Path | str, task: str) -> list[dict]:
    """The items of a task in the order of their ids. UserError if they are not those that the record was made from."""
    record, path = read_record(place, task), _path(place, task, "jsonl")
    if record is None or not path.exists():
        raise UserError(f"{path}: there is no evaluation of {task} here; llmkd eval makes one")
    try:
        found = sha256_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix_of(error, 'evaluate again with --force')}") from error
    if found != record.get("items_sha256"):
        raise UserError(f"{path}: does not match {task}.json (items_sha256); evaluate again with --force")
    return read_jsonl(path)


def write_task(folder: Path, record: dict, items: list[dict]) -> dict:
    """Write both files, the record last, so that a record's items are always there; the record with `items_sha256` filled in."""
    text = "".join(json.dumps(item, ensure_ascii=False, allow_nan=False) + "\n" for item in items)
    record = record | {"items_sha256": hashlib.sha256(text.encode()).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write_atomic(folder / f"{_name(record['task'])}.jsonl", text)
    write_sealed(folder / f"{_name(record['task'])}.json", record)
    return record


def write_group(folder: Path, record: dict) -> None:
    """Write a group's file; `record["group"]` is its name."""
    write_sealed(folder / f"{_name(record['group'])}{GROUP}", record)


def differences(before: dict, now: dict) -> list[str]:
    """A description of the settings that matter in which two records differ."""
    pairs = [(name, then, here) for name in SAME if (then := _at(before, name)) != (here := _at(now, name))]
    if "chat_template" in [name for name, *_ in pairs]:  # then the templates differ too
        pairs = [pair for pair in pairs if pair[0] != "model.chat_template"]
    return [f"{name} {in_words(name, then)} there and {in_words(name, here)} now{_why(name, then)}" for name, then, here in pairs]


def in_words(name: str, value) -> str:
    """A setting's value in a record, for a message."""
    if name == "chat_template":
        return "on" if value else "off"
    if value is None:
        return "none"
    if isinstance(value, str):
        return f"{value[:12]}..." if len(value) > 40 else value
    return json.dumps(value)


def _why(name: str, then) -> str:
    earlier = name == "model.fingerprint" and isinstance(then, str) and not then.startswith(WHOLE)
    return ", since an earlier version recorded samples of the weights" if earlier else ""


def _at(record: dict, dotted: str):
    for key in dotted.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def results_folder(run: Path) -> Path:
    """The folder with a run's results: its `eval`, or the folder itself where it is no run but what `llmkd eval` made for a model."""
    inside = run / "eval"
    return inside if inside.is_dir() or (run / RECIPE).exists() else run


def _path(place: Path | str, task: str, ending: str) -> Path:
    """The path of a task's file: in the folder itself, or in `eval` of a run's folder if it is there."""
    name = f"{_name(task)}.{ending}"
    return inside if (inside := Path(place) / "eval" / name).exists() else Path(place) / name


def _name(task: str) -> str:
    return task.replace("/", "_")
