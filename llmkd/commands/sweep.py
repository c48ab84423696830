"""`llmkd sweep`: trains arms, changed copies of one recipe, several at a time with one teacher where possible. Each ends as if trained alone.

Arms with the same data in the same order, the same base and the same teacher share every batch and the teacher's outputs for it. The
others run one after another. `--resume` continues a sweep that was stopped or killed, and keeps the finished arms.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..config.fields import as_tuple
from ..config.loader import load_recipe, load_sweep
from ..config.make import MakeSettings
from ..config.on_policy import writes
from ..config.paths import place_changes
from ..config.recipe import Recipe, Student, distils, used_teachers, uses_teacher
from ..config.sweep import ArmSpec, Stage, Sweep, expand
from ..console import count, info, several_processes
from ..data.encoding.tokenizer import student_tokenizer
from ..errors import Stopped, UserError, attribute_to_student, of_the_machine, resumable
from ..files import is_leftover
from ..model_folder.files import ModelFiles
from ..model_folder.weights import read_json
from ..output import hub_upload, trackers
from ..output.run_folder import RunFolder, refuse_unwritable
from ..process.machine_errors import OUT_OF_MEMORY, is_out_of_memory
from ..teachers.resolve import check_sampled_caches
from ..teachers.served_models import refuse_absent
from ..training.launch import start
from ..training.prepare import signal_use, student_files
from ..training.run import run, train_together
from ..training.shutdown import ShutdownRequest
from .cache import cache
from .cache_selection import check_stage_caches, refuse_without_cache
from .make import make_of_stage, run_make
from .other_tasks import refuse_other_task
from .roll_stage import refuse_unrollable, roll_stage
from .sweep_state import Group, SweepState

T = TypeVar("T")

#: Every arm is measured against the teacher, even those that do not learn from it, unless the sweep's `set` or the arm changes this.
MEASURED = {"validation.compare_to_teacher": True}


def run_sweep(config: str, overrides: dict, resume: bool, then: Callable[[Path], None] = lambda folder: None) -> Path:
    """Run the stages and train the arms that are not finished, then call `then` with the sweep's folder, which is locked meanwhile. Returns
    the folder. Stopped after a signal."""
    sweep = load_sweep(config, overrides)
    folder = Path(sweep.output_dir).expanduser()
    refuse_unwritable(folder, "output_dir")
    specs = {spec.name: spec for spec in expand(sweep)}
    load = SweepRecipes(sweep, Path(config), specs, check_inputs=True)
    recipes = load.recipes()  # every problem before anything runs
    load.makes(), load.caches(), load.rolled()
    check_recipes_unchanged(recipes)
    for recipe in recipes.values() if sweep.eval.tasks else ():
        refuse_other_task(recipe, "eval")
    if sweep.eval.tasks and sweep.eval.chat_template:
        refuse_without_template(recipes)
    state = SweepState(folder, sweep, specs, resume)
    for recipe in (*load.stages().values(), *load.caches().values(), *(recipes[name] for name in recipes if state.is_waiting(name))):
        refuse_absent(used_teachers(recipe), recipe.data)
    with ShutdownRequest() as stop:
        accelerator = start()  # all processes are here before one of them writes
        with state.lock():
            stages, makes, caches, rolled = load.stages(), load.makes(), load.caches(), load.rolled()
            if sweep.stages and not all(RunFolder(recipe, True).finished for recipe in stages.values()):
                info(f"{count(len(sweep.stages), 'stage')} first ({', '.join(sweep.stages)}), then {count(len(specs), 'arm')}")
            for name in sweep.stages:
                if name not in stages or not RunFolder(stages[name], True).finished:
                    info(f"\nstage {name}")
                before = time.monotonic()
                try:
                    if name in stages:
                        run(stages[name], resume, stop)
                    else:
                        with resumable(name):
                            if name in makes:
                                run_make(makes[name], stop=stop)
                            elif name in rolled:
                                roll_stage(rolled[name], stop)
                            else:
                                cache(caches[name], stop=stop)
                finally:
                    state.record_stage(name, time.monotonic() - before)
            recipes = load.recipes()
            state.record_base(load.base())
            groups = group_arms(recipes, [name for name in recipes if state.is_waiting(name)], sweep.students_per_teacher)
            state.record_plan(groups, recipes)
            for number, group in enumerate(groups, 1):
                info(
                    f"\n[{number}/{len(groups)}] {'arm' if len(group.arms) == 1 else f'{len(group.arms)} arms side by side:'} {', '.join(group.arms)}"
                )
                train_group(group, recipes, state, resume, stop)
            accelerator.wait_for_everyone()  # all processes see the files that rank 0 wrote
            then(folder)
    return folder


def check_recipes_unchanged(recipes: dict[str, Recipe]) -> None:
    """UserError if an arm was started with another recipe: the arms of one sweep would not be comparable."""
    problems = []
    for name, recipe in recipes.items():
        folder = RunFolder(recipe, True)
        if (folder.path / "recipe.yaml").exists():
            try:
                folder.check()
            except UserError as error:
                problems += [f"arm {name}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)


def refuse_without_template(recipes: dict[str, Recipe]) -> None:
    """UserError if eval.chat_template is set and a student's tokenizer has no chat template."""
    students = [recipe.student for recipe in recipes.values()]
    for student in {(one.tokenizer, one.model, one.revision, one.base): one for one in students}.values():
        try:
            template = student_tokenizer(student).chat_template
        except UserError:  # a model that a stage has yet to write
            continue
        if not template:
            name = student.tokenizer or student.model
            raise UserError(f"eval.chat_template: found true, and the tokenizer of {name} has no chat template; set it to false")


