"""`llmkd data` for tasks other than causal_lm: counts, and examples with their targets and the columns that teachers read. Loads no model."""

import sys
from typing import Any, TextIO

from ..config.fields import as_tuple
from ..config.recipe import Recipe, used_teachers
from ..config.tasks import SEQUENCES
from ..config.views import views_of
from ..console import printable, table
from ..data.dataset import read_data
from ..data.examples import Examples
from ..tasks.registry import task_named
from ..training.prepare import batching, find_models
from .preview_data import chosen, mark_supervised, uses_colour


def preview(recipe: Recipe, count: int = 3, example: int | None = None, out: TextIO | None = None) -> dict[str, list[dict[str, Any]]]:
    """Print counts of training and held-out rows (by class for classifiers), then `count` examples drawn by the recipe's seed, or the example
    with the number `example`. Returns the counts by setting."""
    out, task, sequences = out or sys.stdout, task_named(recipe.task), recipe.task in SEQUENCES
    teachers = used_teachers(recipe)
    rows = read_data(recipe.data, views_of(one for _, one in teachers))
    models = find_models(recipe.student, (), open_caches=False)
    processor = task.find_processor(recipe.student, models, recipe.data, rows)
    data = task.encode(rows, recipe.data, batching(recipe.train, recipe.seed, False), as_tuple(recipe.teacher), processor)
    parts = {"data.train": data.train, "data.validation": data.validation}
    numbers = {setting: (_targets if sequences else _classes)(part) for setting, part in parts.items() if part is not None}
    for setting, found in numbers.items():
        print(f"{setting}\n{table(found)}", file=out)
    read_rows = [row for read in rows["data.train"] for row in read.rows]
    for i in chosen(len(data.train), count, example, recipe.seed):
        head, read = f"\nexample {i} of {len(data.train)}  {data.places[i]}", printable(data.train.inputs.shown(i, processor.reader))
        if not sequences:
            name, length = data.train.names[data.train.labels[i]], int(data.train.lengths[i])
            print(f"{head}  length {length:,}, class {name!r}\n{read}", file=out)
        else:
            ids, loss_mask = data.train.example(i)
            target = mark_supervised(ids, loss_mask, processor.reader, uses_colour(out))
            print(
                f"{head}  {len(ids)} tokens of the decoder, {int(loss_mask.sum())} of them supervised\nsource  {read}\ntarget  {target}",
                file=out,
            )
        for setting, one in teachers:
            if one.reads:
                print(f"{setting} reads {one.reads}  {_written(read_rows[data.train.row[i]][one.reads])}", file=out)
    return numbers


def _written(value: Any) -> str:
    """A column's value as it is in the row. It is not tokenised: its teacher may not exist yet."""
    if isinstance(value, dict):  # a file as `datasets` writes it
        value = value.get("bytes") or value.get("path")
    return f"{len(value):,} bytes" if isinstance(value, bytes) else printable(str(value))


def _classes(examples: Examples) -> list[dict[str, Any]]:
    lengths = {name: examples.lengths[examples.labels == i] for i, name in enumerate(examples.names)}
    return [
        {"class": name, "examples": len(of), "shortest": int(of.min()) if len(of) else 0, "longest": int(of.max(initial=0))}
        for name, of in lengths.items()
    ]


def _targets(examples: Examples) -> list[dict[str, Any]]:
    """Counts of examples and of their targets. Lengths are those of the targets, in tokens."""
    counts, of = examples.counts, examples.num_targets
    left_out = {name: counts.get(key, 0) for name, key in (("too long", "too_long"), ("no target", "unsupervised"), ("marked", "marked"))}
    lengths = {"targets": int(of.sum()), "shortest": int(of.min()), "longest": int(of.max())}
    return [{"examples": len(examples), **lengths, **left_out}]
