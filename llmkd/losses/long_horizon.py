"""The long-horizon part of MiniLLM (Gu et al. 2023, arXiv 2306.08543, equations 3 to 5): a token answers for the divergence that it leads to.

The gradient of the reverse KL of whole answers, KL(q || p) = E_y [log q(y) / p(y)] with y ~ q, has two parts. One is the gradient of the
divergence at each position of y, which the divergence of the loss is. The other is - E_y sum_t R_{t+1} grad log q(y_t), where R_{t+1} sums
log p(y_t') / q(y_t') over the later tokens t' > t: cross-entropy on what was written, weighted by R_{t+1}, through which no gradient passes.
"""

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
    """

    names = (NAME,)
    needs_teacher = True

    def __init__(self, weight: float, gamma: float, length_normalized: bool, chunk_size: int | None = None):
        super().__init__()
        self.weight, self.gamma, self.length_normalized, self.chunk_size = weight, gamma, length_normalized, chunk_size

    def forward(self, student: StudentOutputs, signal: Signal | None, batch: Batch) -> Loss:
        ahead_N = self._ahead(student, signal, batch)
        given = batch.weights.get(NAME)
        weights = {"ce": batch.only_kept(ahead_N if given is None else ahead_N * given)}
        total, terms = fused_loss(student.hidden_NH, student.head, batch.labels_N, Objective(), None, self.chunk_size, weights)
        return Loss(self.weight * total, {NAME: terms["ce"]})

    @torch.no_grad()
    def _ahead(self, student: StudentOutputs, signal: Signal, batch: Batch) -> Tensor:
        """R_{t+1} at every target that was written, and 0 at the others, [N]."""
        labels_N, given, device = batch.labels_N, batch.weights.get(NAME), batch.labels_N.device
        written = torch.arange(len(labels_N), device=device) if given is None else given.nonzero()[:, 0]
        chunk = self.chunk_size or default_chunk(student.head.vocab, device.type)
        reward_N = torch.zeros(len(labels_N), dtype=torch.float64, device=device)
        for rows in written.split(chunk):
            log_q_nV = torch.log_softmax(student.head.logits(student.hidden_NH[rows]), -1)
            log_q_n = log_q_nV.gather(-1, labels_N[rows, None])[:, 0]
            reward_N[rows] = (signal.label_log_probs(rows, labels_N[rows]) - log_q_n).double()
        ahead, start, rewards = [], 0, reward_N.tolist()
        for one in batch.examples:
            ahead += later_sums(rewards[start : start + one.num_targets], self.gamma, self.length_normalized)
            start += one.num_targets
        dtype = torch.promote_types(student.hidden_NH.dtype, torch.float32)
        return torch.tensor(ahead, dtype=dtype, device=device)

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
