"""Builds the parts of a training run for the trainer: models, teacher, batch source, students."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..batch import Batch
from ..config.features import feature_teacher
from ..config.fields import with_setting_names
from ..config.recipe import Data, Mixture, Recipe, Student, Train, divergences_of, uses_teacher
from ..config.recipe import Teacher as TeacherSettings
from ..config.sharding import sharded_teacher
from ..config.terms import AttentionLoss
from ..console import info
from ..data.batch_source import TrainingSource
from ..data.batching import TokenBudget
from ..errors import Stopped, UserError, attribute_to_student, on_main_process, report_from_any_rank
from ..models.average import Average
from ..models.compile import compile_layers, configure_torch_compile
from ..models.load import LoadContext, load_models
from ..models.model import Model
from ..output.run_folder import RunFolder
from ..process import heartbeat
from ..signals import NO_TAPS, Taps, Teacher
from ..teachers.connect import check_served, open_served
from ..teachers.fidelity import measured_transform, sample_teacher_batches
from ..teachers.mixture import combine_teachers
from ..teachers.resolve import TeacherSource, examples_of
from ..teachers.served import ServedTeacher, expect_of
from . import checkpoint
from .attention import enable_attention
from .auto_batch import head_chunk_size
from .build_student import build_student, layer_terms, long_horizon_terms
from .engine import check_engine, find_base, let_it_write
from .features import refuse_small_samples, report_shares, sample_batches, start_features
from .loop import StudentState, unwrap
from .model_watch import ModelWatch
from .own_text import OwnText
from .parallel import Replicated, sharded_models, strategy_of
from .prepare import Prepared, micro_batch_size
from .student_run import StudentRun
from .writing import on_policy_source


@dataclass(frozen=True)
class TrainingSetup:
    """The finished parts of a training run.

    prepared   data, tokenizer and the models' files
    source     the micro-batches of this process
    teacher    None without one; if no student distils, it serves validation only
    students   one, or several that share the teacher; restored from their checkpoints, their folders locked
    fidelity   how far merged or quantised teachers are from the originals, by setting and metric
    done       the steps of the checkpoint that the run resumes from, or 0
    watch      notices changes of the models' files
    own_text   measures an on-policy student's answers to held-out prompts; None where it does not
    together   whether the processes compute every pass together, because a model is sharded
    """

    prepared: Prepared
    source: TrainingSource
    teacher: Teacher | None
    students: tuple[StudentRun, ...]
    fidelity: dict[str, float]
    done: int
    watch: ModelWatch
    own_text: OwnText | None = None
    together: bool = False


def build_setup(
    recipes: list[Recipe], prepared: Prepared, folders: list[RunFolder], accelerator, stop_asked: Callable[[], bool]
) -> TrainingSetup:
    """Load the models and build everything that the trainer needs. It takes whole recipes, and gives each part its sections.

    recipes    one for each student. They may differ only in student.lora, loss and optim, and in the adapter that student.model names on one base
    prepared   made from the first recipe, whose data and teacher all students share, and the others
    folders    one for each recipe

    The order of construction: servers are asked for some examples; models, all at once, since they may share weights; this process's batch
    source; each student's terms, optimizer and schedule, which need the number of steps; the teacher, with the layers that the terms read;
    the locks on the folders, when nothing is left that could be refused; last, the newest checkpoint is loaded.
    """
    heartbeat.at("the loading of its models", patient=True)
    recipes = [dataclasses.replace(one, student=prepared.resolved(one.student)) for one in recipes]
    device, recipe = accelerator.device, recipes[0]
    served = open_served(prepared.teachers, device, prepared.vocab, stop_asked)
    on_main_process(accelerator, functools.partial(check_servers, served.values(), prepared))
    base = on_main_process(accelerator, functools.partial(find_base, recipe.on_policy, prepared.prompts, prepared.vocab))
    live = [(source.setting, source.settings) for source in prepared.teachers if source.needs_model]
    strategy = strategy_of(recipe.train.shard, accelerator)
    models, teacher_models, sharded, watch = _load_all(recipes, prepared, live, strategy, accelerator, stop_asked)
    strategy.hold(models)
    teachers = {setting: model for (setting, _), model in zip(live, teacher_models, strict=True)}
    fidelity = {f"{setting}.{name}": value for setting, model in teachers.items() for name, value in model.fidelity.items()}
    source = prepared.source.for_rank(accelerator.process_index, accelerator.num_processes, device)
    own_text = None
    if prepared.prompts:
        source, own_text = on_policy_source(source, prepared, recipe.on_policy, recipe.mixture, models[0], teacher_models)
    engine = base and let_it_write(source, base, models[0], folders[0].path, prepared.vocab, accelerator, stop_asked)
    if served:
        source.on_built, source.reads_while_training = functools.partial(expect_of, tuple(served.values())), True
    students = _build_students(recipes, prepared, folders, models, teachers, source.total_steps, strategy, accelerator)
    average_students(students, teachers, with_setting_names(recipe.teacher, "teacher"))
    taps = teacher_taps(recipes, [student.state for student in students])
    teacher = open_teacher(prepared.teachers, recipe.mixture, teacher_models, taps, device, served)
    lock_folders(students, accelerator)
    done = checkpoint.agreed(restore(students, source, accelerator.is_main_process), accelerator) if folders[0].resume else 0
    if engine:
        check_engine(engine, source, done, accelerator)
    for k, student in enumerate(students if not done else ()):
        with attribute_to_student(k):
            start_terms(student, teacher, recipe.validation.micro_batch_size, device)
    return TrainingSetup(prepared, source, teacher, tuple(students), fidelity, done, watch, own_text, bool(sharded))


def _load_all(
    recipes: list[Recipe],
    prepared: Prepared,
    live: list[tuple[str, TeacherSettings]],
    strategy: Replicated,
    accelerator,
    stop_asked: Callable[[], bool],
) -> tuple[list[Model], list[Model], dict, ModelWatch]:
    """The students; the teachers of `live`; the meshes of sharded models, by setting; and the watch on the models' files."""
    device, recipe = accelerator.device, recipes[0]
    data, train = recipe.data, recipe.train
    probe = functools.partial(teacher_probe, prepared, recipe.validation.micro_batch_size, device)
    sharded = sharded_models(strategy, {name: sharded_teacher(train, own) for name, own in live}, accelerator)
    context = LoadContext(
        vocab=prepared.vocab,
        device=device,
        seed=recipe.seed,
        packing=data.packing * longest_row(train, data),
        around_transform=functools.partial(measured_transform, probe),
        sharded=sharded,
        kind=prepared.kind,
        find=prepared.files_of,
    )
    student_settings, attention = [one.student for one in recipes], [one.loss.attention for one in recipes]
    try:
        models, teacher_models = load(student_settings, live, context, data.share_prefixes, train.compile, attention)
        with report_from_any_rank():
            return models, teacher_models, sharded, ModelWatch(prepared)
    except UserError:
        if stop_asked():  # a signal to the process group also kills the compiler, which is no error of the recipe
            raise Stopped("stopped by a signal before the first step; the same command starts again") from None
        raise


