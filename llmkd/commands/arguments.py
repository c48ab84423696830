"""The commands with their options and help texts, parsed by argparse. Imports no torch.

argparse reads a command's own options. What it leaves, `--section.name VALUE`, are settings, which `config.loader.parse_overrides`
reads and checks against the schema. Mistakes are UserErrors of one line; argparse's own text, usage and exit never appear.
"""

import argparse
import dataclasses
import difflib
import typing

from ..config.loader import parse_overrides
from ..config.recipe import Recipe
from ..config.schema import describe, help_text, section_of
from ..config.sweep import Pipeline, Sweep
from ..errors import UserError

EXIT_CODES = """\
exit codes: 0 done, 1 a bug, 2 a mistake you can fix (one line each), 3 stopped at a non-finite value, 75 stopped by a signal
(--resume continues). accelerate launch and torchrun turn all of them into 1."""

_SETTINGS = """\
settings of a recipe (each is also an option: --optim.lr 1e-4, --teacher null, --data.train.path rows.jsonl):
{sections}
  llmkd {command} --help SECTION describes one section or setting (such as loss, data.train or optim.lr); --help all, every one."""


class _Format(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **more):
        super().__init__(prog, max_help_position=26, width=130, **more)


class HelpShown(Exception):
    """Help was asked for and printed: nothing else is to be done."""


