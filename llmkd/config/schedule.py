"""Schedules: numbers that change over a run, such as {from: 1.0, to: 0.3, shape: cosine}. Each is a pure function of the step."""

import math
import numbers
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Tag

from ..errors import UserError
from .fields import part_of

#: The shapes: the share of the way from `from` to `to` as a function of the share x of the schedule's steps that are done.
SHAPES = {"linear": lambda x: x, "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2, "constant": lambda x: float(x >= 1)}
_KEYS = ("from", "to", "shape", "steps", "ratio")

T = TypeVar("T")
#: A value, or a schedule of such values. The tags make pydantic report the errors of the given form alone.
Scheduled = Annotated[
    Annotated[T, Tag("value")] | Annotated[dict[str, Any], Tag("schedule")],
    Discriminator(lambda value: "schedule" if isinstance(value, dict) else "value"),
]


def is_schedule(value: Any) -> bool:
    """Whether a mapping is a schedule and not a section of settings."""
    return isinstance(value, dict) and {"from", "to"} <= value.keys() <= {*_KEYS}


def length(setting: float | dict[str, Any], total: int) -> int:
    """The number of steps of a schedule in a run of `total` steps: from the first, with the value `from`, to the one that first has `to`."""
    if not isinstance(setting, dict):
        return total
    return setting.get("steps") or part_of(setting.get("ratio", 1.0), total)


def value_at(setting: float | dict[str, Any], step: int, total: int) -> float:
    """The value in step `step` (from 1) of a run of `total` steps."""
    if not isinstance(setting, dict):
        return setting
    done = min(1.0, (step - 1) / max(1, length(setting, total) - 1))
    way = SHAPES[setting.get("shape", "linear")](done)
    return setting["to"] if way == 1 else setting["from"] + (setting["to"] - setting["from"]) * way


def refuse_long_schedule(path: str, setting: float | dict[str, Any], total: int) -> None:
    """UserError if the schedule of a setting does not end within a run of `total` steps."""
    if (steps := length(setting, total)) > max(1, total):
        raise UserError(f"{path}.steps: found {steps}, and the whole run has {total} steps; lower it, or use ratio")


def middle(setting: float | dict[str, Any]) -> float:
    """The value half way, for computations outside of a step."""
    return (setting["from"] + setting["to"]) / 2 if isinstance(setting, dict) else setting


def in_words(setting: float | dict[str, Any]) -> str:
    """`0.5`, or `1 to 0.3 (cosine, 100 steps)`."""
    if not isinstance(setting, dict):
        return f"{setting:g}"
    parts = [setting.get("shape", "linear")]
    parts += [f"{setting['steps']} steps"] if setting.get("steps") else [f"{setting['ratio']:g} of the run"] if "ratio" in setting else []
    return f"{setting['from']:g} to {setting['to']:g} ({', '.join(parts)})"


def schedule_contradictions(setting: Any, path: str, low: float, high: float, total: int | None) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of the schedule of a setting, in the form of `contradictions.contradictions`; none for a plain value.

    low, high   the limits of its values, both included
    total       the steps of the run, if they are known
    """
    if not isinstance(setting, dict):
        return
    for key in setting:
        if key not in _KEYS:
            yield (f"{path}.{key}",), f"no such part of a schedule; there are {', '.join(_KEYS)}"
    for key in ("from", "to"):
        value = setting.get(key)
        if key not in setting:
            yield (f"{path}.{key}", path), "not given; a schedule has from and to, such as {from: 1.0, to: 0.3, shape: cosine}"
        elif not _is_number(value) or not low <= value <= high:
            yield (f"{path}.{key}",), f"found {value!r}, expected a number {low:g} to {high:g}"
    if setting.get("shape", "linear") not in SHAPES:
        yield (f"{path}.shape",), f"found {setting['shape']!r}, expected {', '.join(SHAPES)}"
    steps, ratio = setting.get("steps"), setting.get("ratio")
    if "steps" in setting and (type(steps) is not int or steps < 2):
        yield (f"{path}.steps",), f"found {steps!r}, expected a whole number >= 2"
    elif steps and total and steps > total:
        yield (
            (f"{path}.steps", "train.max_steps"),
            f"found {steps}, more than train.max_steps ({total}), so {path} would never be {setting.get('to')}",
        )
    if "ratio" in setting and (not _is_number(ratio) or not 0 < ratio <= 1):
        yield (f"{path}.ratio",), f"found {ratio!r}, expected a number above 0 and up to 1"
    if "steps" in setting and "ratio" in setting:
        yield (f"{path}.ratio", f"{path}.steps"), f"given together with {path}.steps; keep one of them"
    if setting.get("shape") == "constant" and "steps" not in setting and "ratio" not in setting:
        yield (f"{path}.shape",), "found constant without steps or ratio, after which it is `to`; give one of them, or a plain number"
    if _is_number(setting.get("from")) and setting.get("from") == setting.get("to"):
        yield (f"{path}.to", f"{path}.from"), f"found {setting['to']:g} for both from and to; give that number instead of a schedule"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
