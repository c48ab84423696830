"""The teacher's share of a step's time: its signals are the same, and its seconds are counted until they are read."""

import time

import torch

from llmkd.teachers import timed


class Teacher:
    metrics = ("teacher_ce",)

    def __init__(self, clock):
        self.clock = clock

    def __call__(self, batch):
        self.clock.now += batch
        return f"of {batch}"


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_the_seconds_of_the_calls_since_the_last_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    teacher = timed.TimedTeacher(Teacher(clock), torch.device("cpu"))
    assert teacher.metrics == Teacher.metrics and teacher.seconds() == 0
    assert [teacher(2.0), teacher(0.5)] == ["of 2.0", "of 0.5"]
    clock.now += 7  # the student's
    assert teacher.seconds() == 2.5 and teacher.seconds() == 0


def test_on_a_gpu_events_in_its_queue_are_waited_for_when_they_are_read(monkeypatch):
    clock, waited = Clock(), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now

        def synchronize(self):
            waited.append(self.at)

        def elapsed_time(self, end):
            assert waited[-1] == end.at, "the work was done"
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    teacher = timed.TimedTeacher(Teacher(clock), torch.device("cuda"))
    teacher(2.0), teacher(0.5)
    assert not waited and teacher.seconds() == 2.5 and len(waited) == 2