def train_group(group: Group, recipes: dict[str, Recipe], state: SweepState, resume: bool, stop: ShutdownRequest) -> None:
    """Train a group's arms and record how each ended. An arm that cannot be built is left out, and the others train without it.

    An error in one group does not stop the next, with two exceptions. An error of the machine, such as a full disk, ends the sweep,
    since every group would meet it; running out of memory does not. With several processes, an error that may have been raised on one
    rank only ends it too, since the other ranks would wait forever.
    """
    names, began = list(group.arms), time.monotonic()
    ends: dict[str, tuple[str | None, bool]] = {}
    try:
        while names:
            folders = [RunFolder(recipes[name], resume or bool(ends)) for name in names]  # a first try may have begun them
            try:
                for k, folder in enumerate(folders):
                    with attribute_to_student(k):
                        folder.check()
                failures = train_together([recipes[name] for name in names], folders, stop)
                ends |= {name: (failure and str(failure), failure is not None) for name, failure in zip(names, failures, strict=True)}
                break
            except Stopped:
                raise
            except Exception as error:
                student = getattr(error, "student", None)
                if of_the_machine(error) not in (None, OUT_OF_MEMORY):
                    raise
                if student is None and several_processes():
                    raise
                reason = failure_message(error, len(names))
                lost = names if student is None else [names[student]]
                info(f"given up: {', '.join(lost)}: {reason}")
                ends |= {name: (reason, False) for name in lost}
                names = [name for name in names if name not in lost]
    finally:
        state.record_group(group, ends, time.monotonic() - began)


def failure_message(error: Exception, arms: int) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    reason = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    return reason + ("; lower students_per_teacher, then --resume" if arms > 1 and is_out_of_memory(error) else "")


