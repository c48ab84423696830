"""Signals of a teacher whose distribution is known in part: its top k tokens and the tail mass, or tokens sampled from it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Rows
from ..config.teacher import TAIL_EXPONENTS
from ..losses.divergences import forward_kl
from ..signals import Divergence

#: A token with a log-probability below this belongs to the tail, whatever its rank. A model that masks tokens would otherwise widen
#: the range over which all others are quantised.
NEGLIGIBLE = -100.0
_NOTHING = -1e30  # log-probability of an event that the student does not have: finite, so that no gradient is NaN


@dataclass(frozen=True)
class TopK:
    """K tokens and one bucket for the tail: K + 1 events, over which student and teacher are compared.

    Merging tokens into a bucket can only lower a divergence, so a KL here lies between 0 and the dense one, and equals it at K = V.
    At temperature T = 1/s the tail mass is f(s) = log sum p^s over the tail, which is convex. f(0) is the logarithm of the number of
    tail tokens; further values are stored (`tail_NS`, at `tail_exponents`), and decreasing cubics interpolate between them. The error
    of that, as a mean KL in nats at T = 0.7, 1.5, 3 and 8 (0 at the stored exponents): 8e-5, 3e-4, 4e-5, 8e-6 for K = 64, V = 128,256
    and Zipf-like distributions; 4e-7, 1e-6, 9e-5, 2e-3 for K = 50 of a trained model's V = 512. With s = 1 alone (imported
    log-probabilities) f is a line, as if the tail were uniform: 8e-3, 0.1, 0.08, 7e-4 for the first.

    ids_NK          token ids of each target, increasing. An id with log-probability -inf belongs to the tail
    log_p_NK        their log-probabilities at temperature 1
    tail_NS         f at `tail_exponents`
    label_log_p_N   the log-probability of each target's own token, at temperature 1
    entropy_N       the entropy of the whole distribution, in nats; NaN where it is not known
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    tail_NS: Tensor
    vocab: int
    label_log_p_N: Tensor
    entropy_N: Tensor
    tail_exponents: tuple[float, ...] = TAIL_EXPONENTS

    @staticmethod
    def of(log_p_NV: Tensor, k: int, labels_N: Tensor) -> "TopK":
        """The K most likely tokens of a dense distribution [N, V], in its own precision."""
        ids_NK = log_p_NV.topk(k).indices.sort().values
        found_NK = log_p_NV.gather(1, ids_NK)
        ruled_out_NK = found_NK < NEGLIGIBLE
        log_p_NK = found_NK.masked_fill(ruled_out_NK, -math.inf)
        rest_NV = log_p_NV.scatter(1, ids_NK, torch.where(ruled_out_NK, found_NK, -math.inf))
        tail_NS = torch.stack([(rest_NV * s).logsumexp(1) for s in TAIL_EXPONENTS], 1)
        tail_NS = torch.where(tail_NS > -math.inf, tail_NS.clamp_min(-6e4), tail_NS)  # in the range of float16
        tail_NS[:, TAIL_EXPONENTS.index(1)].clamp_max_(0)
        label_N = log_p_NV.gather(1, labels_N[:, None])[:, 0]
        return TopK(ids_NK, log_p_NK, tail_NS, log_p_NV.shape[1], label_N, entropy(log_p_NV))

    def events(self, rows: Rows, temperature: float = 1.0) -> Tensor:
        """The teacher's log-probabilities of the K + 1 events, [n, K + 1]; they sum to one."""
        log_p_nK, s = self.log_p_NK[rows], 1 / temperature
        count_n = self.vocab - (log_p_nK > -math.inf).sum(1)
        rest_n = interpolate(
            (0.0, *self.tail_exponents), torch.cat([count_n.to(log_p_nK).log()[:, None], self.tail_NS[rows].to(log_p_nK)], 1), s
        )
        return torch.cat([log_p_nK * s, rest_n[:, None]], 1).log_softmax(1)

    def student_events(self, rows: Rows, log_q_nV: Tensor) -> Tensor:
        """The student's log-probabilities of the same events, [n, K + 1]."""
        ids_nK, kept_nK = self.ids_NK[rows], self.log_p_NK[rows] > -math.inf
        log_q_nK = log_q_nV.gather(1, ids_nK)
        rest_nV = log_q_nV.scatter(1, ids_nK, torch.where(kept_nK, _NOTHING, log_q_nK))  # 1 - sum q would cancel
        return torch.cat([torch.where(kept_nK, log_q_nK, _NOTHING), rest_nV.logsumexp(1, keepdim=True)], 1)

    def divergence(self, divergence: Divergence, rows: Rows, log_q_nV: Tensor, temperature: float = 1.0) -> Tensor:
        return divergence(self.student_events(rows, log_q_nV), self.events(rows, temperature).to(log_q_nV.dtype))

    @torch.no_grad()
    def log_probs(self, rows: Rows, log_q_nV: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """All V tokens, with the tail mass distributed in proportion to the student's probabilities (evenly without them)."""
        ids_nK = self.ids_NK[rows]
        log_p_nE = self.events(rows, temperature)
        if log_q_nV is None:
            log_q_nV = log_p_nE.new_full((len(ids_nK), self.vocab), -math.log(self.vocab))
        log_p_nE = log_p_nE.to(log_q_nV.dtype)
        log_p_nV = log_q_nV + (log_p_nE[:, -1:] - self.student_events(rows, log_q_nV)[:, -1:])
        in_rest_nK = log_p_nE[:, :-1] == -math.inf
        return log_p_nV.scatter(1, ids_nK, torch.where(in_rest_nK, log_p_nV.gather(1, ids_nK), log_p_nE[:, :-1]))

    def label_log_probs(self, rows: Rows, labels_n: Tensor) -> Tensor:
        return self.label_log_p_N[rows]

    def exact_metrics(self, rows: Rows, labels_n: Tensor, log_q_nV: Tensor | None) -> dict[str, Tensor]:
        """The entropy only where the record was made from the whole distribution: listed log-probabilities know their top k."""
        found = _recorded_metrics(self, rows)
        if self.tail_exponents != TAIL_EXPONENTS:
            del found["teacher_entropy"]
        if log_q_nV is None:
            return found
        top1_n = self.ids_NK[rows].gather(1, self.log_p_NK[rows].argmax(1, True))[:, 0]
        return {"top1_agreement": (log_q_nV.argmax(1) == top1_n).float()} | found


@dataclass(frozen=True)
class Sampled:
    """D tokens sampled from the teacher, with replacement, at one temperature. Anshumann et al. 2025 (arXiv 2503.16870).

    The gradient of the forward KL is linear in the teacher's probabilities, so the samples' frequencies estimate it without bias;
    that holds for no other divergence. The value is unbiased too, since the teacher's exact entropy is stored; the value of a
    single target may be negative.
    """

    ids_ND: Tensor
    vocab: int
    temperature: float
    soft_entropy_N: Tensor  # of the distribution that was sampled
    label_log_p_N: Tensor
    entropy_N: Tensor

    def divergence(self, divergence: Divergence, rows: Rows, log_q_nV: Tensor, temperature: float = 1.0) -> Tensor:
        if getattr(divergence, "func", divergence) is not forward_kl:
            raise ValueError("loss.divergence: sampled tokens estimate forward_kl only; use forward_kl, or a cache of kind topk or hidden")
        self._check(temperature)
        return -log_q_nV.gather(1, self.ids_ND[rows]).mean(1) - self.soft_entropy_N[rows].to(log_q_nV.dtype)

    def log_probs(self, rows: Rows, log_q_nV: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """The logarithm of each token's frequency among the samples; -inf where it was not sampled."""
        self._check(temperature)
        ids_nD = self.ids_ND[rows]
        dtype = torch.float32 if log_q_nV is None else log_q_nV.dtype
        count_nV = torch.zeros(len(ids_nD), self.vocab, dtype=dtype, device=ids_nD.device)
        return (count_nV.scatter_add_(1, ids_nD, torch.ones_like(ids_nD, dtype=dtype)) / ids_nD.shape[1]).log_()

    def label_log_probs(self, rows: Rows, labels_n: Tensor) -> Tensor:
        return self.label_log_p_N[rows]

    def exact_metrics(self, rows: Rows, labels_n: Tensor, log_q_nV: Tensor | None) -> dict[str, Tensor]:
        return _recorded_metrics(self, rows)

    def _check(self, temperature: float) -> None:
        if temperature != self.temperature:
            raise ValueError(
                f"loss.temperature: found {temperature:g}, and the tokens were sampled at {self.temperature:g}; use that temperature"
            )


def _recorded_metrics(signal: TopK | Sampled, rows: Rows) -> dict[str, Tensor]:
    return {"teacher_ce": -signal.label_log_p_N[rows], "teacher_entropy": signal.entropy_N[rows]}


def entropy(log_p_NV: Tensor) -> Tensor:
    return torch.special.entr(log_p_NV.exp()).sum(1)


def interpolate(nodes: tuple[float, ...], values_NS: Tensor, at: float) -> Tensor:
    """Monotone cubic interpolation at `at` of N decreasing functions given at increasing `nodes`, [N]. Exact at the nodes.

    The slopes are those of Fritsch and Butland (1984). Two nodes give a line; past the last node the function continues as a line.
    Where a value is -inf, so is the result.
    """
    x, y = nodes, values_NS.unbind(1)
    h = [b - a for a, b in zip(x, x[1:], strict=False)]
    chord = [(b - a) / step for a, b, step in zip(y, y[1:], h, strict=False)]
    i = next((n for n, edge in enumerate(x[1:]) if at <= edge), None)
    if i is None or len(chord) == 1:
        result = y[-1] + (at - x[-1]) * chord[-1]
    else:
        left, right = _slope(h, chord, i), _slope(h, chord, i + 1)
        t = (at - x[i]) / h[i]
        from_left = y[i] * (1 + 2 * t) * (1 - t) ** 2 + left * (h[i] * t * (1 - t) ** 2)
        result = from_left + y[i + 1] * (t * t * (3 - 2 * t)) - right * (h[i] * t * t * (1 - t))
    return torch.where((values_NS == -math.inf).any(1), -math.inf, result)


def _slope(h: list[float], chord: list[Tensor], i: int) -> Tensor:
    """The slope at node i, never positive: inside, the weighted harmonic mean of the two chords; at an end, that of a parabola."""
    if 0 < i < len(h):
        a, b = 2 * h[i] + h[i - 1], h[i] + 2 * h[i - 1]
        product = chord[i - 1] * chord[i]
        return torch.where(product > 0, (a + b) * product / (a * chord[i] + b * chord[i - 1]), 0.0)
    near, far = (0, 1) if i == 0 else (-1, -2)
    return (((2 * h[near] + h[far]) * chord[near] - h[near] * chord[far]) / (h[near] + h[far])).clamp_max(0)