def _build_students(
    recipes: list[Recipe],
    prepared: Prepared,
    folders: list[RunFolder],
    models: list[Model],
    teachers: dict[str, Model],
    total_steps: int,
    strategy: Replicated,
    accelerator,
) -> list[StudentRun]:
    """Each student with its terms, optimizer and schedule. `teachers`: those in memory, by setting."""
    students, chunk_size = [], head_chunk_size(prepared.vocab, accelerator.device, info)
    for k, (recipe, folder, model) in enumerate(zip(recipes, folders, models, strict=True)):
        with attribute_to_student(k):
            divergences = divergences_of(recipe.loss, recipe.data)
            terms = [
                *layer_terms(recipe, model, teachers),
                *long_horizon_terms(recipe.on_policy, recipe.loss, chunk_size, total_steps, divergences),
            ]
            state = build_student(recipe.loss, recipe.optim, model, total_steps, accelerator, chunk_size, terms, divergences, strategy)
            own = prepared if k == 0 else prepared.for_student(recipe.student, uses_teacher(recipe))
            students.append(StudentRun(recipe, own, folder, model, state, accelerator.is_main_process))
    return students


def average_students(students: list[StudentRun], models: dict[str, Model], teachers: list[tuple[str, TeacherSettings]]) -> None:
    """Let a teacher that is a moving average of its student's weights (`ema`) follow the student, and put it into the checkpoints."""
    for setting, one in teachers:
        if one.ema is not None and setting in models:
            average = Average(students[0].model, models[setting], one.ema)
            average.follow(students[0].state.optimizer)
            students[0].state.more = {f"teacher.{name}": weight for name, weight in average.weights.items()}


def teacher_probe(prepared: Prepared, micro_batch_size: int, device, setting: str) -> list[Batch]:
    """Some of the batches that the teacher of `setting` will see."""
    number = [source.setting for source in prepared.teachers].index(setting)
    return sample_teacher_batches(prepared.train, number, micro_batch_size, device)


def check_servers(served: Iterable[ServedTeacher], prepared: Prepared) -> None:
    """Ask each server about some examples, before anything is loaded. UserError for one that does not serve the expected teacher."""
    for teacher in served:
        check_served(teacher, prepared.train, prepared.validation, prepared.tokenizer)


def open_teacher(
    sources: tuple[TeacherSource, ...],
    mixture: Mixture,
    models: Iterable[Model],
    taps: dict[str, Taps],
    device,
    served: dict[str, ServedTeacher],
) -> Teacher | None:
    """The teacher, or several combined into one, with signals on `device`; None without teachers.

    models   the loaded models of the teachers that need one, in order
    taps     the layers that terms read inside each teacher, by setting
    served   the teachers that servers have, by setting
    """
    found = iter(models)
    opened = [served.get(one.setting) or one.open(device, found, taps.get(one.setting, NO_TAPS)) for one in sources]
    return combine_teachers(opened, [source.settings for source in sources], mixture) if opened else None


