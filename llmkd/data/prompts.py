"""Prompts for a model to continue: in an example, everything before the first target. `prompt_files.py` reads files of prompts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .encoding.control_tokens import controls
from .encoding.teacher_context import Tokens
from .examples import TokenExamples

#: If all of a text is supervised, so many of its first tokens are the prompt, but at most half of it.
TEXT_PROMPT = 32


@dataclass(frozen=True)
class Prompt:
    """A prompt for a model to continue. `ends`: the control token that ends its answers in training, if one does."""

    place: str
    ids: np.ndarray  # int32 [tokens]
    teacher_ids: np.ndarray  # the same as a teacher reads it, with its context if it has one
    reference: str | None = None  # the data's own answer
    ends: frozenset[int] = frozenset()


def prompts_of(examples: TokenExamples, places: Sequence[str], tokenizer) -> list[Prompt]:
    """The prompt of each example: everything before its first target; the reference is the first contiguous run of targets.

    If a text is supervised from its beginning, its first tokens are the prompt, see TEXT_PROMPT.
    """
    theirs = examples.teacher_view or examples
    return [parted(places[i], examples.example(i), theirs.example(i), tokenizer) for i in range(len(examples))]


def held_out_prompts(examples: TokenExamples, places: Sequence[str], count: int, tokenizer) -> list[Prompt]:
    """Prompts of `count` held-out rows, the same ones every time, in the order of the data. A row with several examples gives its first."""
    firsts = np.unique(examples.row, return_index=True)[1]
    chosen = sorted(random.Random("samples").sample(firsts.tolist(), min(count, len(firsts))))
    return prompts_of(examples.take(np.array(chosen, np.int64)), [places[i] for i in chosen], tokenizer)


def parted(place: str, own: Tokens, theirs: Tokens, tokenizer) -> Prompt:
    """An example as a prompt and the answer that follows it."""
    ids, loss_mask = own
    first = int(loss_mask.argmax())
    gap = first + int(loss_mask[first:].argmin())
    stop = gap if gap > first else len(ids)
    more = max(0, min(TEXT_PROMPT, len(ids) // 2) - first) if first <= 1 and stop == len(ids) else 0
    answer = ids[first + more : stop]
    close = closing(answer, tokenizer)
    reference = decoded(answer[:close], tokenizer)
    ends = frozenset(answer[close : close + 1].tolist())
    return Prompt(place, ids[: first + more], theirs[0][: int(theirs[1].argmax()) + more], reference, ends)


def closing(supervised: np.ndarray, tokenizer) -> int:
    """The index at which the control tokens begin that end an answer, possibly followed by white space; its length if there are none."""
    control, tokens = controls(tokenizer).any, tokenizer.convert_ids_to_tokens(supervised.tolist())
    place = n = len(tokens)
    while n and (control.fullmatch(tokens[n - 1]) or not decoded(supervised[n - 1 : n], tokenizer).strip()):
        n -= 1
        place = n if control.fullmatch(tokens[n]) else place
    return place


def decoded(ids: Sequence[int], tokenizer) -> str:
    """Tokens as text, control tokens included."""
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
