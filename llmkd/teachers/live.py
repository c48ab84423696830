"""A teacher that is a model in memory, with or without an adapter."""

import torch

from ..models import LanguageModel
from ..signals import FIGURES, Batch, Dense, View


class Live:
    """Its hidden states and its head are where the batch is, wherever the model itself is held."""

    figures = FIGURES

    def __init__(self, model: LanguageModel):
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Dense:
        view, device = batch.teacher, self.model.device
        there = View({name: value.to(device) for name, value in view.inputs.items()}, view.rows_N.to(device))
        return Dense(self.model.hidden(there).to(view.rows_N.device), self.model.head)
