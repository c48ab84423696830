"""accelerate launch eval/run.py RUN_OR_MODEL... --tasks hellaswag,commonsense_qa; the same as `llmkd eval` on one process."""

import importlib.util
import sys
from pathlib import Path

if not __package__:  # run as a script: this folder's names are ours alone, and it is the package llmkd_eval, installed or not
    _folder = Path(__file__).resolve().parent
    sys.path[0] = str(_folder.parent)
    _spec = importlib.util.spec_from_file_location("llmkd_eval", _folder / "__init__.py", submodule_search_locations=[str(_folder)])
    sys.modules["llmkd_eval"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["llmkd_eval"])

from llmkd.config.loader import parse_overrides
from llmkd.console import first_process
from llmkd.errors import UserError

USAGE = """\
usage: llmkd eval RUN_OR_MODEL... --tasks TASK[,TASK...] [--tasks_dir DIR] [--fewshot N] [--limit N] [--batch_size auto|N]
                  [--seed N] [--dtype float32|bfloat16|float16|float64] [--out DIR] [--force]
       llmkd tasks DATA_DIR [--to eval/tasks]

eval     Evaluate finished runs, adapters, merged models, bases or hub ids by lm-evaluation-harness, its own tasks and metrics.
         Results: RUN/eval/TASK.json and TASK.jsonl (each item); of other models in runs/eval/NAME; or in --out (of several
         models in --out/NAME each). What has been evaluated with the same settings is not evaluated again.
         Several processes: accelerate launch eval/run.py RUN_OR_MODEL... --tasks ...
  --tasks       tasks, groups or tags of the harness (lm-eval ls tasks)
  --tasks_dir   a folder of task files that come before the harness's own, such as llmkd tasks writes
  --fewshot     examples in the prompt (by default each task's own number; a task that fixes it keeps it)
  --limit       only the first N items
  --batch_size  requests at once; auto tries what fits into a GPU's memory, and is 8 on a CPU
  --seed        for all of the harness's seeds (by default its own, 0 and 1234)
  --dtype       the type of the weights (by default as the student was trained, or as the model is saved)
  --force       evaluate again what has results, and replace them

tasks    Write task files for a folder of data, without a network: truthfulqa_mc1, truthfulqa_mc2, hellaswag and commonsense_qa,
         known by the columns of their rows (.jsonl, .json, .parquet). They name this machine's paths; do not commit them.
"""

_TYPES = ("float32", "bfloat16", "float16", "float64")


def evaluate(argv: list[str]) -> None:
    """`llmkd eval`: evaluate and print a table."""
    force = "--force" in argv
    words = [word for word in argv if word != "--force"]
    first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
    targets, options = words[:first], parse_overrides(words[first:], ("tasks", "tasks_dir", "out", "dtype"))
    tasks = [name for name in (options.pop("tasks", None) or "").split(",") if name]
    if not targets or not tasks:
        raise UserError(
            f"eval: names no {'task' if targets else 'model'}; write llmkd eval RUN_OR_MODEL... --tasks TASK,TASK (see llmkd eval --help)"
        )
    tasks_dir, out, dtype = (options.pop(name, None) for name in ("tasks_dir", "out", "dtype"))
    batch = options.pop("batch_size", "auto")
    if not (batch == "auto" or _whole(batch, 1)):
        raise UserError(f"--batch_size: found {batch!r}, expected auto or a whole number >= 1")
    if dtype not in (None, *_TYPES):
        raise UserError(f"--dtype: found {dtype}, expected one of {', '.join(_TYPES)}")
    numbers = {name: options.pop(name, None) for name in ("fewshot", "limit", "seed")}
    for name, value in numbers.items():
        least = 1 if name == "limit" else 0
        if value is not None and not _whole(value, least):
            raise UserError(f"--{name}: found {value!r}, expected a whole number >= {least}")
    if options:
        raise UserError(f"--{next(iter(options))}: eval has no such option (see llmkd eval --help)")
    from llmkd_eval.harness.evaluate import evaluate_all, in_words

    records = evaluate_all(targets, tasks, tasks_dir=tasks_dir, out=out, batch_size=batch, dtype=dtype, force=force, **numbers)
    if first_process():
        from llmkd.console import table

        rows = [
            {"model": name, "task": task, "shots": record["fewshot"], "items": record["n"], "metric": metric, "score": in_words(figure)}
            for name, of_model in records.items()
            for task, record in of_model.items()
            for metric, figure in record["metrics"].items()
        ]
        print(table(rows))


def tasks(argv: list[str]) -> None:
    """`llmkd tasks`: write task files for local data."""
    from llmkd_eval.harness.local_tasks import write_tasks

    if not argv or argv[0].startswith("--"):
        raise UserError("tasks: names no folder of data; write llmkd tasks DATA_DIR [--to eval/tasks]")
    options = parse_overrides(argv[1:], ("to",))
    to = Path(options.pop("to", None) or "eval/tasks")
    if options:
        raise UserError(f"--{next(iter(options))}: tasks has no such option; it has --to")
    for task, paths in write_tasks(Path(argv[0]), to).items():
        print(f"{to / task}.yaml  {', '.join(map(str, paths))}")


def _whole(value, least: int) -> bool:
    return type(value) is int and value >= least


if __name__ == "__main__":
    from llmkd.cli import main

    sys.exit(main(["eval", *sys.argv[1:]]))
