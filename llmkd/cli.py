"""The `llmkd` command. `llmkd train` is the same as `accelerate launch llmkd/train.py` on one process.

`commands/arguments.py` parses a command's words; a function here checks what the parser cannot, and calls the command. Modules that
load torch are imported by the function that needs them.
"""

import argparse
import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from . import __version__, console
from .commands import arguments
from .commands.other_tasks import refuse_other_task, refuse_run_of_other_task
from .commands.outputs import check_file, json_results, write_file
from .commands.parser import HelpShown, did_you_mean
from .config import loader
from .config.fields import with_setting_names
from .config.recipe import used_teachers
from .errors import UserError, exit_code
from .process.bus_error import report_bus_errors
from .training.environment import check_environment
from .training.launcher import launcher_pid
from .training.shutdown import end_on_signal

_COMPUTES = ("train", "sweep", "cache", "roll", "make", "sample", "export", "eval", "doctor")
_RESUMED = ("train", "sweep")
_QUIET = (*_COMPUTES, "data", "plan", "tasks")


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    console.open_streams()
    console.show_messages()
    report_bus_errors()
    launcher_pid()
    again = "continue with --resume" if argv and argv[0] in _RESUMED else "start it again"
    with end_on_signal(again):
        return exit_code(lambda: dispatch([word for word in argv if word != "--debug"]), debug=debug, again=again)


def entry() -> None:
    sys.exit(main())


def dispatch(argv: list[str]) -> None:
    command, *words = argv or ["--help"]
    if command == "help":  # llmkd help train loss is llmkd train --help loss
        command, words = (words[0], ["--help", *words[1:]]) if words else ("--help", [])
    if command in ("--version", "-V", "version"):
        print(f"llmkd {__version__}")
    elif command in ("--help", "-h"):
        print(arguments.overview())
    elif command in COMMANDS:
        try:
            options, overrides = arguments.parse(command, words)
        except HelpShown:
            return
        if command in _COMPUTES:
            check_environment(shards=command == "train")
        if command in _QUIET:
            quiet()
        with json_results(getattr(options, "json", None)) as write:
            write(COMMANDS[command](options, overrides))
    else:
        if command.startswith("-"):
            raise UserError(f"{command}: not understood; name the command first, such as llmkd train {' '.join(argv)} (see llmkd --help)")
        hint = did_you_mean(command, COMMANDS)
        raise UserError(f"{command}: no such command{hint or ';'} there are {', '.join(COMMANDS)} (see llmkd --help)")


def train(options: argparse.Namespace, overrides: dict) -> Any:
    config = _config(options)
    kind = loader.file_kind(config)
    if kind == "sweep":
        return run_sweep(config, overrides, options.resume)
    if kind == "pipeline":
        from .commands.pipeline import run_pipeline

        return run_pipeline(config, overrides, options.resume)
    recipe = loader.load_recipe(config, overrides, check_inputs=True)
    from .training.run import run

    return run(recipe, options.resume)


def sweep(options: argparse.Namespace, overrides: dict) -> Any:
    config = _config(options)
    if loader.file_kind(config) != "sweep":
        by = "make" if loader.file_kind(config) == "make" else "train"
        raise UserError(f"--config {config}: is not a sweep (it has neither grid: nor arms:); run it by llmkd {by}")
    return run_sweep(config, overrides, options.resume)


def run_sweep(config: str, overrides: dict, resume: bool) -> dict:
    from llmkd_eval import after_sweep

    settings = loader.load_sweep(config, overrides)
    after_sweep.check(Path(settings.output_dir).expanduser(), settings.eval)
    from .commands.sweep import run_sweep as train_sweep

    numbers: dict = {}
    train_sweep(config, overrides, resume, lambda folder: numbers.update(after_sweep.finish(folder, settings.eval)))
    return numbers


def cache(options: argparse.Namespace, overrides: dict) -> dict:
    config = _config(options)
    from .teachers.cache.shards import read_header

    import_file = getattr(options, "import")
    if options.check and import_file:
        raise UserError("--check: given together with --import; import first, then check")
    recipe = loader.load_recipe(config, overrides, check_inputs=True)
    if options.check:
        for setting, one in with_setting_names(recipe.teacher, "teacher"):
            if one.cache:
                read_header(Path(one.cache.path).expanduser(), f"{setting}.cache.path")
        from .commands.cache_check import check

        return check(recipe)
    from .commands.cache import cache as write_caches

    written = list(write_caches(recipe, import_file))
    for path in written:
        print(path)
    return {"caches": written}


