"""Student and objective in one module: what DDP wraps, so that it sees a single forward call."""

from dataclasses import dataclass

from torch import Tensor, nn

from ..batch import Batch
from ..losses.fused import fused_loss
from ..losses.objective import Objective
from ..models.language_model import LanguageModel
from ..signals import Signal


@dataclass(frozen=True)
class Loss:
    """`total` is the mixed loss summed over the batch's targets, to be back-propagated; `rows` each term per target."""

    total: Tensor
    rows: dict[str, Tensor]


class Distiller(nn.Module):
    def __init__(self, student: LanguageModel, objective: Objective, chunk_rows: int | None = None):
        super().__init__()
        self.student, self.objective, self.chunk_rows = student, objective, chunk_rows

    def forward(self, batch: Batch, signal: Signal | None) -> Loss:
        hidden_NH = self.student.hidden(batch.student)
        signal = signal if self.objective.kd_ratio else None  # another student's, where several share a teacher
        total, rows = fused_loss(hidden_NH, self.student.head, batch.labels_N, self.objective, signal, self.chunk_rows)
        return Loss(total, rows)
