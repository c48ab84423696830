"""A recipe's data: reading its rows, encoding them as examples, holding some out, and multiple-choice questions."""

import dataclasses
import json
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from ..config.fields import with_setting_names
from ..config.recipe import OF_THE_STUDENT, Data, Source, Teacher
from ..console import info, warn
from ..errors import UserError
from ..model_folder.files import positions
from .batching import num_draws
from .encoding.formats import FORMATS
from .encoding.token_cache import load_or_encode
from .encoding.tokenizer import vocab_size
from .examples import ALL_TEACHERS, Examples, merge
from .notes import example_notes
from .reading.sources import Rows, read_sources
from .reading.unread import note_unread


@dataclass(frozen=True)
class Dataset:
    """The examples of a setting, or of one of its sources."""

    name: str  # in reports
    examples: Examples
    places: Sequence[str]  # [examples]: the file:line of each
    origins: list[dict]  # each source's entry in the model card: path, name, split, revision, rows, and rows that were used

    def subset(self, name: str, keep: np.ndarray, origins: list[dict]) -> "Dataset":
        """The examples where the boolean array `keep` [examples] is true."""
        return Dataset(name, self.examples.subset(keep), [self.places[i] for i in np.flatnonzero(keep)], origins)


@dataclass(frozen=True)
class Questions:
    """Multiple-choice questions: the encoded choices of all questions, each question's number of choices, and the index of its answer."""

    examples: Examples
    counts: list[int]
    answers: list[int]


# ---- reading


def read_data(data: Data, views: Collection[str] = ()) -> dict[str, list[Rows]]:
    """The checked rows of data.train, data.validation and data.choices, by setting; none of a stream, which is read during training.

    views   the columns that teachers read in place of the student's

    UserError names every bad row.
    """
    wanted = {"data.train": None if data.streaming else data.train, "data.validation": data.validation, "data.choices": data.choices}
    out, problems = {}, []
    for setting, value in wanted.items():
        try:
            out[setting] = read_sources(value, setting, setting == "data.choices", views)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    for setting, value in wanted.items():
        for (name, source), read in zip(with_setting_names(value, setting), out[setting], strict=True):
            note_unread(name, source, read.unread, len(read.rows))
            read.report_chosen(source)
    _warn_of_shared_data(out, data)
    return out


def _warn_of_shared_data(rows: dict[str, list[Rows]], data: Data) -> None:
    """Warn if held-out rows and training rows come from the same data."""

    def read(setting: str, value) -> list[tuple[str, Source, Rows]]:
        of_setting = zip(with_setting_names(value, setting), rows[setting], strict=False)  # rows of a stream are not read yet
        return [(name, source, one) for (name, source), one in of_setting]

    train, held_out = read("data.train", data.train), read("data.validation", data.validation)
    pairs = [(a, b) for a in held_out for b in train]
    if data.validation_fraction:
        pairs += [(b, a) for i, a in enumerate(train) for b in train[i + 1 :]]
    for (name, source, one), (other, others_source, others) in pairs:
        same = one.content.partition(" [")[0] == others.content.partition(" [")[0]  # without the part for limit
        if same and (source.where or others_source.where):
            same = not _texts(one).isdisjoint(_texts(others))
        if same:
            warn(f"warning: {name} and {other} are the same data ({source.path}), so validation metrics would be measured on training rows")


def _texts(rows: Rows) -> set[str]:
    return {json.dumps(row, sort_keys=True, default=_as_text) for row in rows.rows}