class SweepRecipes:
    """The recipes of a sweep's stages and arms."""

    def __init__(self, sweep: Sweep, config: Path, specs: dict[str, ArmSpec], check_inputs: bool = False):
        self.sweep, self.config, self.specs, self.check_inputs = sweep, config, specs, check_inputs

    def recipes(self) -> dict[str, Recipe]:
        """The recipe of every arm, checked. Called again after the stages, since an arm may start from their results."""
        out: dict[str, Recipe] = {}
        problems: dict[str, list[str]] = {}  # the arms with each problem
        for stage in self.stages().values():
            hub_upload.check(stage.push_to_hub)
            trackers.check(stage.report_to)
        caches = self.caches()
        for name, spec in self.specs.items():
            try:
                out[name] = self._load(self.sweep.recipe, MEASURED | self.sweep.set | spec.changes, f"arms/{name}")
                check_stage_caches(out[name], caches)
                check_sampled_caches(used_teachers(out[name]), signal_use(out[name]))
            except UserError as error:
                for problem in error.problems:
                    problems.setdefault(problem, []).append(name)
        if problems:
            raise UserError(*(f"arm {names[0]}: {problem}{_in_others(len(names) - 1)}" for problem, names in problems.items()))
        out = lend_teachers(out)
        trackers.check(tuple(dict.fromkeys(name for recipe in out.values() for name in recipe.report_to)))
        return out

    def stages(self) -> dict[str, Recipe]:
        """The recipes of the stages that train."""
        return self._of_stages(lambda name, stage: self._load(stage.recipe, stage.set, f"stages/{name}") if stage.recipe else None)

    def caches(self) -> dict[str, Recipe]:
        """The recipes of the stages that write their teachers' caches."""
        return self._of_stages(lambda name, stage: self._checked(stage.cache, name, stage, refuse_without_cache))

    def rolled(self) -> dict[str, Recipe]:
        """The recipes of the stages that write answers."""
        return self._of_stages(lambda name, stage: self._checked(stage.roll, name, stage, refuse_unrollable))

    def _checked(self, file: str | None, name: str, stage: Stage, refuse: Callable[[Recipe], None]) -> Recipe | None:
        if file is None:
            return None
        recipe = self._load(file, stage.set, f"stages/{name}")
        refuse(recipe)
        return recipe

    def makes(self) -> dict[str, MakeSettings]:
        """The settings of the stages that make data."""
        output_dir = self.sweep.output_dir

        def load(name: str, stage: Stage) -> MakeSettings | None:
            folder = f"{output_dir}/stages/{name}"
            return make_of_stage(stage, self.config, output_dir, folder, {}, self.check_inputs) if stage.make else None

        return self._of_stages(load)

    def _of_stages(self, load: Callable[[str, Stage], T | None]) -> dict[str, T]:
        """`load` of each stage, by name, where that is not None. UserError with the problems of all stages."""
        out, problems = {}, []
        for name, stage in self.sweep.stages.items():
            try:
                out[name] = load(name, stage)
            except UserError as error:
                problems += [f"stage {name}: {problem}" for problem in error.problems]
        if problems:
            raise UserError(*problems)
        return {name: found for name, found in out.items() if found is not None}

    def base(self) -> Recipe:
        """The recipe that the arms are changed copies of."""
        try:
            return self._load(self.sweep.recipe, MEASURED | self.sweep.set, "")
        except UserError:  # the arms may complete it
            return self._load(self.sweep.recipe, MEASURED | self.sweep.set | next(iter(self.specs.values())).changes, "")

    def _load(self, recipe: str, changes: dict, where: str) -> Recipe:
        output_dir = self.sweep.output_dir
        changes = place_changes(changes, str(self.config.parent), output_dir) | {"output_dir": f"{output_dir}/{where}".rstrip("/")}
        return load_recipe(recipe, changes, check_inputs=self.check_inputs and bool(where), written_later=output_dir)


def _in_others(arms: int) -> str:
    return f" (and in {count(arms, 'more arm')})" if arms else ""


