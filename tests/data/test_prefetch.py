"""What is made ahead is what would have been made in its time; nothing of the thread is left, whatever ends the run."""

import contextlib
import threading
import time

import pytest
import torch

from llmkd.data import batch_source
from llmkd.data.prefetch import prefetch
from llmkd.errors import Stopped
from llmkd.training.run import run
from tests.conftest import distance
from tests.data.test_stream import row, stream
from tests.kit.sources import write


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("llmkd-prefetch")]


def counting(upto: int, begun: list, ended: list):
    try:
        for n in range(upto):
            begun.append(n)
            yield n
        raise KeyError("bad row")
    finally:
        ended.append(True)


def test_items_come_in_order_each_made_while_the_one_before_is_used_and_errors_in_their_place():
    begun, ended, got = [], [], []
    with pytest.raises(KeyError, match="bad row"), contextlib.closing(prefetch(counting(4, begun, ended))) as items:
        for n in items:
            until = time.monotonic() + 5
            while len(begun) < min(n + 2, 4) and time.monotonic() < until:
                time.sleep(0.001)
            assert begun == list(range(min(n + 2, 4))), "one ahead, and not more"
            got.append(n)
    assert got == [0, 1, 2, 3] and ended and not threads()


def test_leaving_the_loop_early_ends_the_thread_and_what_it_runs():
    begun, ended = [], []
    source = counting(9, begun, ended)  # held, so that it is not closed by being forgotten
    with pytest.raises(ValueError), contextlib.closing(prefetch(source)) as items:
        for n in items:
            if n == 2:
                raise ValueError
    assert ended and not threads() and len(begun) <= 4
    assert list(prefetch(n for n in ())) == [] and not threads()


@pytest.fixture
def watched(monkeypatch):
    """How many steps the runs of this test take from the thread."""
    taken = []

    def counted(items):
        for item in prefetch(items):
            taken.append(threads())
            yield item

    monkeypatch.setattr(batch_source, "prefetch", counted)
    return taken


def test_a_run_is_the_same_to_the_last_bit(trained, watched, monkeypatch):
    changes = {"student__lora__dropout": 0.3, "data__packing": True}
    with_it = trained("prefetch", **changes)
    assert len(watched) == 5 and all(watched) and not threads()
    monkeypatch.setattr(batch_source, "prefetch", lambda steps: steps)
    assert distance(with_it, trained("in_time", **changes)) == 0


@pytest.mark.parametrize("ending", ["signal", "bug", "not finite"])
def test_no_thread_outlives_a_run(make_recipe, watched, monkeypatch, ending):
    from llmkd.training import loop
    from llmkd.training.shutdown import ShutdownRequest

    stop = ShutdownRequest()
    real = loop.optimizer_step

    def move(learner, step, *rest):
        real(learner, step, *rest)
        if step == 2 and ending == "signal":
            stop.asked = True
        if step == 2 and ending == "bug":
            raise ZeroDivisionError
        if step == 2:
            next(iter(learner.parameters.values())).data.fill_(torch.nan)

    monkeypatch.setattr(loop, "optimizer_step", move)
    with pytest.raises((Stopped, ZeroDivisionError, loop.NonFinite)):
        run(make_recipe(), stop=stop)
    assert watched and not threads()


def test_a_step_of_a_stream_keeps_its_examples_while_the_next_is_read(tmp_path):
    path = write(tmp_path / "t.jsonl", [row(i, "owl " * (1 + i % 3)) for i in range(24)])
    feed = stream(path, buffer=1, steps=6)
    steps = []
    for number, (step, _) in enumerate(feed.steps()):
        time.sleep(0.02)  # by now the next step has been read
        steps.append(step)
        for n, one in enumerate(steps):
            assert [one.place(i) for i in one.examples] == [f"{path}:{4 * n + i + 1}" for i in range(4)] and len(one.data) == 4
        assert feed.state(number + 1)["rows"]
    assert not threads()
