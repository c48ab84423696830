"""`llmkd data` for classification: the rows of each class, and examples as the student reads them. Loads no model."""

import random
import sys
from typing import Any, TextIO

from ..config.fields import as_tuple
from ..config.recipe import Recipe
from ..config.views import views_of
from ..console import printable, table
from ..data.dataset import read_data
from ..data.examples import Examples
from ..errors import UserError
from ..tasks.registry import task_named
from ..training.prepare import batching, find_models


def preview(recipe: Recipe, count: int = 3, example: int | None = None, out: TextIO | None = None) -> dict[str, list[dict[str, Any]]]:
    """Print how many examples each class has in training and held-out rows, then `count` examples drawn by the recipe's seed, or the one numbered
    `example`. Returns the counts."""
    out, task = out or sys.stdout, task_named(recipe.task)
    rows, models = read_data(recipe.data, views_of(as_tuple(recipe.teacher))), find_models(recipe.student, (), open_caches=False)
    processor = task.find_processor(recipe.student, models, recipe.data, rows)
    data = task.encode(rows, recipe.data, batching(recipe.train, recipe.seed, False), as_tuple(recipe.teacher), processor)
    parts = {"data.train": data.train, "data.validation": data.validation}
    numbers = {setting: _classes(part) for setting, part in parts.items() if part is not None}
    for setting, found in numbers.items():
        print(f"{setting}\n{table(found)}", file=out)
    for i in _chosen(len(data.train), count, example, recipe.seed):
        name, length = data.train.names[data.train.labels[i]], int(data.train.lengths[i])
        read = data.train.inputs.shown(i, processor.reader)
        print(f"\nexample {i} of {len(data.train)}  {data.places[i]}  length {length:,}, class {name!r}\n{printable(read)}", file=out)
    return numbers


def _classes(examples: Examples) -> list[dict[str, Any]]:
    lengths = {name: examples.lengths[examples.labels == i] for i, name in enumerate(examples.names)}
    return [
        {"class": name, "examples": len(of), "shortest": int(of.min()) if len(of) else 0, "longest": int(of.max(initial=0))}
        for name, of in lengths.items()
    ]


def _chosen(every: int, count: int, example: int | None, seed: int) -> list[int]:
    if example is None:
        return sorted(random.Random(f"show {seed}").sample(range(every), min(count, every)))
    if not 0 <= example < every:
        raise UserError(f"--example: found {example}, and there are examples 0 to {every - 1}")
    return [example]
