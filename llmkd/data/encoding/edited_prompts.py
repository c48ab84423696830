"""Examples whose prompts are edited anew in every epoch, while their targets stay, token by token.

The user texts of a row are edited and the row is encoded again by its format, so that the template and the control tokens stay right. An
example that would then have other targets, or be too long, keeps its prompt in that epoch.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...config.recipe import Data, Source
from ...errors import UserError
from ..examples import Draw, TokenExamples
from ..prompt_edits import edited
from ..reading.sources import Rows
from .encode import encode
from .teacher_context import Tokens

if TYPE_CHECKING:  # batches are torch's, and checking data loads no torch
    from ...batch import Batch


@dataclass(frozen=True)
class Origin:
    """The row that an example was made from, and its `number` among the `of` examples of that row."""

    row: dict
    place: str
    source: Source
    number: int
    of: int


@dataclass
class EditedExamples(TokenExamples):
    """`TokenExamples` whose training batches have edited prompts, drawn by (seed, epoch, the example's tokens).

    Hashes, lengths and everything that is measured without a draw belong to the prompts as they are.

    clean   whether teachers read the prompts as they are
    """

    origins: np.ndarray | None = None  # of Origin [examples]
    data: Data | None = None
    tokenizer: object = None

    @property
    def clean(self) -> bool:
        return self.data.augment.teacher_sees == "clean"

    @property
    def one_input(self) -> bool:
        return super().one_input and not self.clean

    def take(self, chosen: np.ndarray) -> "EditedExamples":
        return self._with(super().take(chosen), self.origins[chosen])

    @staticmethod
    def joined(parts: "list[EditedExamples]", *others) -> "EditedExamples":
        return parts[0]._with(TokenExamples.joined(parts, *others), np.concatenate([part.origins for part in parts]))

    def _with(self, plain: TokenExamples, origins: np.ndarray) -> "EditedExamples":
        return EditedExamples(**_fields(plain), origins=origins, data=self.data, tokenizer=self.tokenizer)

    def batch(self, indices: Sequence[int], draw: Draw | None = None) -> "Batch":
        if draw is None or not len(indices):
            return super().batch(indices, draw)
        import torch

        batch = self.drawn(indices, draw).batch(range(len(indices)), draw)
        known = tuple(dataclasses.replace(one, content_hash=self.content_hash(i)) for one, i in zip(batch.examples, indices, strict=True))
        return dataclasses.replace(batch, example_N=torch.tensor(list(indices))[batch.example_N], examples=known)

    def drawn(self, indices: Sequence[int], draw: Draw) -> TokenExamples:
        """Some of the examples as edited for an epoch, for the student and, if they read another text, for its teachers."""
        plain = TokenExamples.take(self, np.array(indices, np.int64))
        views = [self.views(int(i), draw) for i in indices]
        out = dataclasses.replace(plain, **_flat([own for own, _ in views]))
        if self.clean or plain.teacher_view is not None:
            theirs = plain.teacher_view or plain
            out.teacher_view = theirs if self.clean else dataclasses.replace(theirs, **_flat([other for _, other in views]))
        return out

    def views(self, i: int, draw: Draw) -> tuple[Tokens, Tokens]:
        """An example as edited for an epoch, for the student and for the teacher, with its context if it has one."""
        origin, as_it_is = self.origins[i], (self.example(i), (self.teacher_view or self).example(i))
        key, counted = self.student_hash(i), Counter()

        def edit(text: str) -> str:
            counted["texts"] += 1
            return edited(text, self.data.augment.prompt, draw.seed, draw.epoch, f"{key} {counted['texts']}")

        row, data = edited_row(origin.row, edit), self.data
        if data.too_long == "refuse":
            data = dataclasses.replace(data, too_long="drop")
        try:
            found = encode(Rows([row], [origin.place], ""), origin.source, data, self.tokenizer)
        except UserError:  # an edit made a role token, say
            return as_it_is
        if len(found) != origin.of:
            return as_it_is
        views = found.example(origin.number), (found.teacher_view or found).example(origin.number)
        same = all(np.array_equal(ids[mask], own[own_mask]) for (ids, mask), (own, own_mask) in zip(views, as_it_is, strict=True))
        return views if same else as_it_is


def with_edits(examples: TokenExamples, rows: Rows, source: Source, data: Data, tokenizer) -> EditedExamples:
    """The examples of a source, with edited prompts in training batches."""
    of, number, origins = Counter(examples.row.tolist()), Counter(), np.empty(len(examples), object)
    for i, row in enumerate(examples.row.tolist()):
        origins[i] = Origin(rows.rows[row], rows.places[row], source, number[row], of[row])
        number[row] += 1
    return EditedExamples(**_fields(examples), origins=origins, data=data, tokenizer=tokenizer)


def edited_row(row: dict, edit: Callable[[str], str]) -> dict:
    """The row with its user texts edited: instruction and input, prompt, or the user's messages. Answers and other messages stay."""
    out = dict(row)
    for name in ("instruction", "input", "prompt", "messages"):
        value = row.get(name)
        if isinstance(value, str):
            out[name] = edit(value)
        elif isinstance(value, list):
            out[name] = [{**one, "content": edit(one["content"])} if one["role"] == "user" else one for one in value]
    return out


def _fields(examples: TokenExamples) -> dict:
    return {field.name: getattr(examples, field.name) for field in dataclasses.fields(TokenExamples)}


def _flat(examples: list[Tokens]) -> dict[str, np.ndarray]:
    ids, masks = zip(*examples, strict=True)
    return {"ids": np.concatenate(ids), "loss_mask": np.concatenate(masks), "offsets": np.cumsum([0, *map(len, ids)], dtype=np.int64)}
