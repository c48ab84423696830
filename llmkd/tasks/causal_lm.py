"""Causal language models: rows of text or tokens, compared at every supervised token."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.fields import as_tuple, with_setting_names
from ..config.recipe import Data, Source, Student, Teacher, Validation
from ..console import info
from ..data.batching import Batching
from ..data.dataset import (
    Dataset,
    encode_choices,
    encode_sources,
    refuse_too_few_positions,
    refuse_unknown_tokens,
    report_examples,
    report_notes,
    teacher_index,
)
from ..data.encoding import template_process, token_cache
from ..data.encoding.edited_prompts import with_edits
from ..data.encoding.end_tokens import end_tokens, report_end_tokens
from ..data.encoding.same_tokenizer import refuse_other_ends, refuse_other_tokens, report_chosen
from ..data.encoding.tokenizer import load_tokenizer, save_tokenizer, shared_vocab
from ..data.examples import Examples
from ..data.reading.sources import Rows
from ..data.stream import StreamSource
from ..model_folder.files import ModelFiles, rows_of
from ..model_folder.generation import generation_settings, stopping_at
from ..teachers.resolve import TeacherSource
from .planned import joined, planned
from .task import EncodedData, FoundModels

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.kinds import ModelKind


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """The tokenizer as a `Processor`. The tokenizer's own padding and truncation are not used."""

    reader: object
    vocab: int
    labels: tuple[str, ...] = ()

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        return {"the tokenizer": token_cache.tokenizer_hash(self.reader)}

    @functools.cached_property
    def provenance(self) -> dict[str, str]:
        template = hashlib.sha256(json.dumps(self.reader.chat_template).encode()).hexdigest()
        return {"tokenizer": token_cache.tokenizer_hash(self.reader, template=False), "chat_template": template}

    def save(self, folder: Path) -> None:
        save_tokenizer(self.reader, folder)


class TokenMeasures:
    """See `Measures`: perplexity."""

    rows = kept = shown = ()

    def of_rows(self, log_q_nV: "Tensor", labels_n: "Tensor") -> "dict[str, Tensor]":
        return {}

    def metrics(self, means: dict[str, float], sums: dict[str, np.ndarray], weights: np.ndarray) -> dict[str, float]:
        return {"perplexity": math.exp(min(means["ce"], 700))}

    def of_texts(self, model: Any, data: Examples, accelerator: Any) -> dict[str, float]:
        return {}


class CausalLM:
    """See `Task`."""

    name = "causal_lm"

    def measures(self, processor: Tokenizer, validation: Validation) -> TokenMeasures:
        return TokenMeasures()

    def find_processor(self, student: Student, models: FoundModels, data: Data, rows: dict[str, list[Rows]]) -> Tokenizer:
        refuse_too_few_positions(data, models.configs)
        return Tokenizer(*find_tokenizer(student, models, data, rows))

    def encode(
        self, rows: dict[str, list[Rows]], data: Data, batching: Batching, teachers: tuple[Teacher, ...], processor: Tokenizer
    ) -> EncodedData:
        return encode_data(rows, data, batching, teachers, processor.reader, processor.vocab)

    def report(self, data: EncodedData, student: Student, files: ModelFiles | None, processor: Tokenizer) -> None:
        report_end_tokens(data.end_tokens, generation_before(student, files), processor.reader)

    def student_files(self, files: ModelFiles | None, processor: Tokenizer) -> ModelFiles | None:
        return files

    def kind(self, processor: Tokenizer, examples: Examples | None = None, setting: str = "student.model") -> "ModelKind":
        from ..models.kinds import CAUSAL

        return CAUSAL

    def generation(self, student: Student, files: ModelFiles | None, end_tokens: set[int]) -> dict:
        return stopping_at(generation_before(student, files), end_tokens)

    def pipeline(self, processor: Tokenizer) -> str:
        return "text-generation"


def find_tokenizer(student: Student, models: FoundModels, data: Data, rows: dict[str, list[Rows]]) -> tuple[object, int]:
    """The student's tokenizer, and the size of the vocabulary that it and all models share. UserError if a teacher has another tokenizer."""
    sources = [
        (name, source, read)
        for setting in rows
        for (name, source), read in itertools.zip_longest(
            with_setting_names(getattr(data, setting.removeprefix("data.")), setting), rows[setting]
        )
    ]
    tokenizer = _tokenizer(student, models.student)
    for teacher in models.teachers:
        if teacher.files:
            check_same_tokenizer(tokenizer, teacher, sources)
    rows_known = {setting: rows_of(config) for setting, config in models.configs.items()}
    rows_known |= {f"{teacher.setting}.cache.path": teacher.cache.header["vocab"] for teacher in models.teachers if teacher.cache}
    return tokenizer, shared_vocab(tokenizer, rows_known)