def teacher_taps(recipes: Iterable[Recipe], states: Iterable[StudentState]) -> dict[str, Taps]:
    """The layers that the students' terms read inside each teacher, by setting."""
    found: dict[str, Taps] = {}
    for recipe, state in zip(recipes, states, strict=True):
        # loss.attention allows one teacher only
        attended = with_setting_names(recipe.teacher, "teacher")[0][0] if recipe.loss.attention else ""
        if setting := feature_teacher(recipe.loss.features, recipe.teacher) or attended:
            found[setting] = found.get(setting, NO_TAPS) | unwrap(state).teacher_taps
    return found


def start_terms(student: StudentRun, teacher: Teacher | None, micro_batch_size: int, device) -> None:
    """Before the first step: set the maps and scales of `loss.features` from the untouched models."""
    features, prepared = student.recipe.loss.features, student.prepared
    if not features:
        return
    number = [source.setting for source in prepared.teachers].index(feature_teacher(features, student.recipe.teacher))
    term, mine = unwrap(student.state).terms["features"], examples_of(prepared.train, number)
    mine = mine[prepared.train.weight("features")[mine] != 0].tolist()
    samples = sample_batches(prepared.train, mine, term.width, micro_batch_size, device)
    refuse_small_samples(features, term.width, samples)
    student.unexplained = start_features(features, term, student.model, teacher, samples)
    report_shares(features, student.unexplained, sum(batch.num_targets for batch in samples[1]))


def lock_folders(students: list[StudentRun], accelerator) -> None:
    """Let the first process lock the students' folders; if one cannot be locked, every process raises the error."""

    def take() -> list[dict[str, str]]:
        runs = []
        for k, student in enumerate(students):
            with attribute_to_student(k):
                runs.append(student.folder.claim(student.prepared.identity))
        return runs

    accelerator.wait_for_everyone()  # until every process has checked the folders, which locking changes
    for student, run in zip(students, on_main_process(accelerator, take), strict=True):
        student.folder.run = run


def restore(students: list[StudentRun], source: TrainingSource, main: bool) -> int:
    """Load the newest checkpoint that all students have; returns its step, or 0 without one."""
    folders = [student.folder for student in students]
    saved = checkpoint.newest([folder.checkpoints for folder in folders], [folder.run for folder in folders], source.total_steps, info)
    done = saved[0].step if saved else 0
    for k, (student, one) in enumerate(zip(students, saved, strict=False)):
        with attribute_to_student(k):
            student.restore(one)
            try:
                source.restore(one.state)
            except ValueError as error:
                raise UserError(f"{one.path}: {error}; resume with the recipe and the data that wrote it, or start again") from None
    for folder in folders if main and saved else ():
        checkpoint.drop_after(folder.checkpoints, done)
    where = f"resuming after step {done} of {source.total_steps}"
    info(where if saved else f"{folders[0].path} has no checkpoint to resume from; starting at step 1")
    return done


def load(
    students: list[Student],
    teachers: list[tuple[str, TeacherSettings]],
    context: LoadContext,
    share_prefixes: bool,
    compile: bool,
    attention: Sequence[AttentionLoss | None] = (),
) -> tuple[list[Model], list[Model]]:
    """Load the students and the teachers, check them against `data.share_prefixes`, and compile them with `train.compile`.

    teachers    (setting, settings) of each
    attention   `loss.attention` of each student
    """
    if compile:
        configure_torch_compile(context.device)
    learning, found = load_models(students, teachers, context)
    every = [
        *(("student.model", one) for one in learning),
        *((f"{name}.model", one) for (name, _), one in zip(teachers, found, strict=True)),
    ]
    for setting, model in every:
        if share_prefixes and not model.capabilities.packed_attention:
            raise UserError(
                f"data.share_prefixes: {setting} ({model.base_model.config.model_type}) uses its own attention in packed rows, which cannot "
                "share prefixes; set it to false"
            )
    for k, (settings, student) in enumerate(zip(attention, learning, strict=False)):
        if settings:
            with attribute_to_student(k):
                enable_attention(settings, student, found[0], teachers[0][0], context.packing > 0)
    if compile:
        info("compiling the layers of student and teachers, which takes some minutes, or less if they were compiled before")
        for setting, model in every:
            compile_layers(model, setting, context.packing > 0)
    return learning, found


def longest_row(train: Train, data: Data) -> int:
    """The number of tokens that a packed row may hold."""
    size, most = micro_batch_size(train, data.packing), data.max_length
    if isinstance(size, TokenBudget):
        return max(most, min(size.tokens, train.batch_size * most))
    return size * most
