"""The state of a sweep, kept in sweep.json: every arm's status, the groups that train together, times and estimates."""

import contextlib
import dataclasses
import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path

from .. import __version__
from ..config.dotted import flatten
from ..config.fields import as_tuple
from ..config.recipe import Recipe, distils
from ..config.sweep import ArmSpec, Sweep
from ..console import count, first_process, info
from ..errors import UserError
from ..files import is_leftover, remove_leftovers, write_sealed
from ..output.run_files import read_run_file, run_of
from ..output.run_folder import lock_folder

#: What to do about a damaged sweep.json.
REBUILD = "delete it and run the sweep again with --resume, which keeps the finished arms"
STATES = ("waiting", "done", "failed")
#: The file that shows in a run's folder that it ended with this status.
ENDS = {"done": "summary.json", "failed": "nonfinite.json"}


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _asks(recipe: Recipe) -> bool:
    """Whether the student learns from a teacher that is not read from a cache."""
    return distils(recipe) and not all(teacher.cache for teacher in as_tuple(recipe.teacher))


@dataclasses.dataclass
class Group:
    """Arms that train together, or one arm, and why it trains alone."""

    arms: list[str]
    why: str | None = None


class SweepState:
    """`sweep.json`: every arm with its status and cost. Rank 0 rewrites the whole file at each change."""

    def __init__(self, folder: Path, sweep: Sweep, specs: dict[str, ArmSpec], resume: bool):
        self.folder, self.path = folder, folder / "sweep.json"
        arms = {
            spec.name: {
                "arm": spec.arm,
                "seed": spec.seed,
                "folder": f"arms/{spec.name}",
                "changes": {k: v for k, v in spec.changes.items() if k != "seed"},
                "status": "waiting",
                "reason": None,
                "seconds": 0.0,
                "group": None,
            }
            for spec in specs.values()
        }
        first = next(iter(specs.values())).arm
        self.data = {"llmkd": __version__, "baseline": sweep.baseline or first, "base": {}, "stages": {}, "groups": [], "arms": arms}
        if self.path.exists():
            if not resume:
                raise UserError(f"output_dir: {folder} holds a sweep; continue it with --resume, or choose another folder by --output_dir")
            self._restore(arms)
        elif folder.is_dir() and any(p.name not in (".lock", "stages") and not is_leftover(p) for p in folder.iterdir()):
            if not (resume and (folder / "arms").is_dir()):
                raise UserError(f"output_dir: {folder} is not empty and holds no sweep; choose another folder")
            info(f"note: {self.path} is missing, and is made anew: finished arms are kept, and what they have cost is not known any more")
        for arm in arms.values() if resume else ():  # a kill may have come before its end was recorded, or sweep.json is lost
            self._look_for_end(arm)

    def _restore(self, arms: dict[str, dict]) -> None:
        """Restore the state of an earlier attempt. UserError if it is damaged."""
        before = read_run_file(self.path, REBUILD)
        try:
            kept = {name: before["arms"][name] for name in arms if name in before["arms"]}
            whole = all(arm["status"] in STATES and {"seconds", "group", "folder"} <= arm.keys() for arm in kept.values())
            whole &= all({"arms", "seconds"} <= group.keys() for group in before["groups"]) and isinstance(before["stages"], dict)
        except (KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise UserError(f"{self.path}: is not a sweep's state; {REBUILD}")
        settled = {name: arm for name, arm in kept.items() if arm["status"] == "done" or arm.get("final")}
        gone = [name for name, arm in settled.items() if not (self.folder / arm["folder"] / ENDS[arm["status"]]).exists()]
        if gone:
            info(f"note: what {count(len(gone), 'arm')} had left in {self.folder / 'arms'} is gone: {_some(gone)}; trained again")
        arms |= {name: arm for name, arm in kept.items() if name not in gone}
        self.data |= {"stages": before["stages"], "groups": before["groups"]}
        self._take_out({name for group in before["groups"] for name in group["arms"]} - arms.keys())  # arms no longer in the sweep's file

    def _look_for_end(self, arm: dict) -> None:
        """Set the status of a waiting arm from the files of its run, if that has ended."""
        run = self.folder / arm["folder"]
        if arm["status"] != "waiting":
            return
        if (run / ENDS["done"]).exists():
            arm |= {"status": "done", "reason": None, "run": self._run(arm)}
        elif (run / ENDS["failed"]).exists():
            found = read_run_file(run / ENDS["failed"], "delete it and run the sweep again with --resume, which trains that arm further")
            arm |= {"status": "failed", "final": True, "reason": f"step {found.get('step')}: {found.get('term')} is not finite"}

    def _run(self, arm: dict) -> str | None:
        """The hash of the settings of an arm's run, by which a sweep.json of another sweep is recognised."""
        with contextlib.suppress(UserError):
            return run_of(self.folder / arm["folder"])["settings"]

    def lock(self):
        """A context manager that locks the sweep's folder. Also records date, machine and versions."""
        if not first_process():
            return contextlib.nullcontext()
        held = lock_folder(self.folder)
        remove_leftovers(self.folder)
        self.data |= {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        }
        self._write()
        return held

    def is_waiting(self, name: str) -> bool:
        """Whether an arm still has to be trained. A failure may have been fixed since, except a non-finite value, which would recur."""
        arm = self.data["arms"][name]
        return arm["status"] == "waiting" or (arm["status"] == "failed" and not arm.get("final"))

    def record_stage(self, name: str, seconds: float) -> None:
        known = self.data["stages"].setdefault(name, {"folder": f"stages/{name}", "seconds": 0.0})
        known["seconds"] = round(known["seconds"] + seconds, 1)
        self._write()

    def record_base(self, recipe: Recipe) -> None:
        self.data["base"] = json.loads(json.dumps(flatten(recipe), default=dataclasses.asdict))
        self._write()

    def record_plan(self, groups: list[Group], recipes: dict[str, Recipe]) -> None:
        """Print which arms train together and the estimated cost, and record it."""
        from .cost import Cost, estimate

        if not groups:
            info("every arm is done")
            return
        sizes: dict = {}
        costs = [estimate([recipes[name] for name in group.arms], sizes) for group in groups]
        spent = self._take_out({name for group in groups for name in group.arms})
        for group, cost in zip(groups, costs, strict=True):
            alone = f"arm {group.arms[0]} alone ({group.why})"
            how = alone if len(group.arms) == 1 else f"{len(group.arms)} arms side by side ({_some(group.arms)})"
            info(f"{how}: {cost}" if cost else how)
            entry = {"arms": group.arms, "shared": len(group.arms) > 1, "why": group.why}
            entry["seconds"] = round(sum(spent.get(name, 0.0) for name in group.arms), 1)
            entry["estimate"] = dataclasses.asdict(cost) if cost else None
            for name in group.arms:
                self.data["arms"][name] |= {"group": len(self.data["groups"]), "status": "waiting", "reason": None}
            self.data["groups"].append(entry)
        if all(costs):
            total = Cost(sum(c.seconds for c in costs), max(c.bytes for c in costs))
            passes = sum(any(_asks(recipes[name]) for name in group.arms) for group in groups)
            apart = sum(_asks(recipes[name]) for group in groups for name in group.arms)
            saved = f"; {count(passes, 'pass', 'passes')} of the teacher over the data" if passes else ""
            saved += f" ({apart} if every arm trained alone)" if passes < apart else ""
            info(f"in all {total} (estimates) for {count(sum(len(g.arms) for g in groups), 'arm')}{saved}")
        self._write()

    def _take_out(self, waiting: set[str]) -> dict[str, float]:
        """Remove arms that will be trained from the groups of earlier attempts. Returns the seconds each has cost already."""
        spent, groups = {}, []
        for group in self.data["groups"]:
            share = group["seconds"] / len(group["arms"])
            spent |= {name: spent.get(name, 0.0) + share for name in group["arms"] if name in waiting}
            kept = [name for name in group["arms"] if name not in waiting]
            if kept:
                for name in kept:
                    self.data["arms"][name]["group"] = len(groups)
                groups.append(group | {"arms": kept, "seconds": round(share * len(kept), 1)})
        self.data["groups"] = groups
        return spent

    def record_group(self, group: Group, ends: dict[str, tuple[str | None, bool]], seconds: float) -> None:
        """Record a group's results. `ends`: of each arm, why it failed or None, and whether it would fail again. Other arms stay waiting."""
        for name, (reason, last) in ends.items():
            arm = self.data["arms"][name]
            arm |= {"status": "failed" if reason else "done", "reason": reason, "final": last, "run": self._run(arm)}
        for name in group.arms:
            self.data["arms"][name]["seconds"] = round(self.data["arms"][name]["seconds"] + seconds / len(group.arms), 1)
        entry = self.data["groups"][self.data["arms"][group.arms[0]]["group"]]
        entry["seconds"] = round(entry["seconds"] + seconds, 1)
        self._write()

    def _write(self) -> None:
        if first_process():
            write_sealed(self.path, self.data)
