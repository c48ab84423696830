"""One run, from a checked recipe to the folder it leaves behind."""

import contextlib
import os

from . import hub, trackers
from .console import first_process, say
from .errors import NonFinite, Stopped, UserError
from .prepare import prepare
from .recipe import Recipe
from .run_folder import RunFolder
from .stopping import StopRequest


def run(recipe: Recipe, resume: bool = False, stop: StopRequest | None = None) -> dict:
    """Train, and return the run's summary. Raises UserError, NonFinite or Stopped. `stop`: who hears of signals, if somebody does already."""
    folder = RunFolder(recipe, resume)
    folder.check()
    hub.check(recipe.push_to_hub)
    trackers.check(recipe.report_to)
    if resume and folder.finished:
        say(f"{folder.path} is finished; nothing to do" + (" but to upload it" if recipe.push_to_hub else ""))
        return hub.publish(recipe, folder) if first_process() else folder.summary()
    with contextlib.nullcontext(stop) if stop else StopRequest() as stop:
        (failure,) = train_together([recipe], [folder], stop)
        if failure:
            raise failure
        return hub.publish(recipe, folder) if first_process() and recipe.push_to_hub else folder.summary()


def train_together(
    recipes: list[Recipe], folders: list[RunFolder], stop: StopRequest, lead: Recipe | None = None
) -> list[NonFinite | None]:
    """Train the recipes' students side by side; what stopped each, if something did. See `session.Session`."""
    lead = lead or recipes[0]
    prepared = prepare(lead)
    if stop():
        raise Stopped("stopped by a signal before anything was trained; go on with --resume")
    from .session import Session

    try:
        session = Session(recipes, lead, prepared, folders, start(), stop)
        session.train()
        session.finish()
        return [arm.failure for arm in session.arms]
    finally:
        for folder in folders:
            folder.release()


def start():
    """The Accelerator, with as many processes as were asked for; refused otherwise."""
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise UserError(
            "accelerate launch --cpu starts one process, whatever --num_processes says; use accelerate launch --multi_gpu --num_processes N, also without a GPU"
        )
    from datetime import timedelta

    import torch
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    if not torch.cuda.is_available() and "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate launch sets OMP_NUM_THREADS=1
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=timedelta(minutes=10))]
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers)
    if accelerator.num_processes != asked:
        raise UserError(
            f"{asked} processes were asked for and {accelerator.num_processes} work together; start with accelerate launch --num_processes {asked} or torchrun"
        )
    return accelerator
