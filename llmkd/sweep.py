"""A sweep: arms of one recipe, trained side by side before one teacher where they can be, each as it would be alone.

Arms that see the same data in the same order and start from one base share every batch and the teacher's answer to it. The
others run one after another. A sweep that was stopped or killed goes on with --resume: finished arms are left as they are.
"""

import dataclasses
import datetime
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

from . import __version__, hub, trackers
from .console import first_process, say
from .errors import NonFinite, Stopped, UserError
from .model_files import ModelFiles, read_json
from .prepare import student_files
from .recipe import Recipe
from .recipe_study import ArmSpec, Sweep, expand
from .run_folder import RunFolder, lock, write
from .settings import flatten, load_recipe, load_sweep
from .stopping import StopRequest
from .training import run, start, train_together


@dataclasses.dataclass
class Group:
    """Arms that train together, or one alone and why."""

    arms: list[str]
    why: str | None = None


def run_sweep(config: str, overrides: dict, resume: bool) -> Path:
    """Train what is not trained yet, and give the sweep's folder. Raises Stopped when a signal came."""
    sweep = load_sweep(config, overrides)
    folder = Path(sweep.output_dir).expanduser()
    specs = {spec.name: spec for spec in expand(sweep)}
    load = Arms(sweep, Path(config), specs)
    load.recipes()  # every problem before anything runs
    state = State(folder, sweep, specs, resume)
    with StopRequest() as stop:
        start()  # all processes are here before one of them writes
        held = state.claim()
        try:
            for name, recipe in load.stages().items():
                if not RunFolder(recipe, True).finished:
                    say(f"\nstage {name}")
                before = time.monotonic()
                run(recipe, resume, stop)
                state.stage(name, time.monotonic() - before)
            recipes = load.recipes()
            state.base(load.base())
            waiting = {name: recipe for name, recipe in recipes.items() if state.waits(name)}
            groups = grouped(waiting, sweep.side_by_side)
            state.plan(groups, recipes)
            for group in groups:
                train_group(group, {name: recipes[name] for name in group.arms}, state, resume, stop)
        finally:
            held.close()
    return folder


def train_group(group: Group, recipes: dict[str, Recipe], state: "State", resume: bool, stop: StopRequest) -> None:
    """Train a group's arms and keep how each ended. What goes wrong in one group is no reason to leave out the next."""
    say(f"\n{len(group.arms)} of {len(state.data['arms'])} arms: {', '.join(group.arms)}")
    began, folders = time.monotonic(), [RunFolder(recipe, resume) for recipe in recipes.values()]
    try:
        for folder in folders:
            folder.check()
        failures = train_together(list(recipes.values()), folders, stop)
        reasons = [failure and str(failure) for failure in failures]
        final = [isinstance(failure, NonFinite) for failure in failures]
    except Stopped:
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
        if len(group.arms) > 1 and "OutOfMemory" in type(error).__name__:
            reason += "; lower side_by_side, then --resume"
        say(f"given up: {reason}")
        reasons, final = [reason] * len(folders), [False] * len(folders)
    state.ended(group, reasons, final, time.monotonic() - began)


