"""Generates text: the most likely tokens, or sampled ones, whose random numbers depend only on the seed, the text's key and the position."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from ..model_folder.files import positions
from ..model_folder.generation import stops_at
from ..models.language_model import LanguageModel
from ..models.sharding import all_agree, is_sharded
from .draw import choose, entropy
from .sampling import Sampling
from .way import Inputs, way_of


@dataclass(frozen=True)
class Completion:
    """The text after a prompt, as token ids.

    finished  whether the last token is an end token; if not, `max_new_tokens` or the model's positions cut the text off
    entropy   of the model's distribution at temperature 1, averaged over the tokens, in nats; None if unknown

    If a server wrote it:

    log_p      of each token, as the server reports it
    apart      mean absolute difference between these and the student's own log-probabilities; None if they were not compared
    weights    importance weights of the tokens in the loss, since the server's student is an older one; None: all 1
    staleness  the age of the server's student, in optimizer steps
    """

    ids: tuple[int, ...]
    finished: bool
    entropy: float | None = field(default=None, compare=False)
    log_p: tuple[float, ...] | None = field(default=None, compare=False)
    apart: float | None = field(default=None, compare=False)
    weights: tuple[float, ...] | None = field(default=None, compare=False)
    staleness: int | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Mix:
    """Other models that write together with a model, after the same prompt.

    combine  returns log-probabilities of the next token, float64 [B, V], from the logits of the model and of these others
    whole    whether the entropy of a completion is that of the combined distribution; if not, that of the model
    """

    models: tuple[LanguageModel, ...]
    combine: Callable[[list[Tensor]], Tensor]
    whole: bool = False


def stops_of(model: LanguageModel) -> set[int]:
    """The end tokens of the model's own generation config."""
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
    keys: Sequence[int] | None = None,
    mix: Mix | None = None,
) -> list[Completion]:
    """A completion of each prompt, with the model in eval mode; its training mode and torch's random state are left as they were.

    prompts   token ids, at least one each
    end_ids   a completion ends with the first of these
    progress  wraps the list of batches
    keys      for each prompt a number from 0 to 2^64 - 1, on which its sample depends; None: its index
    mix       other models that write together with this one

    Prompts of similar length share a batch, if the model supports that (`way.py`). The others in a batch change a completion by rounding only:
    the random numbers are a function of (seed, key, position in the completion).
    """
    keys = range(len(prompts)) if keys is None else keys
    if len(keys) != len(prompts):
        raise ValueError(f"{len(keys)} keys for {len(prompts)} prompts")
    if any(not len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no token")
    found: dict[int, Completion] = {}
    models = [model, *(mix.models if mix else ())]
    with contextlib.ExitStack() as modes:
        for one in models:
            modes.enter_context(eval_mode(one))
        ways, together = [way_of(one) for one in models], _Together(models)
        for batch in progress(_batches([len(prompt) for prompt in prompts], batch_size, all(way.padded for way in ways))):
            asked = {i: prompts[i] for i in batch}
            texts = [_Text(one, list(asked.values()), way.cached) for one, way in zip(models, ways, strict=True)]
            found |= _completions(together, texts, mix, asked, [keys[i] for i in batch], sampling, frozenset(end_ids))
        together.finish()
    return [found[i] for i in range(len(prompts))]


def _batches(lengths: list[int], size: int, padded: bool) -> list[list[int]]:
    """Batches of indices of prompts of similar length; without `padded` of equal length. The longest come first, to run out of memory at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups = [order] if padded else [list(group) for _, group in itertools.groupby(order, key=lambda i: lengths[i])]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


@contextlib.contextmanager
def eval_mode(model: LanguageModel) -> Iterator[None]:
    """Inside, the model is in eval mode and not compiled; afterwards it is in its former mode."""
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # else each new length would be compiled
            yield
    finally:
        model.train(training)


class _Together:
    """Keeps processes that share a sharded model in step: all make equally many passes; one with nothing left to write passes a single token."""

    def __init__(self, models: list[LanguageModel]):
        self.models, self.sharded = models, next((one.model for one in models if is_sharded(one.model)), None)

    def goes_on(self, here: bool) -> bool:
        """Called before each pass. Whether this process (`here`) or any other has something to write."""
        return here if self.sharded is None else not all_agree(self.sharded, not here)

    def finish(self) -> None:
        """Take part in the other processes' passes until all are done."""
        while self.goes_on(False):
            for one in self.models:
                one.next_logits(Inputs.of([[0]], one.device).columns(slice(None)), use_cache=False)


class _Text:
    """Prompts and their completions so far, as inputs of one model."""

    def __init__(self, model: LanguageModel, prompts: list[Sequence[int]], cached: bool):
        self.model, self.cached, self.positions = model, cached, positions(model.base_model.config.to_dict())
        self.inputs, self.cache = Inputs.of(prompts, model.device), None

    def logits(self) -> Tensor:
        """The logits of each text's next token, [B, V]."""
        new = slice(None) if self.cache is None else slice(-1, None)
        logits_BV, self.cache = self.model.next_logits(self.inputs.columns(new), self.cache, self.cached)
        if logits_BV.isnan().any():
            where = self.model.base_model.config._name_or_path or self.model.base_model.config.model_type
            raise UserError(f"{where}: its logits are NaN, so it cannot write text; check its weights, or load it in another dtype")
        return logits_BV

    def add(self, token_B: Tensor) -> None:
        """Append a token to each text."""
        self.inputs = self.inputs.with_next(token_B.to(self.model.device), self.positions)


def _completions(
    together: "_Together",
    texts: list[_Text],
    mix: Mix | None,
    prompts: dict[int, Sequence[int]],
    keys: list[int],
    sampling: Sampling,
    end_ids: frozenset[int],
) -> dict[int, Completion]:
    """Completions of a batch of prompts, by index. Rows that have ended stay in the batch, and their further tokens are ignored.

    texts  of the model that writes, and of the models of `mix`
    """
    most = min((text.positions for text in texts if text.positions is not None), default=None)
    room = {i: sampling.max_new_tokens if most is None else min(sampling.max_new_tokens, most - len(ids)) for i, ids in prompts.items()}
    written: dict[int, list[int]] = {i: [] for i in prompts}
    entropies = dict.fromkeys(prompts, 0.0)
    while going := [i for i in prompts if len(written[i]) < room[i] and not end_ids.intersection(written[i][-1:])]:
        together.goes_on(True)
        own_BV, *others = [text.logits() for text in texts]
        drawn_BV = mix.combine([own_BV, *(one.to(own_BV.device) for one in others)]) if mix else own_BV
        chosen_B = choose(drawn_BV, [(key, len(written[i])) for key, i in zip(keys, prompts, strict=True)], sampling)
        for i, token, spread in zip(prompts, chosen_B.tolist(), entropy(drawn_BV if mix and mix.whole else own_BV).tolist(), strict=True):
            if i in going:
                written[i].append(token)
                entropies[i] += spread
        for text in texts:
            text.add(chosen_B)
    return {i: Completion(tuple(ids), bool(end_ids.intersection(ids[-1:])), entropies[i] / max(1, len(ids))) for i, ids in written.items()}
