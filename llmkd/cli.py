"""The `llmkd` command. `llmkd train` is the same as `accelerate launch llmkd/train.py` on one process."""

import logging
import os
import sys
import warnings
from pathlib import Path

from . import __version__, settings
from .errors import UserError, exit_code

USAGE = """\
usage: llmkd train --config RECIPE [--section.name VALUE ...] [--resume] [--debug]
       llmkd data --config RECIPE [--show N] [--example I] [--section.name VALUE ...]
       llmkd export RUN [--to FOLDER] [--checkpoint STEP|best]
       llmkd --version          llmkd train --help lists every setting

train    Train a student by distillation, or by plain fine-tuning where the recipe names no teacher.
         Several processes: accelerate launch llmkd/train.py --config RECIPE ...
data     Read and tokenise a recipe's data as a run would; print its figures and N examples (3) with the supervised tokens marked.
export   Write a finished run's student as a plain transformers model (RUN/merged): an adapter is merged into its base.

exit codes: 0 done, 1 a bug, 2 something to mend (one line each), 3 stopped on a non-finite value,
            75 stopped by a signal; --resume goes on. accelerate launch and torchrun turn all of them into 1.
"""

STUDY = """\
A study (a file with stages:, such as recipes/quickstart.yaml) runs its stages in order and compares their students;
every other setting given on the command line goes to all stages.
"""


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = _flag(argv, "--debug")
    return exit_code(lambda: dispatch(argv), debug=debug)


def entry() -> None:
    sys.exit(main())


def dispatch(argv: list[str]) -> None:
    command = argv.pop(0) if argv else "--help"
    if command == "--version":
        print(f"llmkd {__version__}")
    elif command in ("--help", "-h", "help"):
        print(USAGE)
    elif command == "train":
        train(argv)
    elif command == "data":
        data(argv)
    elif command == "export":
        export(argv)
    else:
        raise UserError(f"{command}: no such command; there are train, data and export (see llmkd --help)")


def train(argv: list[str]) -> None:
    if _flag(argv, "--help") or _flag(argv, "-h"):
        print(USAGE + "\n" + STUDY + "\nsettings:\n" + settings.help_text())
        return
    resume = _flag(argv, "--resume")
    overrides = settings.split_overrides(argv)
    config = overrides.pop("config", None)
    if not isinstance(config, str):
        raise UserError("--config: not given; name a recipe, such as --config recipes/quickstart.yaml")
    quiet()
    if "stages" in settings.read(config)[0]:
        from .study import run_study

        run_study(config, overrides, resume)
    else:
        recipe = settings.load_recipe(config, overrides)
        from .training import run

        run(recipe, resume)


def data(argv: list[str]) -> None:
    if _flag(argv, "--help") or _flag(argv, "-h"):
        print(USAGE)
        return
    options = settings.split_overrides(argv)
    config, count, example = options.pop("config", None), options.pop("show", 3), options.pop("example", None)
    if not isinstance(config, str):
        raise UserError("--config: not given; name a recipe")
    for name, value in (("show", count), ("example", example)):
        if value is not None and (type(value) is not int or value < 0):
            raise UserError(f"--{name}: found {value!r}, expected a whole number >= 0")
    stages = settings.read(config)[0].get("stages")
    if stages is not None:
        listed = [str(stage.get("recipe")) for stage in stages.values() if isinstance(stage, dict)] if isinstance(stages, dict) else []
        named = [os.path.relpath(Path(config).parent / one) for one in listed]
        raise UserError(
            f"--config {config}: is a study; name the recipe of one of its stages: {', '.join(dict.fromkeys(named)) or 'it has none'}"
        )
    quiet()
    from .show import show

    show(settings.load_recipe(config, options), count or 0, example)


def export(argv: list[str]) -> None:
    places = [word for word in argv if not word.startswith("--")]
    if _flag(argv, "--help") or _flag(argv, "-h") or not places:
        print(USAGE)
        return
    run = argv.pop(argv.index(places[0]))
    options = settings.split_overrides(argv, ("to", "checkpoint"))
    to, checkpoint = options.pop("to", None), options.pop("checkpoint", None)
    if options:
        raise UserError(f"--{next(iter(options))}: export has no such option; it has --to and --checkpoint")
    quiet()
    from .export import export as write_merged

    print(write_merged(Path(run), Path(to) if to else None, checkpoint))


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
