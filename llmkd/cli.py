"""The `llmkd` command. `llmkd train` is the same as `accelerate launch llmkd/train.py` on one process."""

import logging
import os
import sys
import warnings
from pathlib import Path

from . import __version__
from .config import loader, schema
from .errors import UserError, exit_code

USAGE = """\
usage: llmkd train --config RECIPE [--section.name VALUE ...] [--resume] [--debug]
       llmkd sweep --config SWEEP [--section.name VALUE ...] [--resume]
       llmkd cache --config RECIPE [--check] [--import FILE] [--section.name VALUE ...]
       llmkd data --config RECIPE [--show N] [--example I] [--section.name VALUE ...]
       llmkd export RUN [--to FOLDER] [--checkpoint STEP|best]
       llmkd eval RUN_OR_MODEL... --tasks TASK[,TASK...] [--tasks_dir DIR] [...]     llmkd eval --help says more
       llmkd tasks DATA_DIR [--to eval/tasks]
       llmkd compare RUN|NAME=RUN[,RUN...] ... [--baseline NAME] [--tasks A,B] [--metrics A,B] [--common] [--json FILE]
       llmkd report SWEEP_FOLDER
       llmkd --version          llmkd train --help lists every setting

train    Train a student by distillation, or by plain fine-tuning where the recipe names no teacher.
         Several processes: accelerate launch llmkd/train.py --config RECIPE ...
sweep    Train every arm of a sweep (a recipe and a grid of changes), side by side before one teacher where they can; then
         measure, compare and report them. A pipeline's or sweep's file given to train runs it too, on several processes.
cache    Ask the recipe's teachers once, and keep what they say at every target in the caches that teacher.cache names: runs then need
         no teacher in memory. --check measures what a quantised teacher, or a teacher cache, loses; --import reads answers from elsewhere.
         Several processes: accelerate launch -m llmkd cache --config RECIPE ...
data     Read and tokenise a recipe's data as a run would; print its figures and N examples (3) with the supervised tokens marked.
export   Write a finished run's student as a plain transformers model (RUN/merged): an adapter is merged into its base.
eval     Evaluate runs and models by lm-evaluation-harness. Several processes: accelerate launch eval/run.py RUN_OR_MODEL... --tasks ...
tasks    Write the task files that give the harness's tasks their data from a local folder.
compare  Compare evaluated runs with the first or --baseline, item by item, with intervals and tests; RUN,RUN are the seeds of one arm.
report   Write report.html and report.md of a sweep, finished or not: what was run, curves, comparisons, maps over settings, cost.

exit codes: 0 done, 1 a bug, 2 something to mend (one line each), 3 stopped on a non-finite value,
            75 stopped by a signal; --resume goes on. accelerate launch and torchrun turn all of them into 1.
"""

PIPELINE = """\
A pipeline (a file with stages:, such as recipes/quickstart.yaml) runs its stages in order and compares their students;
every other setting given on the command line goes to all stages. A sweep (a file with grid: or arms:) trains its arms;
a setting that is not its own goes to all arms.
"""


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = _flag(argv, "--debug")
    return exit_code(lambda: dispatch(argv), debug=debug)


def entry() -> None:
    sys.exit(main())


def dispatch(argv: list[str]) -> None:
    commands = {"train": train, "sweep": sweep, "cache": cache, "data": data, "export": export}
    commands |= {"eval": evaluate, "tasks": tasks, "compare": compare, "report": report}
    command = argv.pop(0) if argv else "--help"
    if command == "--version":
        print(f"llmkd {__version__}")
    elif command in ("--help", "-h", "help"):
        print(USAGE)
    elif command in commands:
        commands[command](argv)
    else:
        raise UserError(f"{command}: no such command; there are {', '.join(commands)} (see llmkd --help)")


def train(argv: list[str]) -> None:
    if _flag(argv, "--help") or _flag(argv, "-h"):
        print(USAGE + "\n" + PIPELINE + "\nsettings:\n" + schema.help_text())
        return
    config, overrides, resume = _run_options(argv)
    kind = loader.file_kind(config)
    if kind == "sweep":
        run_sweep(config, overrides, resume)
    elif kind == "pipeline":
        from .commands.pipeline import run_pipeline

        run_pipeline(config, overrides, resume)
    else:
        recipe = loader.load_recipe(config, overrides)
        from .training.run import run

        run(recipe, resume)


def sweep(argv: list[str]) -> None:
    if _flag(argv, "--help") or _flag(argv, "-h"):
        print(USAGE + "\n" + PIPELINE + "\nsettings of a sweep:\n" + schema.help_text(loader.Sweep))
        return
    config, overrides, resume = _run_options(argv)
    if loader.file_kind(config) != "sweep":
        raise UserError(f"--config {config}: is no sweep, which has grid: or arms:; llmkd train runs it")
    run_sweep(config, overrides, resume)


def run_sweep(config: str, overrides: dict, resume: bool) -> None:
    from llmkd_eval import after_sweep

    sweep = loader.load_sweep(config, overrides)
    after_sweep.check(Path(sweep.output_dir).expanduser(), sweep.eval)
    from .commands.sweep import run_sweep as train_arms

    train_arms(config, overrides, resume, lambda folder: after_sweep.finish(folder, sweep.eval))


