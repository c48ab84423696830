"""Moved here from another file."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config.fields import with_setting_names
from ..config.recipe import Data, Source, Teacher
from ..console import info, warn
from ..errors import UserError
from ..model_files import positions
from .batching import num_draws
from .encoding import token_cache
from .encoding.formats import FORMATS
from .encoding.tokenizer import vocab_size
from .examples import ALL_TEACHERS, Examples, merge
from .reading.sources import Rows, read_sources


@dataclass(frozen=True)
class Questions:
    """Multiple choice: the encoded choices, how many each question has, and which is right."""

    examples: Examples
    counts: list[int]
    answers: list[int]


def read_data(data: Data) -> dict[str, list[Rows]]:
    """The rows of every setting that names any, all of them checked; but those of a stream are read when they are trained on."""
    wanted = {"data.train": None if data.streaming else data.train, "data.validation": data.validation, "data.choices": data.choices}
    out, problems = {}, []
    for setting, value in wanted.items():
        try:
            out[setting] = read_sources(value, setting, choices=setting == "data.choices")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    _warn_of_shared(out, data)
    return out


def _warn_of_shared(rows: dict[str, list[Rows]], data: Data) -> None:
    """Rows that are trained on say little when they are measured on as well."""

    def read(setting: str, value) -> list[tuple[str, str, str]]:
        of_setting = zip(with_setting_names(value, setting), rows[setting], strict=False)  # a stream's rows are not read yet
        return [(name, source.path, one.content.partition(" [")[0]) for (name, source), one in of_setting]  # whatever its limit

    train, held_out = read("data.train", data.train), read("data.validation", data.validation)
    pairs = [(a, b) for a in held_out for b in train]
    if data.validation_fraction:
        pairs += [(b, a) for i, a in enumerate(train) for b in train[i + 1 :]]
    for (name, path, content), (other, _, others) in pairs:
        if content == others:
            warn(
                f"warning: {name} and {other} are read from the same data ({path}), so held-out metrics would be of rows that are trained on"
            )


def encode_sources(
    rows: dict[str, list[Rows]], setting: str, data: Data, tokenizer, teachers: tuple[Teacher, ...] = (), said=info
) -> Examples | None:
    """A setting's examples, from all its sources; where there are several, each is reported."""
    parts = []
    of_setting = with_setting_names(data.train if setting == "data.train" else data.validation, setting)
    for (name, source), read in zip(of_setting, rows[setting], strict=True):
        parts.append(token_cache.load_or_encode(read, source, data, tokenizer, name, said))
        parts[-1].teacher_index[:] = teacher_index(source, teachers)
        read.origin["used"] = len(set(parts[-1].row.tolist()))
        if len(of_setting) > 1 and said:
            report_examples(parts[-1], f"{name} ({source.path})")
    return merge(parts) if parts else None


def teacher_index(source: Source, teachers: tuple[Teacher, ...]) -> int:
    """The number of the teacher that a source's rows are left to, or ALL_TEACHERS."""
    if source.teacher is None or len(teachers) < 2:
        return ALL_TEACHERS
    return [teacher.name for teacher in teachers].index(source.teacher)


def refuse_empty_sources(train: Examples, data: Data) -> None:
    """A source whose weight leaves none of its examples in an epoch is a mistake; so is one that is held out as a whole."""
    for i, (setting, source) in enumerate(with_setting_names(data.train, "data.train")):
        count = int((train.source == i).sum())
        if not count:
            raise UserError(f"{setting}: data.validation_fraction leaves none of its rows to train on; lower it, or leave the source out")
        if not num_draws(count, source.weight):
            raise UserError(f"{setting}.weight: {source.weight:g} of {count} examples is none; raise it, or leave the source out")


