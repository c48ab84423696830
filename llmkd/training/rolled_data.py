"""Training data that `llmkd roll` wrote: is the teacher that its writer learnt from also the teacher of this run?

Offline on-policy distillation works best if they are the same (arXiv 2604.13010).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config.data import Data, Source
from ..config.fields import with_setting_names
from ..config.loader import load_recipe
from ..config.recipe import used_teachers
from ..console import count, warn
from ..errors import UserError
from ..rollouts.answer_file import SUFFIX, read_about, rows_in
from ..teachers.resolve import TeacherSource, resolve_teachers


def learnt_from(run: Path | None) -> list[dict]:
    """The teachers of a run, and the models that wrote its training data, as {model, weights}; without those whose files are gone."""
    if run is None:
        return []
    found = []
    try:
        recipe = load_recipe(run / "recipe.yaml")
    except UserError:  # of another version, or no recipe of llmkd
        warn(f"note: {run}: its recipe cannot be read, so the teachers that it learnt from are not known")
        return []
    for setting, one in used_teachers(recipe):
        try:
            (teacher,) = resolve_teachers([(setting, one)])
            found.append({"model": one.label, "weights": teacher.weights})
        except UserError:
            warn(f"note: {run}: the files of its {setting} are gone, so it cannot be compared with the teacher that scores these answers")
    for _, source in with_setting_names(recipe.data.train, "data.train"):
        found += [{"model": about["writer"]["model"], "weights": about["writer"]["weights"]} for _, about in _abouts(source)]
    return found


def report_writers(data: Data, teachers: Sequence[TeacherSource]) -> None:
    """Print a note for each file of answers that is incomplete or changed, or that neither this run's teacher nor its student wrote."""
    for name, source in with_setting_names(data.train, "data.train"):
        mine = [one for one in teachers if source.teacher in (None, one.settings.name)]
        for path, about in _abouts(source):
            if not about["complete"]:
                warn(f"note: {name} ({path}): llmkd roll has not written all of its answers; the same command continues")
            elif (there := rows_in(path)) != (then := about.get("rows", there)):
                warn(
                    f"note: {name} ({path}) is not the file that llmkd roll wrote: it has {count(there[0], 'row')} instead of {then[0]:,}; rows were "
                    f"removed or added, or {path.name}{SUFFIX} belongs to another file"
                )
            writer = about["writer"]
            then = [writer] if writer["part"] == "teacher" else about["learnt_from"]
            if then and mine and not any(one["weights"] == teacher.weights for one in then for teacher in mine):
                whose = "was written by" if writer["part"] == "teacher" else "was written by a student of"
                models = " and ".join(str(one["model"]) for one in then)
                own = " and ".join(str(one.settings.label) for one in mine)
                warn(
                    f"note: {name} ({path}) {whose} {models}, but the teacher of this run is {own}, another model; offline on-policy distillation "
                    "works best if they are the same (docs/rolling.md)"
                )


def _abouts(source: Source) -> Iterator[tuple[Path, dict]]:
    """The files of a source that llmkd roll wrote, each with its record (the sidecar file)."""
    path = Path(source.path).expanduser()
    files = [path] if path.is_file() else sorted(one.with_name(one.name.removesuffix(SUFFIX)) for one in path.glob(f"*{SUFFIX}"))
    for file in files:
        if (about := read_about(file)) is not None:
            yield file, about
