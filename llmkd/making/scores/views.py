"""The two views of a row that its scores compare: the same targets in their context, and alone. No torch.

If an answer were tokenised by itself, its first token might differ from the one in context (with or without a space), and nothing would predict
it. So the answer is tokenised only in its context, and the same token ids are put after one start token.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ...config.data import Data, Source
from ...data.encoding.encode import encode
from ...data.examples import TokenExamples
from ...data.reading.sources import Rows
from ...errors import UserError
from ..filters.words import Reason
from ..rows import Message

_ANY = (1 << 31) - 1  # tokens


def in_context(
    conversations: Sequence[Sequence[Message]], names: Sequence[str], row_format: str, tokenizer, max_length: int
) -> tuple[TokenExamples, dict[int, Reason]]:
    """Conversations as examples whose last message, the assistant's, is supervised with its end token, and the reasons of those that cannot be scored,
    by index. `TokenExamples.row` has the indices of the others.

    names        of the conversations, for messages
    row_format   chat: by the tokenizer's chat template; alpaca: the prompt of Stanford Alpaca, for one question and its answer
    """
    rows = [_row(one, row_format, name) for one, name in zip(conversations, names, strict=True)]
    left_out: dict[int, Reason] = {}
    numbers = list(range(len(rows)))
    try:
        examples = _encoded(rows, names, numbers, row_format, tokenizer, max_length)
    except UserError:  # it names rows that cannot be encoded
        for i in numbers:
            try:
                _encoded(rows, names, [i], row_format, tokenizer, max_length)
            except UserError as error:
                left_out[i] = "cannot_be_scored", error.problems[0].removeprefix(f"{names[i]}: ")
        numbers = [i for i in numbers if i not in left_out]
        examples = _encoded(rows, names, numbers, row_format, tokenizer, max_length)
    missing = sorted({*numbers} - {*examples.row.tolist()})
    whole = _encoded(rows, names, missing, row_format, tokenizer, _ANY)
    tokens = dict(zip(whole.row.tolist(), whole.lengths.tolist(), strict=True))
    for i in missing:
        left_out[i] = (
            ("too_long_to_score", f"{tokens[i]} tokens, more than max_length {max_length}") if i in tokens else ("nothing_to_score", "")
        )
    return examples, left_out


def _encoded(rows: list[dict], names: Sequence[str], numbers: list[int], row_format: str, tokenizer, max_length: int) -> TokenExamples:
    """The examples of the rows with the indices `numbers`, which `TokenExamples.row` holds."""
    source = Source(path="rows", format=row_format, answers="last" if row_format == "chat" else "all")
    chosen = Rows([rows[i] for i in numbers], [names[i] for i in numbers], "")
    examples = encode(chosen, source, Data(max_length=max_length, too_long="drop"), tokenizer)
    return dataclasses.replace(examples, row=np.array(numbers, np.int64)[examples.row])


def _row(conversation: Sequence[Message], row_format: str, name: str) -> dict:
    if row_format == "chat":
        return {"messages": list(conversation)}
    if [message["role"] for message in conversation] != ["user", "assistant"]:
        raise UserError(f"{name}: format alpaca has one question and one answer, and this row more messages; use format: chat")
    return {"instruction": conversation[0]["content"], "output": conversation[1]["content"]}


def start_token(tokenizer) -> int:
    """The token before an answer alone: the start-of-text token, or the end-of-text token if the tokenizer has none."""
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def alone(examples: TokenExamples, start: int) -> TokenExamples:
    """The same targets, each example's after one start token and nothing else."""
    targets = [ids_L[mask_L] for ids_L, mask_L in map(examples.example, range(len(examples)))]
    ids = [np.concatenate([[start], own]).astype(np.int32) for own in targets]
    masks = [np.arange(len(own)) > 0 for own in ids]
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    empty = np.zeros(0, np.int32), np.zeros(0, bool)
    flat = (np.concatenate([one, *parts]) for one, parts in zip(empty, (ids, masks), strict=True))
    return dataclasses.replace(TokenExamples(*flat, offsets, examples.row), source=examples.source, teacher_index=examples.teacher_index)
