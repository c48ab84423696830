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

from llmkd.console import first_process
from llmkd.errors import UserError
from llmkd.model_folder.files import refuse_mistyped_folder


def evaluate(options: argparse.Namespace) -> None:
    """`llmkd eval`: evaluate and print a table. `options` are those of `llmkd.commands.arguments`."""
    if not options.places or not options.tasks:
        raise UserError(
            f"eval: no {'task' if options.places else 'model'} is given; write llmkd eval RUN_OR_MODEL... --tasks TASK,TASK (see llmkd eval --help)"
        )
    for name in options.places:
        refuse_mistyped_folder(name, "eval")  # before the harness is loaded, which takes minutes
    from llmkd_eval.harness.evaluate import evaluate_all, in_words

    given = {name: getattr(options, name) for name in ("tasks_dir", "out", "dtype", "fewshot", "limit", "seed", "force")}
    records = evaluate_all(options.places, options.tasks, batch_size=options.batch_size or "auto", **given)
    if first_process():
        from llmkd.console import table

        rows = [
            {"model": name, "task": task, "shots": record["fewshot"], "items": record["n"], "metric": metric, "score": in_words(value)}
            for name, of_model in records.items()
            for task, record in of_model.items()
            for metric, value in record["metrics"].items()
        ]
        print(table(rows))


def tasks(data: Path, to: Path) -> None:
    """`llmkd tasks`: write task files for local data."""
    from llmkd_eval.harness.local_tasks import write_tasks

    for task, paths in write_tasks(data, to).items():
        print(f"{to / task}.yaml  {', '.join(map(str, paths))}")


if __name__ == "__main__":
    from llmkd.cli import main

    sys.exit(main(["eval", *sys.argv[1:]]))
