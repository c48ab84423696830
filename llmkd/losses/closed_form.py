"""Divergences with their slopes in closed form, over tiles that are used again: what autograd would keep twenty tiles for.

Each function of `divergences.py` that has a twin here is the same function of the same name and options. A twin takes a
pair of distributions as `p_nV`, `q_nV` and `d_nV` = log q - log p (0 where both rule a token out), and `spare(i)`, the
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

Spare = Callable[[int], Tensor]
Closed = Callable[[Tensor, Tensor, Tensor, Spare], tuple[Tensor, Tensor]]


def closed_form(divergence: Divergence) -> Closed | None:
    """The twin of a divergence, with its options; None where it has none."""
    function, options = getattr(divergence, "func", divergence), getattr(divergence, "keywords", {})
    name = getattr(function, "__name__", "")
    twin = globals().get(name) if function is getattr(divergences, name, None) else None
    return twin and (lambda p, q, d, spare: twin(p, q, d, spare, **options))


def forward_kl(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, spare: Spare) -> tuple[Tensor, Tensor]:
    gap = _gap(p_nV, q_nV, d_nV, spare)
    return torch.sub(gap, _counted(d_nV.mul_(p_nV)), out=d_nV), gap


def reverse_kl(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, spare: Spare) -> tuple[Tensor, Tensor]:
    gap, slope = _gap(p_nV, q_nV, d_nV, spare), _counted(d_nV.mul_(q_nV))
    return torch.sub(slope, gap, out=gap), slope


def symmetric_kl(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, spare: Spare, forward_share: float = 0.5) -> tuple[Tensor, Tensor]:
    if forward_share in (0, 1):
        return (forward_kl if forward_share else reverse_kl)(p_nV, q_nV, d_nV, spare)
    gap = _gap(p_nV, q_nV, d_nV, spare)
    reverse = _counted(torch.mul(q_nV, d_nV, out=spare(1)))
    forward = torch.sub(gap, _counted(d_nV.mul_(p_nV)), out=d_nV)
    terms = torch.sub(reverse, gap, out=spare(2)).mul_(1 - forward_share).add_(forward, alpha=forward_share)
    return terms, gap.mul_(forward_share).add_(reverse, alpha=1 - forward_share)


def generalized_jsd(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, spare: Spare, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """Its terms are beta p log(p/m) + (1 - beta) q log(q/m): the rest of the two KLs' terms cancels, since m is their mean."""
    if beta in (0, 1):
        return (reverse_kl if beta else forward_kl)(p_nV, q_nV, d_nV, spare)
    of_p, of_q = _over_mixture(d_nV, beta, spare)
    of_p, slope = _counted(of_p.mul_(p_nV)), _counted(of_q.mul_(q_nV)).mul_(1 - beta)
    return torch.add(slope, of_p, alpha=-beta, out=of_p), slope


def skewed_forward_kl(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, spare: Spare, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    if alpha == 0:
        return forward_kl(p_nV, q_nV, d_nV, spare)
    gap = _gap(p_nV, q_nV, d_nV, spare, 2)
    of_p, _ = _over_mixture(d_nV, alpha, spare)
    terms = _counted(of_p.mul_(p_nV)).neg_().add_(gap, alpha=1 - alpha)
    return terms, _share(gap, p_nV, q_nV, alpha, spare(1)).mul_((1 - alpha) ** 2)


def skewed_reverse_kl(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, spare: Spare, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    if alpha == 0:
        return reverse_kl(p_nV, q_nV, d_nV, spare)
    gap = _gap(p_nV, q_nV, d_nV, spare, 2)
    slope = _counted(_over_mixture(d_nV, 1 - alpha, spare)[1].mul_(q_nV))
    terms = torch.sub(slope, gap, alpha=1 - alpha, out=d_nV)
    return terms, slope.sub_(_share(gap, p_nV, q_nV, 1 - alpha, spare(0)), alpha=alpha * (1 - alpha))


def total_variation(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, spare: Spare) -> tuple[Tensor, Tensor]:
    terms = _gap(p_nV, q_nV, d_nV, spare).abs_().mul_(0.5)
    return terms, d_nV.sign_().mul_(q_nV).mul_(0.5)


def _gap(p_nV: Tensor, q_nV: Tensor, d_nV: Tensor, spare: Spare, i: int = 0) -> Tensor:
    """q - p, in the i-th tile; the first two are used."""
    size = torch.maximum(p_nV, q_nV, out=spare(1))
    gap = torch.abs(d_nV, out=spare(i)).neg_().expm1_().mul_(size)
    return torch.copysign(gap, d_nV, out=gap)


def _over_mixture(d_nV: Tensor, beta: float, spare: Spare) -> tuple[Tensor, Tensor]:
    """-log(p/m), in place of d, and log(q/m), in the second tile, for m = beta p + (1 - beta) q; the first is used.

    The likelier of p and q is m / (1 - share (1 - exp(-|d|))), where `share` is the other's in m.
    """
    log_m = torch.abs(d_nV, out=spare(0)).neg_().expm1_()
    if beta == 0.5:
        log_m.mul_(0.5)
    else:
        log_m.mul_(torch.le(d_nV, 0, out=spare(1)).mul_(1 - 2 * beta).add_(beta))
    log_m.log1p_()
    of_q = torch.clamp_max(d_nV, 0, out=spare(1)).sub_(log_m)
    return d_nV.clamp_min_(0).add_(log_m), of_q


def _share(gap: Tensor, p_nV: Tensor, q_nV: Tensor, beta: float, out: Tensor) -> Tensor:
    """gap q / m for m = beta p + (1 - beta) q, in place of the gap."""
    m = torch.mul(q_nV, 1 - beta, out=out).add_(p_nV, alpha=beta)
    return _counted(gap.mul_(q_nV).div_(m))


def _counted(x: Tensor) -> Tensor:
    """0 log 0 = 0. A NaN of the models themselves is put back by the caller, row by row."""
    return x.nan_to_num_(0.0, math.inf, -math.inf)
