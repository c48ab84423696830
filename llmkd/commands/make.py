"""`llmkd make`: data that a model writes, by the stages of a file."""

import os
from pathlib import Path
from typing import Any

from ..config.make import load_make
from ..errors import UserError
from ..making.pipeline import StageCount, report
from ..making.pipeline import make as run_stages
from ..making.writers.writer import writer_of
from ..output.run_folder import refuse_unwritable
from ..training.shutdown import ShutdownRequest


def make(config: str, overrides: dict[str, Any], dry_run: bool = False, written_later: str = "") -> dict[str, Any]:
    """Run the stages of a file, or go on with them. Returns counts, with those of each stage.

    UserError for what a user can correct; Stopped when a signal arrived: what is written is kept, and the same call goes on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("make: runs in one process; leave accelerate launch out")
    settings = load_make(config, overrides, check_inputs=True, written_later=written_later)
    refuse_unwritable(Path(settings.make.output_dir).expanduser(), "output_dir")
    with ShutdownRequest("finishing what is asked; what is written is kept") as stop:
        found = run_stages(settings, lambda: writer_of(settings.make.writer, _device, stop), dry_run)
    print(report([StageCount(**one) for one in found["stages"]], dry_run))
    return found


def _device():
    from ..training.launch import start

    return start().device
