"""Reads a sweep's folder for the report: arms with their runs, curves, metrics and groups. Nothing is computed here."""

import contextlib
import functools
import math
from dataclasses import dataclass
from pathlib import Path

from llmkd.commands.sweep_state import REBUILD
from llmkd.config import loader
from llmkd.config.dotted import flatten
from llmkd.console import warn
from llmkd.errors import UserError
from llmkd.files import sha256_file
from llmkd.output.metrics import read_metrics
from llmkd.output.run_files import RECIPE, SUMMARY, read_run_file, run_of


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    name: str
    arm: str
    seed: int | None
    folder: Path
    changes: dict
    status: str
    reason: str | None
    seconds: float
    base: dict
    stated: str | None = None  # which run it is, as sweep.json says it

    @functools.cached_property
    def recipe(self) -> dict:
        """By dotted path: the resolved recipe, or where the run has none yet the sweep's base with the arm's changes."""
        path = self.folder / RECIPE
        try:
            return flatten(loader.read_placed(path)) if path.exists() else self.settings
        except UserError as error:
            warn(f"warning: {path} cannot be read ({error.problems[0]}); the report goes by {self.folder.parents[1] / 'sweep.json'}")
            return self.settings

    @functools.cached_property
    def summary(self) -> dict:
        return read_json(self.folder / SUMMARY)

    def check_files(self) -> None:
        """A warning for each file that is not what the summary was made of, and for a run that is another one than sweep.json says."""
        stated = self.summary.get("files") if self.status == "done" else None
        for name, sha256 in stated.items() if isinstance(stated, dict) else ():
            path = self.folder / name
            if not path.is_file() or sha256_file(path) != sha256:
                warn(f"warning: {path} is not what {SUMMARY} was made of; what the report shows of it may be wrong")
        with contextlib.suppress(UserError):
            if self.stated and run_of(self.folder)["settings"] != self.stated:
                warn(f"warning: {self.folder} is another run than sweep.json says; what the report shows of it may be wrong")

    @functools.cached_property
    def records(self) -> list[dict]:
        """metrics.jsonl; what is damaged in it is left out, with a warning."""
        return read_metrics(self.folder, warn) if (self.folder / "metrics.jsonl").is_file() else []

    @property
    def settings(self) -> dict:
        """By dotted path what the arm's recipe was to be: the sweep's base with the arm's changes."""
        return changed(self.base, self.changes)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The teachers that the student learns from: each one's model, or the teacher cache or server of one that names no model."""
        inside = ("loss.features.", "loss.attention.")  # by these it learns from a teacher without a kd_ratio too
        if not (self.recipe.get("loss.kd_ratio") or any(key.startswith(inside) for key in self.recipe)):
            return ()
        several = self.recipe.get("teacher")
        each = [flatten({"teacher": one}) for one in several] if isinstance(several, list) else [self.recipe]
        names = ("teacher.model", "teacher.cache.path", "teacher.server")
        return tuple(str(found[0]) for one in each if (found := [one[name] for name in names if one.get(name)]))

    @property
    def distils(self) -> bool:
        return bool(self.teachers)

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a training term."""
        return _points((r["step"], r.get(name)) for r in self.records if "loss" in r)

    def held_out(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a metric of the held-out rows."""
        return _points((r["step"], r["validation"].get(name)) for r in self.records if "validation" in r)


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed: what is compared."""

    name: str
    number: int
    runs: list[Run]

    @property
    def distils(self) -> bool:
        return self.runs[0].distils

    @property
    def settings(self) -> dict:
        return self.runs[0].settings

    def setting(self, path: str):
        """The arm's value of a setting, by its dotted path."""
        return self.settings.get(path)

    @property
    def done(self) -> list[Run]:
        return [run for run in self.runs if run.status == "done"]

    @property
    def changes(self) -> dict:
        """Differences to the base recipe by dotted path, down to single settings."""
        return flatten(self.runs[0].changes)


@dataclass(frozen=True)
class SweepFolder:
    path: Path
    data: dict
    base: dict
    arms: dict[str, Arm]
    baseline: str

    @property
    def runs(self) -> list[Run]:
        return [run for arm in self.arms.values() for run in arm.runs]


def read_sweep(folder: Path) -> SweepFolder:
    path = folder / "sweep.json"
    if not path.exists():
        found = "holds no sweep.json" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {found}; name the output_dir of a sweep that llmkd sweep has run")
    try:
        data = read_run_file(path, REBUILD)
        base = flatten(data.get("base") or {})
        arms: dict[str, list[Run]] = {}
        for name, arm in data["arms"].items():
            known = (
                arm["arm"],
                arm["seed"],
                folder / arm["folder"],
                arm["changes"],
                arm["status"],
                arm.get("reason"),
                arm.get("seconds") or 0.0,
            )
            arms.setdefault(arm["arm"], []).append(Run(name, *known, base, arm.get("run")))
        named = {name: Arm(name, number, runs) for number, (name, runs) in enumerate(arms.items())}
        baseline = data.get("baseline") or next(iter(named))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"{path}: is not a sweep's state ({type(error).__name__}: {error}); {REBUILD}") from None
    sweep = SweepFolder(folder, data, base, named, baseline)
    for run in sweep.runs:
        run.check_files()
    return sweep


def changed(base: dict, changes: dict) -> dict:
    """The base with some settings changed; a section that is given whole, or set to null, replaces what was below it."""
    out = dict(base)
    for path in changes:
        out = {key: value for key, value in out.items() if key != path and not key.startswith(f"{path}.")}
    return out | flatten(changes)


def read_json(path: Path) -> dict:
    """{} for what is missing, and with a warning for what is damaged: a report says what it has."""
    if path.exists():
        try:
            return read_run_file(path, "the report leaves it out")
        except UserError as error:
            warn(f"warning: {error}")
    return {}


def _points(pairs) -> list[tuple[float, float]]:
    return [(float(step), float(value)) for step, value in pairs if isinstance(value, int | float) and math.isfinite(value)]
