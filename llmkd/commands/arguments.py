"""Parses the command line. `table.py` has the options and help texts. Imports no torch.

argparse reads a command's own options. The rest, `--section.name VALUE`, are settings, which `config.loader.parse_overrides` reads.
"""

import argparse
import dataclasses
import os
import typing

from ..config.loader import parse_overrides
from ..config.make import Make
from ..config.recipe import Recipe
from ..config.schema import describe
from ..config.sweep import Pipeline, Sweep
from ..errors import UserError
from .parser import Once, Parser, did_you_mean, plain_switches, sections_overview
from .table import COMMANDS, Switch

EXIT_CODES = """\
exit codes: 0 done, 1 the machine failed, or a bug, 2 a mistake you can fix, 3 stopped at a non-finite value, 75 stopped by a signal
(--resume continues). accelerate launch and torchrun turn all of them into 1."""

_SETTINGS = """\
settings of {of} (each is also an option: {such}):
{sections}
  llmkd {command} --help SECTION describes one section or setting (such as {section}); --help all, every one."""
_OF = {
    Make: {"of": "the file", "such": "--writer.model MODEL, --limit_tokens 100000", "section": "writer or writer.server"},
    Recipe: {
        "of": "a recipe",
        "such": "--optim.lr 1e-4, --teacher null, --data.train.path rows.jsonl",
        "section": "loss, data.train or optim.lr",
    },
}


def command_parsers(group=None) -> dict[str, Parser]:
    """The parser of each command, by name; added to `group` (of argparse's add_subparsers) if one is given."""
    made = {}
    for command in COMMANDS:
        tail = [f"example:\n  {command.example}"]
        if command.settings:
            about = _OF.get(command.settings, _OF[Recipe])
            tail.append(_SETTINGS.format(sections=sections_overview(command.settings), command=command.name, **about))
        if command.exit_codes:
            tail.append(EXIT_CODES)
        given = {"usage": f"llmkd {command.name} {command.usage}".rstrip(), "description": command.text, "epilog": "\n\n".join(tail)}
        given["kind"] = command.settings
        parser = group.add_parser(command.name, help=command.summary, **given) if group else Parser(prog=f"llmkd {command.name}", **given)
        if command.places:
            parser.add_argument("places", nargs="*", metavar=command.places[0], help=command.places[1])
        for option in command.options:
            if isinstance(option, Switch):
                parser.add_argument(option.flag, action="store_true", help=option.help)
            else:
                parser.add_argument(option.flag, metavar=option.value, help=option.help, type=option.kind, action=Once)
        made[command.name] = parser
    return made


def parse(command: str, words: list[str]) -> tuple[argparse.Namespace, dict[str, typing.Any]]:
    """A command's options, and the settings given with them by dotted path. HelpShown after printing help, UserError for a mistake.

    A leading ~ in an option's value is expanded, since shells do not expand it in --to=~/new.
    """
    options, settings = _parse(command, words)
    for name, value in vars(options).items():
        setattr(options, name, [_at_home(one) for one in value] if isinstance(value, list) else _at_home(value))
    return options, settings


def _at_home(value):
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    path = os.path.expanduser(value)
    if path.startswith("~") and not os.path.lexists(path):
        raise UserError(f"{value}: no home folder of that name is known; set HOME, or write the path out")
    return path


