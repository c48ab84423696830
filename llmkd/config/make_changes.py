"""The `set:` of a stage `make:` in a pipeline or a sweep: changes of a file of `llmkd make`, whose stages have paths of their own. No torch."""

from pathlib import Path
from typing import Any

from ..errors import UserError
from . import loader, paths
from .make import Make
from .make_stages import STAGES


def place_make_changes(changes: dict[str, Any], path: str | Path, folder: str, output_dir: str) -> dict[str, Any]:
    """The changes with their paths placed, as by `paths.place_changes`. UserError with every problem.

    path        the file of make, whose stages decide which settings are paths
    folder      the folder of the file with the changes
    output_dir  the value of `{output_dir}`
    """
    out, problems = {}, []
    stages = changes["stages"] if "stages" in changes else loader.read(path)[0].get("stages")

    def placed(part: dict[str, Any], kind: type | None) -> dict[str, Any]:
        try:
            return paths.place_changes(part, folder, output_dir, kind)
        except UserError as error:
            problems.extend(error.problems)
            return part

    def stage(one: Any) -> Any:
        return placed(one, _kind(one)) if isinstance(one, dict) else one

    for dotted, value in changes.items():
        first, _, number = dotted.partition(".")
        number, _, setting = number.partition(".")
        if first != "stages":
            out |= placed({dotted: value}, Make)
        elif setting:
            out[dotted] = placed({setting: value}, _kind(_item(stages, number)))[setting]
        else:
            out[dotted] = [stage(one) for one in value] if isinstance(value, list) else stage(value)
    if problems:
        raise UserError(*problems)
    return out


def _item(stages: Any, number: str) -> Any:
    return stages[int(number)] if isinstance(stages, list) and number.isdigit() and int(number) < len(stages) else None


def _kind(stage: Any) -> type | None:
    """The class of a stage's settings; None if it is not a stage."""
    return STAGES.get(stage["do"]) if isinstance(stage, dict) and isinstance(stage.get("do"), str) else None
