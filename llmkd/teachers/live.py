"""A teacher that is a model in memory, with or without an adapter."""

import torch

from ..batch import Batch
from ..models.language_model import LanguageModel
from ..signals import TEACHER_METRICS, Dense


class LiveTeacher:
    """Signals are on the batch's device, whatever device the model is on."""

    metrics = TEACHER_METRICS

    def __init__(self, model: LanguageModel):
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Dense:
        view = batch.teacher
        hidden_NH = self.model.hidden(view.each(lambda x: x.to(self.model.device)))
        return Dense(hidden_NH.to(view.rows_N.device), self.model.head)
