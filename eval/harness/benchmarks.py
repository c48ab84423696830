"""Finds the harness's tasks by name and reads their data: from a folder of task files, or the harness's own."""

import difflib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
from pathlib import Path

from llmkd.console import info, warn
from llmkd.errors import UserError

from .task_code import refuse_task_code, sandbox_templates

#: How task files name tasks, groups and tags.
_NAMED = re.compile(rb"^\s*(?:- )?(?:task|group|tag): *[\"']?([\w./-]+)", re.MULTILINE)


def find_tasks(names: list[str], tasks_dir: Path | str | None, fewshot: int | None, allow_task_code: bool = False) -> dict:
    """{name: the harness's task}, with its data read; a group or tag stands for its tasks. UserError for tasks that cannot be loaded.

    allow_task_code  files in `tasks_dir` may name Python that is then run
    """
    tasks_dir = _task_folder(tasks_dir)
    if not allow_task_code:
        if tasks_dir:
            refuse_task_code(tasks_dir, own_tasks())
        sandbox_templates()
    found = {}
    for name in names:
        found |= _load(name, tasks_dir, fewshot)[0]
    if not found:
        raise UserError("--tasks: no task is given; write --tasks hellaswag,commonsense_qa")
    return found


def find_groups(names: list[str], tasks_dir: Path | str | None, fewshot: int | None) -> dict:
    """{name: the harness's group} of the groups with a mean among the names, and inside these groups. Their tasks are those of `find_tasks`."""
    tasks_dir, found = _task_folder(tasks_dir), {}
    for name in names:
        found |= {group.name: group for group in _load(name, tasks_dir, fewshot)[1].values() if group.has_aggregation}
    return found


@functools.cache
def _load(name: str, tasks_dir: Path | None, fewshot: int | None) -> tuple[dict, dict]:
    """Tasks and groups, kept for the next model. There is one set for each number of examples, since the harness writes that into the task."""
    _quiet()
    known = _index_with(name, tasks_dir)
    try:
        loaded = known.load([name])
        tasks = loaded["tasks"]
        empty = [task for task in tasks.values() if not len(task.eval_docs)]
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        fix = "write its task file again (llmkd tasks)" if tasks_dir else "without a network, name local task files with --tasks_dir"
        raise UserError(f"--tasks: {name}: its data cannot be loaded ({type(error).__name__}: {reason}); {fix}") from error
    if empty:
        raise UserError(f"--tasks: {name}: {empty[0].task_name} has no items")
    for task in tasks.values():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"--tasks: {task.task_name}: runs code that the model writes, which llmkd does not do; leave it out")
        if fewshot and shots(task, fewshot) != fewshot:
            warn(f"note: {task.task_name} has its examples in its prompt, so --fewshot {fewshot} has no effect")
    return tasks, loaded["groups"]


def _index_with(name: str, tasks_dir: Path | None):
    """The local index if it has the task, else the one with the harness's own tasks, which takes half a minute to make."""
    if tasks_dir:
        if name in (local := index(tasks_dir, False)).task_index:
            return local
        if (tasks_dir / f"{name}.yaml").exists():
            raise UserError(f"--tasks_dir: {tasks_dir / name}.yaml cannot be read as a task; write it again (llmkd tasks)")
        warn(f"note: {tasks_dir} has no task {name}; looking among the harness's own")
    if (named := _names_unless_written(name)) is not None:
        raise _unknown(name, named)
    every = index(tasks_dir, True)
    if name not in every.task_index:
        raise _unknown(name, every.all_tasks)
    return every


def _unknown(name: str, known: list[str]) -> UserError:
    if name == "held_out":  # the name of these rows in compare and report
        return UserError(
            f"--tasks: {name}: a run measures its held-out rows itself, so there is nothing to evaluate; llmkd compare RUN RUN and llmkd report "
            "SWEEP read them"
        )
    near = difflib.get_close_matches(name, known, 3)
    also = f"; did you mean {' or '.join(near)}?" if near else "; lm-eval ls tasks lists them"
    return UserError(f"--tasks: {name}: lm-evaluation-harness {harness_version()} has no such task{also}")


def _names_unless_written(name: str) -> list[str] | None:
    """The names of the harness's tasks if none of its task files contains this text, else None. This is much faster than the harness's index."""
    found: set[str] = set()
    for folder, _, files in os.walk(own_tasks()):
        for file in files:
            if file.endswith((".yaml", ".yml", ".py")):
                content = Path(folder, file).read_bytes()
                if name.encode() in content or name == Path(file).stem:
                    return None
                found.update(named.decode() for named in _NAMED.findall(content))
    return sorted(found)


@functools.cache
def index(tasks_dir: Path | None, defaults: bool):
    """Made once for all models that are evaluated in this process."""
    from lm_eval.tasks import TaskManager

    if defaults:
        info("indexing the harness's own tasks, which takes half a minute")
    return TaskManager(include_path=str(tasks_dir) if tasks_dir else None, include_defaults=defaults)


def _task_folder(tasks_dir: Path | str | None) -> Path | None:
    if tasks_dir is None:
        return None
    folder = Path(tasks_dir).expanduser().resolve()
    if not folder.is_dir() or not list(folder.rglob("*.yaml")):
        what = "holds no task files (*.yaml)" if folder.is_dir() else "is no folder"
        raise UserError(f"--tasks_dir: {tasks_dir} {what}; llmkd tasks DATA_DIR --to {tasks_dir} writes them for local data")
    return folder


def shots(task, asked: int | None) -> int:
    """The number of few-shot examples that the harness will give: a task that sets 0 itself keeps it."""
    own = task.get_config("num_fewshot")
    return own or 0 if asked is None or own == 0 else asked


def own_tasks() -> Path:
    """The folder of the installed harness's own tasks, found without loading it."""
    need_harness()
    return Path(importlib.util.find_spec("lm_eval").origin).resolve().parent / "tasks"


def need_harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("eval: lm-evaluation-harness is not installed; pip install 'llmkd[eval]'")


def harness_version() -> str:
    return importlib.metadata.version("lm_eval")


def _quiet() -> None:
    """The harness prints a line for every shortened request, and its bars and those of its libraries fill log files."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if (loaded := sys.modules.get("datasets")) and os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] == "1":
        loaded.disable_progress_bars()  # it has read the variable at its import
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
