"""What a run says of its speed while it goes on."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmkd.output import progress
from llmkd.output.metrics import peak_memory
from llmkd.output.progress import Slowdown


def test_a_run_that_becomes_far_slower_says_so_once():
    slowdown = Slowdown()
    said = [slowdown(speed) for speed in (90, 500, 110, 100, 100, 34, 30, 32, 34, 30, 30, 28, 20, 10)]
    assert [i for i, text in enumerate(said) if text] == [11], "the third in a row below a third of 100; 34 is none"
    assert said[11].startswith("note: 30 targets/s, but 100 at the beginning: other programs")


def test_a_steady_or_faster_run_says_nothing():
    for speeds in ([100] * 30, [100] * 5 + [40, 400] * 10, [10] * 5 + [100] * 10, [100] * 5 + [20, 20, 90] * 5):
        slowdown = Slowdown()
        assert not any(slowdown(speed) for speed in speeds)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not Linux")
def test_the_time_left_is_that_of_the_steps_left_at_the_speed_of_this_process(monkeypatch, capsys):
    """Of ten steps four were made before it was resumed, and two in the twelve seconds since."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=100.0)
    monkeypatch.setattr(progress, "time", clock)
    display = progress.ProgressDisplay(10, 4, True)
    clock.now = 112.0
    display.show(6, {"loss": "1.0"}, 5.0)
    assert re.search(r"step 6/10  loss 1.0  .*  24 s left", capsys.readouterr().err)


def test_the_peak_of_memory_is_in_bytes():
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak_memory() == pytest.approx(int(kilobytes) * 1024, rel=0.1)
