"""The runs that a file stands for, as `llmkd plan` takes them: a recipe's one, or the groups of a sweep's arms that train side by side."""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import as_tuple
from ..config.loader import file_kind, load_recipe, load_sweep
from ..config.recipe import Recipe, Student
from ..config.sweep import Sweep, expand
from ..errors import UserError
from ..model_folder.files import ModelFiles
from ..planning.find import Found, find
from ..planning.model_configs import Coming, student_config
from ..planning.plan import Plan, plan
from .sweep import SweepRecipes, group_arms


@dataclass(frozen=True)
class Runs:
    """Students that train side by side before one teacher.

    name      how to call them
    arms      of a sweep
    recipes   of each student, as they are with some settings changed ({dotted path: value}); UserError where these are refused
    """

    name: str
    arms: list[str]
    recipes: Callable[[dict[str, Any]], list[Recipe]]
    found: Found

    def plan(self, memory: float | None, gpu: bool, change: dict[str, Any] | None = None, processes: int = 1) -> Plan:
        """Their plan with some settings changed. Of fewer `students_per_teacher` the first part is planned, in which those that distil come first."""
        settings = dict(change or {})
        most = settings.pop("students_per_teacher", None) or max(1, len(self.arms))
        parts = max(1, -(-len(self.arms) // most))
        recipes = self.recipes(settings)[::parts]
        found = dataclasses.replace(self.found.with_teachers(recipes[0]), students=self.found.students[::parts])
        return plan(recipes, found, memory, gpu, processes)


def runs_of(config: str, overrides: dict[str, Any]) -> list[Runs]:
    """Of a recipe or a sweep. UserError for what cannot be planned."""
    if file_kind(config) == "sweep":
        return _of_sweep(config, overrides)
    folder = Path(config).parent
    load = lambda change: [load_recipe(config, overrides | change)]  # noqa: E731
    return [Runs(config, [], load, find(load({}), folder))]


def _of_sweep(config: str, overrides: dict[str, Any]) -> list[Runs]:
    """Of each group of arms: those that the sweep would train together."""

    def recipes(change: dict[str, Any]) -> dict[str, Recipe]:
        sweep = load_sweep(config, overrides | change)
        return SweepRecipes(sweep, Path(config), {spec.name: spec for spec in expand(sweep)}).recipes()

    sweep, arms = load_sweep(config, overrides), recipes({})
    _refuse_unmade(sweep, arms)
    stages = SweepRecipes(sweep, Path(config), {}).stages()
    coming = {Path(os.path.abspath(one.output_dir)): (Path(sweep.stages[name].recipe), one.student) for name, one in stages.items()}
    folder, out = Path(sweep.recipe).parent, []
    groups = group_arms(arms, None, sweep.students_per_teacher, lambda student: _files(student, folder, coming))
    for number, group in enumerate(groups, 1):
        load = lambda change, names=tuple(group.arms): [found[name] for found in [recipes(change)] for name in names]  # noqa: E731
        many = f"{len(group.arms)} arms side by side" if len(group.arms) > 1 else "one arm"
        found = find([arms[name] for name in group.arms], folder, coming)
        out.append(Runs(f"{config} [{number}/{len(groups)}] {many} ({', '.join(group.arms)})", group.arms, load, found))
    return out


def _refuse_unmade(sweep: Sweep, arms: dict[str, Recipe]) -> None:
    """UserError where an arm trains on data that a stage has not made yet: their lengths are not known."""
    made = {Path(sweep.output_dir, "stages", name): name for name, stage in sweep.stages.items() if stage.make}
    for arm, recipe in arms.items():
        for source in as_tuple(recipe.data.train):
            path = Path(source.path)
            if (stage := made.get(path.parent)) and not path.exists():
                raise UserError(
                    f"arm {arm}: {path} is made by the stage {stage}, which has not run yet; start the sweep, then plan what is left"
                )


def _files(student: Student, folder: Path, coming: Coming) -> ModelFiles | None:
    """Which base it is, whether its files are here or not; None for new weights."""
    if student.model is None:
        return None
    found = student_config(student, folder, coming=coming)
    return ModelFiles(Path(found.base), None, found.config)