class Arms:
    """The recipes of a sweep's stages and arms."""

    def __init__(self, sweep: Sweep, config: Path, specs: dict[str, ArmSpec]):
        self.sweep, self.config, self.specs = sweep, config, specs

    def recipes(self) -> dict[str, Recipe]:
        """Of every arm, checked; read anew after the stages, since an arm may start from what they leave."""
        out, problems = {}, []
        for stage in self.stages().values():
            hub.check(stage.push_to_hub)
            trackers.check(stage.report_to)
        for name, spec in self.specs.items():
            try:
                out[name] = self._load(spec.changes, f"arms/{name}")
            except UserError as error:
                problems += [f"arm {name}: {problem}" for problem in error.problems]
        if problems:
            raise UserError(*dict.fromkeys(problems))
        trackers.check(next(iter(out.values())).report_to)
        return out

    def stages(self) -> dict[str, Recipe]:
        out, problems = {}, []
        for name, stage in self.sweep.stages.items():
            changes = self._placed(stage.set) | {"output_dir": f"{self.sweep.output_dir}/stages/{name}"}
            try:
                out[name] = load_recipe(self.config.parent / stage.recipe, changes)
            except UserError as error:
                problems += [f"stage {name}: {problem}" for problem in error.problems]
        if problems:
            raise UserError(*problems)
        return out

    def base(self) -> Recipe:
        """What the arms are changes of."""
        try:
            return self._load({}, "")
        except UserError:  # the arms may mend it
            return self._load(next(iter(self.specs.values())).changes, "")

    def _load(self, changes: dict, where: str) -> Recipe:
        changes = self._placed(self.sweep.set | changes) | {"output_dir": f"{self.sweep.output_dir}/{where}".rstrip("/")}
        return load_recipe(self.config.parent / self.sweep.recipe, changes)

    def _placed(self, changes: dict) -> dict:
        """`{output_dir}` in a setting is the sweep's folder."""
        return {k: v.replace("{output_dir}", self.sweep.output_dir) if isinstance(v, str) else v for k, v in changes.items()}


def grouped(recipes: dict[str, Recipe], side_by_side: int | None = None) -> list[Group]:
    """Which arms train together. An arm without a teacher joins others that have one: it sees the same data."""
    groups: dict[str, Group] = {}
    alone, known = [], {}
    for name, recipe in sorted(recipes.items(), key=lambda item: not distils(item[1])):  # stable, those with a teacher first
        named = (recipe.student.model, recipe.student.revision, recipe.student.base)
        if named not in known:
            known[named] = student_files(recipe)
        why = alone_because(recipe, known[named])
        if why or side_by_side == 1:
            alone.append(Group([name], why or "side_by_side: 1"))
            continue
        key = shared_part(recipe, known[named])
        if not distils(recipe):
            key = next((other for other in groups if other.partition("\n")[2] == key.partition("\n")[2]), key)
        groups.setdefault(key, Group([])).arms.append(name)
    out = []
    for group in groups.values():
        many = side_by_side or len(group.arms)
        for part in _alike(group.arms, recipes):
            out += [Group(part[i : i + many]) for i in range(0, len(part), many)]
    return [Group(g.arms, g.why or (None if len(g.arms) > 1 else "no other arm shares its data, teacher and base")) for g in out + alone]


def distils(recipe: Recipe) -> bool:
    return recipe.teacher is not None and recipe.loss.kd_ratio > 0


def alone_because(recipe: Recipe, files: ModelFiles | None) -> str | None:
    if recipe.student.method == "full":
        return "full fine-tuning trains a base of its own"
    config = read_json(files.adapter / "adapter_config.json", "student.model") if files.adapter else {}
    if config.get("modules_to_save") or (recipe.student.lora and recipe.student.lora.modules_to_save):
        return "modules_to_save changes the base for all"
    if config.get("bias", "none") != "none":
        return "its adapter trains biases of the base"
    others = [name for name in recipe.report_to if name != "tensorboard"]
    return f"{others[0]} follows one run at a time" if others else None


def shared_part(recipe: Recipe, files: ModelFiles) -> str:
    """What arms must have in common: the teacher in the first line, all else but loss, optimizer and adapter in the second."""
    rest = dataclasses.asdict(recipe) | {name: None for name in ("output_dir", "teacher", "loss", "optim")}
    rest["student"] |= {"model": str(files.base.resolve()), "revision": None, "base": None, "lora": None}
    return json.dumps(dataclasses.asdict(recipe)["teacher"] if distils(recipe) else None) + "\n" + json.dumps(rest)


def _alike(names: list[str], recipes: dict[str, Recipe]) -> list[list[str]]:
    """Arms that have checkpoints apart from those that have none: they could not go on from one step."""
    begun = [n for n in names if any(RunFolder(recipes[n], True).checkpoints.glob("step-*"))]
    return [part for part in (begun, [n for n in names if n not in begun]) if part]


