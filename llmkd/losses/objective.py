"""The student's loss (1 - kd_ratio) CE + kd_ratio T^2 D and its gradient, from the logits of a few rows at a time."""

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..signals import Divergence
from . import ratio
from .closed_form import Closed, closed_form
from .divergences import forward_kl

#: Returns a reusable [n, V] buffer, by its name.
Tile = Callable[[str], Tensor]


@dataclass(frozen=True)
class Objective:
    """Cross-entropy (CE) and a divergence D from the teacher, weighted by `kd_ratio`: (1 - kd_ratio) CE + kd_ratio T^2 D.

    kd_ratio      weight of the divergence, 0 to 1
    temperature   T > 0: both models' logits are divided by it in D. The factor T^2 keeps the size of D's gradient, so that
                  kd_ratio means the same at every temperature (Hinton et al. 2015, section 2)
    divergence    a function (log_q [n, E], log_p [n, E]) -> [n]; `llmkd.make_divergence` gives the built-in ones
    scale         factors of CE and D in one step, see `normalized`

    ArgumentError if one of the first three is out of range.
    """

    kd_ratio: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = forward_kl
    scale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self):
        problems = []
        if not _is_number(self.kd_ratio) or not 0 <= self.kd_ratio <= 1:
            problems.append(f"kd_ratio: found {self.kd_ratio!r}, expected 0 to 1")
        if not _is_number(self.temperature) or not 0 < self.temperature < math.inf:
            problems.append(f"temperature: found {self.temperature!r}, expected a number above 0")
        if not callable(self.divergence):
            problems.append(
                f"divergence: found {self.divergence!r}, expected a function of two tensors; llmkd.make_divergence(name) gives one"
            )
        if problems:
            raise ArgumentError(*problems)

    def combine(self, terms: dict[str, Tensor], shares: dict[str, float] | None = None) -> Tensor:
        """The sum of the terms times their shares, row by row. A term with share 0 is left out, so that an infinite one has no effect."""
        shares = shares or self.shares("kd" in terms)
        return sum(shares[name] * term for name, term in terms.items() if shares[name])

    def shares(self, has_teacher: bool) -> dict[str, float]:
        """The factor of each term in the loss."""
        ce, kd = self.scale
        return {"ce": (1 - self.kd_ratio) * ce, "kd": self.kd_ratio * kd} if has_teacher else {"ce": ce}

    def normalized(self, scale: dict[str, float]) -> "Objective":
        """The objective with each term multiplied by its `scale` (1 without an entry): a step's targets over the sum of the term's weights."""
        return replace(self, scale=(scale.get("ce", 1.0), scale.get("kd", 1.0)))

    def loss_and_grad(
        self,
        logits_nV: Tensor,
        labels_n: Tensor,
        tile: Tile,
        grad_nV: Tensor | None,
        log_p_nV: Tensor | None = None,
        divergence: Callable[[Tensor], Tensor] | None = None,
        shares: dict[str, float] | None = None,
        weights: dict[str, Tensor] | None = None,
        zeros: bool = True,
    ) -> dict[str, Tensor]:
        """The terms for each row: {"ce": [n]}, and with a teacher "kd": [n], which is T^2 D. The terms are unweighted; the gradient is weighted.

        logits_nV    the student's logits, float32 or wider; not changed, unless grad_nV shares their memory
        tile         returns reusable [n, V] buffers
        grad_nV      receives the gradient of the weighted loss with respect to the logits, and may share their memory; None: no gradient
        log_p_nV     the teacher's log-probabilities at the temperature, if it has a full distribution; they need not be normalised
        divergence   for any other teacher: a function from the student's log-probabilities at the temperature to D, [n]
        shares       the factor of each term in the loss; by default this objective's `shares`
        weights      by term, the weight of each row, [n]; 1 without an entry
        zeros        whether weights of the divergence may be 0
        """
        T = self.temperature
        has_teacher = log_p_nV is not None or divergence is not None
        shares = shares or self.shares(has_teacher)
        by_row = {name: w_n.to(logits_nV.dtype)[:, None] for name, w_n in (weights or {}).items()}
        if "ce" in by_row:
            by_row["ce"] = shares["ce"] * by_row["ce"]
        ce, kd = by_row.get("ce", shares.get("ce")), shares.get("kd")  # [n, 1], or a number for all rows
        if log_p_nV is not None and ratio.applies(self.divergence, T, logits_nV):
            each = kd * by_row["kd"] if "kd" in by_row else kd
            if found := ratio.loss_and_grad(logits_nV, labels_n, tile, grad_nV, log_p_nV, ce, each):
                return found
        hard = _softmax(logits_nV, tile("q"))
        terms = {"ce": hard.cross_entropy(logits_nV, labels_n)}
        slope = None
        if has_teacher:
            soft_nV = logits_nV if T == 1 else torch.div(logits_nV, T, out=tile("d"))
            soft = hard if T == 1 else _softmax(soft_nV, tile("soft q"))
            closed = log_p_nV is not None and closed_form(self.divergence)
            if closed:
                value, slope, slope_sum = _compare(closed, soft_nV, soft, log_p_nV, tile)
            else:
                value, slope, slope_sum = _differentiate(
                    divergence or self._of(log_p_nV), soft_nV, grad_nV is not None and shares["kd"] > 0
                )
            terms["kd"] = T * T * value
        if grad_nV is None:
            return terms
        if slope is None or not shares["kd"]:
            _write_ce_grad(hard, labels_n, ce, grad_nV)
            return terms
        # d D / d logits = (slope - q sum slope) / T, and d CE / d logits = q - [label]
        total_nV, label, slope_sum = hard.probs_nV, labels_n[:, None], slope_sum[:, None]
        if "kd" in by_row:  # weights multiply the slope, so that weights of 1 change no bit
            w_n1 = by_row["kd"]
            slope, slope_sum = torch.mul(slope, w_n1, out=slope if closed else None), slope_sum * w_n1
            if zeros:  # the slope may be infinite where its weight is 0
                slope, slope_sum = (x.masked_fill_(w_n1 == 0, 0.0) for x in (slope, slope_sum))
        slope_sum = -T * kd * slope_sum
        if soft is hard:
            total_nV.mul_(slope_sum.add_(ce))
        elif shares["ce"]:
            total_nV.mul_(ce).add_(soft.probs_nV.mul_(slope_sum))
        else:
            total_nV = soft.probs_nV.mul_(slope_sum)
        if shares["ce"]:
            total_nV.scatter_add_(-1, label, -ce if isinstance(ce, Tensor) else total_nV.new_full(label.shape, -ce))
        torch.add(total_nV, slope, alpha=T * kd, out=grad_nV)
        return terms

    def _of(self, log_p_nV: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda log_q_nV: self.divergence(log_q_nV, torch.log_softmax(log_p_nV, -1))


def _write_ce_grad(q: "_Softmax", labels_n: Tensor, ce: float | Tensor, grad_nV: Tensor) -> None:
    """Write ce (q - [label]) into `grad_nV`, overwriting q. `ce`: a number, or [n, 1]."""
    q.probs_nV.scatter_add_(-1, labels_n[:, None], q.probs_nV.new_full((len(labels_n), 1), -1.0))
    if isinstance(ce, Tensor) or ce != 1:
        torch.mul(q.probs_nV, ce, out=grad_nV)
    else:
        grad_nV.copy_(q.probs_nV)


@dataclass(frozen=True)
class _Softmax:
    """The softmax of rows, and two values per row that turn logits x into log-probabilities: x - top + log_peak."""

    probs_nV: Tensor
    top_n: Tensor  # the largest logit
    log_peak_n: Tensor  # the log-probability of the most likely token

    def cross_entropy(self, logits_nV: Tensor, labels_n: Tensor) -> Tensor:
        return (self.top_n - logits_nV.gather(-1, labels_n[:, None])[:, 0]) - self.log_peak_n


def _softmax(logits_nV: Tensor, out: Tensor) -> _Softmax:
    probs_nV = torch.softmax(logits_nV, -1, out=out)
    return _Softmax(probs_nV, logits_nV.amax(-1), probs_nV.amax(-1).log_())


def _compare(closed: Closed, logits_nV: Tensor, q: _Softmax, log_p_nV: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """A divergence in closed form: its values [n], its slope with respect to log q [n, V], and the slope's row sums [n]."""
    p = _softmax(log_p_nV, tile("p"))
    offset_n = q.log_peak_n - p.log_peak_n
    # log q - log p from logits minus each row's maximum: a difference of raw logits would carry the rounding error of the largest of them
    d_nV = torch.sub(logits_nV, q.top_n[:, None], out=tile("d"))
    d_nV.sub_(torch.sub(log_p_nV, p.top_n[:, None], out=tile("scratch 0"))).add_(offset_n[:, None]).nan_to_num_(0.0, math.inf, -math.inf)
    terms_nV, slope_nV = closed(p.probs_nV, q.probs_nV, d_nV, lambda i: tile(f"scratch {i}"))
    nan_n = 0 * offset_n  # NaN in rows where one of the models' logits hold NaN
    return terms_nV.clamp_min_(0).sum(-1) + nan_n, slope_nV, slope_nV.sum(-1) + nan_n


def _differentiate(
    divergence: Callable[[Tensor], Tensor], logits_nV: Tensor, with_slope: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `_compare`, by autograd, for a divergence without a closed form; (values, None, None) without `with_slope`."""
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


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
