"""Samples tokens, from the whole distribution or from its most likely part."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .sampling import Sampling, uniform


def choose(logits_BV: Tensor, places: Sequence[tuple[int, int]], sampling: Sampling) -> Tensor:
    """The next token of each row, int64 [B]. `places`: (key of the text, position in it) of each row."""
    if not sampling.temperature:
        return logits_BV.argmax(-1)
    drawn_B = torch.tensor([uniform(sampling.seed, *place) for place in places], dtype=torch.float64)
    return inverse_cdf(probabilities(logits_BV, sampling), drawn_B.to(logits_BV.device))


def mixed(logits_BV: Tensor, other_BV: Tensor, share: float) -> Tensor:
    """Log-probabilities of share p + (1 - share) q, float64 [B, V]; q: softmax of `logits_BV`, p: of `other_BV`."""
    q_BV, p_BV = (torch.softmax(one.double(), -1) for one in (logits_BV, other_BV))
    return (share * p_BV + (1 - share) * q_BV).log()


def together(logits: Sequence[Tensor], weights: Sequence[float], geometric: bool = False) -> Tensor:
    """Log-probabilities of a mixture of several models' distributions, float64 [B, V], with weights that sum to one: of sum w_i p_i, or with
    `geometric` of exp(sum w_i log p_i), normalised; as `teachers.mixture` combines teachers."""
    each = [torch.log_softmax(z_BV.double(), -1) for z_BV in logits]
    if geometric:
        return torch.log_softmax(sum(w * log_p_BV for w, log_p_BV in zip(weights, each, strict=True)), -1)
    return torch.stack([log_p_BV + math.log(w) for w, log_p_BV in zip(weights, each, strict=True)]).logsumexp(0)


def with_share(logits: Sequence[Tensor], share: float, weights: Sequence[float], geometric: bool = False) -> Tensor:
    """`mixed`, with the others' distributions combined as p."""
    return mixed(logits[0], together(logits[1:], weights, geometric), share)


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that tokens are drawn from, float64 [B, V]: 0 for tokens that are cut off, and not renormalised."""
    p_BV = torch.softmax(logits_BV.double() / sampling.temperature, -1)
    if sampling.top_k is not None or sampling.top_p < 1:
        sorted_BV, order_BV = torch.sort(p_BV, dim=-1, descending=True, stable=True)
        sorted_BV[:, sampling.top_k or sorted_BV.shape[1] :] = 0
        keep_BV, passed_BV = sorted_BV > 0, sorted_BV.cumsum(-1)
        if sampling.top_p < 1:
            keep_BV[:, 1:] &= passed_BV[:, :-1] < sampling.top_p * passed_BV[:, -1:]
        p_BV = torch.where(torch.zeros_like(keep_BV).scatter(-1, order_BV, keep_BV), p_BV, 0.0)
    return torch.where(p_BV >= sampling.min_p * p_BV.amax(-1, keepdim=True), p_BV, 0.0)


def inverse_cdf(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """For each row the first token at which the cumulated probability exceeds `uniform_B` of the total, int64 [B]; never one of probability 0."""
    passed_BV = p_BV.cumsum(-1)
    total_B1 = passed_BV[:, -1:].contiguous()
    found_B1 = torch.searchsorted(passed_BV, uniform_B[:, None] * total_B1, right=True)
    return torch.minimum(found_B1, torch.searchsorted(passed_BV, total_B1))[:, 0]  # the product may be rounded up to the total


def entropy(logits_BV: Tensor) -> Tensor:
    """The entropy of softmax(logits), in nats, [B]."""
    log_p_BV = torch.log_softmax(logits_BV.float() if logits_BV.dtype != torch.float64 else logits_BV, -1)
    return -torch.where(log_p_BV == -math.inf, 0.0, log_p_BV.exp() * log_p_BV).sum(-1)
