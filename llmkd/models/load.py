"""Students and teachers loaded together: what they have in common is in memory once."""

import contextlib
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from ..config.recipe import Lora, Student, Teacher
from ..config.recipe import Student as StudentSettings
from ..config.recipe import Teacher as TeacherSettings
from ..console import info
from ..errors import UserError, attribute_to_student
from ..model_files import ModelFiles, find
from . import activation_checkpointing, adapters, last_layer, pretrained, shared_weights, startup_checks
from .adapters import _fresh_adapter, _kept_adapter, note_quantization
from .families import beside_text
from .float8 import refuse_without_products
from .language_model import LanguageModel
from .offload import OFFLOAD, head_on, offload, resolve_device
from .teacher_transforms import apply_transforms

#: A context manager round a change of a teacher, from (teacher, its settings, their name).
AroundTransform = Callable[[LanguageModel, TeacherSettings, str], contextlib.AbstractContextManager]


def _nothing_around(teacher: LanguageModel, settings: TeacherSettings, setting: str) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext()


def load_teacher(
    settings: TeacherSettings,
    vocab: int,
    device,
    packing: int = 0,
    setting: str = "teacher",
    files: ModelFiles | None = None,
    base: nn.Module | None = None,
    around_transform: AroundTransform = _nothing_around,
) -> LanguageModel:
    """The teacher, frozen and in eval mode. A model, or an adapter on its base, merged or not.

    device        where the student is, and where the head of a teacher that is held elsewhere (`settings.device`) is too
    packing       packed rows of so many tokens must be safe
    files, base   what was found and loaded already
    around_transform   entered round a merge or a conversion to fp8, to measure what that changes
    """
    name, held = f"{setting}.model", resolve_device(setting, settings.device, device)
    files = files or find(settings.model, name, settings.revision, settings.base)
    if settings.float8:
        refuse_without_products(held, setting)
    model = base or pretrained.load_pretrained(files.base, name, settings.dtype, settings.attention, held, settings.loaded_in)
    if files.adapter:
        note_quantization(files, settings.loaded_in, setting)
        model = adapters.load(model, files, name).to(held)
    teacher = LanguageModel(model, _fits(model, vocab, name))
    teacher.requires_grad_(False).eval()
    if settings.device == OFFLOAD:
        teacher.head, teacher.input_device = head_on(teacher.head, torch.device(device)), torch.device(device)
        offload(teacher.base_model, device)
    startup_checks.check(teacher, name, packing, settings.attention)
    if settings.is_transformed:
        with around_transform(teacher, settings, setting):
            apply_transforms(teacher, settings, files, setting)
        last_layer.enable_if_exact(teacher, startup_checks.tolerance(teacher))  # which has other modules now
    if settings.device not in (None, OFFLOAD):
        teacher.head = head_on(teacher.head, torch.device(device))
    return teacher


def load_student(settings: StudentSettings, vocab: int, device, seed: int, packing: int = 0) -> LanguageModel:
    """The student in training mode; exactly what `method` names requires a gradient. `packing`: packed rows of so many tokens must be safe."""
    return load_students([settings], vocab, device, seed, packing)[0]


def load_students(
    many: list[StudentSettings],
    vocab: int,
    device,
    seed: int,
    packing: int = 0,
    found: list[ModelFiles] | None = None,
    base: nn.Module | None = None,
) -> list[LanguageModel]:
    """Students that differ in their adapters only, on one base in memory: each as it would be alone. One may be of any method.

    found, base   what was found of each and loaded already
    """
    settings = many[0]
    found = found or [find(one.model, "student.model", one.revision, one.base) for one in many if one.model]
    torch.manual_seed(seed)
    if found:
        model = base or pretrained.load_pretrained(
            found[0].base, "student.model", settings.dtype, settings.attention, device, settings.quantization
        )
    else:
        model = pretrained.new_model(settings, vocab).to(device)
    if settings.method == "full":
        _check_full(model, found[0] if found else None)
        for parameter in beside_text(model):
            parameter.requires_grad_(False)
    if settings.gradient_checkpointing:
        activation_checkpointing.enable(model, settings.gradient_checkpointing)
    if settings.mixed_precision == "bf16" and next(model.parameters()).dtype != torch.float32:
        info("note: student.mixed_precision: bf16 is for weights held in float32; these are not, and it changes little or nothing")
    names: list[str | None] = [None]
    if settings.method == "lora":
        model.requires_grad_(False)
        names = [f"arm{k}" for k in range(len(many))] if len(many) > 1 else ["default"]
        model = _adapted(model, found, many, names, seed).to(device)
    students = [LanguageModel(model, _fits(model, vocab, "student.model"), name) for name in names]
    for k, (student, own) in enumerate(zip(students, many, strict=True)):
        with attribute_to_student(k):
            _ready(student, own, packing)
    return students


