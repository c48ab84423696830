"""The runs that `llmkd plan` plans: a recipe's own, the stages of a pipeline or a sweep, and the groups of a sweep's arms that train together."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.loader import file_kind, load_pipeline, load_recipe, load_sweep
from ..config.recipe import Recipe, Student
from ..config.sweep import Pipeline, Sweep, expand
from ..model_folder.files import ModelFiles
from ..planning.find import Found, find
from ..planning.model_configs import Coming, student_config
from ..planning.plan import Plan, plan
from ..planning.work import Made
from .pipeline import stage_recipes
from .sweep import SweepRecipes, group_arms


@dataclass(frozen=True)
class Runs:
    """Students that train together with one teacher, or teachers whose caches are written.

    name      of the runs, for people
    arms      names of the sweep's arms; empty for other runs
    recipes   returns the recipe of each student with some settings changed, {dotted path: value}; UserError if that is refused
    """

    name: str
    arms: list[str]
    recipes: Callable[[dict[str, Any]], list[Recipe]]
    found: Found
    stage: str = ""  # the name of the stage of a pipeline or a sweep; "" for arms, and for a single recipe
    caches: bool = False  # whether teacher caches are written, and nothing is trained

    def plan(self, memory: float | None, gpu: bool, change: dict[str, Any] | None = None, processes: int = 1) -> Plan:
        """The plan with some settings changed. If `students_per_teacher` splits the group, its first part is planned, which holds the arms that
        distil first."""
        settings = dict(change or {})
        most = settings.pop("students_per_teacher", None) or max(1, len(self.arms))
        parts = max(1, -(-len(self.arms) // most))
        recipes = self.recipes(settings)[::parts]
        found = dataclasses.replace(self.found.with_teachers(recipes[0]), students=self.found.students[::parts])
        return plan(recipes, found, memory, gpu, processes)


@dataclass(frozen=True)
class Planned:
    """All runs of a file, in the order in which they run.

    kind   of the file: recipe, pipeline or sweep
    made   {name: make or roll} of its stages that write rows, which are not planned
    """

    kind: str
    runs: list[Runs]
    made: dict[str, str]


def runs_of(config: str, overrides: dict[str, Any]) -> Planned:
    """The runs of a recipe, a pipeline or a sweep. UserError for a file that cannot be planned."""
    kind = file_kind(config)
    if kind in ("pipeline", "sweep"):
        return _of_stages(config, overrides, kind)
    load = lambda change: [load_recipe(config, overrides | change)]  # noqa: E731
    return Planned("recipe", [Runs(config, [], load, find(load({}), Path(config).parent))], {})


def _of_stages(config: str, overrides: dict[str, Any], kind: str) -> Planned:
    """The stages of a pipeline or a sweep, and each group of arms that a sweep would train together."""
    where = Path(config)
    if kind == "sweep":
        whole, others = load_sweep(config, overrides), {}
        folder = Path(whole.output_dir, "stages")
    else:
        others = dict(overrides)
        whole = load_pipeline(config, others.pop("output_dir", None))
        folder = Path(whole.output_dir)

    def staged(change: dict[str, Any]) -> dict[str, Recipe]:
        stages = {
            name: stage if stage.writes_rows else dataclasses.replace(stage, set=stage.set | change) for name, stage in whole.stages.items()
        }
        changed = dataclasses.replace(whole, stages=stages)
        if isinstance(changed, Pipeline):
            return stage_recipes(changed, where, others, check_inputs=False)
        load = SweepRecipes(changed, where, {})
        load.rolled()  # its mistakes, since it is not planned
        return load.stages() | load.caches()

    recipes = staged({})
    stages = {name: (stage, recipes[name]) for name, stage in whole.stages.items() if not stage.writes_rows}
    coming = {
        Path(os.path.abspath(one.output_dir)): (Path(stage.recipe), one.student, one.data.features)
        for stage, one in stages.values()
        if stage.recipe
    }
    made = {Path(os.path.abspath(folder / name)): name for name, stage in whole.stages.items() if stage.writes_rows}
    out = []
    for name, (stage, recipe) in stages.items():
        load = lambda change, name=name: [staged(change)[name]]  # noqa: E731
        found = find([recipe], Path(stage.recipe or stage.cache).parent, coming, made)
        out.append(Runs(f"{config} [stage {name}]", [], load, found, name, bool(stage.cache)))
    if isinstance(whole, Sweep):
        out += _groups(config, overrides, whole, coming, made)
    return Planned(kind, out, {name: "make" if whole.stages[name].make else "roll" for name in made.values()})


def _groups(config: str, overrides: dict[str, Any], sweep: Sweep, coming: Coming, made: Made) -> list[Runs]:
    """Each group of arms that a sweep would train together."""

    def recipes(change: dict[str, Any]) -> dict[str, Recipe]:
        sweep = load_sweep(config, overrides | change)
        return SweepRecipes(sweep, Path(config), {spec.name: spec for spec in expand(sweep)}).recipes()

    arms, folder, out = recipes({}), Path(sweep.recipe).parent, []
    groups = group_arms(arms, None, sweep.students_per_teacher, lambda student: _files(student, folder, coming))
    for number, group in enumerate(groups, 1):
        load = lambda change, names=tuple(group.arms): [found[name] for found in [recipes(change)] for name in names]  # noqa: E731
        many = f"{len(group.arms)} arms side by side" if len(group.arms) > 1 else "one arm"
        found = find([arms[name] for name in group.arms], folder, coming, made)
        out.append(Runs(f"{config} [{number}/{len(groups)}] {many} ({', '.join(group.arms)})", group.arms, load, found))
    return out


def _files(student: Student, folder: Path, coming: Coming) -> ModelFiles | None:
    """The student's base, whose files need not be here; None for new weights."""
    if student.model is None:
        return None
    found = student_config(student, folder, coming=coming)
    return ModelFiles(Path(found.base), None, found.config)
