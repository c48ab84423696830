"""A pipeline (a file with stages:): runs its recipes in order, then compares their students on the same held-out rows."""

import dataclasses
import json
from pathlib import Path

from ..config.fields import as_tuple
from ..config.loader import load_pipeline, load_recipe
from ..config.make import Make, MakeSettings
from ..config.paths import place_changes
from ..config.recipe import Recipe
from ..config.sweep import Pipeline
from ..config.views import views_of
from ..console import info, progress_bar, table
from ..errors import UserError, resumable
from ..files import write_atomic
from ..model_folder.files import student_folder
from ..training.environment import check_environment
from ..training.launch import start
from ..training.prepare import Prepared, prepare
from ..training.run import run
from .cache import cache
from .cache_selection import check_stage_caches, refuse_without_cache
from .make import make_of_stage, overrides_of, run_make
from .roll_stage import refuse_unrollable, roll_stage


def run_pipeline(config: str, overrides: dict, resume: bool) -> dict:
    """Run every stage (with `resume`, those that are not finished), compare the students, and return their metrics by stage."""
    overrides = dict(overrides)
    pipeline = load_pipeline(config, overrides.pop("output_dir", None))
    check_environment()
    recipes, makes = stage_recipes(pipeline, Path(config), overrides), stage_makes(pipeline, Path(config), overrides)
    folder = Path(pipeline.output_dir)
    if (folder / "summary.json").exists() and not resume:
        raise UserError(f"output_dir: {folder} holds a finished pipeline; choose another folder by --output_dir, or remove it")
    for number, name in enumerate(pipeline.stages, 1):
        info(f"\n[{number}/{len(pipeline.stages)}] {name}")
        stage = pipeline.stages[name]
        if stage.recipe:
            run(recipes[name], resume)
            continue
        with resumable(name):
            if stage.make:
                run_make(makes[name])
            elif stage.roll:
                roll_stage(recipes[name])
            else:
                cache(recipes[name])
    held_out = ", ".join(source.path for source in as_tuple(recipes[pipeline.students[0]].data.validation))
    info(f"\ncomparing on {held_out}")
    results = compare(pipeline, recipes)
    accelerator = start()
    if accelerator.is_main_process:
        write_atomic(folder / "summary.json", json.dumps(results, indent=1))
        print("\n" + table([{"": name} | metrics for name, metrics in results.items()]))
        print(f"{folder / 'summary.json'}")
    return results


def stage_recipes(pipeline: Pipeline, config: Path, overrides: dict, check_inputs: bool = True) -> dict[str, Recipe]:
    """The recipe of every stage that trains or writes caches or answers, all checked before the first one runs.

    check_inputs   refuse paths that do not exist, other than those that an earlier stage writes
    """
    recipes, problems = {}, []
    if any(stage.make for stage in pipeline.stages.values()):
        overrides = {key: value for key, value in overrides.items() if key not in overrides_of(Make, overrides)} | overrides_of(
            Recipe, overrides
        )
    for name, stage in pipeline.stages.items():
        if stage.make:
            continue
        try:
            changes = place_changes(stage.set, str(config.parent), pipeline.output_dir)
            changes |= overrides | {"output_dir": f"{pipeline.output_dir}/{name}"}
            recipes[name] = load_recipe(
                stage.recipe or stage.cache or stage.roll, changes, check_inputs=check_inputs, written_later=pipeline.output_dir
            )
            if stage.cache:
                refuse_without_cache(recipes[name])
            elif stage.roll:
                refuse_unrollable(recipes[name])
            else:
                check_stage_caches(recipes[name], {before: recipe for before, recipe in recipes.items() if pipeline.stages[before].cache})
        except UserError as error:
            problems += [f"stage {name}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    if other := next((name for name in pipeline.students if views_of(as_tuple(recipes[name].teacher))), None):
        raise UserError(
            f"{config}: students: the teacher of {other} reads another column (teacher.reads), and a pipeline measures the teacher on what its students "
            "read; compare by llmkd sweep, whose teacher may be a stage"
        )
    uploads = [recipe.push_to_hub.repo for recipe in recipes.values() if recipe.push_to_hub]
    if len(set(uploads)) < len(uploads):
        raise UserError(f"{config}: push_to_hub.repo: several stages would upload to {uploads[0]}; set it for one of them in its set:")
    if not as_tuple(recipes[pipeline.students[0]].data.validation):
        raise UserError(
            f"{config}: students: {pipeline.students[0]} has no data.validation, on which the students are to be compared; give one"
        )
    return recipes


def stage_makes(pipeline: Pipeline, config: Path, overrides: dict) -> dict[str, MakeSettings]:
    """The settings of every `make:` stage, checked before the first stage runs."""
    makes, problems, own = {}, [], overrides_of(Make, overrides)
    for name, stage in pipeline.stages.items():
        if not stage.make:
            continue
        try:
            makes[name] = make_of_stage(stage, config, pipeline.output_dir, f"{pipeline.output_dir}/{name}", own, True)
        except UserError as error:
            problems += [f"stage {name}: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return makes


def compare(pipeline: Pipeline, recipes: dict[str, Recipe]) -> dict[str, dict[str, float]]:
    """Metrics of the teacher and the students on the first student's held-out rows and questions."""
    from ..models.load import LoadContext, load_teacher
    from ..models.saved_student import as_trained
    from ..teachers.live import LiveTeacher
    from ..training.validate import Evaluator

    first = recipes[pipeline.students[0]]
    prepared = prepare(first)
    accelerator = start()
    evaluator = Evaluator(
        accelerator, first.validation.micro_batch_size, measures=prepared.task.measures(prepared.processor, first.validation)
    )

    def load(stage: str):
        settings = dataclasses.replace(as_trained(student_folder(recipes[stage].output_dir)), attention=recipes[stage].student.attention)
        return load_teacher(settings, LoadContext(prepared.vocab, accelerator.device, kind=prepared.kind))

    teacher = load(pipeline.teacher)
    names = {pipeline.teacher: teacher} | {name: None for name in pipeline.students}
    return {name: measure(model or load(name), LiveTeacher(teacher), prepared, evaluator) for name, model in names.items()}


def measure(model, teacher, prepared: Prepared, evaluator) -> dict[str, float]:
    """ce and kl_to_teacher (the forward KL), both in nats, top1_agreement and the task's own metrics; with questions also accuracy and its
    standard error."""
    metrics = evaluator.validate([model], teacher, prepared.validation, progress_bar("validation"))[0].metrics()
    out = {"ce": metrics["ce"], "kl_to_teacher": metrics["forward_kl"], "top1_agreement": metrics["top1_agreement"]}
    out |= {name: metrics[name] for name in evaluator.measures.shown}
    if prepared.questions:
        scored = evaluator.accuracy(model, prepared.questions, progress_bar("questions"))
        out |= {k: scored[k] for k in ("accuracy", "accuracy_stderr")}
    return out
