"""Examples whose answers a model writes: the prompts in the data, and the examples made of prompts and answers. No torch.

An answer is a list of token ids and is never encoded again, since a tokenizer may encode its text as other tokens.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config.on_policy import OnPolicy, most_at
from ..config.schedule import refuse_long_schedule
from ..console import info
from ..errors import UserError
from .examples import TokenExamples

WRITTEN = "long_horizon"  # the part of the loss for answers that the student has written only


@dataclass(frozen=True)
class Prompts:
    """The lengths of the examples' prompts, and the examples that may get new answers.

    own        int64 [examples]: tokens of each prompt, which is all before the first target
    theirs     int64 [examples]: the same as the teacher reads it, with its context
    may        bool [examples]: whether the prompt leaves enough room for an answer, and the example has a weight in the distillation term
    too_long   bool [examples]: whether the prompt leaves too little room
    """

    own: np.ndarray
    theirs: np.ndarray
    may: np.ndarray
    too_long: np.ndarray

    def ids(self, examples: TokenExamples, chosen: Sequence[int]) -> list[list[int]]:
        """The prompts of the examples `chosen`, as the student reads them."""
        return [examples.example(i)[0][: self.own[i]].tolist() for i in chosen]

    def teachers(self, examples: TokenExamples, chosen: Sequence[int]) -> list[list[int]]:
        """The prompts of the examples `chosen`, as the teacher reads them."""
        view = examples.teacher_view or examples
        return [view.example(i)[0][: self.theirs[i]].tolist() for i in chosen]


def prompts_of(examples: TokenExamples, places: Sequence[str], room: int, max_length: int, prompt_tokens: int | None) -> Prompts:
    """The prompts of examples.

    room            tokens of the longest answer, which must fit into max_length together with the prompt
    prompt_tokens   for an example that is supervised from its beginning: so many of its first tokens are the prompt, or all but the last.
                    UserError if there is such an example and this is None
    """
    own = _first_targets(examples)
    whole = own <= 1
    if whole.any() and prompt_tokens is None:
        place = places[int(np.flatnonzero(whole)[0])]
        raise UserError(
            f"on_policy.prompt_tokens: not given, but {place} is supervised from its beginning, so it has no prompt; say how many of the first "
            "tokens of such rows are one, such as 32"
        )
    more = np.where(whole, np.clip(examples.lengths - 1, 1, prompt_tokens or 1) - own, 0)
    theirs = own if examples.teacher_view is None else _first_targets(examples.teacher_view)
    own, theirs = own + more, theirs + more
    fits = np.maximum(own, theirs) + room <= max_length
    return Prompts(own, theirs, fits & (examples.weight("kd") != 0), ~fits)


def prompts_for(settings: OnPolicy, examples: TokenExamples, places: Sequence[str], max_length: int) -> Prompts:
    """The prompts of the training examples; prints a line on how many there are. UserError if there is none that may get a new answer."""
    found = prompts_of(examples, places, settings.max_new_tokens, max_length, settings.prompt_tokens)
    count, every = int(found.may.sum()), len(examples)
    long = int(found.too_long.sum())
    too_long = f"{long} of {every} prompts leave less room than on_policy.max_new_tokens ({settings.max_new_tokens}) within data.max_length ({max_length})"
    if not count:
        raise UserError(
            f"on_policy: there is no example whose answer the student could write: {too_long}; lower max_new_tokens, or raise data.max_length"
        )
    info(f"on_policy: the student may write the answers of {count} of {every} examples" + (f"; {too_long}" if long else ""))
    return found


def refuse_mix(settings: OnPolicy, examples: TokenExamples) -> None:
    """UserError if tokens are to be drawn from a mixture of student and teacher and the two read different prompts."""
    if settings.long_horizon and settings.long_horizon.teacher_mix and examples.teacher_view is not None:
        raise UserError(
            "on_policy.long_horizon.teacher_mix: set with rows that have a teacher_context, and tokens are drawn from the mixture of what both models say after "
            "the same prompt; leave one of them out"
        )


def refuse_replay(settings: OnPolicy, batch_size: int, total_steps: int) -> None:
    """UserError if a run with these steps would never draw an answer from its replay buffer."""
    if not settings.replay:
        return
    refuse_long_schedule("on_policy.replay.ratio", settings.replay.ratio, total_steps)
    capacity, before = settings.replay.capacity, range(1, total_steps)
    if (most := sum(most_at(settings.share, step, total_steps) for step in before) * batch_size * settings.samples) < capacity:
        raise UserError(
            f"on_policy.replay.capacity: found {capacity}, and the student writes {most:.0f} answers or so before the last step, so the buffer would never "
            "be full, and every answer fresh; lower it, or leave replay out"
        )


def held_out_prompts_for(settings: OnPolicy, examples: TokenExamples, places: Sequence[str], max_length: int) -> Prompts:
    """The prompts of the held-out examples. One that is supervised from its beginning has none, unless on_policy.prompt_tokens is set."""
    found = prompts_of(examples, places, settings.max_new_tokens, max_length, settings.prompt_tokens or 1)
    return found if settings.prompt_tokens else dataclasses.replace(found, may=found.may & (found.own > 1))


def _first_targets(examples: TokenExamples) -> np.ndarray:
    """The place of the first target in each example, int64 [examples]."""
    targets = np.flatnonzero(examples.loss_mask)
    return targets[np.searchsorted(targets, examples.offsets[:-1])] - examples.offsets[:-1]


def of_written(examples: TokenExamples) -> TokenExamples:
    """The same examples with weight 0 in the part of the loss for the student's own answers: those of the data are not."""
    return dataclasses.replace(examples, weights=examples.weights | {WRITTEN: np.zeros(len(examples), np.float32)})


