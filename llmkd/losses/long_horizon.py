"""The long-horizon term of MiniLLM (Gu et al. 2023, arXiv 2306.08543, equations 3 to 5): each token is charged for the divergence that follows it.

The gradient of the reverse KL of whole answers, KL(q || p) = E_y [log q(y) / p(y)] with y ~ q, has two parts. One is the gradient of the
divergence at each position of y; that is the divergence in the loss. The other is - E_y sum_t R_{t+1} grad log q(y_t), where R_{t+1} is the sum
of log p(y_t') / q(y_t') over the later tokens t' > t: cross-entropy on the written answer, weighted by R_{t+1}, which carries no gradient.
"""

import itertools
import operator
from dataclasses import replace

import torch
from torch import Tensor

from ..batch import Batch
from ..signals import Signal
from .fused import default_chunk, fused_loss
from .objective import Objective
from .terms import HeadTerm, Loss, SingleTerm, StudentOutputs

NAME = "long_horizon"


class LongHorizonTerm(SingleTerm):
    """R_{t+1} CE at every target that was written (`Batch.weights` of this name is 0 at the others).

    weight             of the whole term
    gamma              the discount: token t' counts gamma^(t' - t - 1)
    length_normalized  divide R_{t+1} by the number of later tokens, as MiniLLM does, so that long answers are not preferred to short ones. The
                       gradient is then no longer that of the reverse KL of whole answers
    teacher_mix        the teacher's share a in the distribution that the tokens were drawn from, a p + (1 - a) q. Importance weights
                       w_t = q(y_t) / (a p(y_t) + (1 - a) q(y_t)) correct for it
    products           weigh by products W_t = w_1 ... w_t: a reward r_t' by W_t' (equation 5 with all its factors), and the divergence at t by
                       W_{t-1}, since its expectation over y_t is exact. Both parts then have their expectation without a mixture. Otherwise
                       only w_t weighs R_{t+1}, MiniLLM's approximation: prefixes and later tokens stay those of the mixture. (MiniLLM weighs the
                       divergence by w_t too; the expectation of w_t over y_t is 1, and it is left out here)
    costs              computes the divergence at each target, weights included; the reward is minus that. None: the reward is
                       log p(y_t') / q(y_t'), whose expectation over y_t' is minus the reverse KL. With costs c_t the two parts together are the
                       gradient of E_y sum_t c_t, for any c_t that is a function of the tokens before t: a weighted divergence at any temperature
    """

    needs_teacher = True

    def __init__(
        self,
        weight: float,
        gamma: float,
        length_normalized: bool,
        chunk_size: int | None = None,
        teacher_mix: float = 0.0,
        products: bool = False,
        costs: HeadTerm | None = None,
    ):
        super().__init__(NAME, weight)
        self.scaled_as = "kd"
        self.gamma, self.length_normalized, self.chunk_size = gamma, length_normalized, chunk_size
        self.teacher_mix, self.products, self.costs = teacher_mix, products, costs

    def start_step(self, step: int, scale: dict[str, float]) -> None:
        super().start_step(step, scale)
        if self.costs:
            self.costs.start_step(step, scale)

    @torch.no_grad()
    def select(self, student: StudentOutputs, signal: Signal | None, batch: Batch) -> Batch:
        """The batch with the weights of this term's targets, R_{t+1} included, and with `products` the divergence's weights."""
        given, labels_N = batch.weights.get(NAME), batch.labels_N
        written = torch.arange(len(labels_N), device=labels_N.device) if given is None else given.nonzero()[:, 0]
        sampled_N = self._sampled_rewards(student, signal, batch, written) if self.teacher_mix or not self.costs else None
        ratios = (1 / (self.teacher_mix * sampled_N.exp() + (1 - self.teacher_mix))).tolist() if self.teacher_mix else [1.0] * len(labels_N)
        through, before = self._products(batch, ratios)
        dtype = torch.promote_types(student.hidden_NH.dtype, torch.float32)
        if self.products:
            before_N = torch.tensor(before, dtype=dtype, device=labels_N.device)
            before_N = before_N if given is None else torch.where(given != 0, before_N, 1.0)
            kd_N = before_N * batch.weights["kd"] if "kd" in batch.weights else before_N
            batch = replace(batch, weights=batch.weights | {"kd": kd_N}, zeros=batch.zeros or {})
        if self.costs:
            rewards = (-self.costs(student, signal, batch.keeping(written)).rows["kd"]).tolist()
            given = None if given is None else (given != 0).to(given.dtype)  # costs already include the weights of their examples
        else:
            rewards = [r * w if w else 0.0 for r, w in zip(sampled_N.tolist(), through, strict=True)]
        ahead = [after for own in _slices(batch) for after in later_sums(rewards[own], self.gamma, self.length_normalized)]
        if not self.products:
            ahead = [w * after for w, after in zip(ratios, ahead, strict=True)]
        ahead_N = torch.tensor(ahead, dtype=dtype, device=labels_N.device)
        ahead_N = batch.only_kept(ahead_N if given is None else ahead_N * given)
        return replace(batch, weights=batch.weights | {NAME: ahead_N}, zeros=batch.zeros or {})

    def forward(self, student: StudentOutputs, signal: Signal | None, batch: Batch) -> Loss:
        weights = {"ce": batch.weights[NAME]}
        total, terms = fused_loss(student.hidden_NH, student.head, batch.labels_N, Objective(), None, self.chunk_size, weights)
        measured = self.products and not (self.costs and self.costs.rule)  # with a rule, the head's term reports the weights of "kd"
        return Loss(self.factor * total, {NAME: terms["ce"]}, {"kd": batch.weights["kd"]} if measured else {})

    def _products(self, batch: Batch, ratios: list[float]) -> tuple[list[float], list[float]]:
        """For every target, the weight of its reward and that of its divergence: with `products` W_t and W_{t-1}, else 1."""
        if not self.products:
            return [1.0] * len(ratios), [1.0] * len(ratios)
        every = [list(itertools.accumulate(ratios[own], operator.mul, initial=1.0)) for own in _slices(batch)]
        return [w for one in every for w in one[1:]], [w for one in every for w in one[:-1]]

    def _sampled_rewards(self, student: StudentOutputs, signal: Signal, batch: Batch, written: Tensor) -> Tensor:
        """log p / q at the targets `written`, and 0 at the others, float64 [N]."""
        labels_N = batch.labels_N
        chunk = self.chunk_size or default_chunk(student.head.vocab, labels_N.device.type)
        reward_N = torch.zeros(len(labels_N), dtype=torch.float64, device=labels_N.device)
        for rows in written.split(chunk):
            log_q_nV = torch.log_softmax(student.head.logits(student.hidden_NH[rows], rows=rows), -1)
            log_q_n = log_q_nV.gather(-1, labels_N[rows, None])[:, 0]
            reward_N[rows] = (signal.label_log_probs(rows, labels_N[rows]) - log_q_n).double()
        return reward_N

    def halve_chunks(self, vocab: int, device: str, least: int) -> str:
        rows = self.chunk_size or default_chunk(vocab, device)
        if rows <= least:
            return ""
        self.chunk_size = max(least, rows // 2)
        if self.costs:
            self.costs.halve_chunks(vocab, device, least)
        return f"the long horizon in chunks of {self.chunk_size:,} rows"


def _slices(batch: Batch) -> list[slice]:
    """The targets of each example, as slices."""
    ends = list(itertools.accumulate((one.num_targets for one in batch.examples), initial=0))
    return [slice(*both) for both in itertools.pairwise(ends)]


def later_sums(rewards: list[float], gamma: float, length_normalized: bool) -> list[float]:
    """For each token the discounted sum of the rewards of later tokens, with `length_normalized` divided by their number; 0 for the last."""
    sums, after = [0.0] * len(rewards), 0.0
    for t in range(len(rewards) - 2, -1, -1):
        after = rewards[t + 1] + gamma * after
        sums[t] = after / (len(rewards) - t - 1) if length_normalized else after
    return sums
