"""The rows that the stages of `llmkd make` pass on: a conversation, its other columns, and its origin. No torch."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

#: The column of train.jsonl with a row's origin. It is not trained on.
MADE = "made"

Message = dict[str, Any]


@dataclass(frozen=True)
class Sound:
    """A sound file.

    file    its path; or its bytes, if the row holds them, until they are written to a file
    place   of the row, `FILE:LINE`
    size    in bytes
    """

    file: str | bytes
    place: str
    size: int


@dataclass(frozen=True)
class Row:
    """A conversation, whose last message is the assistant's if there is an answer; or a sound, whose answer is its transcript.

    For a sound, the question is one message with the SHA-256 of the file in place of a text.

    id        16 hex digits, a hash of the content and the parents
    columns   passed on to train.jsonl: the file's own columns, and scores
    stage     that made the row: seeds, or the label of a stage, such as 2_evolve
    writer    the model that wrote a part of it; None for a seed
    parents   ids of the rows that it was made from
    notes     of the stage: finish (stop, length), operation, version, ...
    audio     the sound; None for a conversation
    """

    id: str
    messages: tuple[Message, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    stage: str = "seeds"
    writer: str | None = None
    parents: tuple[str, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)
    audio: Sound | None = None

    @property
    def answer(self) -> str | None:
        """The assistant's last message; None if the row has no answer."""
        return self.messages[-1]["content"] if self.messages[-1]["role"] == "assistant" else None

    @property
    def question(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        return self.messages if self.answer is None else self.messages[:-1]

    @property
    def instruction(self) -> str:
        """The text of the last message before the answer; "" for a sound."""
        return "" if self.audio else self.question[-1]["content"]

    def answered(self, text: str) -> tuple[Message, ...]:
        """The question followed by this answer."""
        return (*self.question, {"role": "assistant", "content": text})

    def asking(self, text: str) -> tuple[Message, ...]:
        """The question with this text as its last message."""
        return (*self.question[:-1], {**self.question[-1], "content": text})

    def with_columns(self, **columns: Any) -> "Row":
        """The same row with more columns, such as scores."""
        return dataclasses.replace(self, columns={**self.columns, **columns})

    def child(self, stage: str, writer: str | None, messages: Sequence[Message], number: int = 0, **notes: Any) -> "Row":
        """A row that is made from this one. `number` distinguishes children with the same messages."""
        made = made_row(stage, writer, messages, (self.id,), number, self.columns, **notes)
        return dataclasses.replace(made, audio=self.audio)

    def as_json(self) -> dict[str, Any]:
        """A line of train.jsonl."""
        made = {"id": self.id, "stage": self.stage, "writer": self.writer, "parents": list(self.parents), **self.notes}
        if not self.audio:
            return {"messages": list(self.messages), **self.columns, MADE: made}
        text = {} if self.answer is None else {"text": self.answer}
        return {"audio": self.audio.file, **text, **self.columns, MADE: made | {"sha256": self.messages[0]["content"]}}


def made_row(
    stage: str,
    writer: str | None,
    messages: Sequence[Message],
    parents: Sequence[str] = (),
    number: int = 0,
    columns: Mapping[str, Any] | None = None,
    **notes: Any,
) -> Row:
    """A row of a stage, with its id."""
    return Row(row_id(stage, messages, parents, number), tuple(messages), columns or {}, stage, writer, tuple(parents), notes)


def row_id(*parts: Any) -> str:
    """A hash of values, as JSON, 16 hex digits."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()


def has_answer(row: Row) -> bool:
    """Whether the row has an answer to train on."""
    return row.answer is not None and bool(row.answer.strip())


def with_system(text: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Messages under a system message, before one that they have."""
    first, *rest = messages
    if first["role"] in ("system", "developer"):
        return ({**first, "content": f"{text}\n\n{first['content']}"}, *rest)
    return ({"role": "system", "content": text}, *messages)