def _adapted(model: nn.Module, found: list[ModelFiles], many: list[StudentSettings], names: list[str], seed: int) -> nn.Module:
    """One adapter after the other, each from the same seed. Those of all-linear come first: it means the layers of the bare base."""
    order = sorted(range(len(many)), key=lambda k: (found[k].adapter is not None, (many[k].lora or Lora()).target_modules != "all-linear"))
    for k in order:
        torch.manual_seed(seed)
        with attribute_to_student(k):
            model = (_kept_adapter if found[k].adapter else _fresh_adapter)(model, found[k], many[k], names[k])
    if len(many) > 1:
        model.set_adapter(names[0])
    return model


def _ready(student: LanguageModel, settings: StudentSettings, packing: int) -> None:
    student.autocast = torch.bfloat16 if settings.mixed_precision == "bf16" else None
    startup_checks.check(student.train(), "student.model", packing, settings.attention)
    _check_narrow(student, settings)
    student.parameters_without_gradient = startup_checks.parameters_without_gradient(student, "student.model")
    if student.parameters_without_gradient:
        some = f"{len(student.parameters_without_gradient)} of {len(student.trainable())} trainable tensors, such as {student.parameters_without_gradient[0]}"
        info(f"note: student: {some}, get no gradient from a small batch; they are never used, or seldom")


def _check_full(model: nn.Module, files: ModelFiles | None) -> None:
    if files and files.adapter:
        raise UserError(
            f"student.method: found full, and {files.adapter} is an adapter; merge it first (llmkd export), or go on with method: lora"
        )
    if getattr(model, "is_quantized", False):
        raise UserError(f"student.method: found full, and {files.base} is quantised; quantised weights cannot be trained, use method: lora")
    dtype = next(model.parameters()).dtype
    if dtype == torch.float16:
        raise UserError("student.dtype: float16 weights cannot be trained in full; set float32, with mixed_precision: bf16 for speed")
    if dtype == torch.bfloat16:
        info("note: bfloat16 weights lose updates below 1/256 of a weight; dtype: float32 with mixed_precision: bf16 keeps them")


def _check_narrow(student: LanguageModel, settings: StudentSettings) -> None:
    """LoRA's own matrices are in float32 at least; copies of modules and biases are in the base's type, and train in it."""
    narrow = {name: p.dtype for name, p in student.trainable().items() if p.dtype in (torch.bfloat16, torch.float16)}
    if settings.method == "full" or not narrow:
        return
    some = f"{len(narrow)} tensors, such as {min(narrow)}"
    if torch.float16 in narrow.values():
        raise UserError(f"student.dtype: {some}, would train in float16; set student.dtype: float32, with mixed_precision: bf16 for speed")
    info(f"note: student: {some}, train in bfloat16 and lose updates below 1/256 of a weight; student.dtype: float32 keeps them")


def _fits(model: nn.Module, vocab: int, setting: str) -> int:
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab:
        raise UserError(f"{setting}: the tokenizer has {vocab} entries and the model's embedding {rows}; they do not belong together")
    return vocab


