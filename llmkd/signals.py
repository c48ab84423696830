"""The nouns that everything else passes around: batches and what a teacher says about their targets.

Shape letters: B examples, T positions, N targets (supervised positions), n targets of one chunk, V entries of
the real vocabulary, H hidden width, E events that two models are compared over (V, or fewer for a sparse signal).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .head import Head

IGNORE = -100


@dataclass(frozen=True)
class View:
    """What one model reads of a batch, and which of its flattened positions predict the N targets."""

    inputs: dict[str, Tensor]  # keyword arguments of the model, each [B, T]
    rows_N: Tensor  # positions in the flattened [B * T] that predict the targets

    def to(self, device) -> "View":
        return View({k: v.to(device, non_blocking=True) for k, v in self.inputs.items()}, self.rows_N.to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch:
    """Targets, and the views from which student and teacher predict them.

    `labels_N[i]` is the token that position `rows_N[i]` of either view must predict: aligned once, in the collator.
    """

    labels_N: Tensor
    example_N: Tensor  # which example of the data set each target belongs to
    student: View
    teacher: View

    def to(self, device) -> "Batch":
        student = self.student.to(device)
        teacher = student if self.teacher is self.student else self.teacher.to(device)
        return Batch(self.labels_N.to(device, non_blocking=True), self.example_N.to(device, non_blocking=True), student, teacher)

    @property
    def targets(self) -> int:
        return self.labels_N.numel()


class Signal(Protocol):
    """What a teacher says about the N targets of a batch."""

    def compare(self, rows: slice, log_q_nV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Student and teacher log-probabilities at `temperature` over the same events: (log_q_nE, log_p_nE)."""

    def log_probs(self, rows: slice) -> Tensor:
        """The teacher's log-probabilities at temperature 1 for those targets, [n, V]."""


class Teacher(Protocol):
    """A callable from a batch to a signal. Never trains, never keeps a gradient."""

    def __call__(self, batch: Batch) -> Signal: ...


@dataclass(frozen=True)
class Dense:
    """The teacher's last hidden states and its head: its exact distribution, computed a chunk at a time."""

    hidden_NH: Tensor
    head: Head

    def compare(self, rows: slice, log_q_nV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits_nV = self.head.logits(self.hidden_NH[rows])
            return log_q_nV, torch.log_softmax(logits_nV if temperature == 1 else logits_nV / temperature, dim=-1)

    def log_probs(self, rows: slice) -> Tensor:
        with torch.no_grad():
            return torch.log_softmax(self.head.logits(self.hidden_NH[rows]), dim=-1)
