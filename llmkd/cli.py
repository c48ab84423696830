"""The `llmkd` command. On one process, `llmkd train` does the same as `accelerate launch llmkd/train.py`.

`commands/arguments.py` parses the command line. The function of a command, below, checks what the parser cannot check and calls the
code in `commands/` or `eval/`. Modules that load torch are imported inside the functions that need them.
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
from .commands.options import config_file, given_options, positional, prompts_file, recipe_file, run_folder
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

#: Commands that run a model: environment variables that would change their results are refused.
_COMPUTES = ("train", "sweep", "cache", "roll", "make", "sample", "export", "eval", "doctor")
#: Commands with --resume.
_RESUMED = ("train", "sweep")
#: Commands that silence the progress bars and advice of libraries.
_QUIET = (*_COMPUTES, "data", "plan", "tasks")


def main(argv: list[str] | None = None) -> int:
    """Run the command of `argv` (default: that of this process) and return its exit code; see `errors.exit_code`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    console.open_streams()
    console.show_messages()
    report_bus_errors()
    launcher_pid()  # remembered from now on: a launcher may end while data is still being read
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
        run_command(command, words)
    elif command.startswith("-"):
        raise UserError(f"{command}: not understood; name the command first, such as llmkd train {' '.join(argv)} (see llmkd --help)")
    else:
        hint = did_you_mean(command, COMMANDS)
        raise UserError(f"{command}: no such command{hint or ';'} there are {', '.join(COMMANDS)} (see llmkd --help)")


def run_command(command: str, words: list[str]) -> None:
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


def train(options: argparse.Namespace, overrides: dict) -> Any:
    config = config_file(options)
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
    config = config_file(options)
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
    config = config_file(options)
    from .teachers.cache.shards import read_header

    import_file = getattr(options, "import")
    if options.check and import_file:
        raise UserError("--check: given together with --import; import first, then check")
    recipe = loader.load_recipe(config, overrides, check_inputs=True)
    if options.check:
        for setting, one in with_setting_names(recipe.teacher, "teacher"):  # before torch is loaded
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
    (writer,) = positional(options, "roll", "who writes", "llmkd roll student, teacher, RUN or MODEL --config RECIPE --to FILE.jsonl")
    if not options.to:
        raise UserError("--to: not given; name the file of answers, such as --to runs/rolled.jsonl")
    if Path(options.to).suffix != ".jsonl":
        raise UserError(f"--to: found {options.to}, expected a file with the ending .jsonl")
    check_file(options.to, "--to")
    _refuse_sampling_options_of_greedy(options)
    prompts = prompts_file(options)
    recipe = loader.load_recipe(recipe_file(options), overrides, check_inputs=True)
    refuse_other_task(recipe, "roll")
    from .commands.roll import roll as write_answers
    from .rollouts.sampling import Sampling

    sampling = Sampling(**{"temperature": 1.0} | given_options(options, "temperature", "max_new_tokens", "seed", "top_p", "top_k", "min_p"))
    more = given_options(options, "samples", "limit", "batch_size")
    found = write_answers(writer, recipe, Path(options.to), sampling, prompts=prompts, **more)
    print(found["file"])
    return found


def _refuse_sampling_options_of_greedy(options: argparse.Namespace) -> None:
    given = list(given_options(options, "top_p", "top_k", "min_p", "seed")) + (["samples"] if (options.samples or 1) > 1 else [])
    if options.temperature == 0 and given:
        raise UserError(
            f"--{given[0]}: given with --temperature 0, which always takes the most likely token; leave it out, or raise the temperature"
        )


def make(options: argparse.Namespace, overrides: dict) -> dict:
    config = config_file(options)
    if (kind := loader.file_kind(config)) != "make":
        raise UserError(f"--config {config}: is a {kind}, and holds no list of stages; name a file of llmkd make")
    from .commands.make import make as run_stages

    found = run_stages(config, overrides, options.dry_run)
    if found["file"]:
        print(found["file"])
    return found


def data(options: argparse.Namespace, overrides: dict) -> dict:
    config = recipe_file(options)
    recipe = loader.load_recipe(config, overrides)
    if recipe.task == "causal_lm":
        from .commands.preview_data import preview
    else:
        from .commands.preview_examples import preview

    return preview(recipe, 3 if options.show is None else options.show, options.example)


def plan(options: argparse.Namespace, overrides: dict) -> dict:
    config = config_file(options)
    if (kind := loader.file_kind(config)) == "sweep":
        loader.load_sweep(config, overrides)
    elif kind == "pipeline":
        loader.load_pipeline(config, overrides.get("output_dir"))
    else:
        from .planning.model_configs import find_models

        recipe = loader.load_recipe(recipe_file(options), overrides, check_data=True)
        find_models(recipe.student, used_teachers(recipe), Path(config).parent)  # before torch is loaded
    if options.plot:
        check_file(options.plot, "--plot")
        if not options.processes:
            raise UserError("--plot: draws the speed of many GPUs, which --processes N plans; give both")
    from .commands.plan import Wanted, run
    from .planning.devices import GPUS, SHARE

    wanted = Wanted(
        gpu=GPUS.get(options.gpu),
        cpu=options.gpu == "none",
        memory=options.memory,
        share=options.share or SHARE,
        rate=options.tflops and options.tflops * 1e12,
        measure=options.measure,
        processes=options.processes,
        plot=options.plot and Path(options.plot),
    )
    return run(config, overrides, wanted)


def doctor(options: argparse.Namespace, overrides: dict) -> dict:
    config = config_file(options)
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
    run = run_folder(options, "export", "a run's output_dir or an adapter")
    from .commands.export import export as write_merged

    print(write_merged(run, Path(options.to) if options.to else None, options.checkpoint))


def sample(options: argparse.Namespace, overrides: dict) -> Any:
    run = run_folder(options, "sample", "a run's output_dir")
    if options.seed is not None and not options.temperature:
        raise UserError("--seed: given without --temperature, and the most likely tokens need none; give both, or leave it out")
    if options.to:
        check_file(options.to, "--to")
    prompts = prompts_file(options)
    refuse_run_of_other_task(run, "sample")
    from .commands.sample import sample as ask
    from .commands.sample_text import as_text

    samples = ask(run, prompts, **given_options(options, "count", "models", "temperature", "max_new_tokens", "seed", "batch_size"))
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

    (folder,) = positional(options, "tasks", "a folder of data", "llmkd tasks DATA_DIR")
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
    (folder,) = map(Path, positional(options, "report", "the folder of a sweep or a run", "llmkd report FOLDER"))
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

    name, *folder = positional(options, "init", "a recipe's name", "llmkd init NAME [FOLDER] (llmkd recipes lists them)", most=2)
    written, command = copy_recipe(name, Path(folder[0] if folder else DEFAULT_FOLDER))
    for path in written:
        print(path)
    console.info(f"next: {command}")


def completion(options: argparse.Namespace, overrides: dict) -> None:
    (shell,) = positional(options, "completion", "a shell", "llmkd completion bash, or zsh")
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
