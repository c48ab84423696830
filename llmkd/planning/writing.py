"""What a student or teacher needs in order to write answers while a run trains, and how long that takes."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from ..config.on_policy import OnPolicy, most_at, writes
from ..config.recipe import Train
from ..data.examples import TokenExamples
from ..models.language_model import LanguageModel
from ..rollouts.draw import entropy, inverse_cdf, probabilities
from ..rollouts.sampling import Sampling
from ..rollouts.way import Inputs
from .live_memory import Phase
from .step import WRITING, Ready, all_there


@dataclass(frozen=True)
class Writing:
    """Of one process, at most: answers at a time and their batches in a step; tokens of a prompt and of an answer.

    models   how many compute each token together
    weights  bytes that are read for a token
    layers   of the model that writes
    peak     bytes in memory while it does
    """

    answers: int
    batches: int
    prompt: int
    new: int
    models: int
    weights: float = 0.0
    layers: int = 0
    peak: float = 0.0

    def seconds(self, rate: float, bandwidth: float | None, per_layer: float, bytes_each: int) -> float:
        """Of a step: a token of all answers of a batch takes what reading the weights takes, or multiplying with them, or a pass through the
        layers, whichever is most. Prompts are not in it.

        rate        operations a second
        bandwidth   bytes a second; None where it is not known
        per_layer   the least seconds of a layer
        bytes_each  of a weight
        """
        multiplying = 2 * self.weights / bytes_each * self.answers / rate
        token = max(self.weights / bandwidth if bandwidth else 0.0, multiplying, self.layers * per_layer)
        return self.batches * self.new * token


def writing_of(settings: OnPolicy | None, train: Train, examples: TokenExamples, ranks: int = 1) -> Writing | None:
    """None where nothing is written, or elsewhere."""
    if not writes(settings) or settings.engine != "local":
        return None
    count = settings.samples * math.ceil(train.batch_size / ranks * most_written(settings, train))
    answers = max(1, min(settings.batch_size, count))
    models = 2 if settings.long_horizon and settings.long_horizon.teacher_mix else 1
    return Writing(answers, -(-count // answers), int(prompts_of(examples).max()), settings.max_new_tokens, models)


def most_written(settings: OnPolicy, train: Train) -> float:
    """The share of a step's examples whose answers are written, at most."""
    total = train.max_steps or 2
    return min(1.0, max(most_at(settings.share, step, total) for step in (1, total)) + settings.teacher_writes)


def with_samples(step: list[int], settings: OnPolicy | None, train: Train) -> list[int]:
    """The examples of a step with as many of each as there are answers to it, at most."""
    if not writes(settings):
        return step
    written = math.ceil(len(step) * most_written(settings, train))
    return [n for n in step[:written] for _ in range(settings.samples)] + step[written:]


def prompts_of(examples: TokenExamples) -> np.ndarray:
    """The tokens of each example before its first target, at least one; without one all."""
    masks = (examples.example(i)[1] for i in range(len(examples)))
    return np.array([max(1, int(mask.argmax())) if mask.any() else n for n, mask in zip(examples.lengths, masks, strict=True)])


def as_written(examples: TokenExamples, settings: OnPolicy, max_length: int) -> TokenExamples:
    """The examples as long as they may become: with an answer of `max_new_tokens` after each prompt that leaves room for it, or their own if
    that is longer."""
    new, lengths = settings.max_new_tokens, examples.lengths
    starts = np.full(len(examples), settings.prompt_tokens) if settings.prompt_tokens else prompts_of(examples)
    starts = np.where(starts > 1, starts, np.maximum(1, lengths - new))  # supervised throughout
    longest = np.where(starts + new <= max_length, np.maximum(lengths, starts + new), lengths)
    offsets = np.concatenate([[0], np.cumsum(longest)])
    mask = np.zeros(offsets[-1], bool)
    for start, begin, stop in zip(starts, offsets, offsets[1:], strict=False):
        mask[begin + start : stop] = True
    return TokenExamples(
        np.zeros(offsets[-1], np.int32), mask, offsets, examples.row, source=examples.source, teacher_index=examples.teacher_index
    )


@torch.no_grad()
def watched_writing(ready: Ready, writing: Writing, settings: OnPolicy, round_to: int = 1) -> Phase:
    """What is in memory while answers are written, before a step: reading the prompts, and the last token of the longest answers."""
    memory, student = all_there(ready, round_to), ready.student_models[0]
    sampling = Sampling(settings.temperature, writing.new, 0, settings.top_p, settings.top_k, settings.min_p)
    groups = [[student, *(ready.teacher_models if writing.models > 1 else ())]] if settings.share != 0 else []
    groups += [[one] for one in ready.teacher_models if settings.teacher_writes]
    for one in (student, *ready.teacher_models):
        one.eval()
    with memory:
        for models in groups:
            memory.enter(WRITING, WRITING)
            held = [_read(one, writing.answers, writing.prompt)[1] for one in models]
            del held
            memory.enter("skipped", WRITING)  # the answers so far are read as if they were prompts, which writing does not
            held = [_read(one, writing.answers, writing.prompt + writing.new - 1)[1] for one in models]
            memory.enter(WRITING, WRITING)
            for one, cache in zip(models, held, strict=True):
                inputs = _inputs(writing.answers, writing.prompt + writing.new)
                logits_BV, _ = one.next_logits(inputs.columns(slice(-1, None)), cache)
                inverse_cdf(probabilities(logits_BV, sampling), torch.zeros(writing.answers, dtype=torch.float64))
                entropy(logits_BV)
            del held, cache, logits_BV
    student.train()
    return dataclasses.replace(memory.phases[WRITING], flops=0)


def _read(model: LanguageModel, rows: int, tokens: int) -> tuple:
    return model.next_logits(_inputs(rows, tokens).columns(slice(None)))


def _inputs(rows: int, tokens: int) -> Inputs:
    ids_BT = torch.zeros(rows, tokens, dtype=torch.int64)
    return Inputs(ids_BT, torch.ones_like(ids_BT), torch.arange(tokens).expand(rows, tokens))
