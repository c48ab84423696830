"""Sends the records of metrics.jsonl to Accelerate's trackers: tensorboard, wandb, trackio, mlflow.

metrics.jsonl stays the complete record; a tracker that fails is dropped with a note, and the run continues.
"""

import dataclasses
import importlib.util
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from ..config.dotted import flatten
from ..config.recipe import Recipe
from ..errors import UserError
from ..files import read_file, write_atomic


def check(names: tuple[str, ...]) -> None:
    """UserError for every tracker whose package is not installed."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(*(f"report_to: {name} is not installed; pip install {name}, or leave it out" for name in missing))


class Trackers:
    """The running trackers of a run.

    names           the trackers in `report_to`
    run             the run's name in the trackers
    configuration   the recipe's settings, see `configuration`
    done            the step after which a resumed run continues
    """

    def __init__(self, names: tuple[str, ...], run: str, configuration: dict, folder: Path, done: int, info: Callable[[str], None]):
        self.info, self.running = info, {}
        for name in dict.fromkeys(names):
            self.running[name] = None
            self._try(name, self._start, name, run, configuration, folder / "trackers", done)

    def log(self, record: dict) -> None:
        """Send a record of metrics.jsonl."""
        group = next((name for name in ("validation", "teacher_check", "fidelity", "unexplained") if name in record), "train")
        values = record.get(group, record)
        metrics = {f"{group}/{k}": v for k, v in values.items() if k != "step"}
        for name, tracker in list(self.running.items()):
            self._try(name, tracker.log, metrics, step=record["step"])

    def finish(self) -> None:
        for name, tracker in list(self.running.items()):
            self._try(name, tracker.finish)
        self.running = {}

    def _start(self, name: str, run: str, configuration: dict, folder: Path, done: int) -> None:
        folder.mkdir(exist_ok=True)
        tracker = make_tracker(name, run, folder, done)
        tracker.start()
        self.running[name] = tracker
        tracker.store_init_configuration(configuration)

    def _try(self, name: str, action: Callable, *args, **kwargs) -> None:
        try:
            action(*args, **kwargs)
        except Exception as error:
            self.running.pop(name, None)
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            self.info(
                f"note: {name} failed ({type(error).__name__}: {reason}); the run continues without it, and metrics.jsonl has everything"
            )


def make_tracker(name: str, run: str, folder: Path, done: int):
    """One of Accelerate's trackers. A resumed run continues the same curve, except in mlflow, where it is a second run of the same name."""
    from accelerate import tracking

    if name == "tensorboard":  # records after the checkpoint are dropped, as in metrics.jsonl
        return tracking.TensorBoardTracker("tensorboard", folder, purge_step=done + 1 if done else 0)
    if name == "mlflow":
        return tracking.MLflowTracker("llmkd", run_name=run)
    known = folder / f"{name}.id"
    if not (done and known.exists()):
        write_atomic(known, uuid.uuid4().hex[:8])
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT", "llmkd")
        return tracking.WandBTracker(project, name=run, id=read_file(known).decode(), resume="allow", dir=str(folder))
    return tracking.TrackioTracker("llmkd", name=f"{run} {read_file(known).decode()}", resume="allow")


def configuration(recipe: Recipe) -> dict[str, bool | int | float | str]:
    """The resolved recipe by dotted path, in types that every tracker accepts."""
    plain = flatten(json.loads(json.dumps(dataclasses.asdict(recipe))))
    return {path: value if isinstance(value, bool | int | float | str) else json.dumps(value) for path, value in plain.items()}
