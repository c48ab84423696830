"""A wrapper that measures a teacher's share of a step's time."""

import time

import torch

from ..batch import Batch
from ..signals import Signal, Teacher


class TimedTeacher:
    """A teacher with the same signals that measures the time of its calls: of a model its body only, since the head is computed with the loss.

    On a GPU, where a call returns before its work is done, CUDA events measure the time, and only `seconds` waits for them.
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
        """The time of all calls since `seconds` was last called."""
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
