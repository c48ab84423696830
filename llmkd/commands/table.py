"""The table of commands: their options, help texts and examples. Imports no torch."""

import argparse
import dataclasses
import typing

from ..config.make import Make
from ..config.recipe import Recipe
from ..config.sweep import Sweep
from ..planning import devices
from .parser import above_zero, batch_size, names_list, number, one_of, some_of, whole_number


@dataclasses.dataclass(frozen=True)
class Option:
    """An option with a value; `kind` turns its text into the value, or raises argparse.ArgumentTypeError."""

    flag: str
    value: str  # its name in the help text
    help: str
    kind: typing.Callable[[str], typing.Any] | None = None


@dataclasses.dataclass(frozen=True)
class Switch:
    flag: str
    help: str


@dataclasses.dataclass(frozen=True)
class Command:
    """`settings`: the configuration whose settings are options too. `places`: name and help of the arguments that are no options."""

    name: str
    summary: str  # one line for llmkd --help
    usage: str
    text: str
    example: str
    options: tuple[Option | Switch, ...] = ()
    settings: type | None = None
    places: tuple[str, str] | None = None
    exit_codes: bool = True


def amount(text: str) -> float:
    """Bytes of an amount of memory."""
    try:
        return devices.bytes_in(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def gpu_or_none(text: str) -> str:
    """The name of a GPU as `devices.GPUS` has it, in whatever case it is written, or none."""
    return one_of(*devices.GPUS, "none")(text.lower())


_JSON = Option("--json", "FILE", "also write the results as JSON to FILE; - writes them to stdout, and all else to stderr")
_CONFIG = Option("--config", "RECIPE", "the recipe, in YAML or JSON")

COMMANDS = (
    Command(
        "train",
        "Train a student by distillation, or without a teacher; also runs a pipeline of stages or a sweep",
        "--config RECIPE [--section.name VALUE ...] [--resume] [--json FILE]",
        "Train the recipe's student: by distillation, or by plain fine-tuning where the recipe names no teacher. A pipeline (a file with\n"
        "stages:) runs its stages in order and compares their students; a sweep (a file with grid: or arms:) trains every configuration.\n"
        "Settings on the command line replace those of the file; in a pipeline or a sweep they apply to every run.\n"
        "Several processes: accelerate launch -m llmkd train --config RECIPE ..., or torchrun -m llmkd train ...",
        "llmkd train --config recipes/quickstart.yaml --optim.lr 1e-3",
        (
            Option("--config", "RECIPE", "a recipe, a pipeline or a sweep, in YAML or JSON"),
            Switch("--resume", "continue a stopped run from its newest checkpoint; finished parts are kept"),
            _JSON,
        ),
        Recipe,
    ),
    Command(
        "sweep",
        "Train every configuration of a sweep, then measure, compare and report them",
        "--config SWEEP [--section.name VALUE ...] [--resume] [--json FILE]",
        "Train every configuration of a sweep (a recipe and a grid of changes), several at a time before one teacher where their data\n"
        "agree; then evaluate, compare and report them. A setting that is not the sweep's own applies to every configuration.",
        "llmkd sweep --config recipes/ablation.yaml --students_per_teacher 4",
        (
            Option("--config", "SWEEP", "the sweep's file, with grid: or arms:"),
            Switch("--resume", "continue: finished configurations are kept"),
            _JSON,
        ),
        Sweep,
    ),
    Command(
        "cache",
        "Run the teachers once and write their outputs to the teacher cache; check a cache; import log-probabilities",
        "--config RECIPE [--check | --import FILE] [--json FILE] [--section.name VALUE ...]",
        "Run the recipe's teachers once over its data and write their outputs at every target to the folders that teacher.cache names.\n"
        "Runs that read the cache need no teacher in memory. Several processes: accelerate launch -m llmkd cache --config RECIPE ...",
        "llmkd cache --config recipes/quickstart/3_from_cache.yaml",
        (
            _CONFIG,
            Switch("--check", "measure the error of a quantised teacher, or of a cache, on training examples"),
            Option(
                "--import",
                "FILE",
                "write the cache from log-probabilities in FILE (JSON lines, Parquet, or a folder of Parquet files) instead of a model",
            ),
            _JSON,
        ),
        Recipe,
    ),
    Command(
        "data",
        "Read and tokenise a recipe's data; print counts and examples with the supervised tokens marked",
        "--config RECIPE [--show N] [--example I] [--json FILE] [--section.name VALUE ...]",
        "Read and tokenise a recipe's data as a run would, without a model. Prints counts of every source, then examples with the\n"
        "supervised tokens marked.",
        "llmkd data --config recipes/quickstart/2_distill.yaml --show 2",
        (
            _CONFIG,
            Option("--show", "N", "how many examples to print, drawn by the recipe's seed (default 3)", whole_number(0)),
            Option("--example", "I", "print the example with this number instead", whole_number(0)),
            _JSON,
        ),
        Recipe,
    ),
    Command(
        "roll",
        "Write a model's answers to a recipe's prompts as data: roll once, cache, train",
        "student|teacher|RUN|MODEL --config RECIPE --to FILE.jsonl [options] [--section.name VALUE ...]",
        "Let the recipe's student or teacher, the student of a finished run, or any model of the same tokenizer answer the prompts of the recipe's\n"
        "training rows (each up to its first target), and write the answers as data: format: tokens, with the ids that were written, and the text\n"
        "for people. An answer depends on the model, its prompt, the sampling and the seed alone. What is written is kept: after a stop or a kill\n"
        "the same command goes on. llmkd cache then scores the file, and runs train from it.",
        "llmkd roll runs/sft --config recipes/quickstart/2_distill.yaml --to runs/rolled.jsonl",
        (
            _CONFIG,
            Option("--to", "FILE.jsonl", "the file of answers"),
            Option("--prompts", "FILE", "a file of prompts, as for llmkd sample (default: the recipe's training rows)"),
            Option("--samples", "N", "answers to each prompt (default 1)", whole_number(1)),
            Option("--limit", "N", "only the first N prompts", whole_number(1)),
            Option("--temperature", "T", "temperature of sampling (default 1); 0: always the most likely token", number(0)),
            Option(
                "--top_p", "P", "of the tokens the most likely ones that have this share of the probability (default 1: all)", number(0, 1)
            ),
            Option("--top_k", "K", "of the tokens the K most likely ones (default all)", whole_number(1)),
            Option(
                "--min_p", "P", "of the tokens those that are at least P times as likely as the most likely one (default 0)", number(0, 1)
            ),
            Option("--max_new_tokens", "N", "longest answer in tokens (default 128); a longer one is cut off", whole_number(1)),
            Option("--seed", "S", "seed of sampling (default 0)", whole_number(0)),
            Option("--batch_size", "N", "answers at a time (default 32)", whole_number(1)),
            _JSON,
        ),
        Recipe,
        places=("WRITER", "student, teacher, the folder of a run, of a model or of an adapter, or a hub id"),
    ),
    Command(
        "make",
        "Make data by a model's text: answers, new and harder questions, reflections, by stages of a file",
        "--config FILE [--dry_run] [--json FILE] [--section.name VALUE ...]",
        "Run the stages of a file, in order, over its seeds: a model in this process, on a server, a program or a file of recorded answers writes.\n"
        "Leaves train.jsonl (format: chat), rejected.jsonl (what was left out, with the reason), a table of counts and a data card. Answers are\n"
        "kept: after a stop or a kill the same command goes on, a finished one asks nothing, and a changed prompt asks for what depends on it.",
        "llmkd make --config recipes/imitation/answers.yaml --dry_run",
        (
            Option("--config", "FILE", "the file of stages, in YAML or JSON"),
            Switch("--dry_run", "print how many asks and tokens each stage needs, and ask nothing"),
            _JSON,
        ),
        Make,
    ),
    Command(
        "plan",
        "Say what a recipe or sweep needs and costs: memory by part, time on GPUs, what to change if it does not fit",
        "--config FILE [--gpu NAME] [--memory AMOUNT] [--processes N] [--measure] [--json FILE] [--section.name VALUE ...]",
        "Run one step of a recipe's training loop on tensors without values: no weights are read and no GPU is needed. Prints the memory at its\n"
        "peak by part, the tokens, targets and operations of the run, and its time on GPUs. With --gpu or --memory also what would save memory\n"
        "where it does not fit, each change planned again. Of a sweep each group of arms that train side by side. One process, or with --processes\n"
        "several, whole or sharded.",
        "llmkd plan --config recipes/llama3_8b_to_1b/2_distill.yaml --gpu 4090",
        (
            _CONFIG,
            Option(
                "--gpu",
                "NAME",
                "a GPU that it is to fit on: L4, 4090, A100-40GB, A100, H100 or H200; none: this machine's CPU",
                gpu_or_none,
            ),
            Option("--memory", "AMOUNT", "memory that it is to fit in, such as 24GB, in place of the GPU's", amount),
            Option("--share", "S", "share of a GPU's stated peak that a step reaches, above 0 to 1 (default 0.4)", above_zero(1)),
            Option("--tflops", "N", "operations per second that are reached, in 10^12, in place of all rates", above_zero()),
            Option(
                "--processes",
                "N",
                "plan N processes: what each needs, by way of holding the models, and the speed of 1 to 512 GPUs",
                whole_number(1),
            ),
            Option("--plot", "FILE.png", "with --processes: a plot of that speed"),
            Switch("--measure", "also load the models, run some real steps on this machine, and print what both say"),
            _JSON,
        ),
        Recipe,
    ),
    Command(
        "doctor",
        "Check a recipe, its models, data and loss on a few rows, before a long run",
        "--config RECIPE [--rows N] [--to FILE.html] [--json FILE] [--section.name VALUE ...]",
        "Read a few rows of a recipe and load its models as a run does, then check what could silently be wrong: the loss and its gradient\n"
        "against a plain float64 one, what is supervised, which parameters train, padding, packing, adapters, the teacher, the cache, what\n"
        "is saved. Takes a minute or two, writes to a temporary folder alone, and ends with exit code 2 where a check fails.",
        "llmkd doctor --config recipes/quickstart/1_teacher.yaml --to doctor.html",
        (
            _CONFIG,
            Option("--rows", "N", "rows of each source that are read, the first ones (default 64)", whole_number(2)),
            Option("--to", "FILE.html", "also write an HTML page"),
            _JSON,
        ),
        Recipe,
    ),
    Command(
        "sample",
        "Show what teacher, student before and student after write to the same prompts, side by side",
        "RUN [--prompts FILE] [--to FILE.html] [options]",
        "Let the teacher of a finished run, its student before the training and the student after it answer the same prompts, and print the\n"
        "answers side by side. Without --prompts they are asked rows of the run's held-out data, whose answers are shown too. One model\n"
        "is in memory at a time. The file of prompts is .jsonl, .json, .csv or .parquet, with rows as those of the run's data (the answer may\n"
        "be missing), or rows with a prompt (text or messages), messages or an instruction; or .txt, a prompt a line. Every prompt is rendered\n"
        "as in training.",
        "llmkd sample runs/first --prompts prompts.txt --to samples.html",
        (
            Option("--prompts", "FILE", "a file of prompts (default: held-out rows of the run's data)"),
            Option("--count", "N", "the first N prompts of the file (default all), or N held-out rows (default 8)", whole_number(1)),
            Option(
                "--models",
                "MODELS",
                "some of teacher, before and after, separated by commas (default all)",
                some_of("teacher", "before", "after"),
            ),
            Option("--temperature", "T", "temperature of sampling (default 0: always the most likely token)", number(0)),
            Option("--max_new_tokens", "N", "longest answer in tokens (default 128); a longer one is cut off", whole_number(1)),
            Option("--seed", "S", "seed of sampling with a temperature (default 0)", whole_number(0)),
            Option("--batch_size", "N", "prompts at a time (default 8)", whole_number(1)),
            Option("--to", "FILE.html", "also write an HTML page"),
            _JSON,
        ),
        places=("RUN", "a run's output_dir"),
    ),
    Command(
        "export",
        "Write a finished run's student as a plain transformers model",
        "RUN [--to FOLDER] [--checkpoint STEP|best]",
        "Write a finished run's student as a plain transformers model, which needs neither PEFT nor llmkd: an adapter is merged into its\n"
        "base. Prints the folder.",
        "llmkd export runs/first --checkpoint best",
        (
            Option("--to", "FOLDER", "where to write (default RUN/merged)"),
            Option("--checkpoint", "STEP", "export this checkpoint: a step's number, or best (see checkpoint.best_by)"),
        ),
        places=("RUN", "a run's output_dir, or an adapter's folder"),
    ),
    Command(
        "eval",
        "Evaluate runs and models by lm-evaluation-harness",
        "RUN_OR_MODEL... --tasks TASK[,TASK...] [options]",
        "Evaluate finished runs, adapters, merged models, bases or hub ids by lm-evaluation-harness, with its own tasks and metrics.\n"
        "Results go to RUN/eval/TASK.json and TASK.jsonl (each item); of other models to runs/eval/NAME; with --out to that folder (with\n"
        "several models to --out/NAME). Results that exist for the same settings are kept and not computed again.\n"
        "Several processes: accelerate launch -m llmkd eval RUN_OR_MODEL... --tasks ...",
        "llmkd eval runs/sft runs/kd --tasks hellaswag,commonsense_qa --limit 200",
        (
            Option("--tasks", "TASKS", "tasks, groups or tags of the harness, separated by commas (lm-eval ls tasks)", names_list),
            Option("--tasks_dir", "DIR", "a folder of task files that come before the harness's own, such as llmkd tasks writes"),
            Option(
                "--fewshot", "N", "examples in the prompt (default: each task's own number; a task that fixes it keeps it)", whole_number(0)
            ),
            Option("--limit", "N", "only the first N items", whole_number(1)),
            Option("--batch_size", "N", "requests per forward pass (default auto: what fits on a GPU, 8 on a CPU)", batch_size),
            Option("--seed", "N", "for all of the harness's seeds (default its own, 0 and 1234)", whole_number(0)),
            Option(
                "--dtype",
                "TYPE",
                "float32, bfloat16, float16 or float64 (default: as the student was trained, or as the model is saved)",
                one_of("float32", "bfloat16", "float16", "float64"),
            ),
            Switch("--chat_template", "render the prompts in the model's chat template, few-shot examples as its turns"),
            Switch("--allow_task_code", "run the Python that task files in --tasks_dir name (!function and its like)"),
            Option("--out", "DIR", "folder for the results"),
            Switch("--force", "evaluate again where results exist, and replace them"),
            _JSON,
        ),
        places=("RUN_OR_MODEL", "a run, a model's folder or a hub id"),
    ),
    Command(
        "tasks",
        "Write harness task files that read their data from a local folder",
        "DATA_DIR [--to FOLDER] [--json FILE]",
        "Write task files for a folder of data, so that the harness runs without a network: truthfulqa_mc1, truthfulqa_mc2, hellaswag and\n"
        "commonsense_qa, recognised by the columns of their rows (.jsonl, .json, .parquet). The files name paths of this machine: do not\n"
        "commit them.",
        "llmkd tasks data/benchmarks --to eval/tasks",
        (Option("--to", "FOLDER", "where to write the task files (default eval/tasks)"), _JSON),
        places=("DATA_DIR", "a folder of data files"),
    ),
    Command(
        "compare",
        "Compare evaluated runs item by item, with intervals and tests",
        "RUN|NAME=RUN[,RUN...] ... [--baseline NAME] [options]",
        "Compare evaluated runs with the first of them, or with --baseline, item by item, with intervals and tests. RUN,RUN are runs of\n"
        "one configuration with different seeds; NAME=RUN names a configuration.",
        "llmkd compare sft=runs/sft kd=runs/kd --tasks hellaswag",
        (
            Option("--baseline", "NAME", "the configuration that the others are compared with (default the first)"),
            Option("--tasks", "TASKS", "only these tasks, separated by commas", names_list),
            Option("--metrics", "METRICS", "only these metrics, separated by commas", names_list),
            Switch("--common", "compare on the items that all runs have, where some have more"),
            _JSON,
        ),
        places=("RUN", "an evaluated run, or NAME=RUN, or NAME=RUN,RUN for several seeds"),
    ),
    Command(
        "report",
        "Write report.html and report.md of a sweep or a run",
        "FOLDER [--json FILE]",
        "Write report.html and report.md of a sweep, finished or not: the runs, learning curves, comparisons, maps over settings, cost.\n"
        "Of a single run: its settings, curves, held-out metrics, and what its student has written. Prints the two paths.",
        "llmkd report runs/ablation",
        (_JSON,),
        places=("FOLDER", "the output_dir of a sweep or a run"),
    ),
    Command(
        "recipes",
        "List the recipes that come with llmkd",
        "[--json FILE]",
        "List the recipes that come with llmkd: what each does, what it needs and the command that runs it. llmkd init copies one.",
        "llmkd recipes",
        (_JSON,),
        exit_codes=False,
    ),
    Command(
        "init",
        "Copy a shipped recipe into a folder, to run or to edit",
        "NAME [FOLDER]",
        "Copy a shipped recipe, with the files it refers to, into FOLDER (default recipes), and print the command that runs it. Existing\n"
        "files are never overwritten.",
        "llmkd init quickstart && llmkd train --config recipes/quickstart.yaml",
        places=("NAME [FOLDER]", "a name that llmkd recipes lists, and a folder"),
        exit_codes=False,
    ),
    Command(
        "completion",
        "Print the shell completion script for bash or zsh",
        "bash|zsh",
        "Print a completion script for commands, options and settings. For bash, add the example's line to ~/.bashrc; for zsh, write the\n"
        "output to a file _llmkd in a folder of $fpath.",
        'eval "$(llmkd completion bash)"',
        places=("SHELL", "bash or zsh"),
        exit_codes=False,
    ),
)
