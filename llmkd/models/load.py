"""Loads and checks students and teachers together, so that weights that they share are in memory once.

Every finished `Model` is built here, with the results of the startup checks and a teacher's settings applied.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ..config.recipe import Lora, Student, Teacher
from ..console import info, warn
from ..errors import UserError, attribute_to_student
from ..model_folder.files import ModelFiles, find
from ..model_folder.trainable import refuse_untrainable
from . import activation_checkpointing, adapters, average, pretrained, sharding, shared_weights, startup_checks
from .depth import find_student
from .dropout import follow_examples
from .encoder_states import keep_states
from .families import base_of, freeze_encoder, non_text_parameters
from .float8 import refuse_without_products
from .kinds import CAUSAL, ModelKind
from .kinds import checked as checked
from .last_layer import enable_if_exact
from .lora import add_new_adapter, refuse_missing_modules
from .model import Model
from .offload import OFFLOAD, head_on, offload, resolve_device
from .teacher_transforms import apply_transforms

#: A function of (teacher, its settings, their name) that returns a context manager, to be entered around a transform of the teacher. Its value
#: is the teacher's `fidelity`.
AroundTransform = Callable[[Model, Teacher, str], contextlib.AbstractContextManager[dict[str, float]]]


def _unmeasured(teacher: Model, settings: Teacher, setting: str) -> contextlib.AbstractContextManager[dict[str, float]]:
    return contextlib.nullcontext({})


@dataclass(frozen=True)
class LoadContext:
    """The settings with which all models of a run are loaded.

    vocab             entries of the tokenizer; every model must have a row for each
    device            of the students, and of the head of a teacher on another device (`teacher.device`)
    seed              for new weights and new adapters
    packing           the most tokens in a packed row, which the models must support; 0 without packing
    around_transform  entered around a teacher's merge or conversion to fp8, to measure the change
    sharded           the mesh of processes for each sharded model, by setting (student, teacher, teacher.0, ...)
    kind              returns the kind of the model of a setting
    find              returns the files of a student; None for new weights
    """

    vocab: int
    device: torch.device | str
    seed: int = 0
    packing: int = 0
    around_transform: AroundTransform = _unmeasured
    sharded: Mapping[str, object] = field(default_factory=dict)
    kind: Callable[[str], ModelKind] = lambda setting: CAUSAL
    find: Callable[[Student], ModelFiles | None] = find_student

    def loads_mapped(self, setting: str, settings: Student | Teacher) -> bool:
        """Whether the weights stay mapped from their files until they are sharded. A merged or quantised model is loaded whole."""
        return setting in self.sharded and not settings.quantization and not getattr(settings, "is_transformed", False)


def load_teacher(
    settings: Teacher, context: LoadContext, setting: str = "teacher", files: ModelFiles | None = None, base: nn.Module | None = None
) -> Model:
    """Load the teacher, frozen and in eval mode: a model, or an adapter on its base, merged or not.

    setting      teacher, or teacher.0, ...
    files, base  its files and its base model, if they are already found and loaded
    """
    device, name, held = context.device, f"{setting}.model", resolve_device(setting, settings.device, context.device)
    kind = context.kind(name)
    files = files or find(settings.model, name, settings.revision, settings.base)
    if settings.float8:
        refuse_without_products(held, setting)
    mapped, casts = context.loads_mapped(setting, settings), None
    if base is None and mapped and (not files.adapter or adapters.is_lora_alone(files, name)):
        base, casts = pretrained.load_as_stored(files.base, name, settings.dtype, settings.attention, kind.auto, bool(files.adapter))
    held = None if mapped else held
    how = settings.dtype, settings.attention, held, settings.loaded_in, kind.auto
    model = base or pretrained.load_pretrained(files.base, name, *how)
    if files.adapter:
        adapters.note_quantization(files, settings.loaded_in, setting)
        model = adapters.load(model, files, name)
        model = model if mapped else model.to(held)
    kind.refuse_misfit(model, context.vocab, name)
    teacher = kind.wrapper(model, context.vocab)
    teacher.requires_grad_(False).eval()
    if setting in context.sharded and not settings.is_transformed:
        _shard(model, setting, context, casts)
    if settings.device == OFFLOAD:
        teacher = teacher.replaced(head=head_on(teacher.head, torch.device(device)), input_device=torch.device(device))
        offload(teacher.base_model, device)
    teacher = kind.checked(teacher, name, context.packing, settings.attention)
    if settings.is_transformed:
        with context.around_transform(teacher, settings, setting) as fidelity:
            apply_transforms(teacher, settings, files, setting)
        last = enable_if_exact(teacher, startup_checks.tolerance(teacher))  # again, since its modules were replaced
        teacher = teacher.replaced(fidelity=fidelity, capabilities=dataclasses.replace(teacher.capabilities, last_layer=last))
        if setting in context.sharded:
            _shard(teacher.model, setting, context)
    if settings.device not in (None, OFFLOAD):
        teacher = teacher.replaced(head=head_on(teacher.head, torch.device(device)))
    return teacher


def load_students(
    many: list[Student], context: LoadContext, found: list[ModelFiles] | None = None, base: nn.Module | None = None
) -> list[Model]:
    """Load the students, in training mode; only the parameters that `method` trains require a gradient.

    Several students may differ only in their adapters: they share one base in memory, and each behaves as if it were alone. A single
    student may use any method.

    found, base  the files of each student and their base model, if they are already found and loaded
    """
    settings, device, kind = many[0], context.device, context.kind("student.model")
    found = found or [files for one in many if (files := context.find(one))]
    torch.manual_seed(context.seed)
    mapped, casts = context.loads_mapped("student", settings), {}
    if found and mapped and base is None and (settings.method == "full" or _cast_later(many, found, kind)):
        loaded = any(files.adapter for files in found)
        base, casts = pretrained.load_as_stored(found[0].base, "student.model", settings.dtype, settings.attention, kind.auto, loaded)
    device = None if mapped else device
    if found:
        how = settings.dtype, settings.attention, device, settings.quantization, kind.auto
        model = base or pretrained.load_pretrained(found[0].base, "student.model", *how)
    else:
        model = pretrained.new_model(settings, kind.architecture(context.vocab), kind.auto)
        model = model if mapped else model.to(device)
    if found and not found[0].adapter:
        kind.started(model, found[0].base, context.seed)
    first = next(model.parameters())
    dtype = casts.get(id(first), first.dtype)
    if settings.method == "full":
        _check_full(model, found[0] if found else None, dtype)
        for parameter in non_text_parameters(model):
            parameter.requires_grad_(False)
    if settings.freeze:
        freeze_encoder(model)
    if settings.gradient_checkpointing:
        activation_checkpointing.enable(model, settings.recomputed, settings.gradient_checkpointing == "offload")
    if settings.mixed_precision == "bf16" and dtype != torch.float32:
        warn("note: student.mixed_precision: bf16 is for float32 weights; these have another dtype, so it changes little or nothing")
    names: list[str | None] = [None]
    if settings.method == "lora":
        model.requires_grad_(False)
        names = [f"student{k}" for k in range(len(many))] if len(many) > 1 else ["default"]
        model = _with_adapters(model, found, many, names, context, casts)
        model = model if mapped else model.to(device)
    kind.refuse_misfit(model, context.vocab, "student.model")
    if "student" in context.sharded:
        _shard(model, "student", context, casts, keep_outline=True)
    students = []
    for k, (name, own) in enumerate(zip(names, many, strict=True)):
        with attribute_to_student(k):
            students.append(_student(model, name, own, context))
    return students


def _cast_later(many: list[Student], found: list[ModelFiles], kind: ModelKind) -> bool:
    """Whether the base may be cast after adapters were put on it: they neither copy its weights nor compute anything from them."""
    for own, files in zip(many, found, strict=True):
        lora = own.lora or Lora()
        if files.adapter and not adapters.is_lora_alone(files, "student.model"):
            return False
        if not files.adapter and (lora.dora or lora.modules_to_save or kind.peft != CAUSAL.peft):
            return False
    return True


def _shard(model: nn.Module, setting: str, context: LoadContext, casts: Mapping[int, torch.dtype] | None = None, **options) -> None:
    sharding.shard(model, context.sharded[setting], setting, casts, **options)
    pretrained.own_memory(model)  # for its buffers, which are not sharded


def _with_adapters(
    model: nn.Module, found: list[ModelFiles], many: list[Student], names: list[str], context: LoadContext, casts: Mapping[int, torch.dtype]
) -> nn.Module:
    """Put the adapters on one after the other, each from the same seed; all-linear first, since it means the layers of the bare base."""
    from .lora_product import add_in_place  # loads PEFT

    kind = context.kind("student.model")
    order = sorted(range(len(many)), key=lambda k: (found[k].adapter is not None, (many[k].lora or Lora()).target_modules != "all-linear"))
    for k in order:
        torch.manual_seed(context.seed)
        with attribute_to_student(k):
            if found[k].adapter:
                model = adapters.load_to_train(model, found[k], many[k], names[k])
            else:
                with pretrained.cast_without_values(model, casts):
                    model = add_new_adapter(model, found[k], many[k], names[k], kind.peft, kind.copies(base_of(model), found[k].base))
    if len(many) > 1:
        model.set_adapter(names[0])
    follow_examples(model)
    add_in_place(model)
    return model


def _student(model: nn.Module, name: str | None, settings: Student, context: LoadContext) -> Model:
    """One of the students on `model`: checked, and in training mode. `name`: that of its adapter."""
    autocast, kind = torch.bfloat16 if settings.mixed_precision == "bf16" else None, context.kind("student.model")
    student = kind.wrapper(model, context.vocab, name, autocast=autocast).train()
    student = kind.checked(student, "student.model", context.packing, settings.attention)
    _check_narrow(student, settings)
    unused = kind.without_gradient(student, "student.model")
    if unused:
        some = f"{len(unused)} of {len(student.trainable())} trainable tensors, such as {unused[0]}"
        warn(f"note: student: {some}, get no gradient from a small batch; they may never be used")
    return student.replaced(capabilities=dataclasses.replace(student.capabilities, parameters_without_gradient=tuple(unused)))


def _check_full(model: nn.Module, files: ModelFiles | None, dtype: torch.dtype) -> None:
    refuse_untrainable(files, getattr(model, "is_quantized", False), str(dtype).removeprefix("torch."))
    if dtype == torch.bfloat16:
        warn("note: bfloat16 weights lose updates below 1/256 of a weight; dtype: float32 with mixed_precision: bf16 keeps them")


def _check_narrow(student: Model, settings: Student) -> None:
    """Refuse or report parameters that would train in half precision: LoRA's matrices are float32, but copied modules have the base's dtype."""
    narrow = {name: p.dtype for name, p in student.trainable().items() if p.dtype in (torch.bfloat16, torch.float16)}
    if settings.method == "full" or not narrow:
        return
    some = f"{len(narrow)} tensors, such as {min(narrow)}"
    if torch.float16 in narrow.values():
        raise UserError(f"student.dtype: {some}, would train in float16; set student.dtype: float32, with mixed_precision: bf16 for speed")
    warn(f"note: student: {some}, train in bfloat16 and lose updates below 1/256 of a weight; student.dtype: float32 keeps them")


def load_models(students: list[Student], teachers: list[tuple[str, Teacher]], context: LoadContext) -> tuple[list[Model], list[Model]]:
    """Load students (`load_students`) and teachers (`load_teacher`); each behaves as if it were loaded alone.

    teachers  (setting, settings) of each: teacher, or teacher.0, teacher.1, ...

    A base that several of them use in the same form is loaded once; if they use two forms of one base, such as 16 bit for a teacher and 4
    bit for a student, tensors that are equal are kept once. Sharing needs `share_base: true` and a teacher on the student's device. A base
    that trains is never shared. A teacher that is the student's moving average (`ema`) is a copy of it (`average.py`). If a teacher merges
    its adapter or is quantised to fp8, only its unchanged tensors are shared.
    """
    for setting, teacher in teachers:
        held = resolve_device(setting, teacher.device, context.device)
        if teacher.float8:
            refuse_without_products(held, setting)
    own: list[ModelFiles] = []
    for k, student in enumerate(students):
        with attribute_to_student(k):
            if files := context.find(student):
                refuse_missing_modules(student, files)
                own.append(files)
    theirs = [find(one.model, f"{setting}.model", one.revision, one.base) for setting, one in teachers]
    keys = _keys(students, own, teachers, theirs)
    waiting = Counter(key for key in keys if key)
    users = [("student", students[0]), *teachers] if students else [("", None), *teachers]
    whole = {key for key, (who, one) in zip(keys, users, strict=True) if key and not context.loads_mapped(who, one)}
    bases: dict[tuple, nn.Module] = {}

    def base(key: tuple | None, files: ModelFiles, setting: str, settings: Student | Teacher) -> nn.Module | None:
        """The base `key` for one of the models that share it; None if a single model uses it and loads it itself."""
        if key not in bases:
            if waiting[key] < 2:
                return None
            device = context.device if key in whole else None
            how = settings.dtype, settings.attention, device, settings.quantization, context.kind(setting).auto
            bases[key] = pretrained.load_pretrained(files.base, setting, *how)
        waiting[key] -= 1
        return shared_weights.copy_sharing_weights(bases[key]) if waiting[key] else bases.pop(key)

    models = []
    for (setting, teacher), files, key in zip(teachers, theirs, keys[1:], strict=True):
        if teacher.ema is not None:
            continue
        on = base(key, files, f"{setting}.model", teacher)
        models.append(load_teacher(teacher, context, setting, files, on))
    on = base(keys[0], own[0], "student.model", students[0]) if own else None
    learning = load_students(students, context, own, on) if students else []
    models += [
        context.kind(f"{name}.model").checked(average.copy_of(learning[0], f"{name}.ema"), f"{name}.model", context.packing)
        for name, one in teachers
        if one.ema is not None
    ]
    sharing = [model for (_, teacher), model in zip(teachers, models, strict=True) if _shares_base(teacher)]
    shared_weights.deduplicate_weights(model.base_model for model in (*learning[:1], *sharing))
    if learning and students[0].keep_encoded:
        keep_states(learning, ((name, model) for (name, _), model in zip(teachers, models, strict=True)), students[0].keep_encoded)
    for n, ((setting, _), model) in enumerate(zip(teachers, models, strict=True)):
        _report_shared_weights(setting, model, learning[:1], models[:n])
    return learning, models


def _shares_base(teacher: Teacher) -> bool:
    return teacher.share_base and teacher.device is None


def _keys(students: list[Student], own: list[ModelFiles], teachers: list[tuple[str, Teacher]], theirs: list[ModelFiles]) -> list:
    """The identity of the students' common base, and of each teacher's; None for a base that is not shared."""
    candidates = [
        (files, one, f"{setting}.model") if _shares_base(one) and not one.is_transformed and one.ema is None else None
        for (setting, one), files in zip(teachers, theirs, strict=True)
    ]
    lora = bool(own) and students[0].method == "lora"
    if sum(map(bool, candidates)) + lora < 2:
        return [None] * (1 + len(teachers))
    student_key = None
    if lora:
        student_keys = {shared_weights.base_identity(files, one, "student.model") for files, one in zip(own, students, strict=True)}
        student_key = None if None in student_keys else student_keys.pop()
    return [student_key, *(shared_weights.base_identity(*candidate) if candidate else None for candidate in candidates)]


def _report_shared_weights(setting: str, model: Model, students: list[Model], others: list[Model]) -> None:
    own = shared_weights.storage_bytes(model)
    for who, them in (("the student", students), ("the teachers before it", others)):
        if shared := sum(own[place] for place in own.keys() & shared_weights.storage_bytes(*them).keys()):
            share = shared / sum(own.values())
            if share < 0.005:  # such as norms that are all ones
                continue
            info(f"{setting}: shares {share:.0%} of its weights with {who}: {shared / 1e6:,.1f} MB are in memory once")
            return
