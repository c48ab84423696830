"""Memory and time for writing answers during training."""

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
    """The most that one process writes.

    answers  in a batch
    batches  in a step
    prompt   tokens of a prompt
    new      tokens of an answer
    models   the number of models that compute each token together
    weights  bytes that are read for a token
    layers   of the model that writes
    peak     bytes in memory during writing
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
        """Seconds per step, without reading prompts. One token of all answers in a batch takes the longest of: reading the weights, multiplying
        with them, and passing through the layers.

        rate        operations per second
        bandwidth   bytes per second; None if unknown
        per_layer   the least seconds of a layer
        bytes_each  bytes of a weight
        """
        multiplying = 2 * self.weights / bytes_each * self.answers / rate
        token = max(self.weights / bandwidth if bandwidth else 0.0, multiplying, self.layers * per_layer)
        return self.batches * self.new * token


def writing_of(settings: OnPolicy | None, train: Train, examples: TokenExamples, ranks: int = 1) -> Writing | None:
    """What a process writes in a step; None if nothing is written, or a server does it."""
    if not writes(settings) or settings.engine != "local":
        return None
    count = settings.samples * math.ceil(train.batch_size / ranks * most_written(settings, train))
    answers = max(1, min(settings.batch_size, count))
    models = 2 if settings.long_horizon and settings.long_horizon.teacher_mix else 1
    return Writing(answers, -(-count // answers), int(prompts_of(examples).max()), settings.max_new_tokens, models)


def most_written(settings: OnPolicy, train: Train) -> float:
    """The largest share of a step's examples whose answers are written."""
    total = train.max_steps or 2
    return min(1.0, max(most_at(settings.share, step, total) for step in (1, total)) + settings.teacher_writes)


def with_samples(step: list[int], settings: OnPolicy | None, train: Train) -> list[int]:
    """The examples of a step, repeated for the answers that may be written to each."""
    if not writes(settings):
        return step
    written = math.ceil(len(step) * most_written(settings, train))
    return [n for n in step[:written] for _ in range(settings.samples)] + step[written:]


def prompts_of(examples: TokenExamples) -> np.ndarray:
    """For each example the number of tokens before its first target, at least 1; all tokens without a target."""
    masks = (examples.example(i)[1] for i in range(len(examples)))
    return np.array([max(1, int(mask.argmax())) if mask.any() else n for n, mask in zip(examples.lengths, masks, strict=True)])


def as_written(examples: TokenExamples, settings: OnPolicy, max_length: int) -> TokenExamples:
    """The examples with the longest answers that may be written: `max_new_tokens` after each prompt that leaves room for it, or their own answer
    if it is longer."""
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
    """The memory of writing answers before a step: of reading the prompts, and of the last token of the longest answers."""
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
            memory.enter("skipped", WRITING)  # reads the answers like prompts, to fill the cache; a run does not do that
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
