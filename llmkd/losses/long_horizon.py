"""The long-horizon part of MiniLLM (Gu et al. 2023, arXiv 2306.08543, equations 3 to 5): a token answers for the divergence that it leads to.

The gradient of the reverse KL of whole answers, KL(q || p) = E_y [log q(y) / p(y)] with y ~ q, has two parts. One is the gradient of the
divergence at each position of y, which the divergence of the loss is. The other is - E_y sum_t R_{t+1} grad log q(y_t), where R_{t+1} sums
log p(y_t') / q(y_t') over the later tokens t' > t: cross-entropy on what was written, weighted by R_{t+1}, through which no gradient passes.
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
from .terms import Loss, StudentOutputs, Term

NAME = "long_horizon"


class LongHorizonTerm(Term):
    """R_{t+1} CE at every target that was written (`Batch.weights` of this name is 0 at the others).

    weight            of the whole term
    gamma             discount: a token t' counts gamma^(t' - t - 1)
    length_normalized  divide R_{t+1} by the number of later tokens, as MiniLLM does: long answers are then not preferred to short ones. It is no
                      longer the gradient of the reverse KL of whole answers
    teacher_mix       the share a of the teacher in what the tokens were drawn from, a p + (1 - a) q. Importance weights
                      w_t = q(y_t) / (a p(y_t) + (1 - a) q(y_t)) then make up for it
    products          weights are products, W_t = w_1 ... w_t: a reward r_t' counts W_t' (equation 5 with all its factors), and the divergence at t
                      W_{t-1}, since its expectation over y_t is exact. Both parts have the expectation that they have without a mixture. Else w_t alone
                      weighs R_{t+1}, MiniLLM's approximation (w_t of the divergence too, there: its expectation over y_t is 1, and it is left out), and
                      prefixes and later tokens stay those of the mixture
    """

    names = (NAME,)
    needs_teacher = True

    def __init__(
        self,
        weight: float,
        gamma: float,
        length_normalized: bool,
        chunk_size: int | None = None,
        teacher_mix: float = 0.0,
        products: bool = False,
    ):
        super().__init__()
        self.weight, self.gamma, self.length_normalized, self.chunk_size = weight, gamma, length_normalized, chunk_size
        self.teacher_mix, self.products = teacher_mix, products

    @torch.no_grad()
    def select(self, student: StudentOutputs, signal: Signal | None, batch: Batch) -> Batch:
        """The batch with the weights of this term's targets, R_{t+1} included, and with `products` those of the divergence."""
        given = batch.weights.get(NAME)
        reward_N = self._rewards(student, signal, batch)
        ratio_N = 1 / (self.teacher_mix * reward_N.exp() + (1 - self.teacher_mix)) if self.teacher_mix else torch.ones_like(reward_N)
        ahead, before, start, rewards, ratios = [], [], 0, reward_N.tolist(), ratio_N.tolist()
        for one in batch.examples:
            own = slice(start, start + one.num_targets)
            sums, products = self._of_example(rewards[own], ratios[own])
            ahead, before = ahead + sums, before + products
            start += one.num_targets
        dtype, device = torch.promote_types(student.hidden_NH.dtype, torch.float32), batch.labels_N.device
        ahead_N, before_N = (torch.tensor(x, dtype=dtype, device=device) for x in (ahead, before))
        weights = {NAME: batch.only_kept(ahead_N if given is None else ahead_N * given)}
        if self.products:
            written_N = before_N if given is None else torch.where(given != 0, before_N, 1.0)
            weights["kd"] = written_N * batch.weights["kd"] if "kd" in batch.weights else written_N
        return replace(batch, weights=batch.weights | weights, zeros=batch.zeros or {})

    def forward(self, student: StudentOutputs, signal: Signal | None, batch: Batch) -> Loss:
        weights = {"ce": batch.weights[NAME]}
        total, terms = fused_loss(student.hidden_NH, student.head, batch.labels_N, Objective(), None, self.chunk_size, weights)
        return Loss(self.weight * total, {NAME: terms["ce"]}, {"kd": batch.weights["kd"]} if self.products else {})

    def _of_example(self, rewards: list[float], ratios: list[float]) -> tuple[list[float], list[float]]:
        """The weights of an example's tokens, and the products of the ratios of the tokens before each."""
        if not self.products:
            return [w * after for w, after in zip(ratios, later_sums(rewards, self.gamma, self.length_normalized), strict=True)], [
                1.0
            ] * len(ratios)
        products = list(itertools.accumulate(ratios, operator.mul, initial=1.0))
        weighted = [r * w if w else 0.0 for r, w in zip(rewards, products[1:], strict=True)]
        return later_sums(weighted, self.gamma, self.length_normalized), products[:-1]

    def _rewards(self, student: StudentOutputs, signal: Signal, batch: Batch) -> Tensor:
        """log p / q of every target that was written, and 0 of the others, float64 [N]."""
        labels_N, given, device = batch.labels_N, batch.weights.get(NAME), batch.labels_N.device
        written = torch.arange(len(labels_N), device=device) if given is None else given.nonzero()[:, 0]
        chunk = self.chunk_size or default_chunk(student.head.vocab, device.type)
        reward_N = torch.zeros(len(labels_N), dtype=torch.float64, device=device)
        for rows in written.split(chunk):
            log_q_nV = torch.log_softmax(student.head.logits(student.hidden_NH[rows], rows=rows), -1)
            log_q_n = log_q_nV.gather(-1, labels_N[rows, None])[:, 0]
            reward_N[rows] = (signal.label_log_probs(rows, labels_N[rows]) - log_q_n).double()
        return reward_N

    def combine(self, values: dict[str, float]) -> float:
        return self.weight * values[NAME]

    def halve_chunks(self, vocab: int, device: str, least: int) -> str:
        rows = self.chunk_size or default_chunk(vocab, device)
        if rows <= least:
            return ""
        self.chunk_size = max(least, rows // 2)
        return f"the long horizon in chunks of {self.chunk_size:,} rows"


def later_sums(rewards: list[float], gamma: float, length_normalized: bool) -> list[float]:
    """For each token the discounted sum of the rewards of later ones, or with `length_normalized` that over their number; 0 for the last."""
    sums, after = [0.0] * len(rewards), 0.0
    for t in range(len(rewards) - 2, -1, -1):
        after = rewards[t + 1] + gamma * after
        sums[t] = after / (len(rewards) - t - 1) if length_normalized else after
    return sums