def load_models(
    students: list[Student],
    teachers: list[tuple[str, Teacher]],
    vocab: int,
    device,
    seed: int,
    packing: int = 0,
    around_transform: AroundTransform = _nothing_around,
) -> tuple[list[LanguageModel], list[LanguageModel]]:
    """The students as `load_students` gives them and the teachers as `load_teacher` does, each as it would be alone.

    teachers   with the names of their settings: teacher, or teacher.0, teacher.1, ...
    packing    packed rows of so many tokens must be safe
    around_transform   see `load_teacher`

    A base that several of them stand on, held alike, is loaded once; of others, such as a teacher in 16 bit and a student in 4,
    the tensors that are equal are kept once. Only where `share_base` says so, and beside the student alone; a base that trains is
    never shared, and of one that a teacher is merged into, or rounds, only what stays equal.
    """
    for setting, teacher in teachers:
        held = resolve_device(setting, teacher.device, device)
        if teacher.float8:
            refuse_without_products(held, setting)
    own = [find(one.model, "student.model", one.revision, one.base) for one in students if one.model]
    theirs = [find(one.model, f"{setting}.model", one.revision, one.base) for setting, one in teachers]
    keys = _keys(students, own, teachers, theirs)
    waiting = Counter(key for key in keys if key)
    bases: dict[tuple, nn.Module] = {}

    def base(key: tuple | None, files: ModelFiles, setting: str, settings: Student | Teacher) -> nn.Module | None:
        """One that others stand on too; None where there are no others."""
        if key not in bases:
            if waiting[key] < 2:
                return None
            bases[key] = pretrained.load_pretrained(files.base, setting, settings.dtype, settings.attention, device, settings.quantization)
        waiting[key] -= 1
        return shared_weights.copy_sharing_weights(bases[key]) if waiting[key] else bases.pop(key)

    models = []
    for (setting, teacher), files, key in zip(teachers, theirs, keys[1:], strict=True):
        on = base(key, files, f"{setting}.model", teacher)
        models.append(load_teacher(teacher, vocab, device, packing, setting, files, on, around_transform))
    on = base(keys[0], own[0], "student.model", students[0]) if own else None
    learning = load_students(students, vocab, device, seed, packing, own, on) if students else []
    beside = [model for (_, teacher), model in zip(teachers, models, strict=True) if _shares_base(teacher)]
    shared_weights.deduplicate_weights(model.base_model for model in (*learning[:1], *beside))
    for n, ((setting, _), model) in enumerate(zip(teachers, models, strict=True)):
        _report_shared_weights(setting, model, learning[:1], models[:n])
    return learning, models


def _shares_base(teacher: Teacher) -> bool:
    return teacher.share_base and teacher.device is None


def _keys(students: list[Student], own: list[ModelFiles], teachers: list[tuple[str, Teacher]], theirs: list[ModelFiles]) -> list:
    """Of the students' base (one for all) and of each teacher's; None for those that share none."""
    candidates = [
        (files, one, f"{setting}.model") if _shares_base(one) and not one.is_transformed else None
        for (setting, one), files in zip(teachers, theirs, strict=True)
    ]
    lora = bool(own) and students[0].method == "lora"
    if sum(map(bool, candidates)) + lora < 2:
        return [None] * (1 + len(teachers))
    student_keys = (
        {shared_weights.base_identity(files, one, "student.model") for files, one in zip(own, students, strict=True)} if lora else {None}
    )
    student_key = None if None in student_keys else student_keys.pop()
    return [student_key, *(shared_weights.base_identity(*candidate) if candidate else None for candidate in candidates)]


def _report_shared_weights(setting: str, model: LanguageModel, students: list[LanguageModel], others: list[LanguageModel]) -> None:
    own = shared_weights.storage_bytes(model)
    for who, them in (("the student", students), ("the teachers before it", others)):
        if shared := sum(own[place] for place in own.keys() & shared_weights.storage_bytes(*them).keys()):
            share = shared / sum(own.values())
            if share < 0.005:  # norms that are all ones, say
                continue
            info(f"{setting}: shares {share:.0%} of its weights with {who}: {shared / 1e6:,.1f} MB are in memory once")
            return
