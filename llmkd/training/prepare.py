"""Prepares a run without loading weights: model files, tokenizer, encoded data with its batch source, and checks of teacher caches.

`prepare` takes the whole recipe, since it reads almost every section; the functions that it calls take the sections that they need.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config.features import feature_teacher
from ..config.fields import as_tuple, with_setting_names
from ..config.on_policy import writes
from ..config.recipe import PartLayers, Recipe, Student, Teacher, Train, distils, used_teachers
from ..config.schedule import refuse_long_schedule
from ..config.views import views_of
from ..console import info
from ..data.batch_source import TrainingSource
from ..data.batching import MOST_TOKENS, Batching, TokenBudget
from ..data.dataset import Questions, read_data, refuse_uncounted
from ..data.examples import Examples
from ..data.written import Prompts, held_out_prompts_for, prompts_for, refuse_mix, refuse_replay
from ..errors import UserError, attribute_to_student, for_each_student
from ..model_folder.files import ModelFiles, find
from ..model_folder.identity import identity_of, verify
from ..output.run_files import LAYERS
from ..tasks.registry import task_named
from ..tasks.task import EncodedData, FoundModels, Processor, Task
from ..teachers.resolve import SignalUse, TeacherSource, check_cache, check_coverage, provenance, resolve_teachers, with_answers
from ..teachers.served_models import refuse_absent
from .early_checks import refuse_early
from .layer_pairs import check_features, refuse_attention, refuse_by_outline
from .recipe_checks import check_packages, report_large_micro_batch
from .rolled_data import report_writers
from .teacher_check import refuse_nothing_to_learn

if TYPE_CHECKING:
    from ..models.kinds import ModelKind

MODELS = ("the student", "the teacher")  # prefixes of the models' names in `Prepared.identity`
MEASURED = 64  # training examples on which the influence of the student's layers is measured


@dataclass(frozen=True)
class Prepared:
    """Everything that is read and checked before a model is loaded.

    train               the training examples; of a stream, those of the first step
    places              file and line of each training example
    identity            what `--resume` compares, by name: hashes of data and models, and the layers that are kept
    end_tokens          token ids that end an answer
    student             None for new weights
    configs             the models' configurations, by setting (student.model, teacher.model, ...)
    layers              the layers of the student's base that are kept; None for all
    prompts             prompts of `train` for an on-policy student; else None
    validation_prompts  prompts of `validation` for it; None where it writes nothing there
    """

    task: Task
    processor: Processor
    source: TrainingSource
    train: Examples
    places: Sequence[str]
    validation: Examples | None
    validation_places: Sequence[str]
    questions: Questions | None
    identity: dict[str, str]
    end_tokens: set[int]
    origins: dict[str, list[dict]]
    student: ModelFiles | None
    configs: dict[str, dict]
    teachers: tuple[TeacherSource, ...]
    layers: tuple[int, ...] | None = None
    prompts: Prompts | None = None
    validation_prompts: Prompts | None = None

    @property
    def tokenizer(self) -> object:
        """The tokenizer; for other inputs than text, what reads them in its place."""
        return self.processor.reader

    @property
    def vocab(self) -> int:
        """The size of the vocabulary that the tokenizer and all models share; for a classifier, the number of classes."""
        return self.processor.vocab

    def files_of(self, settings: Student) -> ModelFiles | None:
        """The files of the base and adapter from which a student is trained; None for new weights."""
        return self.task.student_files(student_files(settings), self.processor)

    def kind(self, setting: str = "student.model") -> "ModelKind":
        """How the model of a setting (student.model, teacher.0, ...) is loaded and run."""
        return self.task.kind(self.processor, self.train, setting)

    def resolved(self, settings: Student) -> Student:
        """A student's settings, with the layers that a measurement chose filled in."""
        return settings if self.layers is None else dataclasses.replace(settings, layers=self.layers)

    def for_student(self, settings: Student, with_teachers: bool) -> "Prepared":
        """The same for another student of the run; without teachers if it does not distil."""
        student, teachers = self.files_of(self.resolved(settings)), self.teachers if with_teachers else ()
        identity = {name: value for name, value in self.identity.items() if not name.startswith(MODELS)} | model_identity(student, teachers)
        return dataclasses.replace(self, student=student, teachers=teachers, identity=identity)


