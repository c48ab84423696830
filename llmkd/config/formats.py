"""The formats of rows: their columns, against which settings and rows are checked."""

import dataclasses
from collections.abc import Collection
from typing import Literal

ROLES = ("system", "developer", "user", "assistant", "tool")
#: The kinds of columns that name or hold files.
FILES = ("audio", "image")


@dataclasses.dataclass(frozen=True)
class Column:
    kind: Literal["text", "messages", "text or messages", "tools", "numbers", "audio", "image", "label"] = "text"
    optional: bool = False  # a file may lack it


@dataclasses.dataclass(frozen=True)
class RowFormat:
    """The columns of a format. data/encoding/formats.py turns rows into text: a new format is one entry here and one there."""

    row: dict[str, Column]
    answer: str | None = None  # the column that a multiple-choice question lacks, since its choices take the place
    #: "all": every token, so that choices cannot replace an answer, and a text may be split. "marked": tokens that the row marks. "label": a class.
    supervised: Literal["answer", "all", "marked", "label", "transcript"] = "answer"
    template: Literal["optional", "always", "never"] = "never"  # whether the tokenizer's chat template renders it
    file: str | None = None  # the column that names a sound or an image, or holds it
    notes: tuple[str, ...] = ()  # columns that `llmkd roll` and `llmkd make` add for human readers; they are ignored
    reads: str | None = None  # the column that a student reads, if a teacher may read another one
    views: dict[str, Column] = dataclasses.field(default_factory=dict)  # columns that a teacher may read in its place (`teacher.reads`)

    @property
    def is_text(self) -> bool:
        """Whether its rows are text for a decoder, before which a teacher may read a context."""
        return self.supervised not in ("marked", "label", "transcript")

    @property
    def columns(self) -> dict[str, Column]:
        """The columns of a row, with teacher_context, which every format of text has."""
        return {**self.row, **({"teacher_context": Column(optional=True)} if self.is_text else {})}

    def columns_for(self, views: Collection[str]) -> dict[str, Column]:
        """The columns of a row, including those in `views`, which teachers read."""
        return {**self.columns, **{name: Column(column.kind) for name, column in self.views.items() if name in views}}

    def kind_of(self, column: str) -> str:
        """The kind of a column that a student or a teacher may read: text, audio or image."""
        return (self.row | self.views)[column].kind.removesuffix(" or messages")

    @property
    def has_messages(self) -> bool:
        return any("messages" in column.kind for column in self.row.values())

    def names(self, choices: bool = False) -> tuple[str, ...]:
        """The names that `Source.fields` may map: columns, the keys of a message, and those of a multiple-choice question."""
        in_message = ("role", "content", "train") if self.has_messages else ()
        return (*self.columns, *self.views, *in_message, *(("choices", "answer") if choices else ()))


def _of_classes(reads: Literal["text", "audio", "image"], **more: Column) -> RowFormat:
    """Rows with a class each: a column that the student reads, `more` of it, and the other columns that a teacher may read."""
    return RowFormat(
        {reads: Column(reads), **more, "label": Column("label")},
        supervised="label",
        file=None if reads == "text" else reads,
        reads=reads,
        views={kind: Column(kind, optional=True) for kind in ("text", *FILES) if kind != reads}
        | ({"prompt": Column(optional=True)} if reads == "text" else {}),  # a text for the teacher in place of the student's
    )


FORMATS = {
    "alpaca": RowFormat(
        {"instruction": Column(), "input": Column(optional=True), "output": Column(), "system": Column(optional=True)},
        answer="output",
        template="optional",
    ),
    "chat": RowFormat(
        {"messages": Column("messages"), "tools": Column("tools", optional=True), "system": Column(optional=True)},
        template="always",
        notes=("made",),
    ),
    "prompt_completion": RowFormat(
        {
            "prompt": Column("text or messages"),
            "completion": Column("text or messages"),
            "tools": Column("tools", optional=True),
            "system": Column(optional=True),
        },
        answer="completion",
        template="optional",
        reads="prompt",
    ),
    "text": RowFormat({"text": Column()}, supervised="all"),
    "tokens": RowFormat(
        {
            "input_ids": Column("numbers"),
            "loss_mask": Column("numbers", optional=True),
            "labels": Column("numbers", optional=True),
            "completion_mask": Column("numbers", optional=True),
            "assistant_masks": Column("numbers", optional=True),
            "attention_mask": Column("numbers", optional=True),
            "position_ids": Column("numbers", optional=True),
            "seq_lengths": Column("numbers", optional=True),
            "tokenizer": Column(optional=True),
        },
        supervised="marked",
        notes=("prompt", "answer", "finished", "key", "row_checksum"),
    ),
    "labelled": _of_classes("text", text_pair=Column(optional=True)),
    "audio": _of_classes("audio"),
    "image": _of_classes("image"),
    "speech": RowFormat(
        {"audio": Column("audio"), "text": Column()},
        supervised="transcript",
        file="audio",
        notes=("made",),
        reads="audio",
        views={"prompt": Column(optional=True)},
    ),
}
#: The formats of rows that each task reads.
FORMATS_OF = {
    "causal_lm": tuple(name for name, one in FORMATS.items() if one.supervised not in ("label", "transcript")),
    "classification": tuple(name for name, one in FORMATS.items() if one.supervised == "label"),
    "text_to_text": ("prompt_completion",),
    "speech_recognition": ("speech",),
}
