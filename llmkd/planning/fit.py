"""Changes that make a recipe fit into memory, each with the memory that it saves, found by planning the changed recipe."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..config.fields import as_tuple, with_setting_names
from ..config.recipe import Recipe, distils
from ..errors import UserError

LEAST = 0.01  # of the needed memory: smaller savings are not shown


@dataclass(frozen=True)
class Change:
    """A change of a recipe.

    settings   {dotted path: value}, as options of the command line
    same       whether the student learns the same, up to rounding
    """

    settings: dict[str, Any]
    same: bool


@dataclass(frozen=True)
class Saving:
    """A change, the memory that is needed with it, and what it saves, in bytes."""

    change: Change
    needed: float
    saves: float


def changes(recipe: Recipe, students: int = 0) -> Iterator[Change]:
    """Changes that may save memory; some may contradict other settings of the recipe. `students`: their number in a sweep, if they train side
    by side."""
    student, train = recipe.student, recipe.train
    if students > 1:
        yield from (Change({"students_per_teacher": most}, True) for most in sorted({-(-students // 2), 1}, reverse=True))
    if student.recomputed is not True:
        yield Change({"student.gradient_checkpointing": True}, True)
    if train.micro_batch_size:
        for size in sorted({1, train.micro_batch_size // 2} - {0, train.micro_batch_size}, reverse=True):
            yield Change({"train.micro_batch_size": size}, True)
    elif train.micro_batch_tokens != "auto" and train.micro_batch_tokens > recipe.data.max_length:
        yield Change({"train.micro_batch_tokens": max(recipe.data.max_length, train.micro_batch_tokens // 2)}, True)
    if student.method == "full" and student.architecture is None and student.layers is None:
        yield Change({"student.method": "lora"}, False)
    if student.method == "lora" and not student.quantization:
        yield Change({"student.quantization": {"type": "nf4"}}, False)
    for setting, one in with_setting_names(recipe.teacher, "teacher") if distils(recipe) else ():
        if one.cache is not None or one.device is not None:
            continue
        if not one.quantization:
            yield from (Change({f"{setting}.quantization": {"type": kind}}, False) for kind in ("int8", "nf4"))
        yield Change({f"{setting}.device": "offload"}, True)
        if len(as_tuple(recipe.teacher)) == 1 and not recipe.data.streaming:
            yield Change({f"{setting}.cache": {"path": f"{recipe.output_dir}_cache", "kind": "hidden"}}, True)
    if (recipe.loss.chunk_size or 2048) > 512:
        yield Change({"loss.chunk_size": 512}, True)
    if recipe.optim.name == "adamw":
        yield Change({"optim.name": "adamw_8bit"}, False)


def savings(recipe: Recipe, needed: float, needs: Callable[[dict[str, Any]], float], students: int = 0) -> list[Saving]:
    """Every change that saves memory, the largest saving first. `needs`: the memory that the recipe needs with changed settings, in bytes; it
    raises UserError if they are refused."""
    found = []
    for change in changes(recipe, students):
        try:
            after = needs(change.settings)
        except UserError:  # it contradicts the recipe's other settings
            continue
        if needed - after >= LEAST * needed:
            found.append(Saving(change, after, needed - after))
    return sorted(found, key=lambda one: -one.saves)


def together(found: list[Saving], needed: float, room: float, needs: Callable[[dict[str, Any]], float]) -> Saving | None:
    """Several changes that make the recipe fit into `room` together, for use if no single one does. Changes that leave the result unchanged are
    taken first, the largest saving first. None if all of them are not enough."""
    taken: dict[str, Any] = {}
    same, now = True, needed
    for one in sorted(found, key=lambda one: (not one.change.same, -one.saves)):
        if one.change.settings.keys() & taken.keys() or _of_one_teacher(one.change.settings, taken):
            continue
        try:
            after = needs(taken | one.change.settings)
        except UserError:
            continue
        if after > now - LEAST * needed:
            continue
        taken, now, same = taken | one.change.settings, after, same and one.change.same
        if now <= room:
            return Saving(Change(taken, same), now, needed - now)
    return None


def _of_one_teacher(settings: dict[str, Any], taken: dict[str, Any]) -> bool:
    """Whether both change how or where the same teacher is loaded."""
    return bool({path.rpartition(".")[0] for path in settings if path.startswith("teacher")} & {path.rpartition(".")[0] for path in taken})
