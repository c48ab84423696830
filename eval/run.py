"""accelerate launch eval/run.py RUN_OR_MODEL... --tasks hellaswag,commonsense_qa; `llmkd eval` on several processes."""

import argparse
import importlib.util
import sys
from pathlib import Path

if not __package__:  # run as a script: this folder's names are ours alone, and it is the package llmkd_eval, installed or not
    _folder = Path(__file__).resolve().parent
    sys.path[0] = str(_folder.parent)
    _spec = importlib.util.spec_from_file_location("llmkd_eval", _folder / "__init__.py", submodule_search_locations=[str(_folder)])
    sys.modules["llmkd_eval"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["llmkd_eval"])

from llmkd.commands.other_tasks import refuse_run_of_other_task
from llmkd.console import first_process
from llmkd.errors import UserError


def evaluate(options: argparse.Namespace) -> list[dict]:
    """`llmkd eval`: evaluate, print a table and return its numbers. `options` are those of `llmkd.commands.arguments`."""
    if not options.places or not options.tasks:
        raise UserError(
            f"eval: no {'task' if options.places else 'model'} is given; write llmkd eval RUN_OR_MODEL... --tasks TASK,TASK (see llmkd eval --help)"
        )
    from llmkd_eval.harness.model_refs import refuse_missing

    for place in options.places:
        refuse_run_of_other_task(Path(place), "eval")
    refuse_missing(options.places, options.out)  # before the harness is loaded, which takes half a minute
    from llmkd_eval.harness.benchmarks import find_groups
    from llmkd_eval.harness.evaluate import SomeFailed, evaluate_all, in_words
    from llmkd_eval.harness.groups import group_means

    names = ("tasks_dir", "out", "dtype", "fewshot", "limit", "seed", "force", "chat_template", "allow_task_code")
    given = {name: getattr(options, name) for name in names}
    failed = None
    try:
        records = evaluate_all(options.places, options.tasks, batch_size=options.batch_size or "auto", **given)
    except SomeFailed as error:
        records, failed = error.records, error
    from llmkd.console import table

    rows = [
        {"model": name, "task": task, "shots": record["fewshot"], "items": record["n"], "metric": metric} | value
        for name, of_model in records.items()
        for task, record in of_model.items()
        for metric, value in record["metrics"].items()
    ]
    groups = find_groups(options.tasks, options.tasks_dir, options.fewshot)
    rows += [{"model": name} | row for name, of_model in records.items() for row in group_means(groups, of_model)]
    if first_process() and rows:
        shown = [{"model": row["model"], "task": _named(row)} | {key: row[key] for key in ("shots", "items", "metric")} for row in rows]
        print(table([one | {"score": in_words(row)} for one, row in zip(shown, rows, strict=True)]))
    if failed:
        failed.results = rows  # for --json
        raise failed
    return rows


def _named(row: dict) -> str:
    """A task, or a group with what its mean is of."""
    if "tasks" not in row:
        return row["task"]
    return f"{row['task']} (mean of {len(row['tasks'])}, {'by items' if row['weighting'] == 'items' else 'each alike'})"


def tasks(data: Path, to: Path) -> list[dict]:
    """`llmkd tasks`: write task files for local data."""
    from llmkd_eval.harness.local_tasks import write_tasks

    rows = [{"task": task, "file": to / f"{task}.yaml", "data": paths} for task, paths in write_tasks(data, to).items()]
    for row in rows:
        print(f"{row['file']}  {', '.join(map(str, row['data']))}")
    return rows


if __name__ == "__main__":
    from llmkd.cli import main

    sys.exit(main(["eval", *sys.argv[1:]]))
