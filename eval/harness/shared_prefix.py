"""The tokens with which every prompt of a task begins, such as fixed examples: the model reads them once, and its cache of keys and values serves all requests."""

import copy
import os

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

LEAST = 32  # tokens; reading fewer than these again costs next to nothing


class SharedPrefix:
    """`tokens` that were read, and the cache of keys and values that they left."""

    def __init__(self, tokens: list[int], cache: DynamicCache):
        self.tokens, self.cache = tokens, cache

    @classmethod
    def of(cls, model, contexts: list[list[int]], longest: int, limit: int) -> "SharedPrefix | None":
        """What all `contexts` begin with; at least one token of each is left. None where that is short, or where it cannot be read apart.

        longest  tokens of the longest request, its continuation included
        limit    tokens that the harness gives to the model at most; it cuts the beginning of a longer request
        """
        if len(contexts) < 2 or longest > limit or _positions_by_length(model.config):
            return None
        tokens = os.path.commonprefix(contexts)[: min(map(len, contexts)) - 1]
        if len(tokens) < LEAST:
            return None
        with torch.no_grad():
            cache = model(torch.tensor([tokens], device=model.device), use_cache=True).get("past_key_values")
        if type(cache) is not DynamicCache or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
            return None  # recurrent states and caches of a model's own are left alone
        if cache.get_seq_length() != len(tokens):
            return None  # a model that adds tokens of its own, such as CPM-Ant
        return cls(tokens, cache)

    def logits(self, model, ids_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, V] of tokens that come after the prefix."""
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(ids_BT))
        with torch.no_grad():
            return model(ids_BT, past_key_values=cache, use_cache=True).logits


def _positions_by_length(config) -> bool:
    """Whether a model encodes positions by how much it reads at once (longrope, dynamic NTK): a prefix that is read alone would be encoded otherwise."""
    rope = str(getattr(config.get_text_config(), "rope_parameters", None))  # of the whole model, or of each type of layer
    return "longrope" in rope or "dynamic" in rope