def prepare(recipe: Recipe, open_caches: bool = True, layers: tuple[int, ...] | None = None, others: Sequence[Recipe] = ()) -> Prepared:
    """Read and check data, model folders, tokenizers and teacher caches. No weights are loaded, unless the student's layers are to be measured.

    open_caches   False: leave teacher caches alone, since they are yet to be written
    layers        the layers that were measured before, for a resumed run
    others        recipes of students that train side by side with the first; only the settings that are a student's own are checked

    UserError; one about a student's own settings is attributed to that student (`attribute_to_student`).
    """
    many = recipe, *others
    for_each_student(many, lambda one: check_packages(one.student, one.optim, with_setting_names(one.teacher, "teacher")))
    report_large_micro_batch(recipe.train)
    refuse_absent(used_teachers(recipe), recipe.data)
    rows = read_data(recipe.data, views_of(one for _, one in used_teachers(recipe)))
    models = find_models(recipe.student, used_teachers(recipe), open_caches)
    for_each_student(many, lambda one: check_attention(one, models.configs))
    task = task_named(recipe.task)
    processor = task.find_processor(recipe.student, models, recipe.data, rows)
    task.measures(processor, recipe.validation)  # refuses what cannot be measured
    models = dataclasses.replace(models, student=task.student_files(models.student, processor))
    vocab = processor.vocab
    teachers = tuple(with_answers(teacher, recipe.data, processor.reader, vocab) for teacher in models.teachers)
    models = dataclasses.replace(models, teachers=teachers)
    for teacher in models.teachers:
        if teacher.cache:
            check_cache(teacher, recipe.data, signal_use(recipe), processor.provenance, vocab)
    cut = batching(recipe.train, recipe.seed, recipe.data.packing)
    data = task.encode(rows, recipe.data, cut, as_tuple(recipe.teacher), processor)
    if data.validation is not None:
        refuse_uncounted(data.validation, recipe.checkpoint.best_by)
    check_caches_cover(recipe, models.teachers, processor.provenance, data)
    report_writers(recipe.data, models.teachers)
    refuse_nothing_to_learn(recipe.teacher, recipe.loss.kd_ratio, recipe.data.streaming, data.train)
    task.report(data, recipe.student, models.student, processor)
    student, layers = with_layers(recipe.student, models.student, data.train, layers)
    configs = models.configs | ({"student.model": student.config} if student else {})
    for_each_student(many, lambda one: check_terms(one, configs, data.train))
    identity = data.identity | processor.identity | model_identity(student, models.teachers)
    identity |= {LAYERS: ", ".join(map(str, layers))} if layers else {}
    parts = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)} | {"identity": identity}
    found = {"task": task, "processor": processor, "student": student, "configs": configs, "teachers": models.teachers, "layers": layers}
    if writes(recipe.on_policy):
        refuse_long_schedule("on_policy.share", recipe.on_policy.share, data.source.total_steps)
        refuse_mix(recipe.on_policy, data.train)
        refuse_replay(recipe.on_policy, recipe.train.batch_size, data.source.total_steps)
        found["prompts"] = prompts_for(recipe.on_policy, data.train, data.places, recipe.data.max_length)
        if data.validation is not None and recipe.on_policy.validation_prompts:
            held_out = data.validation, data.validation_places, recipe.data.max_length
            found["validation_prompts"] = held_out_prompts_for(recipe.on_policy, *held_out)
    return Prepared(**found, **parts)


def check_early(recipe: Recipe) -> None:
    """UserError for a recipe that does not fit this machine or its local models, before the data are read. Takes less than a second."""
    refuse_early(recipe.student, recipe.loss, recipe.teacher, used_teachers(recipe))


def check_attention(recipe: Recipe, configs: dict[str, dict]) -> None:
    """UserError if models of these configurations lack the layers or heads that `loss.attention` compares. `configs`: by setting."""
    if recipe.loss.attention:
        teacher = with_setting_names(recipe.teacher, "teacher")[0][0]
        refuse_attention(recipe.loss.attention, configs["student.model"], configs.get(f"{teacher}.model", {}))


def check_terms(recipe: Recipe, configs: dict[str, dict], train: Examples) -> None:
    """UserError, before a model is loaded, if these models or the training data lack what `loss.features` and `loss.attention` need.

    configs   by setting
    """
    features, attention = recipe.loss.features, recipe.loss.attention
    check_attention(recipe, configs)
    if attention:
        refuse_second_view(train)
    check_features(features, feature_teacher(features, recipe.teacher), configs, train)
    if (features or attention) and recipe.task == "causal_lm":  # others are not built from their configurations
        teacher = feature_teacher(features, recipe.teacher) or with_setting_names(recipe.teacher, "teacher")[0][0]
        refuse_by_outline(features, attention, teacher, configs)