class Parser(argparse.ArgumentParser):
    """argparse with its mistakes as UserErrors, no abbreviations, and `--help SECTION` where the command takes settings of `kind`."""

    def __init__(self, *args, kind=None, **kwargs):
        kwargs = {"add_help": False, "allow_abbrev": False, "formatter_class": _Format} | kwargs
        super().__init__(*args, **kwargs)
        self.kind = kind
        self.add_argument(
            "-h",
            "--help",
            action=_Help,
            nargs="?" if kind else 0,
            metavar="SECTION",
            help="this text" + ("; with SECTION, the settings of that section; with all, every setting" if kind else ""),
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    @property
    def command(self) -> str:
        return self.prog.split()[-1]

    def error(self, message: str):
        flag, _, problem = message.removeprefix("argument ").partition(": ")
        flag = flag.split("/")[-1]
        if problem.startswith("expected one argument"):
            problem = f"no value given; write {flag} VALUE"
        raise UserError(f"{flag}: {problem}" if problem else f"{self.command}: {message}")

    def flags(self) -> dict[str, argparse.Action]:
        return {name: action for name, action in self._option_string_actions.items() if name.startswith("--")}


class _Help(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(settings_help(parser.kind, values) if values else parser.format_help().rstrip())
        raise HelpShown


class _Once(argparse.Action):
    """An option with a value; given twice it is refused, since one of the two would be ignored."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest, None) is not None:
            raise UserError(f"{option_string}: given twice; keep one")
        setattr(namespace, self.dest, values)


def whole_number(least: int):
    def number(text: str) -> int:
        whole = text.lstrip("+-").isdigit()
        if not whole or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text if whole else repr(text)}, expected a whole number >= {least}")
        return int(text)

    return number


def one_of(*names: str):
    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"found {text}{did_you_mean(text, names)}, expected one of {', '.join(names)}")
        return text

    return name


def names_list(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def batch_size(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return whole_number(1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(str(error).replace("expected ", "expected auto or ")) from None


def did_you_mean(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {close[0]}?" if close else ""


def parse(command: str, words: list[str]) -> tuple[argparse.Namespace, dict[str, typing.Any]]:
    """A command's options, and the settings given beside them. Raises HelpShown after printing help, UserError for a mistake."""
    parser = command_parsers()[command]
    options, rest = parser.parse_known_args(_plain_flags(parser, words))
    unknown = [word for word in rest if word.startswith("-") and word != "-"]
    if parser.kind:
        own = {field.name for kind in (Recipe, Sweep, Pipeline) for field in dataclasses.fields(kind)}
        for word in unknown:
            name = word.partition("=")[0]
            if "." not in name and name[2:] not in own and (hint := did_you_mean(name, parser.flags())):
                raise UserError(f"{name}: {command} has no such option{hint}")
        if rest and not rest[0].startswith("-") and not options.config:
            raise UserError(f"{rest[0]}: not understood; the recipe is given by --config {rest[0]} (see llmkd {command} --help)")
        return options, parse_overrides(rest, ())
    if unknown:
        name = unknown[0].partition("=")[0]
        known = [flag for flag in parser.flags() if flag not in ("--help", "--debug")]
        there = f"it has {', '.join(known)}" if known else "it has none"
        raise UserError(f"{name}: {command} has no such option{did_you_mean(name, known)}; {there}")
    if rest and not hasattr(options, "places"):
        raise UserError(f"{rest[0]}: {command} takes no such argument (see llmkd {command} --help)")
    if rest:  # positional arguments behind an option, which argparse leaves
        options.places = [*options.places, *rest]
    return options, {}


def _plain_flags(parser: Parser, words: list[str]) -> list[str]:
    """`--resume=true` and `--resume true` are `--resume`, with false they are nothing: as a setting would be written."""
    switches = {name for name, action in parser.flags().items() if action.nargs == 0 and name != "--help"}
    out, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name not in switches:
            out.append(word)
            continue
        if not equals and parser.kind and rest and rest[0].lower() in ("true", "false"):
            equals, value = "=", rest.pop(0)
        if equals and value.lower() not in ("true", "false"):
            raise UserError(f"{name}: found {value}, expected true or false, or {name} without a value")
        if not equals or value.lower() == "true":
            out.append(name)
    return out


# ---- help on settings


def settings_help(kind, which: str) -> str:
    """The settings of a section, or of all. `which`: all, a section or a setting, dotted. UserError for one that is not there."""
    if which == "all":
        return help_text(kind)
    which = which.removeprefix("--")
    found = [entry for entry in describe(kind) if entry[0] == which or entry[0].startswith(which + ".")]
    if not found:
        paths = [path for path, *_ in describe(kind)]
        sections = {path[:i] for path in paths for i, letter in enumerate(path) if letter == "."}
        hint = did_you_mean(which, [*sections, *paths]) or f"; the sections are {', '.join(_sections(kind))}"
        raise UserError(f"--help {which}: no such section or setting{hint}")
    return help_text(kind, which)


def _sections(kind) -> dict[str, list[str]]:
    """Sections at the top of a configuration with the names in them."""
    out = {}
    for field in dataclasses.fields(kind):
        if section := section_of(kind, field.name):
            out[field.name] = [inner.name for inner in dataclasses.fields(section)]
    return out


def _overview(kind) -> str:
    sections = _sections(kind)
    single = [field.name for field in dataclasses.fields(kind) if field.name not in sections]
    lines = [f"  {', '.join(single)}"]
    for name, inner in sections.items():
        shown, width = [], 0
        for one in inner:
            width += len(one) + 2
            if width > 96:
                shown.append("...")
                break
            shown.append(one)
        lines.append(f"  {name:<14}{', '.join(shown)}")
    return "\n".join(lines)


# ---- the commands

SUMMARY = {
    "train": "Train a student by distillation, or without a teacher; also runs a pipeline of stages or a sweep",
    "sweep": "Train every configuration of a sweep, then measure, compare and report them",
    "cache": "Run the teachers once and write their outputs to the teacher cache; check a cache; import log-probabilities",
    "data": "Read and tokenise a recipe's data; print counts and examples with the supervised tokens marked",
    "export": "Write a finished run's student as a plain transformers model",
    "eval": "Evaluate runs and models by lm-evaluation-harness",
    "tasks": "Write harness task files that read their data from a local folder",
    "compare": "Compare evaluated runs item by item, with intervals and tests",
    "report": "Write report.html and report.md of a sweep",
    "recipes": "List the recipes that come with llmkd",
    "init": "Copy a shipped recipe into a folder, to run or to edit",
    "completion": "Print the shell completion script for bash or zsh",
}


def command_parsers(group=None) -> dict[str, Parser]:
    """One parser per command; in `group` (of add_subparsers), where one parser for all of them is needed."""
    made = {}

    def command(name: str, usage: str, text: str, example: str, kind=None, codes: bool = True) -> Parser:
        tail = [f"example:\n  {example}"]
        if kind:
            tail.append(_SETTINGS.format(sections=_overview(kind), command=name))
        if codes:
            tail.append(EXIT_CODES)
        given = {"usage": f"llmkd {name} {usage}".rstrip(), "description": text, "epilog": "\n\n".join(tail), "kind": kind}
        made[name] = group.add_parser(name, help=SUMMARY[name], **given) if group else Parser(prog=f"llmkd {name}", **given)
        return made[name]

    def option(parser: Parser, flag: str, metavar: str, text: str, **more) -> None:
        parser.add_argument(flag, metavar=metavar, help=text, action=_Once, **more)

    def config(parser: Parser, what: str = "the recipe, in YAML or JSON") -> None:
        option(parser, "--config", "RECIPE", what)

    train = command(
        "train",
        "--config RECIPE [--section.name VALUE ...] [--resume]",
        "Train the recipe's student: by distillation, or by plain fine-tuning where the recipe names no teacher. A pipeline (a file with\n"
        "stages:) runs its stages in order and compares their students; a sweep (a file with grid: or arms:) trains every configuration.\n"
        "Settings on the command line replace those of the file; in a pipeline or a sweep they apply to every run.\n"
        "Several processes: accelerate launch -m llmkd train --config RECIPE ..., or torchrun -m llmkd train ...",
        "llmkd train --config recipes/quickstart.yaml --optim.lr 1e-3",
        Recipe,
    )
    config(train, "a recipe, a pipeline or a sweep, in YAML or JSON")
    train.add_argument("--resume", action="store_true", help="continue a stopped run from its newest checkpoint; finished parts are kept")

    sweep = command(
        "sweep",
        "--config SWEEP [--section.name VALUE ...] [--resume]",
        "Train every configuration of a sweep (a recipe and a grid of changes), several at a time beside one teacher where their data\n"
        "agree; then evaluate, compare and report them. A setting that is not the sweep's own applies to every configuration.",
        "llmkd sweep --config recipes/ablation.yaml --students_per_teacher 4",
        Sweep,
    )
    option(sweep, "--config", "SWEEP", "the sweep's file, with grid: or arms:")
    sweep.add_argument("--resume", action="store_true", help="continue: finished configurations are kept")

    cache = command(
        "cache",
        "--config RECIPE [--check | --import FILE] [--section.name VALUE ...]",
        "Run the recipe's teachers once over its data and write their outputs at every target to the folders that teacher.cache names.\n"
        "Runs that read the cache need no teacher in memory. Several processes: accelerate launch -m llmkd cache --config RECIPE ...",
        "llmkd cache --config recipes/quickstart/3_from_cache.yaml",
        Recipe,
    )
    config(cache)
    cache.add_argument("--check", action="store_true", help="measure the error of a quantised teacher, or of a cache, on training examples")
    option(cache, "--import", "FILE", "write the cache from log-probabilities in FILE (JSON lines) instead of a model", dest="import_file")

    data = command(
        "data",
        "--config RECIPE [--show N] [--example I] [--section.name VALUE ...]",
        "Read and tokenise a recipe's data as a run would, without a model. Prints counts of every source, then examples with the\n"
        "supervised tokens marked.",
        "llmkd data --config recipes/quickstart/2_distill.yaml --show 2",
        Recipe,
    )
    config(data)
    option(data, "--show", "N", "how many examples to print, drawn by the recipe's seed (default 3)", type=whole_number(0))
    option(data, "--example", "I", "print the example with this number instead", type=whole_number(0))

    export = command(
        "export",
        "RUN [--to FOLDER] [--checkpoint STEP|best]",
        "Write a finished run's student as a plain transformers model, which needs neither PEFT nor llmkd: an adapter is merged into its\n"
        "base. Prints the folder.",
        "llmkd export runs/first --checkpoint best",
    )
    export.add_argument("places", nargs="*", metavar="RUN", help="a run's output_dir, or an adapter's folder")
    option(export, "--to", "FOLDER", "where to write (default RUN/merged)")
    option(export, "--checkpoint", "STEP", "export this checkpoint: a step's number, or best (see checkpoint.best_by)")

    evaluate = command(
        "eval",
        "RUN_OR_MODEL... --tasks TASK[,TASK...] [options]",
        "Evaluate finished runs, adapters, merged models, bases or hub ids by lm-evaluation-harness, with its own tasks and metrics.\n"
        "Results go to RUN/eval/TASK.json and TASK.jsonl (each item); of other models to runs/eval/NAME; with --out to that folder (with\n"
        "several models to --out/NAME). Results that exist for the same settings are kept and not computed again.\n"
        "Several processes: accelerate launch -m llmkd eval RUN_OR_MODEL... --tasks ...",
        "llmkd eval runs/sft runs/kd --tasks hellaswag,commonsense_qa --limit 200",
    )
    evaluate.add_argument("places", nargs="*", metavar="RUN_OR_MODEL", help="a run, a model's folder or a hub id")
    option(evaluate, "--tasks", "TASKS", "tasks, groups or tags of the harness, separated by commas (lm-eval ls tasks)", type=names_list)
    option(evaluate, "--tasks_dir", "DIR", "a folder of task files that come before the harness's own, such as llmkd tasks writes")
    option(
        evaluate,
        "--fewshot",
        "N",
        "examples in the prompt (default: each task's own number; a task that fixes it keeps it)",
        type=whole_number(0),
    )
    option(evaluate, "--limit", "N", "only the first N items", type=whole_number(1))
    option(evaluate, "--batch_size", "N", "requests per forward pass (default auto: what fits on a GPU, 8 on a CPU)", type=batch_size)
    option(evaluate, "--seed", "N", "for all of the harness's seeds (default its own, 0 and 1234)", type=whole_number(0))
    option(
        evaluate,
        "--dtype",
        "TYPE",
        "float32, bfloat16, float16 or float64 (default: as the student was trained, or as the model is saved)",
        type=one_of("float32", "bfloat16", "float16", "float64"),
    )
    option(evaluate, "--out", "DIR", "folder for the results")
    evaluate.add_argument("--force", action="store_true", help="evaluate again where results exist, and replace them")

    tasks = command(
        "tasks",
        "DATA_DIR [--to FOLDER]",
        "Write task files for a folder of data, so that the harness runs without a network: truthfulqa_mc1, truthfulqa_mc2, hellaswag and\n"
        "commonsense_qa, recognised by the columns of their rows (.jsonl, .json, .parquet). The files name paths of this machine: do not\n"
        "commit them.",
        "llmkd tasks data/benchmarks --to eval/tasks",
    )
    tasks.add_argument("places", nargs="*", metavar="DATA_DIR", help="a folder of data files")
    option(tasks, "--to", "FOLDER", "where to write the task files (default eval/tasks)")

    compare = command(
        "compare",
        "RUN|NAME=RUN[,RUN...] ... [--baseline NAME] [options]",
        "Compare evaluated runs with the first of them, or with --baseline, item by item, with intervals and tests. RUN,RUN are runs of\n"
        "one configuration with different seeds; NAME=RUN names a configuration.",
        "llmkd compare sft=runs/sft kd=runs/kd --tasks hellaswag",
    )
    compare.add_argument("places", nargs="*", metavar="RUN", help="an evaluated run, or NAME=RUN, or NAME=RUN,RUN for several seeds")
    option(compare, "--baseline", "NAME", "the configuration that the others are compared with (default the first)")
    option(compare, "--tasks", "TASKS", "only these tasks, separated by commas", type=names_list)
    option(compare, "--metrics", "METRICS", "only these metrics, separated by commas", type=names_list)
    compare.add_argument("--common", action="store_true", help="compare on the items that all runs have, where some have more")
    option(compare, "--json", "FILE", "also write the numbers to FILE")

    report = command(
        "report",
        "SWEEP_FOLDER",
        "Write report.html and report.md of a sweep, finished or not: the runs, learning curves, comparisons, maps over settings, cost.\n"
        "Prints the two paths.",
        "llmkd report runs/ablation",
    )
    report.add_argument("places", nargs="*", metavar="SWEEP_FOLDER", help="the sweep's output_dir")

    command(
        "recipes",
        "",
        "List the recipes that come with llmkd: what each does, what it needs and the command that runs it. llmkd init copies one.",
        "llmkd recipes",
        codes=False,
    )

    init = command(
        "init",
        "NAME [FOLDER]",
        "Copy a shipped recipe, with the files it refers to, into FOLDER (default recipes), and print the command that runs it. Existing\n"
        "files are never overwritten.",
        "llmkd init quickstart && llmkd train --config recipes/quickstart.yaml",
        codes=False,
    )
    init.add_argument("places", nargs="*", metavar="NAME [FOLDER]", help="a name that llmkd recipes lists, and a folder")

    completion = command(
        "completion",
        "bash|zsh",
        "Print a completion script for commands, options and settings. For bash, add the example's line to ~/.bashrc; for zsh, write the\n"
        "output to a file _llmkd in a folder of $fpath.",
        'eval "$(llmkd completion bash)"',
        codes=False,
    )
    completion.add_argument("places", nargs="*", metavar="SHELL", help="bash or zsh")
    return made


def overview() -> str:
    """The text of llmkd --help."""
    commands = "\n".join(f"  {name:<12}{text}" for name, text in SUMMARY.items())
    return (
        "usage: llmkd COMMAND [options]\n       llmkd COMMAND --help      llmkd train --help SECTION      llmkd --version\n\n"
        "Distil a large causal language model into a small one.\n\n"
        f"commands:\n{commands}\n\n"
        "first steps:\n  llmkd init quickstart && llmkd train --config recipes/quickstart.yaml\n\n"
        f"several processes:\n  accelerate launch -m llmkd train --config RECIPE ...\n\n{EXIT_CODES}"
    )


def completion_script(shell: str) -> str:
    """A script for bash or zsh by shtab, with every command, option and setting."""
    import shtab

    whole = Parser(prog="llmkd", description="Distil a large causal language model into a small one.")
    group = whole.add_subparsers(dest="command", parser_class=Parser)
    for name, parser in command_parsers(group).items():
        parser.usage = None
        for action in parser._actions:
            if action.dest == "help":
                action.nargs = 0  # a section behind it is not completed
            elif action.dest in ("config", "import_file", "json"):
                action.complete = shtab.FILE
            elif action.dest in ("to", "out", "tasks_dir", "places") and name not in ("init", "completion"):
                action.complete = shtab.DIRECTORY
        if name == "completion":
            parser._actions[-1].choices, parser._actions[-1].nargs = ["bash", "zsh"], None
        for path, _, _, text in describe(parser.kind) if parser.kind else ():
            parser.add_argument(f"--{path}", help=text.partition(". ")[0].partition("; ")[0].replace("%", "%%") or None)
    return shtab.complete(whole, shell=shell)
