"""Evaluates the arms of a sweep with the harness after training, compares them and writes the report."""

from pathlib import Path

from llmkd.config.sweep import Evaluation
from llmkd.console import first_process, info
from llmkd.errors import UserError
from llmkd.files import read_sealed

from .harness.record_files import read_record


def check(folder: Path, wanted: Evaluation) -> None:
    """UserError if a task or the harness is missing, or if an arm was evaluated with other settings. Called before the arms are trained."""
    if not wanted.tasks:
        return
    from .harness.benchmarks import find_tasks, need_harness

    need_harness()
    try:
        tasks = find_tasks(list(wanted.tasks), wanted.tasks_dir, wanted.fewshot, wanted.allow_task_code)
    except UserError as error:
        raise UserError(*(problem.replace("--tasks", "eval.tasks", 1) for problem in error.problems)) from None
    for task in tasks:
        for arm in sorted(folder.glob("arms/*")):
            record = read_record(arm, task) or {}
            for name in ("limit", "fewshot", "chat_template"):
                there, asked = record.get(name), getattr(wanted, name)
                differs = bool(there) != asked if name == "chat_template" else there != asked
                if record and differs and (name != "fewshot" or asked is not None):
                    raise UserError(
                        f"eval.{name}: found {asked}, and {arm.name} was evaluated on {task} with {record.get(name)}; "
                        f"use that value, or remove {folder}/arms/*/eval to evaluate all arms again"
                    )


def finish(folder: Path, wanted: Evaluation) -> dict:
    """Evaluate every finished arm that has no results yet, write the report and return its numbers. Failures are raised at the end."""
    from .report.write import read_report, write

    arms = read_sealed(folder / "sweep.json")["arms"]
    done = [str(folder / arm["folder"]) for arm in arms.values() if arm["status"] == "done"]
    problems: tuple[str, ...] = ()
    if wanted.tasks and done:
        from .harness.evaluate import evaluate_all

        info(f"\nevaluating {len(done)} arms on {', '.join(wanted.tasks)}")
        options = {"fewshot": wanted.fewshot, "limit": wanted.limit, "batch_size": wanted.batch_size or "auto"}
        options |= {"chat_template": wanted.chat_template, "allow_task_code": wanted.allow_task_code}
        try:
            evaluate_all(done, list(wanted.tasks), tasks_dir=wanted.tasks_dir, **options)
        except UserError as error:
            problems = error.problems
    numbers = {}
    if first_process():
        report = read_report(folder)
        numbers = report.numbers()
        for path in write(report):
            print(path)
    failed = [f"arm {name}: {arm['reason']}" for name, arm in arms.items() if arm["status"] == "failed"]
    if failed or problems:
        error = UserError(*failed, *problems)
        error.results = numbers  # for --json
        raise error
    return numbers
