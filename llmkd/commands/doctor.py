"""`llmkd doctor`: runs the checks of `llmkd/doctor/` on a recipe and prints a line for each."""

import dataclasses
import shutil
import sys
import textwrap
from collections import Counter
from pathlib import Path

from .. import __version__
from ..config import loader
from ..config.fields import with_setting_names
from ..config.recipe import Recipe, Student, used_teachers
from ..console import count, info, printable, several_processes
from ..doctor.check import Check, ChecksFailed, Result, not_asked
from ..errors import UserError
from ..teachers.served_models import refuse_absent
from .other_tasks import refuse_other_task

ROWS = 64
_INDENT = 11


def doctor(config: str, overrides: dict, rows: int = ROWS) -> list[Result]:
    """Run every check on a recipe, or on each stage of a pipeline, and print each result as it comes."""
    if several_processes():
        raise UserError("doctor: runs in one process; leave accelerate launch, or torchrun, out")
    if loader.file_kind(config) == "pipeline":
        from .pipeline import stage_recipes

        overrides = dict(overrides)
        pipeline = loader.load_pipeline(config, overrides.pop("output_dir", None))
        recipes = stage_recipes(pipeline, Path(config), overrides)
        stages = {name: recipe for name, recipe in recipes.items() if not pipeline.stages[name].roll}
        written = {name: Path(pipeline.output_dir, name) for name, stage in pipeline.stages.items() if stage.writes_rows}
    else:
        stages, written = {"": loader.load_recipe(config, overrides, check_inputs=True)}, {}
    for recipe in stages.values():
        refuse_other_task(recipe, "doctor")
        refuse_absent(used_teachers(recipe), recipe.data)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that cannot show a character
    info(f"examining the recipe on at most {rows} rows of each source; a minute or two" + (" a stage" if len(stages) > 1 else ""))
    results = [result for name in stages for result in _to_come(name, stages[name], written) or examined(name, stages, rows)]
    print(f"\n{summary(results)}", flush=True)
    return results


def _to_come(stage: str, recipe: Recipe, written: dict[str, Path]) -> list[Result]:
    """A result that says so if the stage reads rows that an earlier stage has yet to write. `written`: the folders of stages that write rows."""
    for _, source in (*with_setting_names(recipe.data.train, "data.train"), *with_setting_names(recipe.data.validation, "data.validation")):
        path = Path(source.path).expanduser().absolute()
        for name, folder in written.items():
            if folder.expanduser().absolute() in path.parents and not path.exists():
                why = f"{source.path} is written by the stage {name}; ask again after it"
                found = dataclasses.replace(not_asked(why), check="the stage's rows are there", group="Data", stage=stage)
                print(f"\n{stage}: Data\n" + printable("\n".join(as_text(found))), flush=True)
                return [found]
    return []


def examined(stage: str, recipes: dict[str, Recipe], rows: int) -> list[Result]:
    """The results for one stage's recipe, printed as they come. A model that an earlier stage has yet to train is replaced by the model that
    it is trained from."""
    from ..doctor.examine import examine

    headings: list[str] = []

    def show(check: Check, result: Result) -> None:
        if check.group not in headings:
            headings.append(check.group)
            print(f"\n{stage}: {check.group}" if stage else f"\n{check.group}")
        print(printable("\n".join(as_text(result))), flush=True)

    recipe, stand_ins = with_stand_ins(recipes[stage], recipes)
    for setting, name in stand_ins.items():
        info(f"{stage}: {setting} is trained by the stage {name}; the model that it is trained from is examined in its place")
    return [dataclasses.replace(one, stage=stage) for one in examine(recipe, rows, show, frozenset(stand_ins))]


def with_stand_ins(recipe: Recipe, stages: dict[str, Recipe]) -> tuple[Recipe, dict[str, str]]:
    """The recipe with every model that a stage has yet to train replaced by the one it is trained from, and {setting: that stage}."""
    found: dict[str, str] = {}

    def stand_in(setting: str, one):
        path = Path(one.model).expanduser() if one.model else None
        if path is None or path.exists():
            return one
        for name, other in stages.items():
            if name and Path(other.output_dir).expanduser().absolute() in path.absolute().parents:
                found[setting] = name
                student, _ = with_stand_ins(other, {key: value for key, value in stages.items() if key != name})
                return dataclasses.replace(one, **_start_of(student.student))
        return one

    teachers = tuple(stand_in(setting, one) for setting, one in with_setting_names(recipe.teacher, "teacher"))
    teacher = teachers if isinstance(recipe.teacher, tuple) else (*teachers, None)[0]
    return dataclasses.replace(recipe, student=stand_in("student", recipe.student), teacher=teacher), found


def _start_of(student: Student) -> dict[str, str | None]:
    """model, base and revision of the model that a student is trained from; with student.layers the smaller model. If its layers are yet to
    be chosen by a measurement, as many evenly spaced ones stand in for them."""
    if student.layers is None:
        return {"model": student.model, "base": student.base, "revision": student.revision}
    from ..models.depth import find_student

    if not isinstance(student.layers, tuple):
        student = dataclasses.replace(student, layers=dataclasses.replace(student.layers, by="even"))
    return {"model": str(find_student(student).base), "base": None, "revision": None}


def as_text(result: Result) -> list[str]:
    """A result as lines for the terminal."""
    width = max(60, min(120, shutil.get_terminal_size().columns)) - _INDENT
    status = result.status.upper() if result.status == "failed" else result.status
    lines = [f"{status:<{_INDENT}}{result.check}"]
    for text in (result.found, f"to do: {result.fix}" if result.fix else ""):
        lines += [" " * _INDENT + line for line in textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)]
    return lines + ["    | " + line for text in result.shown for line in (*text.splitlines(), "")]


def summary(results: list[Result]) -> str:
    found = Counter(result.status for result in results)
    parts = [f"{found[status]} {status}" for status in ("passed", "failed", "warned", "not asked") if found[status]]
    return f"{count(len(results), 'check')}: {', '.join(parts)}, in {sum(result.seconds for result in results):.0f} seconds"


def unless_failed(results: list[Result], config: str) -> dict:
    """{llmkd, config, passed, checks}, for --json. ChecksFailed (exit code 2), which holds the same, if a check failed."""
    wrong = [result.check for result in results if result.status == "failed"]
    whole = {"llmkd": __version__, "config": config, "passed": not wrong, "checks": results}
    if wrong:
        raise ChecksFailed(f"doctor: {count(len(wrong), 'check')} failed: {'; '.join(wrong)}", whole)
    return whole
