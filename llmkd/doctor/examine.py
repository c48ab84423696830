"""All checks in their order, and the function that asks them one after another."""

import contextlib
import os
import shutil
import time
import traceback
from collections.abc import Callable

import torch

from ..config.recipe import Recipe
from ..errors import UserError, brief
from ..files import temporary_folder
from ..model_folder.hashes import cache_root
from ..process.machine_errors import machine_error
from . import data, files, losses, models, on_policy, terms, training
from .check import Check, Result, failed, not_asked, passed
from .setup import Setup


def load(setup: Setup) -> Result:
    """Loads and tries what a run does before its first step. UserError says what is wrong."""
    setup.load()
    return passed(
        "loaded: " + ", ".join(f"{name} ({sum(p.numel() for p in one.parameters()):,} parameters)" for name, one in setup.models.items())
    )


LOAD = Check("the models are loaded and can be used", "Models", "data", "correct that, and start llmkd doctor again", load)

CHECKS: tuple[Check, ...] = (
    *data.CHECKS,
    LOAD,
    *models.CHECKS,
    *losses.CHECKS,
    *terms.CHECKS,
    *on_policy.CHECKS,
    *training.CHECKS,
    *files.CHECKS,
)


def examine(
    recipe: Recipe,
    rows: int = 64,
    on_result: Callable[[Check, Result], None] = lambda check, result: None,
    stand_ins: frozenset[str] = frozenset(),
) -> list[Result]:
    """The results of all checks. `on_result` is called after each. Only a temporary folder is written to, and the random state is kept.

    stand_ins  the settings of models that are still to be trained, for which the recipe names untrained ones
    """
    cache = os.environ.get("LLMKD_CACHE")
    with temporary_folder("doctor") as folder, torch.random.fork_rng():
        with contextlib.suppress(OSError, RuntimeError):  # so that large weights need not be hashed again
            shutil.copytree(cache_root() / "hashes", folder / "cache" / "hashes")
        os.environ["LLMKD_CACHE"] = f"{folder}/cache"
        try:
            (folder / "work").mkdir()
            return ask_all(Setup(recipe, rows, folder / "work", stand_ins), CHECKS, on_result)
        finally:
            os.environ.pop("LLMKD_CACHE")
            if cache is not None:
                os.environ["LLMKD_CACHE"] = cache


def ask_all(setup: Setup, checks: tuple[Check, ...], on_result: Callable[[Check, Result], None]) -> list[Result]:
    """The checks' results, in their order. If the data cannot be read or the models not be loaded, checks that need them are not asked."""
    results, lacking = [], ""
    for check in checks:
        if lacking and check.needs != "nothing":
            result = not_asked(f"it needs what the failed check ({lacking}) was to find").of(check, 0.0)
        else:
            result = ask(setup, check)
            if result.status == "failed" and check.run in (data.read, load):
                lacking = check.name
        results.append(result)
        on_result(check, result)
    return results


def ask(setup: Setup, check: Check) -> Result:
    """The check's result; an exception in it is a failure."""
    start = time.monotonic()
    try:
        result = check.run(setup)
    except UserError as error:
        result = failed("; ".join(error.problems), check.fix)
    except Exception as error:
        machine = machine_error(error)
        fix = f"{machine.name}: {machine.advice}" if machine else check.fix
        result = failed(f"it could not be completed ({brief(error)})", fix, ("\n".join(traceback.format_exc().splitlines()[-8:]),))
    return result.of(check, time.monotonic() - start)
