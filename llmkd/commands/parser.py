"""argparse as llmkd uses it: mistakes are UserErrors of one line, with a suggestion; `--help SECTION` describes settings. No torch."""

import argparse
import dataclasses
import difflib
import math
import re

from ..config.schema import describe, help_text, section_of
from ..errors import UserError


class _Format(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **more):
        super().__init__(prog, max_help_position=26, width=130, **more)


class HelpShown(Exception):
    """Help was printed: the command has nothing else to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for mistakes and takes no abbreviations; `--help SECTION` describes the settings of `kind`."""

    def __init__(self, *args, kind=None, **kwargs):
        kwargs = {"add_help": False, "allow_abbrev": False, "formatter_class": _Format} | kwargs
        super().__init__(*args, **kwargs)
        self.kind = kind
        self._positionals.title = "arguments"
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


class Once(argparse.Action):
    """An option with a value, refused if it is given twice: argparse would ignore the first."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest, None) is not None:
            raise UserError(f"{option_string}: given twice; keep one")
        setattr(namespace, self.dest, values)


def whole_number(least: int):
    def number(text: str) -> int:
        whole = bool(re.fullmatch(r"[+-]?[0-9]{1,18}", text))
        if not whole or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text if whole else repr(text)}, expected a whole number >= {least}")
        return int(text)

    return number


def number(least: float, most: float = math.inf):
    def value(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not least <= found <= most or found == math.inf:
            wanted = f">= {least:g}" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"found {text}, expected a number {wanted}")
        return found

    return value


def above_zero(most: float = math.inf):
    def value(text: str) -> float:
        try:
            found = number(0)(text)
        except argparse.ArgumentTypeError:
            found = 0.0
        if not 0 < found <= most:
            raise argparse.ArgumentTypeError(
                f"found {text}, expected a number above 0" + (f", at most {most:g}" if most < math.inf else "")
            )
        return found

    return value


def one_of(*names: str):
    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"found {text}, expected one of {', '.join(names)}{did_you_mean(text, names)}")
        return text

    return name


def names_list(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def some_of(*names: str):
    def some(text: str) -> list[str]:
        return [one_of(*names)(name) for name in names_list(text)] or [one_of(*names)(text)]

    return some


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


def plain_switches(parser: Parser, words: list[str]) -> list[str]:
    """The words with switches that are written like settings as plain ones: `--resume=true` and `--resume true` become `--resume`, and with
    false they are left out."""
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


def settings_help(kind, which: str) -> str:
    """The help text of a section or a setting, by its dotted path, or of all settings. UserError for an unknown one."""
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
    """The top-level sections of a configuration, each with the names of its settings."""
    out = {}
    for field in dataclasses.fields(kind):
        if section := section_of(kind, field.name):
            out[field.name] = [inner.name for inner in dataclasses.fields(section)]
    return out


def sections_overview(kind) -> str:
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
