"""The columns that teachers read instead of the student's (`teacher.reads`), and what they cannot be combined with. A part of `contradictions.py`."""

from collections.abc import Iterable, Iterator

from .fields import as_tuple, with_setting_names
from .formats import FORMATS
from .recipe import Recipe
from .teacher import Teacher


def views_of(teachers: Iterable[Teacher]) -> frozenset[str]:
    """The columns that teachers read instead of the student's."""
    return frozenset(one.reads for one in teachers if one.reads)


def view_contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of `teacher.reads`, in the form of `contradictions.contradictions`."""
    sources = [
        (path, source)
        for setting, value in (("data.train", recipe.data.train), ("data.validation", recipe.data.validation))
        for path, source in with_setting_names(value, setting)
    ]
    for path, one in with_setting_names(recipe.teacher, "teacher"):
        if one.reads is not None:
            yield from _of_teacher(path, one, sources, recipe.task)
    views = views_of(as_tuple(recipe.teacher))
    for path, source in sources:
        for column in source.fields:
            if column in FORMATS[source.format].views and column not in views:
                yield (
                    (f"{path}.fields.{column}", "teacher"),
                    f"names a column that no model reads; set reads: {column} of a teacher, or leave it out",
                )


def _of_teacher(path: str, one: Teacher, sources: list, task: str) -> Iterator[tuple[tuple[str, ...], str]]:
    setting = f"{path}.reads"
    if task == "causal_lm":
        yield (
            (setting, "task"),
            f"found {one.reads!r} with task: causal_lm, whose teachers read the student's text; use data.teacher_context for a text before it, or leave it out",
        )
        return
    for name, why in (("ema", "which is the student's own average, and reads what it reads"), ("server", "which reads text alone")):
        if getattr(one, name) is not None:
            yield (setting, f"{path}.{name}"), f"set with {name}, {why}; leave it out"
            return
    if one.model is None:
        yield (setting, f"{path}.model"), "set without a model, which says how the column is read; name the model, also with a cache"
    for at, source in sources:
        form = FORMATS[source.format]
        if one.reads == form.reads:
            yield (setting, f"{at}.format"), f"found {one.reads!r}, which is what the student reads of format {source.format}; leave it out"
        elif one.reads not in form.views:
            known = f"expected {' or '.join(form.views)}" if form.views else "whose rows have no other column to read; leave it out"
            yield (setting, f"{at}.format"), f"found {one.reads!r} with {at}.format: {source.format}, {known}"