def refuse_too_few_positions(data: Data, configs: dict[str, dict]) -> None:
    """Examples may not be longer than what a model has positions for; `configs` are those of each setting's model."""
    for setting, config in configs.items():
        longest = positions(config)
        if longest and data.max_length > longest:
            raise UserError(f"data.max_length: found {data.max_length}, and {setting} has {longest} positions; lower it")
        text = config.get("text_config", config)
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        short = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
        if rope.get("rope_type", rope.get("type")) == "longrope" and short and data.max_length > short:
            warn(
                f"note: {setting}: its rotary positions (longrope) are others for all of a micro-batch whose longest example exceeds {short} tokens, "
                "so results depend on what stands together; a lower data.max_length, or train.micro_batch_size: 1 without packing, avoids it"
            )


def refuse_unknown_tokens(vocab: int, examples: Examples, places: Sequence[str], tokenizer) -> None:
    """Tokens that the tokenizer has and a model has not would be an index error, or on a GPU worse."""
    for i in range(len(examples)) if vocab < vocab_size(tokenizer) else ():
        ids = np.concatenate([of.example(i)[0] for of in (examples, examples.teacher_view) if of is not None])
        if (ids >= vocab).any():
            token = tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise UserError(f"{places[i]}: holds {token!r}, which the tokenizer knows and a model has no row for; remove it from the text")


def hold_out(examples: Examples, share: float) -> tuple[Examples, Examples | None]:
    """Part off a share of the rows, the same ones whatever the run's seed, so that seeds can be compared on them.

    Pieces of one text, or turns of one conversation, stay together.
    """
    rows = sorted(set(examples.row.tolist()))
    count = round(share * len(rows))
    if not count:
        if share:
            raise UserError(f"data.validation_fraction: {share:g} of {len(rows)} rows is none; raise it")
        return examples, None
    if count == len(rows):
        raise UserError(f"data.validation_fraction: {share:g} of {len(rows)} rows leaves none to train on; lower it")
    held = np.isin(examples.row, random.Random("held out").sample(rows, count))
    return examples.subset(~held), examples.subset(held)


def encode_choices(rows: Rows, source: Source, data: Data, tokenizer) -> Questions:
    """One example for each choice of each question; the answer's tokens are supervised."""
    asked = [{column: value for column, value in row.items() if column != "teacher_context"} for row in rows.rows]  # the student alone
    answered = [FORMATS[source.format].with_answer(row, choice) for row in asked for choice in row["choices"]]
    source = dataclasses.replace(source, format=answered[0][1])
    expanded = Rows(
        [row for row, _ in answered],
        [place for row, place in zip(rows.rows, rows.places, strict=True) for _ in row["choices"]],
        rows.content + " choices",
    )
    whole = dataclasses.replace(
        data, too_long="refuse", train_on_input=False, teacher_context=None
    )  # a choice cut short would look the likelier
    examples = token_cache.load_or_encode(expanded, source, whole, tokenizer, "data.choices", info)
    if len(examples) != len(expanded.rows):
        raise UserError(
            f"data.choices: {len(expanded.rows) - len(examples)} of {len(expanded.rows)} choices are empty; give every choice a text"
        )
    return Questions(examples, [len(row["choices"]) for row in rows.rows], [row["answer"] for row in rows.rows])


_NOTES = {
    "as_characters": "{} with the characters of a control token, which stay characters",
    "endless": "{} that the chat template ends with no control token: the student will not learn from them where to stop",
}


def report_examples(examples: Examples, name: str) -> None:
    c = examples.counts
    dropped = [
        f"{c[k]} {words}" for k, words in (("too_long", "too long"), ("unsupervised", "with nothing supervised, dropped")) if c.get(k)
    ]
    info(
        f"{name}: {len(examples)} examples, {len(examples.ids)} tokens, {int(examples.loss_mask.sum())} targets"
        + (f", {len(examples.teacher_view.ids)} tokens for the teacher with its context" if examples.teacher_view is not None else "")
        + (f" ({', '.join(dropped)})" if dropped else "")
    )
    report_notes(examples, name)


def report_notes(examples: Examples, name: str) -> None:
    """What a person should know of the examples, said once."""
    c = examples.counts
    for key, words in _NOTES.items():
        if c.get(key):
            warn(f"note: {name}: {words.format(c[key])}")
