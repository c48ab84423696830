"""Greedy decoding with an encoder-decoder model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .encoder_decoder import EncoderDecoder


@torch.no_grad()
def greedy(model: EncoderDecoder, inputs: dict[str, Tensor], given: Sequence[int], end: int, most: int) -> list[list[int]]:
    """The greedy tokens after `given` for each of B sources: at most `most`, up to `end`, which is left out.

    inputs  as in a view, on the model's device

    As in transformers, tokens that the model's generation config suppresses, always or at the beginning, are not chosen.
    """
    model.set_active_adapter()
    settings = getattr(model.base_model, "generation_config", None)
    never, not_first = (list(getattr(settings, name, None) or []) for name in ("suppress_tokens", "begin_suppress_tokens"))
    source = model.encoded(inputs)
    B, device = len(source.states_BSH), source.states_BSH.device
    ids_BT, cache = torch.tensor([list(given)] * B, device=device), None
    written: list[list[int]] = [[] for _ in range(B)]
    going = [True] * B
    for step in range(most):
        hidden_BTH, cache = model.decoded(source, ids_BT, cache, use_cache=True)
        logits_BV = model.head.logits(hidden_BTH[:, -1])
        known = [i for i in (*never, *(not_first if not step else ())) if i < logits_BV.shape[1]]
        logits_BV[:, known] = -torch.inf
        ids_BT = logits_BV.argmax(-1, keepdim=True)
        for b, token in enumerate(ids_BT[:, 0].tolist()):
            going[b] = going[b] and token != end
            if going[b]:
                written[b].append(token)
        if not any(going):
            break
    return written