def lend_teachers(recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """Give arms without a teacher that of the first arm with the same data that uses one: their students are measured against it too."""
    lenders: dict[str, Recipe] = {}
    for recipe in recipes.values():
        if uses_teacher(recipe):
            lenders.setdefault(data_key(recipe), recipe)
    out = {}
    for name, recipe in recipes.items():
        lender = lenders.get(data_key(recipe)) if recipe.teacher is None else None
        out[name] = dataclasses.replace(recipe, teacher=lender.teacher, mixture=lender.mixture) if lender else recipe
    return out


def group_arms(
    recipes: dict[str, Recipe],
    waiting: list[str] | None = None,
    students_per_teacher: int | None = None,
    files_of: Callable[[Student], ModelFiles | None] = student_files,
) -> list[Group]:
    """Which of the waiting arms train together: those with the same data, base and teacher. In each group arms that distil come first.

    All groups of the first seed come first, so that a sweep that is stopped early has compared all its arms with that seed.

    files_of   finds a student's files
    """
    waiting = list(recipes) if waiting is None else waiting
    together: dict[str, list[str]] = {}
    alone, files = [], {}
    for name in sorted(waiting, key=lambda name: not distils(recipes[name])):  # stable
        recipe = recipes[name]
        named = (recipe.student.model, recipe.student.revision, recipe.student.base, recipe.student.layers)
        try:
            if named not in files:
                files[named] = files_of(recipe.student)
            why = why_alone(recipe, files[named]) or ("students_per_teacher: 1" if students_per_teacher == 1 else None)
        except UserError as error:
            raise UserError(*(f"arm {name}: {problem}" for problem in error.problems)) from error.__cause__
        if why:
            alone.append(Group([name], why))
        else:
            together.setdefault(sharing_key(recipe, files[named]), []).append(name)
    out = []
    for names in together.values():
        for part in _with_common_checkpoint(names, recipes):
            count = -(-len(part) // (students_per_teacher or len(part)))
            out += [Group(part[i::count]) for i in range(count)]  # dealt, so that arms that do not distil are among others that do
    groups = [Group(g.arms, None if len(g.arms) > 1 else "no waiting arm has the same data and base") for g in out] + alone
    seeds = list(dict.fromkeys(recipes[name].seed for name in recipes))
    return sorted(groups, key=lambda group: seeds.index(recipes[group.arms[0]].seed))  # stable


def why_alone(recipe: Recipe, files: ModelFiles | None) -> str | None:
    if recipe.student.method == "full":
        return "full fine-tuning changes the base"
    if writes(recipe.on_policy):
        return "a part of its data is written while it trains"
    if any(one.ema is not None for one in as_tuple(recipe.teacher)):
        return "its teacher is the average of its own weights"
    config = read_json(files.adapter / "adapter_config.json", "student.model") if files.adapter else {}
    if config.get("modules_to_save") or (recipe.student.lora and recipe.student.lora.modules_to_save):
        return "modules_to_save changes the base"
    if config.get("bias", "none") != "none":
        return "its adapter trains biases of the base"
    others = [name for name in recipe.report_to if name != "tensorboard"]
    return f"{others[0]} logs one run at a time" if others else None


def sharing_key(recipe: Recipe, files: ModelFiles) -> str:
    """A text that is equal for arms that can train together: all settings but loss, optimizer and adapter.

    Two settings of the loss are in it, since they change which layers of the teacher are read: which of several teachers hidden states are
    compared with, and attention relations. These read the teacher's last layer at every position instead of at the targets, by matrix
    products of other shapes, which agree with the usual ones up to rounding only.
    """
    rest = dataclasses.asdict(recipe) | {name: None for name in ("output_dir", "loss", "optim")}
    rest["read inside"] = recipe.loss.features and recipe.loss.features.teacher
    rest["relations"] = bool(recipe.loss.attention and recipe.loss.attention.what == "relations")
    rest["student"] |= {"model": str(files.base.resolve()), "revision": None, "base": None, "lora": None}
    return json.dumps(rest)


def data_key(recipe: Recipe) -> str:
    """A text that is equal for arms with the same examples and the same tokenizer."""
    student = recipe.student
    return json.dumps([dataclasses.asdict(recipe.data), student.model, student.revision, student.base, student.tokenizer])


def _with_common_checkpoint(names: list[str], recipes: dict[str, Recipe]) -> list[list[str]]:
    """Split arms into parts that can resume together: those of a part share a checkpoint step, or have no checkpoint."""
    parts: list[tuple[set[str], list[str]]] = []
    for name in names:
        steps = {path.name for path in RunFolder(recipes[name], True).checkpoints.glob("step-*") if not is_leftover(path)}
        for part in parts:
            if (part[0] & steps) or not (part[0] or steps):
                part[0].intersection_update(steps)
                part[1].append(name)
                break
        else:
            parts.append((steps, [name]))
    return [part for _, part in parts]
