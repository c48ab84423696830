"""`llmkd data`: counts of a recipe's tokenised data, and examples as text with the supervised tokens marked. Loads no model."""

import contextlib
import os
import random
import sys
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ..config.fields import as_tuple
from ..config.formats import FORMATS
from ..config.recipe import Recipe, Student, used_teachers
from ..console import align, printable
from ..data.batching import Batching
from ..data.dataset import (
    Dataset,
    encode_sources,
    hold_out,
    join,
    read_data,
    refuse_empty_sources,
    refuse_too_few_positions,
    report_notes,
    weights_in_words,
)
from ..data.encoding.end_tokens import end_tokens, report_end_tokens
from ..data.encoding.supervised_text import supervised_spans
from ..data.encoding.token_rows import vocabulary_hash
from ..data.encoding.tokenizer import student_base, student_tokenizer
from ..data.examples import Examples, merge
from ..data.reading.sources import Rows
from ..data.stream import StreamSource
from ..errors import UserError
from ..model_folder.generation import generation_settings
from ..model_folder.weights import read_json

_MARKS = ("", "", "⟦", "⟧")  # before and after unsupervised text, before and after supervised text
_COLOURS = ("\x1b[2m", "\x1b[0m", "\x1b[1;32m", "\x1b[0m")


def preview(recipe: Recipe, count: int = 3, example: int | None = None, out: TextIO | None = None) -> dict[str, list[dict[str, Any]]]:
    """Print counts of every source, then `count` examples drawn by the recipe's seed, or the example with the number `example`. Returns the
    counts by setting."""
    out = out or sys.stdout
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="backslashreplace")  # for terminals that cannot show a character
    rows, tokenizer = read_data(recipe.data), student_tokenizer(recipe.student)
    configs = _configs(recipe)
    refuse_too_few_positions(recipe.data, configs)
    numbers: dict[str, list[dict[str, Any]]] = {}
    train = _print_counts(recipe, "data.train", rows, tokenizer, numbers, out)
    if not recipe.data.streaming:
        refuse_empty_sources(hold_out(train, recipe.data.validation_fraction)[0].examples, recipe.data)
    if recipe.data.validation_fraction:
        print(f"data.validation_fraction: {recipe.data.validation_fraction:g} of these rows, drawn by seed, are held out", file=out)
    if rows["data.validation"]:
        _print_counts(recipe, "data.validation", rows, tokenizer, numbers, out)
    examples = train.examples
    folders = [student_base(recipe.student)] if recipe.student.model else []
    settings = generation_settings(configs["student.model"], folders, "student.model")
    if not all(FORMATS[source.format].is_text for source in (*as_tuple(recipe.data.train), *as_tuple(recipe.data.validation))):
        print(f"the student's tokenizer, as rows of tokens name it: {vocabulary_hash(tokenizer)}", file=out)
    report_end_tokens(end_tokens(examples, recipe.data, tokenizer), settings, tokenizer)
    for i in chosen(len(examples), count, example, recipe.seed):
        ids, loss_mask = examples.example(i)
        head = f"example {i} of {len(examples)}  {train.places[i]}  {len(ids)} tokens, {int(loss_mask.sum())} of them supervised"
        print(f"\n{head}\n{mark_supervised(ids, loss_mask, tokenizer, uses_colour(out))}", file=out)
        theirs = examples.teacher_view.example(i) if examples.teacher_view is not None else (ids, loss_mask)
        if len(theirs[0]) != len(ids) or (theirs[0] != ids).any():
            print(f"teacher's input  {len(theirs[0])} tokens\n{mark_supervised(*theirs, tokenizer, uses_colour(out))}", file=out)
    return numbers


def _configs(recipe: Recipe) -> dict[str, dict]:
    """The config.json of each model, by setting; without teachers that are not trained yet."""
    configs = {"student.model": recipe.student.architecture or _config(student_base(recipe.student))}
    for setting, one in used_teachers(recipe):
        with contextlib.suppress(UserError):
            if one.model:
                configs[f"{setting}.model"] = _config(student_base(Student(model=one.model, base=one.base, revision=one.revision)))
    return configs