class State:
    """`sweep.json`: the arms, how each stands, and what it cost. Written by the first process, whole each time."""

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
        if not self.path.exists():
            if folder.is_dir() and any(p.name not in (".lock", "stages") for p in folder.iterdir()):
                raise UserError(f"output_dir: {folder} is not empty and holds no sweep; choose another folder")
            return
        if not resume:
            raise UserError(f"output_dir: {folder} holds a sweep; go on with it by --resume, or choose another folder by --output_dir")
        before = json.loads(self.path.read_text())
        old, new = ({name: arm["changes"] for name, arm in data["arms"].items()} for data in (before, json.loads(json.dumps(self.data))))
        differs = [name for name in old if name in new and old[name] != new[name]]
        if differs:
            raise UserError(
                f"arm {differs[0]}: {old[differs[0]]} in the sweep that is to be resumed and {new[differs[0]]} now; give it as it was, or another name"
            )
        kept = {name: before["arms"][name] for name in arms if name in before["arms"]}
        self.data |= {"stages": before["stages"], "groups": before["groups"], "arms": arms | kept}

    def claim(self):
        """The folder, for one sweep at a time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not first_process():
            return open("/dev/null")
        held = lock(self.folder)
        self.data |= {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        }
        self._write()
        return held

    def waits(self, name: str) -> bool:
        """Whether an arm is still to be trained. One that met infinities would meet them again; other failures can be mended."""
        arm = self.data["arms"][name]
        return arm["status"] == "waiting" or (arm["status"] == "failed" and not arm.get("final"))

    def stage(self, name: str, seconds: float) -> None:
        known = self.data["stages"].setdefault(name, {"folder": f"stages/{name}", "seconds": 0.0})
        known["seconds"] = round(known["seconds"] + seconds, 1)
        self._write()

    def base(self, recipe: Recipe) -> None:
        self.data["base"] = json.loads(json.dumps(flatten(recipe), default=dataclasses.asdict))

    def plan(self, groups: list[Group], recipes: dict[str, Recipe]) -> None:
        """Say what will be done and what it costs, and keep it."""
        from .cost import Cost, estimate

        if not groups:
            say("every arm is done")
            return
        sizes: dict = {}
        costs = [estimate([recipes[name] for name in group.arms], sizes) for group in groups]
        for group, cost in zip(groups, costs, strict=True):
            how = f"{len(group.arms)} arms side by side" if len(group.arms) > 1 else f"1 arm alone ({group.why})"
            say(f"{how}: {cost}" if cost else how)
            entry = {"arms": group.arms, "shared": len(group.arms) > 1, "why": group.why, "seconds": 0.0}
            entry["estimate"] = dataclasses.asdict(cost) if cost else None
            for name in group.arms:
                self.data["arms"][name] |= {"group": len(self.data["groups"]), "status": "waiting", "reason": None}
            self.data["groups"].append(entry)
        if all(costs):
            total = Cost(sum(c.seconds for c in costs), max(c.bytes for c in costs))
            taught = sum(any(distils(recipes[name]) for name in group.arms) for group in groups)
            alone = sum(distils(recipes[name]) for group in groups for name in group.arms)
            say(f"in all {total} (estimates) for {sum(len(g.arms) for g in groups)} arms; {taught} passes of a teacher instead of {alone}")
        self._write()

    def ended(self, group: Group, reasons: list[str | None], final: list[bool], seconds: float) -> None:
        for name, reason, last in zip(group.arms, reasons, final, strict=True):
            arm = self.data["arms"][name]
            arm |= {"status": "failed" if reason else "done", "reason": reason, "final": last}
            arm["seconds"] = round(arm["seconds"] + seconds / len(group.arms), 1)
        self.data["groups"][self.data["arms"][group.arms[0]]["group"]]["seconds"] += round(seconds, 1)
        self._write()

    def _write(self) -> None:
        if first_process():
            write(self.path, json.dumps(self.data, indent=1))
