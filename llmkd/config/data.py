"""The data's settings: where rows come from, what they are, what becomes of them. A part of `recipe.py`."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from .fields import Count, OneOrMany, Seed, as_tuple, changeable, config_dataclass, fixed

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Column:
    kind: Literal["text", "messages", "text or messages", "tools"] = "text"
    optional: bool = False  # a file need not have it


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """What the rows of a format hold. How a row becomes text is in data/encoding/formats.py: a new format is an entry here and one there."""

    row: dict[str, Column]
    answer: str | None = None  # the column that a multiple-choice question lacks, since its choices stand for it
    supervised: Literal["answer", "all"] = "answer"  # with "all" there is no answer to choose, and a text may be split
    template: Literal["optional", "always", "never"] = "never"  # whether the tokenizer's chat template renders it

    @property
    def columns(self) -> dict[str, Column]:
        """Of a row, with the one that every format has."""
        return {**self.row, "teacher_context": Column(optional=True)}

    @property
    def has_messages(self) -> bool:
        return any("messages" in column.kind for column in self.row.values())

    def names(self, choices: bool = False) -> tuple[str, ...]:
        """What `Source.fields` may rename: columns, what a message holds, and what a multiple-choice question has."""
        in_message = ("role", "content") if self.has_messages else ()
        return (*self.row, *in_message, "teacher_context", *(("choices", "answer") if choices else ()))


FORMATS = {
    "alpaca": RowFormat(
        {"instruction": Column(), "input": Column(optional=True), "output": Column()}, answer="output", template="optional"
    ),
    "chat": RowFormat({"messages": Column("messages"), "tools": Column("tools", optional=True)}, template="always"),
    "prompt_completion": RowFormat(
        {"prompt": Column("text or messages"), "completion": Column("text or messages"), "tools": Column("tools", optional=True)},
        answer="completion",
        template="optional",
    ),
    "text": RowFormat({"text": Column()}, supervised="all"),
}


@config_dataclass
class Source:
    path: str = fixed(
        path="data",
        description="A .json, .jsonl, .parquet, .arrow or .csv file, a folder of them, a hub data set, or builtin:skills (the generated corpus).",
    )
    format: Literal["alpaca", "chat", "prompt_completion", "text"] = fixed(
        "alpaca",
        shapes=("tokens",),
        description="alpaca: instruction, input, output; chat: messages of role and content; prompt_completion: prompt, completion; text: text.",
    )
    fields: dict[str, str] = fixed(
        default_factory=dict,
        description="What the file calls the format's columns, where it has other names: {messages: conversations, role: from, content: value}.",
    )
    roles: dict[str, str] = fixed(
        default_factory=dict,
        description="What the file calls the roles of a chat, where it has other names: {user: human, assistant: gpt}.",
    )
    chat_template: bool = fixed(
        False,
        shapes=("tokens",),
        description="alpaca and prompt_completion: the prompt is a user's turn and the answer an assistant's, in the tokenizer's chat template.",
    )
    name: str | None = fixed(
        None, description="Configuration of a hub data set; for builtin:skills, questions (conversations) or prose (plain text)."
    )
    split: str = fixed("train", description="Split of a hub data set, of a folder whose files are named by split, or of builtin:skills.")
    revision: str | None = fixed(None, description="Revision of a hub data set.")
    limit: Count | None = fixed(None, description="Use only so many rows: the first ones, or with seed a random sample.")
    seed: Seed | None = fixed(None, description="Draw the limit's rows by this seed.")
    weight: float = fixed(
        1.0, gt=0, le=1000, description="Passes over this source in one epoch: 2 is twice, 0.5 a half, drawn anew each epoch."
    )
    teacher: str | None = fixed(None, description="Name of the one teacher that these rows are left to; null for all of them together.")


@config_dataclass
class Data:
    train: OneOrMany[Source] = fixed(None, description="What the student trains on: a source, or a list of them.")
    validation: OneOrMany[Source] = fixed(None, description="Held-out rows; or set validation_fraction.")
    validation_fraction: float = fixed(0.0, ge=0, lt=1, description="Share of the training rows, drawn by seed, held out for validation.")
    choices: Source | None = changeable(
        None,
        description="Multiple-choice questions in the same format, scored at the end: rows have choices (texts) and answer (an index).",
    )
    max_length: Annotated[int, Field(ge=2)] = fixed(512, shapes=("tokens", "teacher"), description="Longest example in tokens.")
    too_long: Literal["drop", "truncate", "split", "refuse"] = fixed(
        "drop",
        shapes=("tokens", "teacher"),
        description="What becomes of a longer one: drop it, cut its end off, split it into several (text only), or refuse the run.",
    )
    train_on_input: bool = fixed(
        False, shapes=("tokens", "teacher"), description="Supervise the prompt's tokens too, not only the answer's."
    )
    teacher_context: str | None = fixed(
        None,
        shapes=("tokens", "teacher"),
        description="Text that only the teacher reads before each example (a chat's system message); a row's own column teacher_context follows it.",
    )
    packing: bool = changeable(
        False,
        description="Concatenate a micro-batch's examples into one row without padding; they stay isolated, and the result is the same.",
    )
    share_prefixes: bool = changeable(
        False,
        description="With packing: compute a prefix that examples of a micro-batch have in common, such as a template's first words, once for "
        "all of them. The result is the same but for rounding, and for dropout, which is then drawn there once.",
    )
    streaming: bool = fixed(
        False, description="Read and tokenise the training rows while training instead of before; needs train.max_steps."
    )
    shuffle_buffer: Count = fixed(10_000, description="Streaming: rows that are shuffled together.")
    cache_dir: str | None = changeable(
        None, path="output", description="Where tokenised data is kept; by default ~/.cache/llmkd, or LLMKD_CACHE."
    )


def no_context_with(data: Data) -> Iterator[tuple[str, str]]:
    """Settings that do not go together with a context for the teacher, and what to do about it."""
    if data.too_long == "split":
        yield "data.too_long", "too_long: split, whose later pieces no context stands before; use drop, truncate or refuse"
    if data.train_on_input:
        yield "data.train_on_input", "train_on_input, and the teacher's input is not the student's; set it to false"


def data_contradictions(data: Data, max_steps: int | None, group_by_length: int) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings of the data that are each right and together wrong, as `recipe.contradictions` gives them."""
    if not as_tuple(data.train):
        yield ("data.train",), "not given; name what to train on, such as {path: train.jsonl, format: alpaca}"
    if data.validation == ():
        yield ("data.validation",), "found an empty list; name a source, or leave it out"
    if as_tuple(data.validation) and data.validation_fraction:
        yield ("data.validation_fraction", "data.validation"), "given together with data.validation; keep one of them"
    if data.teacher_context is not None:
        if not data.teacher_context.strip():
            yield ("data.teacher_context",), "found no text; give what the teacher shall read, or leave it out"
        for setting, problem in no_context_with(data):
            yield ("data.teacher_context", setting), f"given with {problem}"
    every = (*as_tuple(data.train), *as_tuple(data.validation))
    if data.too_long == "split" and any(FORMATS[s.format].supervised != "all" for s in every):
        whole = " and ".join(name for name, one in FORMATS.items() if one.supervised == "all")
        yield ("data.too_long", "data.train", "data.validation"), f"found split, which only format: {whole} can be; use drop or truncate"
    for setting, value in (("data.train", data.train), ("data.validation", data.validation), ("data.choices", data.choices)):
        for i, source in enumerate(as_tuple(value)):
            for name, problem in _source_contradictions(source, setting):
                path = f"{setting}.{i}" if isinstance(value, tuple) else setting
                yield (f"{path}.{name}",), problem
    if data.share_prefixes and not data.packing:
        yield ("data.share_prefixes", "data.packing"), "given without data.packing, to whose rows it belongs; set that to true"
    if data.streaming:
        yield from _streaming_contradictions(data, max_steps, group_by_length)


