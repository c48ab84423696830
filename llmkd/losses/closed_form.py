"""Divergences with their gradients in closed form, on reused [n, V] buffers where autograd would keep about twenty of them.

Each function here is the analytic-gradient version of the function of the same name and options in `divergences.py`.

Inputs: `p_nV` (teacher), `q_nV` (student), `d_nV` = log q - log p (0 where both are 0), and `scratch(i)`, a reusable [n, V]
buffer. Returns (terms, slope), both [n, V]: terms that sum to the divergence and are >= 0 up to rounding, and the derivative of the
divergence with respect to log q. `d_nV` is overwritten; `p_nV` and `q_nV` are not.

The terms are those of `divergences.py`, computed without subtracting nearly equal numbers: q - p is
+-max(p, q) (1 - exp(-|d|)), and log m of a mixture m follows from the larger of its two parts. In float32 log m is
accurate to about 1e-7 / w, where w is that part's weight in m: 6e-5 at w = 1/1000.
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
    """The closed form of a divergence, with its options fixed; None if it has none."""
    function, options = _CLOSED_FORMS.get(divergences.builtin_name(divergence)), getattr(divergence, "keywords", {})
    return function and (lambda p, q, d, scratch: function(p, q, d, scratch, **options))


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
    """Terms beta p log(p/m) + (1 - beta) q log(q/m): the other parts of the two KLs' terms cancel, since m = beta p + (1 - beta) q."""
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
    """q - p, in scratch(i); uses scratch(0) or scratch(i), and scratch(1)."""
    size = torch.maximum(p_nV, q_nV, out=scratch(1))
    gap = torch.abs(d_nV, out=scratch(i)).neg_().expm1_().mul_(size)
    return torch.copysign(gap, d_nV, out=gap)


def _over_mixture(d_nV: Tensor, beta: float, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """-log(p/m), written over d, and log(q/m), in scratch(1), for m = beta p + (1 - beta) q. Uses scratch(0).

    The larger of p and q is m / (1 - w (1 - exp(-|d|))), where w is the weight of the smaller one in m.
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
    """gap q / m for m = beta p + (1 - beta) q, written over `gap`."""
    m = torch.mul(q_nV, 1 - beta, out=out).add_(p_nV, alpha=beta)
    return _zero_nans(gap.mul_(q_nV).div_(m))


def _zero_nans(x: Tensor) -> Tensor:
    """Replace NaN by 0, since 0 log 0 = 0. The caller adds a NaN back to every row where a model's own logits hold one."""
    return x.nan_to_num_(0.0, math.inf, -math.inf)
