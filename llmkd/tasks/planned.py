"""Batch sources of planned examples, and the parts of a recipe's data that every task makes alike."""

import dataclasses

from ..config.fields import as_tuple
from ..config.recipe import Data
from ..data.batch_source import PlannedSource
from ..data.batching import Batching, BatchPlan
from ..data.dataset import Dataset, hold_out, join, refuse_empty_sources, report_examples
from ..data.examples import Examples


def batch_plan(batching: Batching, examples: Examples, weights: tuple[float, ...]) -> BatchPlan:
    """The order of the training examples. `weights`: passes over each source in an epoch."""
    return BatchPlan(
        lengths=examples.lengths,
        seed=batching.seed,
        batch_size=batching.batch_size,
        epochs=batching.epochs,
        max_steps=batching.max_steps,
        group_by_length=batching.group_by_length,
        sources=examples.source,
        weights=weights,
    )


def joined(name: str, parts: list[Dataset]) -> Dataset | None:
    """The examples of a setting; of several sources each is reported."""
    for part in parts if len(parts) > 1 else ():
        report_examples(part)
    return join(name, parts)


def planned(train: Dataset, data: Data, batching: Batching) -> tuple[PlannedSource, Dataset, Dataset | None]:
    """Training examples that are all in memory: their source, and the examples without those that are held out, and these."""
    held_out = None
    if data.validation_fraction:
        report_examples(dataclasses.replace(train, name="train and validation"))
        train, held_out = hold_out(train, data.validation_fraction)
    refuse_empty_sources(train.examples, data)
    report_examples(train)
    plan = batch_plan(batching, train.examples, tuple(source.weight for source in as_tuple(data.train)))
    return PlannedSource(train.examples, train.places, plan, batching.micro_batch_size), train, held_out