def _source_contradictions(source: Source, setting: str) -> Iterator[tuple[str, str]]:
    choices, row_format = setting == "data.choices", FORMATS[source.format]
    if source.path.startswith("builtin:") and source.path != "builtin:skills":
        yield "path", f"found {source.path!r}; the only built-in corpus is builtin:skills"
    if choices and row_format.supervised == "all":
        *others, last = (name for name, one in FORMATS.items() if one.supervised == "answer")
        yield "format", f"found {source.format}, which has no answer to choose; use {', '.join(others)} or {last}"
    if source.weight != 1 and setting != "data.train":
        yield "weight", f"found {source.weight:g}, and only training sources have weights; leave it out"
    if source.seed is not None and source.limit is None:
        yield "seed", "given without limit, whose rows it draws; give a limit, or leave it out"
    if source.chat_template and row_format.template != "optional":
        why = "is always rendered by it" if row_format.template == "always" else "has no turns to render"
        yield "chat_template", f"found true with format: {source.format}, which {why}; leave it out"
    known, columns = row_format.names(choices), row_format.columns
    for column in source.fields:
        if column not in known:
            yield f"fields.{column}", f"format {source.format} has no such column; it has {', '.join(known)}"
    without = ("role", "content", *([row_format.answer] if choices else []))
    for group in (("role", "content"), tuple(c for c in known if c not in without)):
        theirs = {c: source.fields.get(c, c) for c in group if c in source.fields or not (c in columns and columns[c].optional)}
        twice = next((c for c in source.fields if c in theirs and list(theirs.values()).count(theirs[c]) > 1), None)
        if twice:
            other = next(c for c in theirs if c != twice and theirs[c] == theirs[twice])
            yield f"fields.{twice}", f"found {theirs[twice]!r}, which is also read as {other}; give each its own column"
    if source.roles and not row_format.has_messages:
        yield "roles", f"given with format: {source.format}, which has no roles; leave it out"
    for role, name in source.roles.items():
        if role not in ROLES:
            yield f"roles.{role}", f"no such role; the roles are {', '.join(ROLES)}"
        elif name in {source.roles.get(other, other) for other in ROLES if other != role}:
            yield f"roles.{role}", f"found {name!r}, which also stands for another role; give each role its own name"


def _streaming_contradictions(data: Data, max_steps: int | None, group_by_length: int) -> Iterator[tuple[tuple[str, ...], str]]:
    if not max_steps:
        yield ("data.streaming", "train.max_steps"), "found true without train.max_steps; the length of a stream is not known, so give it"
    if data.validation_fraction:
        yield (
            ("data.validation_fraction", "data.streaming"),
            "given with data.streaming, which reads no rows beforehand to part; use data.validation",
        )
    if isinstance(data.train, tuple) and len(data.train) > 1:
        yield (
            ("data.train", "data.streaming"),
            "several sources with data.streaming, which reads one; write them to one folder, or set it to false",
        )
    for source in as_tuple(data.train):
        if source.weight != 1:
            yield ("data.train", "data.streaming"), "a weight with data.streaming, which reads a source again and again; leave it out"
        if source.seed is not None:
            yield (
                ("data.train", "data.streaming"),
                "limit with seed and data.streaming, which cannot draw from rows it has not read; use the first",
            )
    if group_by_length > 1:
        yield (
            ("train.group_by_length", "data.streaming"),
            f"found {group_by_length} with data.streaming, where lengths are not known; use 1",
        )
