"""A process that stands still is named by the others within the time that is set, and one that is busy is not."""

import dataclasses
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from llmkd.cli import main
from llmkd.commands import cache
from llmkd.config.recipe import Train
from llmkd.process import heartbeat, rank_messages
from llmkd.process.heartbeat import PATIENT, TIMEOUT, Heartbeats, Place
from llmkd.training import launch as launch_of
from llmkd.training.trainer import Trainer
from tests.conftest import plain_recipe
from tests.kit.processes import launch

LIMIT = 600


class Store:
    """A launcher's key-value server, in this process."""

    def __init__(self):
        self.values = {}

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def add(self, key: str, number: int) -> int:
        return number

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


def test_where_all_are_at_one_place_none_is_named_alone(three):
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


def test_the_setting_is_at_most_what_is_waited_for_elsewhere():
    assert Train().timeout == TIMEOUT and Train(timeout=PATIENT).timeout == PATIENT
    for seconds in (9.0, PATIENT + 1):
        with pytest.raises(ValueError, match="timeout"):
            Train(timeout=seconds)


def under_launcher(monkeypatch) -> Store:
    """This process is the second of two, and looks at the other all the time."""
    store = Store()
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_messages, "connect", lambda: store)
    monkeypatch.setattr(rank_messages, "_LOOKS", 0.01)
    monkeypatch.setattr(heartbeat, "_here", Place())
    return store


def test_a_process_that_ends_well_tells_the_others(monkeypatch):
    store = under_launcher(monkeypatch)
    with rank_messages.ending_with_others():
        for _ in range(500):
            if store.values:
                break
            time.sleep(0.01)
        assert rank_messages.watched and json.loads(store.values["llmkd/said/0/place/1"])[0] > 0
    assert not rank_messages.watched and json.loads(store.values["llmkd/said/0/place/1"])[0] == 0


class Met(Exception):
    pass


@pytest.mark.parametrize(("watching", "seconds"), [(False, 600), (True, 600 + PATIENT)])
def test_torch_waits_longer_where_processes_watch_each_other(monkeypatch, watching, seconds):
    import accelerate

    def accelerator(kwargs_handlers, **_):
        raise Met({type(one).__name__: one for one in kwargs_handlers}["InitProcessGroupKwargs"].timeout.total_seconds())

    monkeypatch.setattr(accelerate, "Accelerator", accelerator)
    monkeypatch.setattr(rank_messages, "watched", watching)
    with pytest.raises(Met) as met:
        launch_of.start()
    assert met.value.args == (seconds,)


def test_processes_that_write_a_cache_watch_each_other_when_they_meet(monkeypatch):
    def start():
        raise Met(rank_messages.watched)

    under_launcher(monkeypatch)
    monkeypatch.setattr(launch_of, "start", start)
    monkeypatch.setattr(cache, "select_teachers", lambda *_: (None, []))
    with pytest.raises(Met, match="True"):
        cache.cache(None)


def test_every_batch_of_a_cache_is_a_sign(monkeypatch):
    """Processes may write one for days, each at one place."""
    monkeypatch.setattr(heartbeat, "_here", Place())
    shard, signs = SimpleNamespace(put=lambda: signs.append(heartbeat._here.signs), write=lambda: None), []
    cache.write_shards(SimpleNamespace(shard=lambda n: shard), {0: [[1], [2]], 3: [[3]]}, lambda batch: (), lambda: False)
    assert signs == [1, 2, 3]


def test_a_student_is_written_where_others_wait_for_long(monkeypatch):
    """Also after questions, whose batches are a place where they do not."""

    @dataclasses.dataclass
    class Evaluator:
        stop: object = None

        def accuracy(self, *_):
            heartbeat.at("a batch of validation")
            return {}

    monkeypatch.setattr(heartbeat, "_here", Place())
    found, nothing = [], lambda *_: None
    strategy = SimpleNamespace(is_finite=lambda *_: True, to_write=lambda *_: found.append(heartbeat._here.patient))
    watch, prepared = SimpleNamespace(changed=lambda every: None), SimpleNamespace(questions=[1])
    students = [SimpleNamespace(state=SimpleNamespace(strategy=strategy), model=None)] * 2
    accelerator = SimpleNamespace(wait_for_everyone=nothing)
    Trainer.finish(
        SimpleNamespace(watch=watch, active=students, prepared=prepared, evaluator=Evaluator(), accelerator=accelerator, main=True)
    )
    assert found == [True, True]


@pytest.mark.parametrize(
    ("machines", "answers", "ends"),
    [("1", 0, False), ("2", 0, True), ("2", 3, True), ("2", 10, False)],
)
def test_a_launcher_on_another_machine_that_does_not_answer_ends_the_process(monkeypatch, machines, answers, ends):
    """It answers in the first looks of ten, each 100 seconds after the one before."""
    closed, answered, ended = threading.Event(), threading.Event(), []

    def looks(closed):
        for number in range(10):
            if number < answers:
                answered.set()
            yield 100.0
            if ended:
                return

    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    monkeypatch.setenv("MASTER_ADDR", "node7")
    monkeypatch.setattr(heartbeat, "_timeout", LIMIT)
    monkeypatch.setattr(rank_messages, "_looks", looks)
    monkeypatch.setattr(rank_messages, "_end", ended.append)
    answered.set()
    rank_messages._watch_server(closed, answered)
    assert len(ended) == ends
    assert not ends or ended[0].startswith("the launcher on the first machine (node7) has not answered for 700 s; train.timeout")


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