def cache(argv: list[str]) -> None:
    if _flag(argv, "--help") or _flag(argv, "-h"):
        print(USAGE + "\nsettings:\n" + schema.help_text())
        return
    checks = _flag(argv, "--check")
    options = loader.parse_overrides(argv, ("config", "import"))
    config, foreign = options.pop("config", None), options.pop("import", None)
    if not isinstance(config, str):
        raise UserError("--config: not given; name a recipe")
    if checks and foreign:
        raise UserError("--check: given together with --import; import first, then check")
    quiet()
    recipe = loader.load_recipe(config, options)
    if checks:
        from .commands.cache_check import check

        check(recipe)
        return
    from .commands.cache import cache as write_caches

    for path in write_caches(recipe, foreign):
        print(path)


def _run_options(argv: list[str]) -> tuple[str, dict, bool]:
    resume = _flag(argv, "--resume")
    overrides = loader.parse_overrides(argv)
    config = overrides.pop("config", None)
    if not isinstance(config, str):
        raise UserError("--config: not given; name a recipe, such as --config recipes/quickstart.yaml")
    quiet()
    return config, overrides, resume


def data(argv: list[str]) -> None:
    if _flag(argv, "--help") or _flag(argv, "-h"):
        print(USAGE)
        return
    options = loader.parse_overrides(argv)
    config, count, example = options.pop("config", None), options.pop("show", 3), options.pop("example", None)
    if not isinstance(config, str):
        raise UserError("--config: not given; name a recipe")
    for name, value in (("show", count), ("example", example)):
        if value is not None and (type(value) is not int or value < 0):
            raise UserError(f"--{name}: found {value!r}, expected a whole number >= 0")
    if (kind := loader.file_kind(config)) != "recipe":
        file = loader.read(config)[0]
        stages = file["stages"].values() if isinstance(file.get("stages"), dict) else []
        named = [
            os.path.relpath(Path(config).parent / str(one["recipe"]))
            for one in (file, *stages)
            if isinstance(one, dict) and one.get("recipe")
        ]
        raise UserError(
            f"--config {config}: is a {kind}; name the recipe of one of its runs: {', '.join(dict.fromkeys(named)) or 'it has none'}"
        )
    quiet()
    from .commands.preview_data import preview

    preview(loader.load_recipe(config, options), count or 0, example)


def export(argv: list[str]) -> None:
    places = [word for word in argv if not word.startswith("--")]
    if _flag(argv, "--help") or _flag(argv, "-h") or not places:
        print(USAGE)
        return
    run = argv.pop(argv.index(places[0]))
    options = loader.parse_overrides(argv, ("to", "checkpoint"))
    to, checkpoint = options.pop("to", None), options.pop("checkpoint", None)
    if options:
        raise UserError(f"--{next(iter(options))}: export has no such option; it has --to and --checkpoint")
    quiet()
    from .commands.export import export as write_merged

    print(write_merged(Path(run), Path(to) if to else None, checkpoint))


def evaluate(argv: list[str], what: str = "evaluate") -> None:
    from llmkd_eval import run

    if _flag(argv, "--help") or _flag(argv, "-h"):
        print(run.USAGE)
        return
    quiet()
    getattr(run, what)(argv)


def tasks(argv: list[str]) -> None:
    evaluate(argv, "tasks")


def compare(argv: list[str]) -> None:
    common, asked = _flag(argv, "--common"), _flag(argv, "--help") or _flag(argv, "-h")
    before = ["", *argv]
    places = [i for i, word in enumerate(argv) if not word.startswith("--") and (not before[i].startswith("--") or "=" in before[i])]
    if asked or not places:
        print(USAGE)
        return
    options = loader.parse_overrides([word for i, word in enumerate(argv) if i not in places], ("baseline", "tasks", "metrics", "json"))
    tasks, metrics = ((options.pop(name, None) or "").split(",") for name in ("tasks", "metrics"))
    baseline, file = options.pop("baseline", None), options.pop("json", None)
    if options:
        raise UserError(f"--{next(iter(options))}: compare has no such option; it has --baseline, --tasks, --metrics, --common and --json")
    from llmkd_eval.comparison import compare as comparison
    from llmkd_eval.comparison.compare_text import as_json, as_text
    from llmkd_eval.comparison.items import parse_arms

    from .console import info

    arms = parse_arms([argv[i] for i in places])
    rows = comparison.compare(arms, baseline, list(filter(None, tasks)) or None, list(filter(None, metrics)) or None, common, info)
    print(as_text(rows))
    if file:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text(as_json(rows) + "\n", encoding="utf-8")


def report(argv: list[str]) -> None:
    if _flag(argv, "--help") or _flag(argv, "-h") or not argv:
        print(USAGE)
        return
    if len(argv) > 1 or argv[0].startswith("--"):
        raise UserError(f"report: found {' '.join(argv)}, expected the folder of one sweep and nothing else")
    from llmkd_eval.report.write import write

    for path in write(Path(argv[0])):
        print(path)


def quiet() -> None:
    """Libraries' bars and advice are kept out of the console; what matters is said by llmkd itself."""
    warnings.simplefilter("ignore", FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "torch.distributed.elastic.multiprocessing.redirects"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _flag(argv: list[str], name: str) -> bool:
    found = name in argv
    while name in argv:
        argv.remove(name)
    return found


if __name__ == "__main__":
    entry()
