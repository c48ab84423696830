"""Writes task files by which lm-evaluation-harness reads the data of its own tasks from a local folder.

Each includes the task that is installed with the harness, so that prompt, choices, metrics and version are the genuine ones, and
overrides only where the data comes from. The harness wants absolute paths in them, so they are made for each machine.
"""

import re
from collections.abc import Callable
from pathlib import Path

import yaml

from llmkd.data.reading import files
from llmkd.errors import UserError
from llmkd.files import write_atomic
from llmkd.output.run_folder import refuse_unwritable

from .benchmarks import own_tasks

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # the names in `datasets`
_SHARD = re.compile(r".*-\d+-of-\d+\.\w+")


def _is_truthfulqa(row: dict) -> bool:
    return {"question", "mc1_targets", "mc2_targets"} <= row.keys()


def _is_hellaswag(row: dict) -> bool:
    return {"activity_label", "ctx_a", "ctx_b", "endings", "label"} <= row.keys()


def _is_commonsense_qa(row: dict) -> bool:
    """Its columns are those of ARC too, whose questions have four choices."""
    choices = row.get("choices")
    return {"question", "answerKey"} <= row.keys() and isinstance(choices, dict) and choices.get("label") == list("ABCDE")


#: {task: (its file among the harness's own, a test for rows of its data)}.
TASKS: dict[str, tuple[str, Callable[[dict], bool]]] = {
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1.yaml", _is_truthfulqa),
    "truthfulqa_mc2": ("truthfulqa/truthfulqa_mc2.yaml", _is_truthfulqa),
    "hellaswag": ("hellaswag/hellaswag.yaml", _is_hellaswag),
    "commonsense_qa": ("commonsense_qa/default.yaml", _is_commonsense_qa),
}


def write_tasks(data: Path, to: Path) -> dict[str, list[Path]]:
    """Write `to`/<task>.yaml for every task whose data lies in the folder `data`; {task: its data files}. UserError if there is none."""
    if not data.is_dir():
        raise UserError(f"{data}: there is no such folder; name the folder with the tasks' data")
    refuse_unwritable(to, "--to")
    found: dict[str, dict[str, list[Path]]] = {}
    for path in sorted(p for p in data.resolve().rglob("*") if p.suffix.lower() in _READERS and p.is_file()):
        split, row = _split(path.relative_to(data.resolve())), _first_row(path)
        for task in (task for task, (_, is_its) in TASKS.items() if row and is_its(row)):
            found.setdefault(task, {}).setdefault(split, []).append(path)
    found = {task: splits for task, splits in found.items() if "validation" in splits}
    if not found:
        raise UserError(
            f"{data}: has no validation data of {', '.join(TASKS)}, which are recognised by the columns of their rows; name the folder that has it"
        )
    for task, splits in found.items():
        for paths in (splits.get("train", []), splits["validation"]):
            if len(paths) > 1 and not all(_SHARD.fullmatch(path.name) for path in paths):
                raise UserError(f"{data}: {paths[0].name} and {paths[1].name} both hold rows of {task}; name a folder that has one of them")
    installed = own_tasks()
    to.mkdir(parents=True, exist_ok=True)
    for task, splits in found.items():
        write_atomic(to / f"{task}.yaml", _task_file(task, splits, installed))
    return {task: splits["validation"] for task, splits in found.items()}


def _task_file(task: str, splits: dict[str, list[Path]], installed: Path) -> str:
    kept = {split: [str(path) for path in splits[split]] for split in ("train", "validation") if split in splits}
    fields = {
        "include": str(installed / TASKS[task][0]),
        "task": task,
        "dataset_path": _READERS[splits["validation"][0].suffix.lower()],
        "dataset_name": None,  # some tasks name a configuration of the hub's data set
        "dataset_kwargs": {"data_files": kept},
    }
    if "train" not in splits:
        fields["training_split"] = None  # few-shot examples then come from the validation rows, without the row in question
    return "# Written by llmkd tasks for this machine.\n" + yaml.safe_dump(fields, sort_keys=False)


def _split(path: Path) -> str:
    """The split of a file by the words of its name and folders; validation if they name none."""
    words = set(re.split(r"[^a-z]+", path.as_posix().lower()))
    return "train" if words & {"train", "training"} else "test" if "test" in words else "validation"


def _first_row(path: Path) -> dict | None:
    with open(path, "rb") as file:
        try:
            row = next((get() for _, get in files.records(file, path.name, path)), None)
        except files.BadRow:
            return None
    return row if isinstance(row, dict) else None
