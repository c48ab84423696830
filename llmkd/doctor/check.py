"""A check of the doctor: a question about a run's recipe, asked of a `Setup`, and its result."""

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
    """What a check found. A failed or warned one says how to put it right; one that could not be asked says why in `found`.

    check, group  of the check; `stage` of a pipeline that it was asked of
    shown    what it looked at, such as decoded examples: texts of some lines each
    seconds  that it took
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
    """The end of a command of which a check failed; `results` is what it would have returned."""

    def __init__(self, text: str, results: dict):
        super().__init__(text)
        self.results = results


@dataclass(frozen=True)
class Check:
    """`run` answers; an exception in it is a failed check.

    name   what is true where it passes, in a few words
    group  the heading that it stands under
    needs  what of the setup must exist: nothing, the data that were read, or the models that were loaded
    fix    what to do where `run` raises
    """

    name: str
    group: str
    needs: Literal["nothing", "data", "models"]
    fix: str
    run: Callable[["Setup"], Result]


#: Only where the recipe, the rows and rounding cannot be the cause.
BUG = "this is a mistake of llmkd, of a library it uses, or in the model's own code, not in the recipe: do not train; report it with this page"


def short(x: float) -> str:
    """A difference: 0, or with two digits."""
    return f"{x:.1e}" if x else "0"