def _config(folder: Path) -> dict:
    return read_json(folder / "config.json", "student.model") if (folder / "config.json").exists() else {}


def _print_counts(recipe: Recipe, setting: str, rows: dict[str, list[Rows]], tokenizer, numbers: dict, out: TextIO) -> Dataset:
    """Print counts of a setting's sources and notes on them, add the counts to `numbers`, and return the setting's examples."""
    data, train = recipe.data, recipe.train
    if setting == "data.train" and data.streaming:
        (source,) = as_tuple(data.train)
        stream = StreamSource(source, data, tokenizer, Batching(recipe.seed, train.batch_size, train.batch_size, max_steps=train.max_steps))
        print("the first step of a stream:", file=out)
        parts = [Dataset(f"{setting} ({source.path})", stream.examples, stream.places, [stream.origin])]
    else:
        parts = encode_sources(rows[setting], data.train if setting == "data.train" else data.validation, setting, data, tokenizer)
    numbers[setting] = counts([part.examples for part in parts], [part.name for part in parts])
    print(table(numbers[setting]), file=out)
    for part in parts:
        if said := weights_in_words(part.examples):
            print(f"{part.name}: {', '.join(said)}", file=out)
        report_notes(part)
    return join(setting, parts)


def chosen(every: int, count: int, example: int | None, seed: int) -> list[int]:
    """The numbers of the examples to show, of `every` examples: `example`, or `count` of them drawn by seed."""
    if example is None:
        return sorted(random.Random(f"show {seed}").sample(range(every), min(count, every)))
    if not 0 <= example < every:
        raise UserError(f"--example: found {example}, and there are examples 0 to {every - 1}")
    return [example]


def counts(parts: list[Examples], names: list[str]) -> list[dict[str, Any]]:
    """Counts of each source and, if there are several, of all together. Lengths are in tokens."""
    out = []
    for name, part in [*zip(names, parts, strict=True), *([("in total", merge(parts))] if len(parts) > 1 else [])]:
        c, lengths = part.counts, part.lengths
        low, median, high, most = np.percentile(lengths, [0, 50, 95, 100]).tolist() if len(lengths) else [0] * 4
        found = {"source": name, "rows": c["rows"], "examples": len(part), "tokens": c["tokens"], "targets": c["targets"]}
        found |= {
            "supervised": c["targets"] / max(1, c["tokens"]),
            "too_long": c["too_long"],
            "no_answer": c["unsupervised"],
            "marked": c["marked"],
        }
        out.append(found | {"shortest": int(low), "median": median, "percentile_95": high, "longest": int(most)})
    return out


def table(rows: list[dict[str, Any]]) -> str:
    """The counts as text."""
    heads = {"source": "", "too_long": "too long", "no_answer": "no answer", "percentile_95": "95 %"}
    lines = [[heads.get(name, name) for name in rows[0]]]
    for row in rows:
        shown = row | {"supervised": f"{row['supervised']:.1%}"}
        lines.append([value if isinstance(value, str) else f"{round(value):,}" for value in shown.values()])
    return "\n".join(line.rstrip() for line in align(lines))


def mark_supervised(ids, loss_mask, tokenizer, colour: bool) -> str:
    """An example as text, with its control tokens, and the supervised spans in brackets or in colour."""
    plain_on, plain_off, on, off = _COLOURS if colour else _MARKS
    out = []
    for text, supervised in supervised_spans([int(i) for i in ids], [bool(m) for m in loss_mask], tokenizer):
        text = printable(text)
        if text:
            out.append(f"{on}{text}{off}" if supervised else f"{plain_on}{text}{plain_off}")
    return "".join(out)


def uses_colour(out: TextIO) -> bool:
    """Colour on a terminal unless NO_COLOR is set, and anywhere if FORCE_COLOR is set (no-color.org, force-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or out.isatty()
