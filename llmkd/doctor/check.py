"""A check of the doctor: a question about a recipe, answered on a `Setup`, and its result."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import UserError

if TYPE_CHECKING:
    from .setup import Setup

Status = Literal["passed", "failed", "warned", "not asked"]


@dataclass(frozen=True)
class Result:
    """The result of a check. A failed or warned one has a fix; one that could not be asked says why in `found`.

    check, group  the check's name and heading
    stage    the stage of a pipeline that was checked
    shown    what the check looked at, such as decoded examples: texts of a few lines each
    seconds  the time that the check took
    """

    status: Status
    found: str
    fix: str = ""
    shown: tuple[str, ...] = ()
    check: str = ""
    group: str = ""
    stage: str = ""
    seconds: float = 0.0

    def of(self, check: "Check", seconds: float) -> "Result":
        return dataclasses.replace(self, check=check.name, group=check.group, seconds=round(seconds, 3))


def passed(found: str, shown: tuple[str, ...] = ()) -> Result:
    return Result("passed", found, "", shown)


def warned(found: str, fix: str, shown: tuple[str, ...] = ()) -> Result:
    return Result("warned", found, fix, shown)


def failed(found: str, fix: str, shown: tuple[str, ...] = ()) -> Result:
    return Result("failed", found, fix, shown)


def not_asked(why: str) -> Result:
    return Result("not asked", why)


class ChecksFailed(UserError):
    """A check of the command failed. `results`: what the command would have returned."""

    def __init__(self, text: str, results: dict):
        super().__init__(text)
        self.results = results


@dataclass(frozen=True)
class Check:
    """A check. `run` answers it; an exception in `run` is a failed check.

    name   what is true if the check passes, in a few words
    group  the heading above it
    needs  the part of the setup that must exist: nothing, the data read, or the models loaded
    fix    what to do if `run` raises
    """

    name: str
    group: str
    needs: Literal["nothing", "data", "models"]
    fix: str
    run: Callable[["Setup"], Result]


#: The fix if neither the recipe, nor the rows, nor rounding can be the cause.
BUG = "this is a mistake of llmkd, of a library it uses, or in the model's own code, not in the recipe: do not train; report it with this page"


def short(x: float) -> str:
    """A difference in two digits, or 0."""
    return f"{x:.1e}" if x else "0"
