"""One run, from a checked recipe to a finished run folder."""

import contextlib
import dataclasses

from ..config.recipe import Recipe
from ..config.sharding import sharding_contradictions
from ..console import first_process, info
from ..errors import NonFinite, Stopped, UserError, attribute_to_student, for_each_student, name_last_checkpoint
from ..model_folder.identity import verify
from ..output import hub_upload, trackers
from ..output.run_files import recorded_layers
from ..output.run_folder import RunFolder
from ..process import heartbeat
from .environment import check_environment
from .fsdp_variables import fsdp2_asked, unseen
from .launch import start
from .prepare import check_early, prepare
from .process_state import check_process_state
from .recipe_checks import refuse_long_schedules
from .shutdown import ShutdownRequest


def run(recipe: Recipe, resume: bool = False, stop: ShutdownRequest | None = None) -> dict:
    """Train, and return the run's summary. Raises UserError, NonFinite or Stopped.

    resume   continue from the newest checkpoint in the recipe's output_dir
    stop     the handler of signals, if one is installed already
    """
    check_environment(shards=True)
    check_process_state()
    recipe = as_launched(recipe)
    folder = RunFolder(recipe, resume)
    folder.check()
    hub_upload.check(recipe.push_to_hub)
    trackers.check(recipe.report_to)
    if resume and folder.finished:
        for name in ("adapter", "model"):
            if (folder.path / name).is_dir():
                verify(folder.path / name, None, "output_dir")
        info(f"{folder.path} is finished; nothing to do" + (" except the upload" if recipe.push_to_hub else ""))
        return hub_upload.publish(recipe.push_to_hub, folder) if first_process() else folder.summary()
    with contextlib.nullcontext(stop) if stop else ShutdownRequest() as stop:
        (failure,) = train_together([recipe], [folder], stop)
        if failure:
            raise failure
        return hub_upload.publish(recipe.push_to_hub, folder) if first_process() and recipe.push_to_hub else folder.summary()


def as_launched(recipe: Recipe) -> Recipe:
    """The recipe, with train.shard: full if Accelerate's config file asks for FSDP2. UserError for settings that contradict it."""
    if not fsdp2_asked() or recipe.train.shard == "full":
        return recipe
    sharded = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, shard="full"))
    asks = "(Accelerate's config file, or ACCELERATE_USE_FSDP, asks for it)"
    if problems := [f"{settings[0]}: {problem} {asks}" for settings, problem in sharding_contradictions(sharded)]:
        raise UserError(*problems)
    return sharded


def train_together(recipes: list[Recipe], folders: list[RunFolder], stop: ShutdownRequest) -> list[NonFinite | None]:
    """Train the recipes' students side by side (see `build.build_setup`). Returns each student's failure, or None."""
    heartbeat.expect_within(recipes[0].train.timeout)
    heartbeat.at("the reading of its data", patient=True)
    with unseen():
        for_each_student(recipes, check_early)
        with attribute_to_student(0):
            layers = recorded_layers(folders[0].path) if folders[0].resume else None
        prepared = prepare(recipes[0], layers=layers, others=recipes[1:])
        for_each_student(recipes, lambda one: refuse_long_schedules(one.loss, one.optim, prepared.source.total_steps))
        if stop():
            raise Stopped("stopped by a signal before anything was trained; continue with --resume")
        from .build import build_setup
        from .trainer import Trainer, TrainerSettings

        try:
            accelerator = start()
            setup, first = build_setup(recipes, prepared, folders, accelerator, stop), recipes[0]
            trainer = Trainer(setup, TrainerSettings(first.train, first.validation, first.checkpoint), accelerator, stop)
            with name_last_checkpoint(lambda: trainer.written):
                trainer.train()
                trainer.finish()
            return [student.failure for student in trainer.students]
        finally:
            for folder in folders:
                folder.release()
