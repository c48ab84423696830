"""Divergences with their slopes in closed form, over tiles that are used again: what autograd would keep twenty tiles for.

Each function of `divergences.py` that has a twin here is the same function of the same name and options. A twin takes a
pair of distributions as `p_nV`, `q_nV` and `d_nV` = log q - log p (0 where both rule a token out), and `scratch(i)`, the
i-th tile [n, V] to write in; it gives (terms, slope), both [n, V]: the terms, each >= 0 up to rounding, whose sum is
the divergence, and its derivative with respect to log q. It may overwrite d, never p or q.

The terms are those of `divergences.py`, where no difference of near equals is taken: q - p is +-max(p, q) (1 - exp(-|d|)),
and log m of a mixture m comes from the likelier of its two parts
(in float32 to some 1e-7 / share, where that part's share in m is small: 6e-5 at 1/1000).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..signals import Divergence
from . import divergences

Scratch = Callable[[int], Tensor]
Closed = Callable[[Tensor, Tensor, Tensor, Scratch], tuple[Tensor, Tensor]]


def closed_form(divergence: Divergence) -> Closed | None:
    """The twin of a divergence, with its options; None where it has none."""
    twin, options = _CLOSED_FORMS.get(divergences.builtin_name(divergence)), getattr(divergence, "keywords", {})
    return twin and (lambda p, q, d, scratch: twin(p, q, d, scratch, **options))


def forward_kl(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    gap = _gap(p_nV, q_nV, d_nV, scratch)
    return torch.sub(gap, _zero_nans(d_nV.mul_(p_nV)), out=d_nV), gap


def reverse_kl(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    gap, slope = _gap(p_nV, q_nV, d_nV, scratch), _zero_nans(d_nV.mul_(q_nV))
    return torch.sub(slope, gap, out=gap), slope


def symmetric_kl(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, scratch: Scratch, forward_weight: float = 0.5) -> tuple[Tensor, Tensor]:
    if forward_weight in (0, 1):
        return (forward_kl if forward_weight else reverse_kl)(p_nV, q_nV, d_nV, scratch)
    gap = _gap(p_nV, q_nV, d_nV, scratch)
    reverse = _zero_nans(torch.mul(q_nV, d_nV, out=scratch(1)))
    forward = torch.sub(gap, _zero_nans(d_nV.mul_(p_nV)), out=d_nV)
    terms = torch.sub(reverse, gap, out=scratch(2)).mul_(1 - forward_weight).add_(forward, alpha=forward_weight)
    return terms, gap.mul_(forward_weight).add_(reverse, alpha=1 - forward_weight)


def generalized_jsd(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, scratch: Scratch, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Its terms are beta p log(p/m) + (1 - beta) q log(q/m): the rest of the two KLs' terms cancels, since m is their mean."""
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(p_nV, q_nV, d_nV, scratch)
    of_p, of_q = _over_mixture(d_nV, beta, scratch)
    of_p, slope = _zero_nans(of_p.mul_(p_nV)), _zero_nans(of_q.mul_(q_nV)).mul_(1 - beta)
    return torch.add(slope, of_p, alpha=-beta, out=of_p), slope


def skewed_forward_kl(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, scratch: Scratch, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    if alpha == 0:
        return forward_kl(p_nV, q_nV, d_nV, scratch)
    gap = _gap(p_nV, q_nV, d_nV, scratch, 2)
    of_p, _ = _over_mixture(d_nV, alpha, scratch)
    terms = _zero_nans(of_p.mul_(p_nV)).neg_().add_(gap, alpha=1 - alpha)
    return terms, _share(gap, p_nV, q_nV, alpha, scratch(1)).mul_((1 - alpha) ** 2)


def skewed_reverse_kl(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, scratch: Scratch, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    if alpha == 0:
        return reverse_kl(p_nV, q_nV, d_nV, scratch)
    gap = _gap(p_nV, q_nV, d_nV, scratch, 2)
    slope = _zero_nans(_over_mixture(d_nV, 1 - alpha, scratch)[1].mul_(q_nV))
    terms = torch.sub(slope, gap, alpha=1 - alpha, out=d_nV)
    return terms, slope.sub_(_share(gap, p_nV, q_nV, 1 - alpha, scratch(0)), alpha=alpha * (1 - alpha))


def total_variation(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    terms = _gap(p_nV, q_nV, d_nV, scratch).abs_().mul_(0.5)
    return terms, d_nV.sign_().mul_(q_nV).mul_(0.5)


_CLOSED_FORMS: dict[str, Closed] = {
    function.__name__: function
    for function in (forward_kl, reverse_kl, symmetric_kl, generalized_jsd, skewed_forward_kl, skewed_reverse_kl, total_variation)
}


def _gap(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, scratch: Scratch, i: int = 0) -> Tensor:
    """q - p, in the i-th tile; the first two are used."""
    size = torch.maximum(p_nV, q_nV, out=scratch(1))
    gap = torch.abs(d_nV, out=scratch(i)).neg_().expm1_().mul_(size)
    return torch.copysign(gap, d_nV, out=gap)


def _over_mixture(d_nV: Tensor, beta: float, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """-log(p/m), in place of d, and log(q/m), in the second tile, for m = beta p + (1 - beta) q; the first is used.

    The likelier of p and q is m / (1 - share (1 - exp(-|d|))), where `share` is the other's in m.
    """
    log_m = torch.abs(d_nV, out=scratch(0)).neg_().expm1_()
    if beta == 0.5:
        log_m.mul_(0.5)
    else:
        log_m.mul_(torch.le(d_nV, 0, out=scratch(1)).mul_(1 - 2 * beta).add_(beta))
    log_m.log1p_()
    of_q = torch.clamp_max(d_nV, 0, out=scratch(1)).sub_(log_m)
    return d_nV.clamp_min_(0).add_(log_m), of_q


def _share(gap: Tensor, p_nV: Tensor, q_nV: Tensor, beta: float, out: Tensor) -> Tensor:
    """gap q / m for m = beta p + (1 - beta) q, in place of the gap."""
    m = torch.mul(q_nV, 1 - beta, out=out).add_(p_nV, alpha=beta)
    return _zero_nans(gap.mul_(q_nV).div_(m))


def _zero_nans(x: Tensor) -> Tensor:
    """0 log 0 = 0. A NaN of the models themselves is put back by the caller, row by row."""
    return x.nan_to_num_(0.0, math.inf, -math.inf)
