"""Text that a model writes: the most likely tokens, or tokens whose draw depends on nothing but the seed, the text's key and the position."""

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
    """What follows a prompt.

    finished  its last token is an end token; else it was cut off, by `max_new_tokens` or the model's positions
    entropy   of the model's distribution at temperature 1, mean over the tokens, in nats; None where it is not known

    Of one that a server wrote:

    log_p      of each token, as the server says it
    apart      mean size of the difference between those and the student's own; None where they were not compared
    weights    of each token in the loss, which make up for it that the server's student is another one; None: all 1
    staleness  optimizer steps since the server's student was the one that trains
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
    """Other models that have a say in every token, after the same prompt.

    combine  gives log-probabilities of the next token, float64 [B, V], from the logits of the model that writes and of these
    whole    the entropy of a completion is that of all of them together; else of the model that writes
    """

    models: tuple[LanguageModel, ...]
    combine: Callable[[list[Tensor]], Tensor]
    whole: bool = False


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
    keys: Sequence[int] | None = None,
    mix: Mix | None = None,
) -> list[Completion]:
    """A completion of each prompt, in the model's eval mode; its training mode and torch's random state are as before.

    prompts   token ids, at least one each
    end_ids   a completion ends with the first of these
    progress  wraps the list of batches
    keys      a number from 0 to 2^64 - 1 of each prompt, on which its sample depends; None: their indices
    mix       other models that have a say in every token

    Prompts of like lengths share a batch, as far as the model can take that (`way.py`). Which ones share it changes a completion by rounding alone: what is drawn is a
    function of (seed, key, position in the completion).
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
    """Indices of prompts of like lengths; without `padded` of equal ones. The longest come first: what does not fit into memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups = [order] if padded else [list(group) for _, group in itertools.groupby(order, key=lambda i: lengths[i])]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


@contextlib.contextmanager
def eval_mode(model: LanguageModel) -> Iterator[None]:
    """The model in eval mode and not compiled for the `with` block; then in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # every new length would be compiled anew
            yield
    finally:
        model.train(training)


class _Together:
    """Keeps processes in step that hold parts of a model: all make equally many passes, those with nothing left to write of one token."""

    def __init__(self, models: list[LanguageModel]):
        self.models, self.sharded = models, next((one.model for one in models if is_sharded(one.model)), None)

    def goes_on(self, here: bool) -> bool:
        """Before each pass: whether this process, or any other, has something to write."""
        return here if self.sharded is None else not all_agree(self.sharded, not here)

    def finish(self) -> None:
        while self.goes_on(False):
            for one in self.models:
                one.next_logits(Inputs.of([[0]], one.device).columns(slice(None)), use_cache=False)


class _Text:
    """Prompts and what was written to them so far, as one model reads them."""

    def __init__(self, model: LanguageModel, prompts: list[Sequence[int]], cached: bool):
        self.model, self.cached, self.positions = model, cached, positions(model.base_model.config.to_dict())
        self.inputs, self.cache = Inputs.of(prompts, model.device), None

    def logits(self) -> Tensor:
        """Those of the next token of each, [B, V]."""
        new = slice(None) if self.cache is None else slice(-1, None)
        logits_BV, self.cache = self.model.next_logits(self.inputs.columns(new), self.cache, self.cached)
        if logits_BV.isnan().any():
            where = self.model.base_model.config._name_or_path or self.model.base_model.config.model_type
            raise UserError(f"{where}: its logits are NaN, so it can write no text; check its weights, or load it in another dtype")
        return logits_BV

    def add(self, token_B: Tensor) -> None:
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
    """Completions of a batch of prompts, by their indices. Rows that have ended stay in the batch, and what they go on with is not read.

    texts  of the model that writes, and of those of `mix`
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
