"""A teacher that is a model in memory, with or without an adapter."""

import torch

from ..batch import Batch
from ..models.model import Model
from ..signals import NO_TAPS, TEACHER_METRICS, Dense, Taps


class LiveTeacher:
    """A model as a teacher. Its signals are on the batch's device, whatever device the model is on.

    taps      the values inside the model that its signals hold
    setting   teacher, or teacher.0, ... in a list
    """

    metrics = TEACHER_METRICS

    def __init__(self, model: Model, taps: Taps = NO_TAPS, setting: str = "teacher"):
        self.model, self.taps, self.setting = model, taps, setting

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Dense:
        view = batch.view_of(self.setting)
        outputs, device = self.model.outputs(view.each(lambda x: x.to(self.model.device)), self.taps), view.rows_N.device
        layers = {number: hidden_NH.to(device) for number, hidden_NH in outputs.layers.items()}
        attention = {number: inputs.each(lambda x: x.to(device)) for number, inputs in outputs.attention.items()}
        return Dense(outputs.hidden_NH.to(device), self.model.head, layers, attention)