def roll(options: argparse.Namespace, overrides: dict) -> dict:
    (writer,) = _places(options, "roll", "who writes", "llmkd roll student, teacher, RUN or MODEL --config RECIPE --to FILE.jsonl")
    if not options.to:
        raise UserError("--to: not given; name the file of answers, such as --to runs/rolled.jsonl")
    if Path(options.to).suffix != ".jsonl":
        raise UserError(f"--to: found {options.to}, expected a file with the ending .jsonl")
    check_file(options.to, "--to")
    cuts = [name for name in ("top_p", "top_k", "min_p", "seed") if getattr(options, name) is not None]
    if options.temperature == 0 and (cuts or (options.samples or 1) > 1):
        given = cuts[0] if cuts else "samples"
        raise UserError(
            f"--{given}: given with --temperature 0, which always takes the most likely token; leave it out, or raise the temperature"
        )
    if options.prompts and not Path(options.prompts).is_file():
        raise UserError(f"--prompts: {options.prompts}: no such file; name a file of prompts")
    recipe = loader.load_recipe(_recipe(options), overrides, check_inputs=True)
    refuse_other_task(recipe, "roll")
    from .commands.roll import roll as write_answers
    from .rollouts.sampling import Sampling

    names = {"temperature", "max_new_tokens", "seed", "top_p", "top_k", "min_p"}
    given = {name: value for name, value in vars(options).items() if value is not None}
    sampling = Sampling(**{"temperature": 1.0} | {name: given[name] for name in names & given.keys()})
    more = {name: given[name] for name in ("samples", "limit", "batch_size") if name in given}
    found = write_answers(
        writer, recipe, Path(options.to).expanduser(), sampling, prompts=options.prompts and Path(options.prompts), **more
    )
    print(found["file"])
    return found


def make(options: argparse.Namespace, overrides: dict) -> dict:
    config = _config(options)
    if (kind := loader.file_kind(config)) != "make":
        raise UserError(f"--config {config}: is a {kind}, and holds no list of stages; name a file of llmkd make")
    from .commands.make import make as run_stages

    found = run_stages(config, overrides, options.dry_run)
    if found["file"]:
        print(found["file"])
    return found


def data(options: argparse.Namespace, overrides: dict) -> dict:
    config = _recipe(options)
    recipe = loader.load_recipe(config, overrides)
    if recipe.task == "causal_lm":
        from .commands.preview_data import preview
    else:
        from .commands.preview_examples import preview

    return preview(recipe, 3 if options.show is None else options.show, options.example)


def plan(options: argparse.Namespace, overrides: dict) -> dict:
    config = _config(options)
    if (kind := loader.file_kind(config)) == "sweep":
        loader.load_sweep(config, overrides)
    elif kind == "pipeline":
        loader.load_pipeline(config, overrides.get("output_dir"))
    else:
        from .planning.model_configs import find_models

        recipe = loader.load_recipe(_recipe(options), overrides, check_data=True)
        find_models(recipe.student, used_teachers(recipe), Path(config).parent)  # before torch is loaded
    from .commands.plan import Wanted, run
    from .planning.devices import GPUS, SHARE

    gpu = GPUS.get(options.gpu)
    rate = options.tflops and options.tflops * 1e12
    if options.plot:
        check_file(options.plot, "--plot")
        if not options.processes:
            raise UserError("--plot: draws the speed of many GPUs, which --processes N plans; give both")
    more = options.processes, options.plot and Path(options.plot)
    return run(config, overrides, Wanted(gpu, options.gpu == "none", options.memory, options.share or SHARE, rate, options.measure, *more))


def doctor(options: argparse.Namespace, overrides: dict) -> dict:
    config = _config(options)
    if loader.file_kind(config) == "sweep":
        recipe = loader.load_sweep(config).recipe
        raise UserError(
            f"--config {config}: is a sweep, and doctor examines a recipe or a pipeline; name the recipe that its arms change "
            f"(--config {recipe}), with an arm's changes behind it, as in --optim.lr 1e-4"
        )
    if options.to:
        check_file(options.to, "--to")
    from .commands import doctor as command

    results = command.doctor(config, overrides, options.rows or command.ROWS)
    if options.to:
        from llmkd_eval.report.doctor import doctor_page

        write_file(options.to, doctor_page(results, config))
        print(options.to)
    return command.unless_failed(results, config)


def export(options: argparse.Namespace, overrides: dict) -> None:
    (run,) = _places(options, "export", "a run's folder", "llmkd export RUN")
    if not Path(run).is_dir():  # before torch is loaded
        raise UserError(f"{run}: {'is a file' if Path(run).exists() else 'no such folder'}; name a run's output_dir or an adapter")
    from .commands.export import export as write_merged

    print(write_merged(Path(run), Path(options.to) if options.to else None, options.checkpoint))


