"""A process that stands still is named by the others within the time that is set, and one that is busy is not."""

import json
import os
import signal
import time

import pytest

from llmkd.cli import main
from llmkd.process import heartbeat, rank_messages
from llmkd.process.heartbeat import PATIENT, Heartbeats, Place
from tests.conftest import plain_recipe
from tests.kit.processes import launch

LIMIT = 600


class Store:
    """A launcher's key-value server, in this process."""

    def __init__(self):
        self.values = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return self.values.keys() >= set(keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key].encode() for key in keys]


class Processes:
    """As many of one launch, in this process; `pass_time` gives the sentence on who stands still, and after how many seconds it came."""

    def __init__(self, monkeypatch, count: int):
        self._store, self._patch = Store(), monkeypatch
        monkeypatch.setattr(heartbeat, "_timeout", LIMIT)
        self._all = [Heartbeats(lambda name: f"x/{name}", rank, count) for rank in range(count)]
        self.places = [Place() for _ in range(count)]
        self.stopped: set[int] = set()

    def _each(self):
        for rank, one in enumerate(self._all):
            if rank not in self.stopped:
                self._patch.setattr(heartbeat, "_here", self.places[rank])
                yield rank, one
                self.places[rank] = heartbeat._here

    def come_to(self, text: str, *ranks: int, patient: bool = False) -> None:
        for rank, _ in self._each():
            if rank in ranks or not ranks:
                heartbeat.at(text, patient)

    def leave(self, gone: int) -> None:
        for rank, one in self._each():
            if rank == gone:
                one.leave(self._store)
        self.stopped.add(gone)

    def pass_time(self, seconds: float, working: int | None = None) -> tuple[str, int] | None:
        for second in range(10, int(seconds) + 1, 10):
            for rank, one in self._each():
                if rank == working:
                    heartbeat.going_on()
                if said := one.look(self._store, 10.0):
                    return said, second
        return None


@pytest.fixture
def three(monkeypatch) -> Processes:
    processes = Processes(monkeypatch, 3)
    assert processes.pass_time(100) is None
    return processes


@pytest.mark.parametrize("patient", [False, True])
def test_a_process_that_was_stopped_is_named_with_its_place_wherever_it_is(three, patient):
    three.come_to("step 3, micro-batch 1 of 2", patient=patient)
    assert three.pass_time(100) is None
    three.stopped.add(1)
    three.come_to("step 3, micro-batch 2 of 2")
    said, after = three.pass_time(2 * LIMIT)
    assert said.startswith("process 1 (of 0 to 2; ") and f"process id {os.getpid()}) sent no sign of life for 6" in said
    assert said.endswith("was last at step 3, micro-batch 1 of 2") and LIMIT < after <= LIMIT + LIMIT // 5


def test_a_process_that_was_stopped_is_named_where_the_others_stand_at_the_same_place(three):
    three.come_to("step 3, micro-batch 2 of 2")
    assert three.pass_time(20) is None
    three.stopped.add(1)
    said, after = three.pass_time(2 * LIMIT)
    assert said.startswith("process 1 (of 0 to 2; ") and " sent no sign of life for " in said and after <= LIMIT + LIMIT // 5


def test_a_process_that_hangs_is_the_one_that_is_behind_the_others(three):
    three.come_to("step 3, micro-batch 1 of 2")
    three.come_to("step 3, micro-batch 2 of 2", 0, 1)
    said, after = three.pass_time(2 * LIMIT)
    assert said.startswith("process 2 (of 0 to 2; ") and "at step 3, micro-batch 1 of 2, and the others wait for it" in said
    assert LIMIT < after <= LIMIT + LIMIT // 5


def test_where_all_are_at_one_place_none_is_blamed(three):
    three.come_to("step 3, micro-batch 2 of 2")
    said, _ = three.pass_time(2 * LIMIT)
    assert ") and 2 more stood still" in said and said.endswith("at step 3, micro-batch 2 of 2, as all do")


def test_what_takes_long_is_waited_for(three):
    """One loads a model or writes a checkpoint, or waits for a server that answers later, and the others are in a step."""
    three.come_to("the loading of its models", patient=True)
    three.come_to("step 1, micro-batch 1 of 1", 1, 2)
    assert three.pass_time(PATIENT - 100) is None
    assert three.pass_time(300)[0].startswith("process 0 (of 0 to 2; ")


def test_one_that_works_where_it_is_is_waited_for(three):
    three.come_to("step 1, micro-batch 1 of 1")
    assert three.pass_time(3 * LIMIT, working=2) is None


def test_one_that_has_ended_is_not_waited_for_and_the_last_waits_for_nobody(three):
    three.come_to("the writing of the student", patient=True)
    three.leave(1)
    assert three.pass_time(3 * LIMIT) is None
    three.leave(2)
    assert three.pass_time(2 * PATIENT) is None


def test_one_that_has_not_begun_is_named(monkeypatch):
    two = Processes(monkeypatch, 2)
    two.stopped.add(1)
    assert two.pass_time(PATIENT - 100) is None  # it may be importing
    said, _ = two.pass_time(300)
    assert said.startswith("process 1 (of 0 to 1) sent no sign of life") and said.endswith("nothing: it has not begun")


def test_time_in_which_the_process_itself_was_stopped_does_not_count(monkeypatch):
    """A job that a scheduler stops as a whole goes on: no process takes the others for dead."""

    class Closed:
        waits = iter([False, False, True])

        def wait(self, seconds):
            return next(self.waits)

    now = iter([0.0, 1.0, 3601.0])
    monkeypatch.setattr(rank_messages.time, "monotonic", lambda: next(now))
    assert list(rank_messages._looks(Closed())) == [1.0, 5.0]


def train_and_stop(words: list[str], port: int) -> int:
    """A run whose second process is stopped in its third step; it is killed some seconds after the first has ended, as by a launcher."""
    from llmkd.training import loop

    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(port)}
    rank_messages._LOOKS = 0.2
    forward = loop.forward_backward

    def stopping(micro, *more):
        if os.environ["RANK"] == "1" and heartbeat._here.text.startswith("step 3,"):
            time.sleep(2)  # its place is told
            os.kill(os.getpid(), signal.SIGSTOP)
        return forward(micro, *more)

    loop.forward_backward = stopping
    return main(["train", *words])


@pytest.mark.slow
def test_a_run_one_of_whose_processes_is_stopped_ends_and_names_it(world, tmp_path):
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
    words = ["--config", str(tmp_path / "r.yaml"), "--checkpoint.every", "1", "--train.timeout", "15"]
    done = launch(2, train_and_stop, words, server.port, limit=200)  # a process that waits for ever is killed: another code
    assert done.returncode == 1, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("llmkd: ")]
    assert line.startswith("llmkd: process 1 (of 0 to 1; ") and " sent no sign of life for " in line, line
    assert "and was last at step 3, micro-batch 1 of 1;" in line
    assert main(["train", *words, "--resume"]) == 0
