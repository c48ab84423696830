"""Text that a model writes: the most likely tokens, or tokens drawn by noise that depends on nothing but the seed, the prompt and the position."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..model_folder.files import positions
from ..model_folder.generation import stops_at
from ..models.language_model import LanguageModel
from .way import Inputs, Way, way_of


@dataclass(frozen=True)
class Sampling:
    """temperature 0: always the most likely token; else tokens are drawn from softmax(logits / temperature), from nothing else of it cut."""

    temperature: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What follows a prompt. `finished`: its last token is an end token; else it was cut off, by `max_new_tokens` or the model's positions."""

    ids: tuple[int, ...]
    finished: bool


def stops_of(model: LanguageModel) -> set[int]:
    """The ids at which the model's own generation config ends a text."""
    config = model.base_model.generation_config
    return set(stops_at(config.to_dict())) if config else set()


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    end_ids: Collection[int],
    batch_size: int = 8,
    progress: Callable[[list], Iterable] = iter,
) -> list[Completion]:
    """A completion of each prompt, in the model's eval mode; its training mode and torch's random state are as before.

    prompts   token ids, at least one each
    end_ids   a completion ends with the first of these
    progress  wraps the list of batches

    Prompts of like lengths share a batch, as far as the model can take that (`way.py`). Which ones share it changes a completion by rounding alone: the noise is a
    function of (seed, index of the prompt, position in its completion).
    """
    if any(not len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no token")
    found: dict[int, Completion] = {}
    with _eval_mode(model):
        way = way_of(model)
        for batch in progress(_batches([len(prompt) for prompt in prompts], batch_size, way.padded)):
            found |= _completions(model, way, {i: prompts[i] for i in batch}, sampling, frozenset(end_ids))
    return [found[i] for i in range(len(prompts))]


def _batches(lengths: list[int], size: int, padded: bool) -> list[list[int]]:
    """Indices of prompts of like lengths; without `padded` of equal ones. The longest come first: what does not fit into memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups = [order] if padded else [list(group) for _, group in itertools.groupby(order, key=lambda i: lengths[i])]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


@contextlib.contextmanager
def _eval_mode(model: LanguageModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # every new length would be compiled anew
            yield
    finally:
        model.train(training)


def _completions(
    model: LanguageModel, way: Way, prompts: dict[int, Sequence[int]], sampling: Sampling, end_ids: frozenset[int]
) -> dict[int, Completion]:
    """Completions of a batch of prompts, by their indices. Rows that have ended stay in the batch, and what they go on with is not read."""
    most = positions(model.base_model.config.to_dict())
    room = {i: sampling.max_new_tokens if most is None else min(sampling.max_new_tokens, most - len(ids)) for i, ids in prompts.items()}
    written: dict[int, list[int]] = {i: [] for i in prompts}
    text, cache = Inputs.of(list(prompts.values()), model.device), None
    while going := [i for i in prompts if len(written[i]) < room[i] and not end_ids.intersection(written[i][-1:])]:
        logits_BV, cache = model.next_logits(text.columns(slice(None) if cache is None else slice(-1, None)), cache, way.cached)
        if logits_BV.isnan().any():
            where = model.base_model.config._name_or_path or model.base_model.config.model_type
            raise UserError(f"{where}: its logits are NaN, so it can write no text; check its weights, or load it in another dtype")
        chosen_B = _choose(logits_BV, [(i, len(written[i])) for i in prompts], sampling)
        for i, token in zip(prompts, chosen_B.tolist(), strict=True):
            if i in going:
                written[i].append(token)
        text = text.with_next(chosen_B, most)
    return {i: Completion(tuple(ids), bool(end_ids.intersection(ids[-1:]))) for i, ids in written.items()}


def _choose(logits_BV: Tensor, places: list[tuple[int, int]], sampling: Sampling) -> Tensor:
    """The next token of each row, int64 [B]. `places`: (index of the prompt, position in its completion) of each row."""
    if not sampling.temperature:
        return logits_BV.argmax(-1)
    noise_BV = torch.from_numpy(np.stack([gumbel_noise(sampling.seed, *place, logits_BV.shape[1]) for place in places]))
    return (logits_BV.double() / sampling.temperature + noise_BV.to(logits_BV.device)).argmax(-1)


def gumbel_noise(seed: int, prompt: int, position: int, vocab: int) -> np.ndarray:
    """Standard Gumbel noise [vocab], float64, by a counter-based generator: the most likely token plus it is a sample of the distribution."""
    bits = np.random.Philox(key=np.array([seed, prompt], np.uint64), counter=np.array([0, position, 0, 0], np.uint64))
    with np.errstate(divide="ignore"):  # a uniform number that is 0 gives -inf: a token that is not chosen
        return -np.log(-np.log(np.random.Generator(bits).random(vocab)))