def _parse(command: str, words: list[str]) -> tuple[argparse.Namespace, dict[str, typing.Any]]:
    parser = command_parsers()[command]
    words, settings = plain_switches(parser, words), []
    if parser.kind and any(action.dest == "places" for action in parser._actions):  # else a setting's value may be taken for a place
        words, settings = _apart(parser, words)
    options, rest = parser.parse_known_args(words)
    unknown = [word for word in (*rest, *settings) if word.startswith("-") and word != "-"]
    if parser.kind:
        own = {field.name for kind in (Recipe, Sweep, Pipeline, Make) for field in dataclasses.fields(kind)}
        own |= {path.rpartition(".")[2] for kind in (Recipe, Make) for path, *_ in describe(kind)}  # --lr: parse_overrides names optim.lr
        for word in unknown:
            name = word.partition("=")[0]
            if "." in name or name[2:] in own:
                continue
            elsewhere = [other.name for other in COMMANDS if any(option.flag == name for option in other.options)]
            hint = f"; it belongs to llmkd {', '.join(elsewhere)}" if elsewhere else did_you_mean(name, parser.flags())
            if hint:
                raise UserError(f"{name}: {command} has no such option{hint}")
        if hasattr(options, "places"):
            options.places, rest = [*options.places, *rest], settings
        _refuse_stray(words, rest)
        if rest and not rest[0].startswith("-") and not options.config:
            raise UserError(f"{rest[0]}: not understood; the recipe is given by --config {rest[0]} (see llmkd {command} --help)")
        return options, parse_overrides(rest, ())
    if unknown:
        name = unknown[0].partition("=")[0]
        known = [flag for flag in parser.flags() if flag not in ("--help", "--debug")]
        hint = did_you_mean(name, known) or f"; it has {', '.join(known) or 'none'}"
        raise UserError(f"{name}: {command} has no such option{hint}")
    if rest and not hasattr(options, "places"):
        raise UserError(f"{rest[0]}: {command} takes no such argument (see llmkd {command} --help)")
    if rest:  # positional arguments behind an option, which argparse leaves
        options.places = [*options.places, *rest]
    return options, {}


_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2212"  # text processors replace two hyphens by one of these


def _refuse_stray(words: list[str], rest: list[str]) -> None:
    """UserError for words that are neither options nor values, with a guess at what was meant."""
    for word in rest:
        if word[0] in _DASHES:
            raise UserError(f"{word}: begins with a dash that is no hyphen; write --{word.lstrip(_DASHES + '-')}")
        before = words[words.index(word) - 1] if word in words[1:] else ""
        if before == "--resume" and not word.startswith("-"):
            raise UserError(
                f"--resume: found {word}, and it takes no value: a run goes on from the newest whole checkpoint of its output_dir; leave {word} out"
            )
        if word in ("-c", "--recipe", "--cfg", "--conf", "--yaml"):
            raise UserError(f"{word}: not understood; the recipe is given by --config FILE")


def _apart(parser: Parser, words: list[str]) -> tuple[list[str], list[str]]:
    """The words split into a command's own options and arguments, and settings: `--name VALUE` or `--name=VALUE` where `--name` is no option."""
    own, settings, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if not word.startswith("--") or name in parser.flags():
            own.append(word)
            continue
        settings.append(word)
        if not equals and rest and not rest[0].startswith("--"):
            settings.append(rest.pop(0))
    return own, settings


def overview() -> str:
    """The text of llmkd --help."""
    commands = "\n".join(f"  {command.name:<12}{command.summary}" for command in COMMANDS)
    return (
        "usage: llmkd COMMAND [options]\n       llmkd COMMAND --help      llmkd train --help SECTION      llmkd --version\n\n"
        "Distil a large causal language model into a small one.\n\n"
        f"commands:\n{commands}\n\n"
        "first steps:\n  llmkd init quickstart && llmkd train --config recipes/quickstart.yaml\n\n"
        f"several processes:\n  accelerate launch -m llmkd train --config RECIPE ...\n\n{EXIT_CODES}"
    )


def completion_script(shell: str) -> str:
    """The completion script for bash or zsh, made by shtab, with every command, option and setting."""
    import shtab

    whole = Parser(prog="llmkd", description="Distil a large causal language model into a small one.")
    group = whole.add_subparsers(dest="command", parser_class=Parser)
    for name, parser in command_parsers(group).items():
        parser.usage = None
        for action in parser._actions:
            if action.dest == "help":
                action.nargs = 0  # its section is not completed
            elif action.dest in ("config", "import", "json", "prompts") or (action.dest == "to" and name in ("sample", "doctor", "roll")):
                action.complete = shtab.FILE
            elif action.dest in ("to", "out", "tasks_dir", "places") and name not in ("init", "completion"):
                action.complete = shtab.DIRECTORY
        if name == "completion":
            parser._actions[-1].choices, parser._actions[-1].nargs = ["bash", "zsh"], None
        settings = [one for one in describe(parser.kind) if f"--{one[0]}" not in parser.flags()] if parser.kind else []
        for path, _, _, text in settings:
            parser.add_argument(f"--{path}", help=text.partition(". ")[0].partition("; ")[0].replace("%", "%%") or None)
    return shtab.complete(whole, shell=shell)
