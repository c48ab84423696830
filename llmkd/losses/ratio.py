"""Cross-entropy and forward KL at temperature 1 from the ratio of both models' probabilities, with half the passes over [n, V] of the general form.

Let p be the teacher's probabilities, x = z - y the difference of student's and teacher's logits minus its mean under p, e = exp(x) - 1 and
s = sum p e. Then q = p (1 + e) / (1 + s) and KL(p || q) = log(1 + s) - sum p x, where the last sum is 0 up to rounding. So the student's
softmax is never computed, nearly equal numbers are never subtracted, and where the models agree everything is as small as their difference.

z - y is rounded before its mean is subtracted, so an offset between the two models' logits, which no softmax sees, costs digits here. The
error of the KL's gradient in float32 (3,000 entries, models that differ by 1e-4, compared with float64) is 1e-7 without an offset, 3e-5 with
an offset of 2, and 6e-3 with 31. In the general form, which subtracts each model's largest logit first, it is 3e-4 with any offset; that
form is used for offsets above `_OFFSET`.
"""

import torch
from torch import Tensor

from ..signals import Divergence
from .divergences import builtin_name

#: Up to this x, p e is right even if p has underflowed: what is lost is a probability below exp(40 - 87).
_MOST = 40.0
#: Up to this mean of z - y under p, x is as accurate as a logit of usual size: to 2e-6 in float32.
_OFFSET = 32.0


def applies(divergence: Divergence, temperature: float, logits_nV: Tensor) -> bool:
    """Whether this form applies. Not on a GPU: the host would wait for `in_range`, and the Triton kernel computes everything there."""
    return temperature == 1 and builtin_name(divergence) == "forward_kl" and not logits_nV.is_cuda


def in_range(x_nV: Tensor, mean_n1: Tensor) -> bool:
    """Whether the form is accurate. It is not if the student finds likely what its teacher rules out, if the models' logits have a large
    offset, or if logits are infinite or NaN."""
    return bool(x_nV.amax() <= _MOST) and all(abs(mean) <= _OFFSET for mean in mean_n1[:, 0].tolist())  # in Python: few numbers


def loss_and_grad(
    logits_nV: Tensor,
    labels_n: Tensor,
    tile,
    grad_nV: Tensor | None,
    log_p_nV: Tensor,
    ce: float | Tensor,
    kd: float | Tensor,
) -> dict[str, Tensor] | None:
    """As `Objective.loss_and_grad`; None if the form is not `in_range`. ce, kd: the terms' factors in the gradient, numbers or [n, 1]."""
    label = labels_n[:, None]
    p_nV = torch.softmax(log_p_nV, -1, out=tile("p"))
    x_nV, product = torch.sub(logits_nV, log_p_nV, out=tile("d")), tile("q")
    mean_n1 = torch.mul(p_nV, x_nV, out=product).sum(-1, keepdim=True)
    if not in_range(x_nV.sub_(mean_n1), mean_n1):
        return None
    rest_n1 = torch.mul(p_nV, x_nV, out=product).sum(-1, keepdim=True)
    log_p_label = (log_p_nV.gather(-1, label) - log_p_nV.amax(-1, keepdim=True)) + p_nV.amax(-1, keepdim=True).log_()
    x_label = x_nV.gather(-1, label)
    of_p_nV = x_nV.expm1_().mul_(p_nV)
    s_n1 = of_p_nV.sum(-1, keepdim=True)
    log_sum_n1 = s_n1.log1p()
    terms = {"ce": (log_sum_n1 - x_label - log_p_label)[:, 0], "kd": (log_sum_n1 - rest_n1).clamp_min_(0)[:, 0]}
    if grad_nV is not None:  # ce (q - [label]) + kd (q - p)
        total_nV = of_p_nV.mul_((ce + kd) / (1 + s_n1))
        total_nV.scatter_add_(-1, label, -ce if isinstance(ce, Tensor) else torch.full_like(x_label, -ce))
        torch.addcmul(total_nV, p_nV, (ce - kd * s_n1) / (1 + s_n1), out=grad_nV)
    return terms
