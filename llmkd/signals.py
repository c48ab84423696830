"""The nouns that everything else passes around: batches and what a teacher says about their targets.

Shape letters: B examples, T positions, N targets (supervised positions), n targets of one chunk, V entries of
the real vocabulary, H hidden width, K entries that a sparse signal keeps, E events that two models are compared over
(V, or fewer for a sparse signal).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .batch import Batch, Rows
from .head import Head

#: From the log-probabilities of student and teacher over the same events, both [n, E]: how far apart they are, [n].
Divergence = Callable[[Tensor, Tensor], Tensor]


class Signal(Protocol):
    """What a teacher says about the N targets of a batch."""

    def divergence(self, divergence: Divergence, rows: Rows, log_q_nV: Tensor, temperature: float = 1.0) -> Tensor:
        """How far the student is from this teacher at those targets, [n]; `log_q_nV` are its log-probabilities at `temperature`."""

    def log_probs(self, rows: Rows, log_q_nV: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """The teacher's log-probabilities at `temperature` for those targets, [n, V].

        Where a signal knows only the mass of some tokens together, it is shared out as the student shares its own (`log_q_nV`).
        """

    def label_log_probs(self, rows: Rows, labels_n: Tensor) -> Tensor:
        """The teacher's log-probability of each target's own token, at temperature 1, [n]."""

    def exact_metrics(self, rows: Rows, labels_n: Tensor, log_q_nV: Tensor) -> dict[str, Tensor]:
        """Those of TEACHER_METRICS that it knows better than `log_probs` says, [n]."""


#: What can be told of a teacher and of a student before it; of one that is known by samples, fewer.
TEACHER_METRICS = ("forward_kl", "reverse_kl", "top1_agreement", "teacher_ce", "teacher_entropy")


class Teacher(Protocol):
    """A callable from a batch to a signal. Never trains, never keeps a gradient."""

    metrics: tuple[str, ...]  # which of TEACHER_METRICS can be told of its signals

    def __call__(self, batch: Batch) -> Signal: ...


class Known:
    """A signal that knows the teacher's whole distribution: `log_probs` says all that there is."""

    def log_probs(self, rows: Rows, log_q_nV: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        raise NotImplementedError

    def divergence(self, divergence: Divergence, rows: Rows, log_q_nV: Tensor, temperature: float = 1.0) -> Tensor:
        return divergence(log_q_nV, self.log_probs(rows, log_q_nV, temperature))

    def label_log_probs(self, rows: Rows, labels_n: Tensor) -> Tensor:
        return self.log_probs(rows).gather(-1, labels_n[:, None])[:, 0]

    def exact_metrics(self, rows: Rows, labels_n: Tensor, log_q_nV: Tensor) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class Dense(Known):
    """The teacher's last hidden states and its head: its exact distribution, computed a chunk at a time."""

    hidden_NH: Tensor
    head: Head

    def log_probs(self, rows: Rows, log_q_nV: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        with torch.no_grad():
            logits_nV = self.head.logits(self.hidden_NH[rows])
            return torch.log_softmax(logits_nV if temperature == 1 else logits_nV / temperature, dim=-1)
