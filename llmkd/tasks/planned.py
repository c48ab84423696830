"""Batch sources of examples that are all in memory, and the encoding of a recipe's data as far as it is the same for all tasks."""

import dataclasses
import hashlib
from collections.abc import Callable

from ..config.fields import as_tuple, with_setting_names
from ..config.recipe import Data, Source
from ..data.batch_source import PlannedSource
from ..data.batching import Batching, BatchPlan
from ..data.dataset import Dataset, hold_out, join, refuse_empty_sources, report_examples
from ..data.examples import Examples
from ..data.reading.sources import Rows
from .task import EncodedData


def batch_plan(batching: Batching, examples: Examples, weights: tuple[float, ...]) -> BatchPlan:
    """The order of the training examples. `weights`: the passes over each source in an epoch."""
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
    """The examples of a setting's sources as one; with several, each is reported."""
    for part in parts if len(parts) > 1 else ():
        report_examples(part)
    return join(name, parts)


def planned(train: Dataset, data: Data, batching: Batching) -> tuple[PlannedSource, Dataset, Dataset | None]:
    """The batch source of training examples, the training examples that are not held out, and the held-out ones (`data.validation_fraction`)."""
    held_out = None
    if data.validation_fraction:
        report_examples(dataclasses.replace(train, name="train and validation"))
        train, held_out = hold_out(train, data.validation_fraction)
    refuse_empty_sources(train.examples, data)
    report_examples(train)
    plan = batch_plan(batching, train.examples, tuple(source.weight for source in as_tuple(data.train)))
    return PlannedSource(train.examples, train.places, plan, batching.micro_batch_size), train, held_out


def encoded_data(
    rows: dict[str, list[Rows]],
    data: Data,
    batching: Batching,
    encode: Callable[[Rows, Source, str], Dataset],
    check: Callable[[Dataset, Dataset], None] = lambda train, held_out: None,
    end_tokens: frozenset[int] = frozenset(),
) -> EncodedData:
    """Training and held-out examples of a task that cannot stream. Their identity hashes the rows and the examples, since rows may name files.

    encode       from a source's rows, its settings and the name of its setting to its examples
    check        of training and held-out examples: UserError if they do not fit each other
    end_tokens   see `EncodedData`
    """

    def of(setting: str) -> list[Dataset]:
        named = with_setting_names(getattr(data, setting.removeprefix("data.")), setting)
        return [encode(read, source, name) for (name, source), read in zip(named, rows[setting], strict=True)]

    held_out = joined("validation", of("data.validation"))
    source, train, drawn = planned(joined("train", of("data.train")), data, batching)
    held_out = drawn or held_out
    if held_out:
        check(train, held_out)
        report_examples(held_out)
    identity = {
        name: "\n".join([*(read.content for read in rows[setting]), *([_hashes(part)] if part else [])])
        for name, setting, part in (("the training data", "data.train", train), ("the held-out data", "data.validation", held_out))
    }
    origins = {"data.train": train.origins, "data.validation": held_out.origins if held_out else []}
    validation, places = (held_out.examples, held_out.places) if held_out else (None, [])
    return EncodedData(source, train.examples, train.places, validation, places, None, identity, set(end_tokens), origins)


def _hashes(data: Dataset) -> str:
    return hashlib.sha256("".join(data.examples.content_hash(i) for i in range(len(data.examples))).encode()).hexdigest()
