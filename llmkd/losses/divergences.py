"""Divergences between a teacher p and a student q: pure functions of two tensors of log-probabilities, row by row.

Every function takes `log_q` (student) and `log_p` (teacher), both [N, E] and normalised over the last axis, and
returns [N], in nats. None of them depends on labels, masks, temperature, reduction or device. `log_p` gets no gradient and
may hold -inf (a teacher that gives a token no probability); a divergence that is infinite there is returned as inf.

Every divergence is a sum of terms each of which is >= 0, so that rounding cannot make the sum negative and a
small divergence keeps its leading digits: sum a (log a - log b) is computed as sum a (log a - log b) - a + b, which is
equal because a and b both sum to one, and has the same gradient on normalised inputs.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..signals import Divergence


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q). Hinton et al. 2015 (arXiv 1503.02531), up to the teacher's entropy."""
    return _kl(log_p, log_q)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum q (log q - log p). Gu et al. 2023, MiniLLM (arXiv 2306.08543), section 2.2, per token.

    Infinite where the teacher gives probability 0 to a token and the student does not.
    """
    return _kl(log_q, log_p)


def symmetric_kl(log_q: Tensor, log_p: Tensor, forward_weight: float = 0.5) -> Tensor:
    """forward_weight KL(p || q) + (1 - forward_weight) KL(q || p). At one half, half of Jeffreys' divergence."""
    return _mix(forward_weight, lambda: forward_kl(log_q, log_p), lambda: reverse_kl(log_q, log_p))


def generalized_jsd(log_q: Tensor, log_p: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Agarwal et al. 2023, GKD (arXiv 2306.13649), section 2; the convention of TRL and Liger. beta = 0 is forward KL
    and beta = 1 reverse KL *by definition*: the formula itself tends to 0 at both ends (like beta KL(p || q) and
    (1 - beta) KL(q || p)), so the value jumps there. beta = 0.5 is the Jensen-Shannon divergence, at most log 2.
    """
    if beta == 0:
        return forward_kl(log_q, log_p)
    if beta == 1:
        return reverse_kl(log_q, log_p)
    log_m = _log_mix(beta, log_p, log_q)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skewed_forward_kl(log_q: Tensor, log_p: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q). Ko et al. 2024, DistiLLM (arXiv 2402.03898), section 3.1. alpha = 0 is forward KL."""
    return _kl(log_p, _log_mix(alpha, log_p, log_q))


def skewed_reverse_kl(log_q: Tensor, log_p: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q). Ko et al. 2024, DistiLLM (arXiv 2402.03898), section 3.1. alpha = 0 is reverse KL."""
    return _kl(log_q, _log_mix(alpha, log_q, log_p))


def adaptive_kl(log_q: Tensor, log_p: Tensor, head_mass: float = 0.5) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), w = g_head / (g_head + g_tail).

    Wu et al. 2024 (arXiv 2404.02657), section 4. The head is the smallest set of the teacher's most likely events
    that holds at least `head_mass`; g = sum |p - q| over head and tail. w takes no gradient; it is 1/2 at p = q.
    """
    with torch.no_grad():
        p, gap = log_p.exp(), (log_p.exp() - log_q.exp()).abs()
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        in_head = ordered.cumsum(-1) - ordered < head_mass
        head = torch.zeros_like(p).scatter_(-1, order, in_head.to(p.dtype))
        g_head, g_all = (gap * head).sum(-1), gap.sum(-1)
        weight = torch.where(g_all > 0, g_head / g_all.clamp_min(torch.finfo(p.dtype).tiny), 0.5)
    return weight * forward_kl(log_q, log_p) + (1 - weight) * reverse_kl(log_q, log_p)


def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """1/2 sum |p - q|, at most 1. Wen et al. 2023, f-DISTILL (arXiv 2307.15190), section 3. Gradient 0 at p = q."""
    return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)


def alpha_beta(log_q: Tensor, log_p: Tensor, alpha: float = 0.2, beta: float = 0.7) -> Tensor:
    """-1/(alpha beta) sum [p^alpha q^beta - alpha/(alpha+beta) p^(alpha+beta) - beta/(alpha+beta) q^(alpha+beta)].

    Cichocki, Cruces, Amari 2011 (Entropy 13, 134-170), section 2, as used by Wang et al. 2025, ABKD
    (arXiv 2505.04560). By continuity, alpha = 0 is 1/beta^2 sum [q^beta log(q^beta/p^beta) - q^beta + p^beta] and
    beta = 0 the same with p and q exchanged: (1, 0) is forward and (0, 1) reverse KL. alpha, beta >= 0, not both 0.
    """
    if alpha == 0:
        return _kl(beta * log_q, beta * log_p) / beta**2
    if beta == 0:
        return _kl(alpha * log_p, alpha * log_q) / alpha**2
    return _AlphaBeta.apply(log_q, log_p, alpha, beta)