def answered(
    examples: TokenExamples,
    prompts: Prompts,
    chosen: Sequence[int],
    answers: Sequence[Sequence[int]],
    weights: Sequence[Sequence[float] | None] = (),
    by_student: bool = True,
) -> TokenExamples:
    """The examples `chosen`, each with a written answer of at least one token in place of the data's.

    weights      for each answer the weights of its tokens in the terms of the teacher (kd, features, attention), or None for 1
    by_student   whether the student wrote the answers

    Every token of an answer is a target for student and teacher. Its weight in the cross-entropy is 0, since the answer may be wrong; its
    other weights are the example's. In the part of the loss for the student's own answers (WRITTEN) it is the weight in "kd".
    """
    theirs = None if examples.teacher_view is None else _appended(examples.teacher_view, prompts.theirs, chosen, answers)
    found = _appended(examples, prompts.own, chosen, answers)
    found.teacher_view = theirs
    found.weights = {name: w_E[chosen] for name, w_E in examples.weights.items()} | {"ce": np.zeros(len(chosen), np.float32)}
    if by_student and WRITTEN in found.weights:
        found.weights[WRITTEN] = examples.weight("kd")[chosen]
    if any(own is not None for own in weights):
        of_tokens = np.ones(len(found.ids), np.float32)
        of_tokens[found.loss_mask] = [
            one for own, answer in zip(weights, answers, strict=True) for one in ([1.0] * len(answer) if own is None else own)
        ]
        found.token_weights = dict.fromkeys(("kd", "features", "attention"), of_tokens)
    return found


def _appended(examples: TokenExamples, lengths: np.ndarray, chosen: Sequence[int], answers: Sequence[Sequence[int]]) -> TokenExamples:
    ids = [(examples.example(i)[0][: lengths[i]], np.asarray(answer, np.int32)) for i, answer in zip(chosen, answers, strict=True)]
    masks = [np.repeat([False, True], [len(prompt), len(answer)]) for prompt, answer in ids]
    offsets = np.cumsum([0, *map(len, masks)], dtype=np.int64)
    of_each = (examples.row[chosen], {}, examples.source[chosen], examples.teacher_index[chosen])
    return TokenExamples(
        np.concatenate([part for both in ids for part in both]), np.concatenate(masks), offsets, *of_each, collator=examples.collator
    )
