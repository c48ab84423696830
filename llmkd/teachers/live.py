"""A teacher that is a model in memory, with or without an adapter."""

import torch

from ..models import LanguageModel
from ..signals import FIGURES, Batch, Dense


class Live:
    figures = FIGURES

    def __init__(self, model: LanguageModel):
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Dense:
        return Dense(self.model.hidden(batch.teacher), self.model.head)