def sample(options: argparse.Namespace, overrides: dict) -> Any:
    (run,) = _places(options, "sample", "a run's folder", "llmkd sample RUN")
    if not Path(run).is_dir():  # before torch is loaded
        raise UserError(f"{run}: {'is a file' if Path(run).exists() else 'no such folder'}; name a run's output_dir")
    if options.seed is not None and not options.temperature:
        raise UserError("--seed: given without --temperature, and the most likely tokens need none; give both, or leave it out")
    if options.to:
        check_file(options.to, "--to")
    if options.prompts and not Path(options.prompts).is_file():
        raise UserError(f"--prompts: {options.prompts}: no such file; name a file of prompts")
    refuse_run_of_other_task(Path(run), "sample")
    from .commands.sample import sample as ask
    from .commands.sample_text import as_text

    given = {name: getattr(options, name) for name in ("count", "models", "temperature", "max_new_tokens", "seed", "batch_size")}
    samples = ask(Path(run), options.prompts and Path(options.prompts), **{k: v for k, v in given.items() if v is not None})
    print(as_text(samples, shutil.get_terminal_size().columns))
    if options.to:
        from llmkd_eval.report.samples import samples_page

        write_file(options.to, samples_page(samples))
        print(options.to)
    return samples


def evaluate(options: argparse.Namespace, overrides: dict) -> list[dict]:
    from llmkd_eval import run

    return run.evaluate(options)


def tasks(options: argparse.Namespace, overrides: dict) -> list[dict]:
    from llmkd_eval import run

    (folder,) = _places(options, "tasks", "a folder of data", "llmkd tasks DATA_DIR")
    return run.tasks(Path(folder), Path(options.to or "eval/tasks"))


def compare(options: argparse.Namespace, overrides: dict) -> dict:
    if not options.places:
        raise UserError("compare: no run given; write llmkd compare RUN RUN ... (see llmkd compare --help)")
    from llmkd_eval.comparison import compare as comparison
    from llmkd_eval.comparison.compare_text import as_numbers, as_text
    from llmkd_eval.comparison.item_results import parse_arms

    arms = parse_arms(options.places)
    rows = comparison.compare(arms, options.baseline, options.tasks or None, options.metrics or None, options.common, console.info)
    print(as_text(rows))
    return as_numbers(rows)


def report(options: argparse.Namespace, overrides: dict) -> dict:
    (folder,) = map(Path, _places(options, "report", "the folder of a sweep or a run", "llmkd report FOLDER"))
    from llmkd_eval.report import run_report
    from llmkd_eval.report.write import read_report, write

    if run_report.is_run(folder):
        run = run_report.read_run(folder)
        paths, numbers = run_report.write(run), run_report.numbers(run)
    else:
        found = read_report(folder)
        paths, numbers = write(found), found.numbers()
    for path in paths:
        print(path)
    return numbers


def recipes(options: argparse.Namespace, overrides: dict) -> dict:
    from .commands.recipes import list_recipes, shipped

    print(list_recipes())
    return shipped()


def init(options: argparse.Namespace, overrides: dict) -> None:
    from .commands.recipes import DEFAULT_FOLDER, copy_recipe

    name, folder = (*_places(options, "init", "a recipe's name", "llmkd init NAME [FOLDER] (llmkd recipes lists them)", most=2), None)[:2]
    written, command = copy_recipe(name, Path(folder or DEFAULT_FOLDER))
    for path in written:
        print(path)
    console.info(f"next: {command}")


def completion(options: argparse.Namespace, overrides: dict) -> None:
    (shell,) = _places(options, "completion", "a shell", "llmkd completion bash, or zsh")
    if shell not in ("bash", "zsh"):
        raise UserError(f"completion: found {shell}, expected bash or zsh")
    print(arguments.completion_script(shell))


COMMANDS = {
    "train": train,
    "sweep": sweep,
    "cache": cache,
    "data": data,
    "roll": roll,
    "make": make,
    "plan": plan,
    "doctor": doctor,
    "sample": sample,
    "export": export,
    "eval": evaluate,
    "tasks": tasks,
    "compare": compare,
    "report": report,
    "recipes": recipes,
    "init": init,
    "completion": completion,
}


def _config(options: argparse.Namespace) -> str:
    if not options.config:
        raise UserError("--config: not given; name a recipe, such as --config recipes/quickstart.yaml (llmkd recipes lists them)")
    return options.config


def _recipe(options: argparse.Namespace) -> str:
    """The recipe that is named. UserError for a pipeline or a sweep, with the recipes of its runs."""
    config = _config(options)
    if (kind := loader.file_kind(config)) not in ("recipe", "make"):  # load_recipe refuses the latter
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
    return config


def _places(options: argparse.Namespace, command: str, what: str, usage: str, most: int = 1) -> list[str]:
    """The words that are no options: one, or up to `most`."""
    if not options.places:
        raise UserError(f"{command}: {what} is not given; write {usage}")
    if len(options.places) > most:
        raise UserError(f"{command}: found {' '.join(options.places)}, expected {what} and nothing else; write {usage}")
    return options.places


def quiet() -> None:
    """Keep the progress bars and advice of libraries off the console."""
    warnings.simplefilter("ignore", FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("bitsandbytes", "torch.distributed.elastic.multiprocessing.redirects"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    entry()
