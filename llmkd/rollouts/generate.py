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

    Prompts of like lengths share a batch, padded on the left. Which ones share it changes a completion by rounding alone: the noise is a
    function of (seed, index of the prompt, position in its completion).
    """
    if any(not len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no token")
    batches = _batches([len(prompt) for prompt in prompts], batch_size, _takes_padding(model))
    found: dict[int, Completion] = {}
    with _eval_mode(model):
        for batch in progress(batches):
            found |= _completions(model, {i: prompts[i] for i in batch}, sampling, frozenset(end_ids))
    return [found[i] for i in range(len(prompts))]


def _batches(lengths: list[int], size: int, padded: bool) -> list[list[int]]:
    """Indices of prompts of like lengths; without `padded` of equal ones. The longest come first: what does not fit into memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups = [order] if padded else [list(group) for _, group in itertools.groupby(order, key=lambda i: lengths[i])]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def _takes_padding(model: LanguageModel) -> bool:
    """Oddity: the eager attention of transformers takes its softmax in float32, where the mask of a padded float64 row becomes NaN."""
    return not (model.dtype == torch.float64 and model.base_model.config.get_text_config()._attn_implementation == "eager")


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
    model: LanguageModel, prompts: dict[int, Sequence[int]], sampling: Sampling, end_ids: frozenset[int]
) -> dict[int, Completion]:
    """Completions of a batch of prompts, by their indices. Rows that have ended stay in the batch, and what they go on with is not read."""
    most = positions(model.base_model.config.to_dict())
    room = {i: sampling.max_new_tokens if most is None else min(sampling.max_new_tokens, most - len(ids)) for i, ids in prompts.items()}
    written: dict[int, list[int]] = {i: [] for i in prompts}
    ids_BT, mask_BT = _left_padded(list(prompts.values()), model.device)
    position_BT, cache = (mask_BT.cumsum(-1) - 1).clamp(min=0), None
    while going := [i for i in prompts if len(written[i]) < room[i] and not end_ids.intersection(written[i][-1:])]:
        new = slice(None) if cache is None else slice(-1, None)
        inputs = {"input_ids": ids_BT[:, new], "attention_mask": mask_BT, "position_ids": position_BT[:, new]}
        logits_BV, cache = model.next_logits(inputs, cache)
        if logits_BV.isnan().any():
            where = model.base_model.config._name_or_path or model.base_model.config.model_type
            raise UserError(f"{where}: its logits are NaN, so it can write no text; check its weights, or load it in another dtype")
        chosen_B = _choose(logits_BV, [(i, len(written[i])) for i in prompts], sampling)
        for i, token in zip(prompts, chosen_B.tolist(), strict=True):
            if i in going:
                written[i].append(token)
        ids_BT, mask_BT = (torch.cat([x_BT, one_B[:, None]], -1) for x_BT, one_B in ((ids_BT, chosen_B), (mask_BT, mask_BT[:, -1])))
        position_BT = torch.cat([position_BT, (position_BT[:, -1:] + 1).clamp(max=(most or 1 << 60) - 1)], -1)
    return {i: Completion(tuple(ids), bool(end_ids.intersection(ids[-1:]))) for i, ids in written.items()}


def _left_padded(prompts: list[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and the mask of those that are not padding, both int64 [B, T]."""
    longest = max(map(len, prompts))
    ids_BT, mask_BT = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.as_tensor(np.asarray(prompt, np.int64))
        mask_BT[row, longest - len(prompt) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


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
