"""One run, from a checked recipe to the folder it leaves behind."""

import contextlib

from ..config.recipe import Recipe
from ..console import first_process, say
from ..errors import NonFinite, Stopped
from ..output import hub_upload as hub
from ..output import trackers
from ..output.run_folder import RunFolder
from .launch import start
from .prepare import prepare
from .shutdown import StopRequest


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
    from .trainer import Session

    try:
        session = Session(recipes, lead, prepared, folders, start(), stop)
        session.train()
        session.finish()
        return [arm.failure for arm in session.arms]
    finally:
        for folder in folders:
            folder.release()
