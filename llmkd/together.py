"""Students and teachers loaded together: what they have in common is in memory once."""

from collections import Counter

from torch import nn

from . import loading, sharing
from .console import say
from .float8 import refuse_without_products
from .honing import Asked
from .model_files import ModelFiles, find
from .models import LanguageModel, load_students, load_teacher
from .placing import device_of
from .recipe import Student, Teacher


def load_together(
    students: list[Student],
    teachers: list[tuple[str, Teacher]],
    vocab: int,
    device,
    seed: int,
    packing: int = 0,
    asked: Asked | None = None,
) -> tuple[list[LanguageModel], list[LanguageModel]]:
    """The students as `load_students` gives them and the teachers as `load_teacher` does, each as it would be alone.

    teachers   with the names of their settings: teacher, or teacher.0, teacher.1, ...
    packing    packed rows of so many tokens must be safe
    asked      some of what a teacher will be asked, by its setting: see `load_teacher`

    A base that several of them stand on, held alike, is loaded once; of others, such as a teacher in 16 bit and a student in 4,
    the tensors that are equal are kept once. Only where `share_base` says so, and beside the student alone; a base that trains is
    never shared, and of one that a teacher is merged into, or rounds, only what stays equal.
    """
    for setting, teacher in teachers:
        held = device_of(setting, teacher.device, device)
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
            bases[key] = loading.base(files.base, setting, settings.dtype, settings.attention, device, settings.quantization)
        waiting[key] -= 1
        return sharing.twin(bases[key]) if waiting[key] else bases.pop(key)

    models = []
    for (setting, teacher), files, key in zip(teachers, theirs, keys[1:], strict=True):
        on = base(key, files, f"{setting}.model", teacher)
        models.append(load_teacher(teacher, vocab, device, packing, setting, files, on, asked))
    on = base(keys[0], own[0], "student.model", students[0]) if own else None
    learning = load_students(students, vocab, device, seed, packing, own, on) if students else []
    beside = [model for (_, teacher), model in zip(teachers, models, strict=True) if _beside(teacher)]
    sharing.hold_once(model.plain for model in (*learning[:1], *beside))
    for n, ((setting, _), model) in enumerate(zip(teachers, models, strict=True)):
        _say_what_is_shared(setting, model, learning[:1], models[:n])
    return learning, models


def _beside(teacher: Teacher) -> bool:
    return teacher.share_base and teacher.device is None


def _keys(students: list[Student], own: list[ModelFiles], teachers: list[tuple[str, Teacher]], theirs: list[ModelFiles]) -> list:
    """Of the students' base (one for all) and of each teacher's; None for those that share none."""
    candidates = [
        (files, one, f"{setting}.model") if _beside(one) and not one.honed else None
        for (setting, one), files in zip(teachers, theirs, strict=True)
    ]
    lora = bool(own) and students[0].method == "lora"
    if sum(map(bool, candidates)) + lora < 2:
        return [None] * (1 + len(teachers))
    student_keys = {sharing.base_key(files, one, "student.model") for files, one in zip(own, students, strict=True)} if lora else {None}
    student_key = None if None in student_keys else student_keys.pop()
    return [student_key, *(sharing.base_key(*candidate) if candidate else None for candidate in candidates)]


def _say_what_is_shared(setting: str, model: LanguageModel, students: list[LanguageModel], others: list[LanguageModel]) -> None:
    own = sharing.storages(model)
    for who, them in (("the student", students), ("the teachers before it", others)):
        if shared := sum(own[place] for place in own.keys() & sharing.storages(*them).keys()):
            share = shared / sum(own.values())
            if share < 0.005:  # norms that are all ones, say
                continue
            say(f"{setting}: shares {share:.0%} of its weights with {who}: {shared / 1e6:,.1f} MB are in memory once")
            return