def encode_data(
    rows: dict[str, list[Rows]], data: Data, batching: Batching, teachers: tuple[Teacher, ...], tokenizer, vocab: int
) -> EncodedData:
    """Encode the rows that were read: training examples, as a batch source too, held-out examples and multiple-choice questions."""
    how = (data, tokenizer, teachers)
    held_out = joined("validation", encode_sources(rows["data.validation"], data.validation, "data.validation", *how))
    if data.streaming:
        source = _stream(data, batching, teachers, tokenizer)
        train, content = Dataset("train", source.examples, source.places, [source.origin]), source.content
        ends = source.end_tokens
        report_notes(dataclasses.replace(train, name="train, the first step"))
        refuse_unknown_tokens(vocab, train, tokenizer)
    else:
        parts = encode_sources(rows["data.train"], data.train, "data.train", *how)
        if data.augment:
            parts = _with_edits(parts, rows["data.train"], data, tokenizer)
        train = joined("train", parts)
        content = "\n".join(read.content for read in rows["data.train"])
        refuse_unknown_tokens(vocab, train, tokenizer)
        source, train, drawn = planned(train, data, batching)
        held_out = drawn or held_out
        ends = end_tokens(train.examples, data, tokenizer)
    if held_out:
        report_examples(held_out)
        refuse_unknown_tokens(vocab, held_out, tokenizer)
    identity = {"the training data": content, "the held-out data": " ".join(read.content for read in rows["data.validation"])}
    origins = {"data.train": train.origins, "data.validation": held_out.origins if held_out else []}
    questions = None
    if data.choices:
        (read,) = rows["data.choices"]
        questions, origins["data.choices"] = encode_choices(read, data.choices, data, tokenizer), [read.origin]
    if not data.streaming:
        template_process.close()
    validation, places = (held_out.examples, held_out.places) if held_out else (None, [])
    return EncodedData(source, train.examples, train.places, validation, places, questions, identity, ends, origins)


def _with_edits(parts: list[Dataset], rows: list[Rows], data: Data, tokenizer) -> list[Dataset]:
    """The training sources' data sets with prompts that are edited anew in every epoch."""
    every = zip(parts, rows, as_tuple(data.train), strict=True)
    return [dataclasses.replace(part, examples=with_edits(part.examples, read, source, data, tokenizer)) for part, read, source in every]


def generation_before(student: Student, files: ModelFiles | None) -> dict:
    """The generation config of the model that the student is trained from."""
    config, folders = (files.config, (files.adapter, files.base)) if files else (student.architecture, ())
    return generation_settings(config, folders, "student.model")


def _stream(data: Data, batching: Batching, teachers: tuple[Teacher, ...], tokenizer) -> StreamSource:
    (source,) = as_tuple(data.train)
    stream = StreamSource(source, data, tokenizer, batching, teacher_index(source, teachers))
    info(f"train: streaming {source.path}")
    return stream


def _tokenizer(student: Student, files: ModelFiles | None):
    if not student.tokenizer:
        return load_tokenizer(str(files.base), "student.model")
    tokenizer = load_tokenizer(student.tokenizer, "student.tokenizer")
    if files and (files.base / "tokenizer.json").exists():
        own = load_tokenizer(str(files.base), "student.model")
        refuse_other_tokens(tokenizer, own, "student.tokenizer", "it", f"{files.base}'s own")
        report_chosen(tokenizer, own, files.base)
    return tokenizer


def check_same_tokenizer(tokenizer, teacher: TeacherSource, sources: list[tuple[str, Source, Rows | None]]) -> None:
    files, setting = teacher.files, f"{teacher.setting}.model"
    theirs = load_tokenizer(str(files.with_tokenizer), setting)
    refuse_other_tokens(tokenizer, theirs, setting, "the student's tokenizer", f"{teacher.settings.model}'s")
    refuse_other_ends(tokenizer, theirs, setting, files.with_tokenizer, sources)