def with_layers(
    settings: Student, files: ModelFiles | None, train: Examples, known: tuple[int, ...] | None
) -> tuple[ModelFiles | None, tuple[int, ...] | None]:
    """The student's files, cut to the layers that are kept, and these layers' numbers; None if all are kept.

    known   the layers that were chosen by an earlier measurement
    """
    if settings.layers is None:
        return files, None
    from ..models import depth, depth_parts

    whole = find(settings.model, "student.model", settings.revision, settings.base)
    if isinstance(settings.layers, PartLayers):
        info(f"student: {depth_parts.described(whole, settings.layers)}")
        return files, None
    kept = depth.kept_of(settings, whole)
    if kept is not None:
        info(f"student: {depth.described(kept, whole)}")
        return files, kept
    from ..teachers.fidelity import sample_examples

    few = sample_examples(train, MEASURED)
    kept = known or depth.choose_layers(settings, whole, [few.example(i)[0] for i in range(len(few))])
    info(f"student: {depth.described(kept, whole)}")
    return depth.cut(whole, kept), kept


def refuse_second_view(examples: Examples) -> None:
    """UserError if the teacher reads other positions than the student: their attention cannot be compared."""
    if examples.teacher_view is not None:
        raise UserError(
            "loss.attention: rows have a teacher_context, which gives the teacher other positions; remove it, or leave loss.attention out"
        )


def model_identity(student: ModelFiles | None, teachers: Sequence[TeacherSource]) -> dict[str, str]:
    """Hashes of the models' weights and configurations, by name, for `--resume` to compare. Weight files are read unless their hash is known.

    UserError if a file does not match the record next to it, or an adapter was trained on another base.
    """
    found = {}
    if student:
        with attribute_to_student(0):
            verify(student.base, student.adapter, "student.model")
            found |= identity_of("the student", "student.model", student.base, student.adapter)
    for teacher in teachers:
        found |= teacher.identities
    return found


def find_models(student_settings: Student, named_teachers: Sequence[tuple[str, Teacher]], open_caches: bool) -> FoundModels:
    """The files of student and teachers, and the teachers' caches. UserError if one is missing."""
    with attribute_to_student(0):
        student = student_files(student_settings)
    teachers = resolve_teachers(named_teachers, open_caches)
    configs = {"student.model": student.config if student else student_settings.architecture}
    configs |= {f"{teacher.setting}.model": teacher.files.config for teacher in teachers if teacher.files}
    return FoundModels(student, teachers, configs)


def check_caches_cover(recipe: Recipe, teachers: tuple[TeacherSource, ...], processor: dict[str, str], data: EncodedData) -> None:
    """UserError if a teacher cache lacks held-out examples, or training examples of a run that distils."""
    parts = {"data.train": (data.train, data.places)} if distils(recipe) else {}
    parts |= {"the held-out rows": (data.validation, data.validation_places)}
    for number, teacher in enumerate(teachers):
        if teacher.cache:
            check_coverage(teacher, number, parts, provenance(recipe.data, teacher, processor, data.identity))


def signal_use(recipe: Recipe) -> SignalUse:
    """What the recipe computes from its teachers' signals: losses, mixture and metrics."""
    others = {f"{name}.divergence": one.divergence for name, one in with_setting_names(recipe.data.train, "data.train") if one.divergence}
    return SignalUse(recipe.loss, recipe.mixture, recipe.checkpoint.best_by, others)


def student_files(student: Student) -> ModelFiles | None:
    """The files of the student's base and adapter, the base cut to `student.layers` where these are known; None for new weights."""
    if student.layers is not None:
        from ..models.depth import find_student

        return find_student(student)
    return find(student.model, "student.model", student.revision, student.base) if student.model else None


def batching(train: Train, seed: int, packing: bool) -> Batching:
    """How the training examples are batched."""
    size = micro_batch_size(train, packing)
    return Batching(seed, train.batch_size, size, train.epochs, train.max_steps, train.group_by_length)


def micro_batch_size(train: Train, packing: bool) -> int | TokenBudget:
    """The limit of a micro-batch, in examples or tokens; for `auto` the upper bound of the measurement."""
    tokens = train.micro_batch_tokens
    return TokenBudget(MOST_TOKENS if tokens == "auto" else tokens, packing) if tokens else train.micro_batch_size
