"""A teacher whose share of a step's time is known."""

import time

import torch

from ..batch import Batch
from ..signals import Signal, Teacher


class TimedTeacher:
    """The same signals. `seconds`: what they took; of a model that is its body, since the product with its head is a part of the loss.

    On a GPU a call returns before the work is done: events in the queue are read instead of a clock, and nothing waits for them before `seconds`.
    """

    def __init__(self, teacher: Teacher, device: torch.device):
        self.teacher, self.metrics = teacher, teacher.metrics
        self.mark = _event if device.type == "cuda" else time.perf_counter
        self.calls: list[tuple] = []

    def __call__(self, batch: Batch) -> Signal:
        begun = self.mark()
        signal = self.teacher(batch)
        self.calls.append((begun, self.mark()))
        return signal

    def seconds(self) -> float:
        """Of the calls since the last time."""
        calls, self.calls = self.calls, []
        return sum(_between(begun, ended) for begun, ended in calls)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(begun, ended) -> float:
    if isinstance(ended, float):
        return ended - begun
    ended.synchronize()
    return begun.elapsed_time(ended) / 1e3
