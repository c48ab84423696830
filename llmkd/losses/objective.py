"""What the student minimises: (1 - kd_ratio) CE + kd_ratio T^2 D, and its gradient, from the logits of a few rows at a time."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..signals import Divergence
from .closed_form import Closed, closed_form
from .divergences import forward_kl

#: A tile [n, V] to write in, by name.
Tile = Callable[[str], Tensor]


@dataclass(frozen=True)
class Objective:
    """Cross-entropy and a divergence, mixed by `kd_ratio`.

    The divergence is taken between both models softened by `temperature` and multiplied by its square, so that its
    gradient keeps its size and kd_ratio means the same at every temperature (Hinton et al. 2015, section 2).
    """

    kd_ratio: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = forward_kl

    def __post_init__(self):
        problems = []
        if not 0 <= self.kd_ratio <= 1:
            problems.append(f"kd_ratio: found {self.kd_ratio!r}, expected 0 to 1")
        if not 0 < self.temperature < math.inf:
            problems.append(f"temperature: found {self.temperature!r}, expected a number above 0")
        if not callable(self.divergence):
            problems.append(
                f"divergence: found {self.divergence!r}, expected a function of two tensors; llmkd.make_divergence(name) gives one"
            )
        if problems:
            raise ArgumentError(*problems)

    def combine(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms, row by row. A term without weight is left out, so it cannot spoil the rest."""
        weights = self._weights("kd" in terms)
        return sum(weights[name] * term for name, term in terms.items() if weights[name])

    def _weights(self, taught: bool) -> dict[str, float]:
        return {"ce": 1 - self.kd_ratio, "kd": self.kd_ratio} if taught else {"ce": 1.0}

    def loss_and_grad(
        self,
        logits_nV: Tensor,
        labels_n: Tensor,
        tile: Tile,
        grad_nV: Tensor | None,
        log_p_nV: Tensor | None = None,
        divergence: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The terms for each row: {"ce": [n]}, and with a teacher "kd": [n], which is T^2 D.

        logits_nV    the student's, float32 or wider; read only
        grad_nV      takes the gradient of the mixed loss with respect to the logits; it may lie over them
        log_p_nV     of a teacher that is known whole, at the temperature; they need not be normalised
        divergence   of another teacher: from the student's log-probabilities at the temperature to D, [n]
        """
        T = self.temperature
        taught = log_p_nV is not None or divergence is not None
        weights = self._weights(taught)
        hard = _softmax(logits_nV, tile("q"))
        terms = {"ce": hard.cross_entropy(logits_nV, labels_n)}
        slope = None
        if taught:
            soft_nV = logits_nV if T == 1 else torch.div(logits_nV, T, out=tile("d"))
            soft = hard if T == 1 else _softmax(soft_nV, tile("soft q"))
            closed = log_p_nV is not None and closed_form(self.divergence)
            if closed:
                value, slope, slope_sum = _compare(closed, soft_nV, soft, log_p_nV, tile)
            else:
                value, slope, slope_sum = _differentiate(
                    divergence or self._of(log_p_nV), soft_nV, grad_nV is not None and weights["kd"] > 0
                )
            terms["kd"] = T * T * value
        if grad_nV is None:
            return terms
        # d D / d logits = (slope - q sum slope) / T, and d CE / d logits = q - [label]
        total_nV = hard.probs_nV
        if slope is None or not weights["kd"]:
            if weights["ce"] != 1:
                total_nV.mul_(weights["ce"])
        else:
            slope_sum = -self.kd_ratio * T * slope_sum[:, None]
            if soft is hard:
                total_nV.mul_(slope_sum.add_(weights["ce"]))
            elif weights["ce"]:
                total_nV.mul_(weights["ce"]).add_(soft.probs_nV.mul_(slope_sum))
            else:
                total_nV = soft.probs_nV.mul_(slope_sum)
        if weights["ce"]:
            total_nV.scatter_add_(-1, labels_n[:, None], total_nV.new_full((len(labels_n), 1), -weights["ce"]))
        if slope is None or not weights["kd"]:
            grad_nV.copy_(total_nV)
        else:
            torch.add(total_nV, slope, alpha=self.kd_ratio * T, out=grad_nV)
        return terms

    def _of(self, log_p_nV: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda log_q_nV: self.divergence(log_q_nV, torch.log_softmax(log_p_nV, -1))


@dataclass(frozen=True)
class _Softmax:
    """The softmax of rows, and what makes log-probabilities of them: x - top + log_peak."""

    probs_nV: Tensor
    top_n: Tensor  # the largest logit
    log_peak_n: Tensor  # the log-probability of the likeliest token

    def cross_entropy(self, logits_nV: Tensor, labels_n: Tensor) -> Tensor:
        return (self.top_n - logits_nV.gather(-1, labels_n[:, None])[:, 0]) - self.log_peak_n


def _softmax(logits_nV: Tensor, out: Tensor) -> _Softmax:
    probs_nV = torch.softmax(logits_nV, -1, out=out)
    return _Softmax(probs_nV, logits_nV.amax(-1), probs_nV.amax(-1).log_())


def _compare(closed: Closed, logits_nV: Tensor, q: _Softmax, log_p_nV: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """A divergence in closed form: its values [n], the slope with respect to log q, and the slope's sums [n]."""
    p = _softmax(log_p_nV, tile("p"))
    offset_n = q.log_peak_n - p.log_peak_n
    # log q - log p; from the tops, since a difference of the logits as they are would be rounded as the largest of them
    d_nV = torch.sub(logits_nV, q.top_n[:, None], out=tile("d"))
    d_nV.sub_(torch.sub(log_p_nV, p.top_n[:, None], out=tile("scratch 0"))).add_(offset_n[:, None]).nan_to_num_(0.0, math.inf, -math.inf)
    terms_nV, slope_nV = closed(p.probs_nV, q.probs_nV, d_nV, lambda i: tile(f"scratch {i}"))
    nan_n = 0 * offset_n  # where either model says NaN
    return terms_nV.clamp_min_(0).sum(-1) + nan_n, slope_nV, slope_nV.sum(-1) + nan_n


def _differentiate(
    divergence: Callable[[Tensor], Tensor], logits_nV: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same by autograd, for what has no closed form; without slope where it is not asked for."""
    log_q_nV = torch.log_softmax(logits_nV, -1).requires_grad_(with_slope)
    with torch.set_grad_enabled(with_slope):
        value_n = divergence(log_q_nV)
        if value_n.shape != log_q_nV.shape[:1]:
            raise ArgumentError(
                f"divergence: returned a tensor of shape {tuple(value_n.shape)}, expected one value for each of {len(log_q_nV)} rows"
            )
        if not with_slope:
            return value_n, None, None
        (slope_nV,) = torch.autograd.grad(value_n.sum(), log_q_nV)
    return value_n.detach(), slope_nV, slope_nV.sum(-1)
