"""Finds out by trial how a model can generate text: whether prompts may be padded, and whether it can cache keys and values."""

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..models.language_model import LanguageModel
from ..models.probe import probe_ids, relative_gap
from ..models.startup_checks import tolerance


@dataclass(frozen=True)
class Way:
    """A way to generate text.

    padded   prompts of different lengths may share a batch, padded on the left
    cached   keys and values are cached, so that a pass computes the newest token only
    """

    padded: bool
    cached: bool


#: The best first. The last works for every model.
_WAYS = (Way(True, True), Way(False, True), Way(True, False), Way(False, False))
_KNOWN: "weakref.WeakKeyDictionary[nn.Module, Way]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def way_of(model: LanguageModel) -> Way:
    """The best way for a model in eval mode in which its logits equal, up to rounding, those of each prompt alone without a cache."""
    base = model.base_model
    if base not in _KNOWN:
        long, short = probe_ids(model.head.vocab).tolist()
        prompts, limit = [long, short[:7]], tolerance(model, *([model.autocast] if model.autocast else []))
        right = torch.cat([_logits(model, [prompt], False) for prompt in prompts])
        _KNOWN[base] = next(way for way in _WAYS if way == _WAYS[-1] or _is_right(model, way, prompts, right, limit))
    return _KNOWN[base]


def _is_right(model: LanguageModel, way: Way, prompts: list[list[int]], right_BV: Tensor, limit: float) -> bool:
    with contextlib.suppress(Exception):  # a model without such a cache, or one that takes no mask, may raise anything
        batches = [prompts] if way.padded else [[prompt] for prompt in prompts]
        return relative_gap([right_BV], [torch.cat([_logits(model, batch, way.cached) for batch in batches])]) <= limit
    return False


def _logits(model: LanguageModel, prompts: list[list[int]], cached: bool) -> Tensor:
    """Logits [B, V] of the token after each prompt; with `cached` the last token is passed after the others."""
    text = Inputs.of(prompts, model.device)
    if not cached:
        return model.next_logits(text.columns(slice(None)), use_cache=False)[0]
    _, cache = model.next_logits(Inputs(text.ids_BT[:, :-1], text.mask_BT[:, :-1], text.position_BT[:, :-1]).columns(slice(None)))
    return model.next_logits(text.columns(slice(-1, None)), cache)[0]


@dataclass(frozen=True)
class Inputs:
    """Rows of tokens, padded on the left: ids, the attention mask (0 for padding), and positions, all int64 [B, T]."""

    ids_BT: Tensor
    mask_BT: Tensor
    position_BT: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], device: torch.device) -> "Inputs":
        longest = max(map(len, prompts))
        ids_BT, mask_BT = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids_BT[row, longest - len(prompt) :] = torch.as_tensor(np.asarray(prompt, np.int64))
            mask_BT[row, longest - len(prompt) :] = 1
        ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
        return cls(ids_BT, mask_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0))

    def columns(self, new: slice) -> dict[str, Tensor]:
        """The inputs of `LanguageModel.next_logits` for some of the columns, with the mask of all columns."""
        return {"input_ids": self.ids_BT[:, new], "attention_mask": self.mask_BT, "position_ids": self.position_BT[:, new]}

    def with_next(self, token_B: Tensor, positions: int | None) -> "Inputs":
        """The rows with one more token each. `positions`: the model's number of positions; a row stays at the last one."""
        ids_BT, mask_BT = torch.cat([self.ids_BT, token_B[:, None]], -1), torch.cat([self.mask_BT, torch.ones_like(token_B[:, None])], -1)
        next_B1 = (self.position_BT[:, -1:] + 1).clamp(max=(positions or 1 << 60) - 1)
        return Inputs(ids_BT, mask_BT, torch.cat([self.position_BT, next_B1], -1))
