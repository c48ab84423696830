"""What the options and arguments of a command name: files, folders and values, checked before torch is loaded."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..config import loader
from ..errors import UserError


def config_file(options: argparse.Namespace) -> str:
    if not options.config:
        raise UserError("--config: not given; name a recipe, such as --config recipes/quickstart.yaml (llmkd recipes lists them)")
    return options.config


def recipe_file(options: argparse.Namespace) -> str:
    """The file that --config names. UserError for a pipeline or a sweep, with the recipes of its runs."""
    config = config_file(options)
    if (kind := loader.file_kind(config)) not in ("recipe", "make"):  # load_recipe refuses the latter
        file = loader.read(config)[0]
        stages = file["stages"].values() if isinstance(file.get("stages"), dict) else []
        named = [
            os.path.relpath(Path(config).parent / str(one[key]))
            for one in (file, *stages)
            for key in ("recipe", "cache")
            if isinstance(one, dict) and one.get(key)
        ]
        raise UserError(
            f"--config {config}: is a {kind}; name the recipe of one of its runs: {', '.join(dict.fromkeys(named)) or 'it has none'}"
        )
    return config


def run_folder(options: argparse.Namespace, command: str, expected: str) -> Path:
    """The folder of a run that the command line names; checked before torch is loaded."""
    (run,) = map(Path, positional(options, command, "a run's folder", f"llmkd {command} RUN"))
    if not run.is_dir():
        raise UserError(f"{run}: {'is a file' if run.exists() else 'no such folder'}; name {expected}")
    return run


def prompts_file(options: argparse.Namespace) -> Path | None:
    if options.prompts and not Path(options.prompts).is_file():
        raise UserError(f"--prompts: {options.prompts}: no such file; name a file of prompts")
    return Path(options.prompts) if options.prompts else None


def given_options(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options `names` that the command line gives, by name."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def positional(options: argparse.Namespace, command: str, what: str, usage: str, most: int = 1) -> list[str]:
    """The positional arguments: at least one, and at most `most`. UserError otherwise."""
    if not options.places:
        raise UserError(f"{command}: {what} is not given; write {usage}")
    if len(options.places) > most:
        raise UserError(f"{command}: found {' '.join(options.places)}, expected {what} and nothing else; write {usage}")
    return options.places
