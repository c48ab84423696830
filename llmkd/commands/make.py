"""`llmkd make`: training data written by a model, in the stages of a file."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from ..config.make import MakeSettings, load_make
from ..config.make_changes import place_make_changes
from ..config.sweep import Stage
from ..console import several_processes
from ..errors import UserError
from ..making.pipeline import StageCount, report
from ..making.pipeline import make as run_stages
from ..making.writers.writer import writer_of
from ..output.run_folder import refuse_unwritable
from ..training.shutdown import ShutdownRequest


def make(config: str, overrides: dict[str, Any], dry_run: bool = False) -> dict[str, Any]:
    """Run the stages of a file, or continue an earlier attempt, and return counts, of each stage too.

    UserError for a user's mistake; Stopped after a signal: what is written is kept, and the same call continues.
    """
    return run_make(load_make(config, overrides, check_inputs=True), dry_run)


def run_make(settings: MakeSettings, dry_run: bool = False, stop: ShutdownRequest | None = None) -> dict[str, Any]:
    """As `make`, of loaded settings. `stop`: a ShutdownRequest that the caller has entered."""
    if several_processes():
        raise UserError("make: runs in one process; run it by llmkd make without accelerate launch first")
    refuse_unwritable(Path(settings.make.output_dir).expanduser(), "output_dir")
    with contextlib.nullcontext(stop) if stop else ShutdownRequest("finishing what is asked; what is written is kept") as stop:
        found = run_stages(settings, lambda: writer_of(settings.make.writer, _device, stop, settings.sounds), dry_run)
    print(report([StageCount(**one) for one in found["stages"]], dry_run))
    return found


def make_of_stage(stage: Stage, config: Path, output_dir: str, folder: str, overrides: dict[str, Any], check_inputs: bool) -> MakeSettings:
    """The settings of a `make:` stage of a pipeline or a sweep.

    config       the file of the pipeline or sweep
    output_dir   its output_dir, the value of `{output_dir}` in `set:`
    folder       where the stage writes
    """
    changes = place_make_changes(stage.set, stage.make, str(config.parent), output_dir) | overrides | {"output_dir": folder}
    return load_make(stage.make, changes, check_inputs=check_inputs, written_later=output_dir)


def overrides_of(kind: type, overrides: dict[str, Any]) -> dict[str, Any]:
    """The overrides whose section or setting exists in `kind`, Recipe or Make."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {dotted: value for dotted, value in overrides.items() if dotted.partition(".")[0] in names}


def _device():
    from ..training.launch import start

    return start().device