def make_divergence(name: str, **options: float) -> Divergence:
    """The divergence of that name with its options fixed. Nothing is checked here; `llmkd.make_divergence` checks name and options."""
    return functools.partial(DIVERGENCES[name], **options)


#: The divergences of `loss.divergence`, by name.
DIVERGENCES: dict[str, Divergence] = {
    function.__name__: function
    for function in (
        *(forward_kl, reverse_kl, symmetric_kl, generalized_jsd, skewed_forward_kl, skewed_reverse_kl),
        *(adaptive_kl, total_variation, alpha_beta),
    )
}


def builtin_name(divergence: Divergence) -> str | None:
    """The name of a divergence in DIVERGENCES, with or without options; None for any other function, even one with such a name."""
    function = getattr(divergence, "func", divergence)
    name = getattr(function, "__name__", "")
    return name if DIVERGENCES.get(name) is function else None


def divergence_name(divergence: Divergence) -> str:
    """A name for messages, of any callable."""
    function = getattr(divergence, "func", divergence)
    return getattr(function, "__name__", type(function).__name__)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return _KL.apply(log_a, log_b)


def kl_and_slope(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor]:
    """KL(a || b) over the last axis, and its gradient b - a with respect to the scores of which `log_b` is the log-softmax; without autograd."""
    value, _, difference = _kl_parts(log_a, log_b)
    return value, difference


def _kl_parts(log_a: Tensor, log_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For rows that sum to one: sum a (log a - log b) - a + b, whose last two parts cancel in the sum; a (log b - log a); and b - a.

    With d = log b - log a the terms are (b - a) - a d, and b - a = +-max(a, b) (1 - exp(-|d|)) has no cancellation.
    """
    a, d = log_a.exp(), (log_b - log_a).nan_to_num_(0.0, math.inf, -math.inf)  # both -inf: no difference
    difference = torch.copysign(torch.maximum(log_a, log_b).exp_().mul_(d.abs().neg_().expm1_()), d)
    weighted = d.mul_(a).nan_to_num_(0.0, math.inf, -math.inf)  # 0 log 0 = 0; a NaN of the inputs stays in `difference`
    terms = torch.sub(difference, weighted, out=a).clamp_min_(0)
    return terms.sum(-1), weighted, difference


class _KL(torch.autograd.Function):
    """KL(a || b). Autograd would keep about twenty [n, V] tensors; here the gradients are at hand: -a d for log a, and b - a for log b."""

    @staticmethod
    def forward(ctx, log_a, log_b):
        value, weighted, difference = _kl_parts(log_a, log_b)
        ctx.save_for_backward(weighted if ctx.needs_input_grad[0] else None, difference if ctx.needs_input_grad[1] else None)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weighted, difference = ctx.saved_tensors
        grad_a = None if weighted is None else weighted * -grad[..., None]
        grad_b = None if difference is None else difference * grad[..., None]
        return grad_a, grad_b


class _AlphaBeta(torch.autograd.Function):
    """The alpha-beta divergence for alpha, beta > 0; accurate also if they are small, or p and q are close.

    With s = -|log q - log p| <= 0 and r(e) = (exp(e s) - 1) / e a term is max(p, q)^t / t, t = alpha + beta, times
    (1 + beta r(beta)) r(alpha) - r(beta) where q <= p, and the same with alpha and beta exchanged where q > p.
    """

    @staticmethod
    def forward(ctx, log_q, log_p, alpha, beta):
        below = log_q <= log_p
        s = (log_q - log_p).abs().neg_().nan_to_num_(0.0, neginf=-math.inf)
        size = torch.maximum(log_q, log_p).mul_(alpha + beta).exp_()
        r_alpha, r_beta = (alpha * s).expm1_().div_(alpha), s.mul_(beta).expm1_().div_(beta)
        terms = torch.where(below, (1 + beta * r_beta) * r_alpha - r_beta, (1 + alpha * r_alpha) * r_beta - r_alpha)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(size * r_alpha * torch.where(below, 1 + beta * r_beta, -1.0))
        return terms.mul_(size).clamp_min_(0).sum(-1) / (alpha + beta)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return slope * grad[..., None], None, None, None


def _log_mix(share: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """log(share a + (1 - share) b)."""
    if share in (0, 1):
        return log_a if share else log_b
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _mix(share: float, first: Callable[[], Tensor], second: Callable[[], Tensor]) -> Tensor:
    """share * first + (1 - share) * second, without computing what has no weight (it may be infinite)."""
    if share in (0, 1):
        return first() if share else second()
    return share * first() + (1 - share) * second()