def _as_text(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else repr(value)


# ---- encoding


def encode_sources(
    rows: list[Rows], sources: Source | tuple[Source, ...] | None, setting: str, data: Data, tokenizer, teachers: tuple[Teacher, ...] = ()
) -> list[Dataset]:
    """The examples of a setting, one data set for each of its sources. `rows`: the setting's rows from `read_data`."""
    out = []
    for (name, source), read in zip(with_setting_names(sources, setting), rows, strict=True):
        examples = load_or_encode(read, source, data, tokenizer, name)
        examples.teacher_index[:] = teacher_index(source, teachers)
        examples.weigh(dataclasses.asdict(source.loss))
        origin = read.origin | {"used": len(set(examples.row.tolist()))}
        out.append(Dataset(f"{name} ({source.path})", examples, [read.places[i] for i in examples.row], [origin]))
    return out


def join(name: str, parts: list[Dataset]) -> Dataset | None:
    """The data sets of a setting's sources as one; None without any."""
    if not parts:
        return None
    places = [place for part in parts for place in part.places]
    return Dataset(name, merge([part.examples for part in parts]), places, [origin for part in parts for origin in part.origins])


def teacher_index(source: Source, teachers: tuple[Teacher, ...]) -> int:
    """The index of the teacher that a source names for its rows, or ALL_TEACHERS."""
    if source.teacher is None or len(teachers) < 2:
        return ALL_TEACHERS
    return [teacher.name for teacher in teachers].index(source.teacher)


def hold_out(data: Dataset, fraction: float) -> tuple[Dataset, Dataset | None]:
    """Split examples into training and held-out ones; None for the latter if `fraction` is 0.

    The held-out rows do not depend on the run's seed, so runs with different seeds can be compared on them. All examples of a row (pieces
    of a text, turns of a conversation) stay together.
    """
    rows = sorted(set(data.examples.row.tolist()))
    count = round(fraction * len(rows))
    if not count:
        if fraction:
            raise UserError(f"data.validation_fraction: {fraction:g} of {len(rows)} rows is none; raise it to {1 / len(rows):.2g} or more")
        return data, None
    if count == len(rows):
        raise UserError(f"data.validation_fraction: {fraction:g} of {len(rows)} rows leaves none to train on; lower it")
    held = np.isin(data.examples.row, random.Random("held out").sample(rows, count))
    return data.subset(data.name, ~held, data.origins), data.subset("validation", held, [])


def encode_choices(rows: Rows, source: Source, data: Data, tokenizer) -> Questions:
    """One example for each choice of each question, with only the choice supervised, and without a context for the teacher."""
    questions = [{column: value for column, value in row.items() if column != "teacher_context"} for row in rows.rows]
    answered = [FORMATS[source.format].with_answer(row, choice) for row in questions for choice in row["choices"]]
    source = dataclasses.replace(source, format=answered[0][1])
    expanded = Rows(
        [row for row, _ in answered],
        [place for row, place in zip(rows.rows, rows.places, strict=True) for _ in row["choices"]],
        rows.content + " choices",
    )
    # a truncated choice would get a higher likelihood, so choices that are too long are refused
    whole = dataclasses.replace(data, too_long="refuse", train_on_input=False, teacher_context=None)
    examples = load_or_encode(expanded, source, whole, tokenizer, "data.choices")
    if len(examples) != len(expanded.rows):
        raise UserError(
            f"data.choices: {len(expanded.rows) - len(examples)} of {len(expanded.rows)} choices are empty; give every choice a text"
        )
    return Questions(examples, [len(row["choices"]) for row in rows.rows], [row["answer"] for row in rows.rows])


# ---- checks


def refuse_empty_sources(train: Examples, data: Data) -> None:
    """UserError if a source has no example in an epoch, since all are held out or its weight is too small."""
    for i, (setting, source) in enumerate(with_setting_names(data.train, "data.train")):
        count = int((train.source == i).sum())
        if not count:
            raise UserError(f"{setting}: data.validation_fraction leaves none of its rows to train on; lower it, or leave the source out")
        if not num_draws(count, source.weight):
            raise UserError(f"{setting}.weight: {source.weight:g} of {count} examples is none; raise it, or leave the source out")


def refuse_uncounted(held_out: Examples, best_by: str | None) -> None:
    """UserError if the examples that data.validation_fraction holds out have no weight in a metric that is needed."""
    for name, needed in (("ce", "cross-entropy is measured on them"), ("kd", f"checkpoint.best_by is {best_by}")):
        if not (held_out.weight(name) > 0).any() and (name == "ce" or best_by not in (None, *OF_THE_STUDENT)):
            raise UserError(
                f"data.validation_fraction: none of the rows that it holds out has a loss.{name} above 0, but {needed}; raise it, or give "
                "data.validation"
            )


def refuse_too_few_positions(data: Data, configs: dict[str, dict]) -> None:
    """UserError if data.max_length exceeds a model's positions. `configs`: each model's config.json, by setting."""
    for setting, config in configs.items():
        longest = positions(config)
        if longest and data.max_length > longest:
            raise UserError(f"data.max_length: found {data.max_length}, and {setting} has {longest} positions; lower it")
        text = config.get("text_config", config)
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        short = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        if rope.get("rope_type", rope.get("type")) == "longrope" and short and data.max_length > short:
            warn(
                f"note: {setting}: its rotary embeddings (longrope) change for every example of a micro-batch whose longest one exceeds {short} "
                "tokens, so results depend on the micro-batches; to avoid it, lower data.max_length, or set train.micro_batch_size: 1 without packing"
            )


def refuse_unknown_tokens(vocab: int, data: Dataset, tokenizer) -> None:
    """UserError if an example has a token without a row in a model's embeddings, which would be an index error, or worse on a GPU."""
    views = [view for view in (data.examples, data.examples.teacher_view) if view is not None]
    for i in range(len(data.examples)) if vocab < vocab_size(tokenizer) else ():
        ids = np.concatenate([view.example(i)[0] for view in views])
        if (ids >= vocab).any():
            token = tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise UserError(f"{data.places[i]}: contains the token {token!r}, for which a model has no row; remove it from the text")


# ---- reports


def report_examples(data: Dataset) -> None:
    """Print one line with the numbers of examples, tokens and targets, and the notes."""
    examples, c = data.examples, data.examples.counts
    reasons = {"too_long": "too long", "unsupervised": "with nothing supervised, dropped", "marked": "marked as not trained on, dropped"}
    dropped = [f"{c[k]} {words}" for k, words in reasons.items() if c.get(k)]
    info(
        f"{data.name}: {len(examples)} examples, {examples.described}"
        + "".join(f", {said}" for said in weights_in_words(examples))
        + (f" ({', '.join(dropped)})" if dropped else "")
    )
    report_notes(data)


def weights_in_words(examples: Examples) -> list[str]:
    """A phrase for each part of the loss in which examples have weights other than 1: the weights, and the number of targets with them."""
    said = []
    for name, (_, carriers) in examples.weighted(range(len(examples))).items():
        values = ", ".join(f"{weight:g}" for weight in np.unique(examples.weights[name]))
        said.append(f"loss.{name} {values} ({carriers} targets carry it)")
    return said


def report_notes(data: Dataset) -> None:
    """Print a line for each oddity of the examples that may matter."""
    for note in example_notes(data.examples.counts):
        kind, _, words = note.partition(": ")
        warn(f"{kind}: {data.name}: {words}")
