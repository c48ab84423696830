"""A budget that is measured: the largest that fits, without a trace; and halved, not died of, when memory runs out in training.

Memory that runs out is a student whose forward pass raises above a number of tokens while it trains.
"""

import dataclasses
import inspect
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmkd.cli import main
from llmkd.commands.cost import largest_micro_batch_tokens
from llmkd.data.batching import TokenBudget
from llmkd.data.examples import TokenExamples
from llmkd.errors import UserError
from llmkd.models.language_model import LanguageModel
from llmkd.output.run_folder import RunFolder
from llmkd.teachers.live import LiveTeacher
from llmkd.training import auto_batch
from llmkd.training import memory as memory_gauges
from llmkd.training.run import run
from tests.conftest import distance, plain_recipe, weights
from tests.kit.processes import launch
from tests.training.test_parity import BOUND

AUTO = {"train__micro_batch_size": None, "train__micro_batch_tokens": "auto"}
DROPOUT = {"student__lora__dropout": 0.3}


class Memory:
    """Holds so many tokens, and notes what was asked of it."""

    tokens = 10**9

    def __init__(self):
        self.asked = []

    def hold(self, tokens: int) -> None:
        self.asked.append(tokens)
        if tokens > self.tokens:
            raise torch.OutOfMemoryError(f"{tokens} tokens")


@pytest.fixture
def memory(monkeypatch):
    memory, outputs = Memory(), LanguageModel.outputs

    def limited(self, view, *taps):
        if self.training and torch.is_grad_enabled() and self.trainable():
            memory.hold(view.inputs["input_ids"].numel())
        return outputs(self, view, *taps)

    monkeypatch.setattr(LanguageModel, "outputs", limited)
    return memory


def said(capsys) -> list[int]:
    """The budgets that a run told of."""
    lines = [line for line in capsys.readouterr().err.splitlines() if "micro-batches of at most" in line]
    return [int(line.split("at most ")[1].split()[0].replace(",", "")) for line in lines]


@pytest.mark.parametrize("packing", [False, True])
def test_auto_finds_what_fits_and_leaves_no_trace(trained, memory, capsys, packing):
    changes = DROPOUT | {"data__packing": packing, "train__max_steps": 3}
    memory.tokens = 400
    torch.manual_seed(5)
    measured = trained("auto", **AUTO, **changes)
    (found,) = said(capsys)
    assert 152 <= found <= 400
    assert max(memory.asked[2:]) > 400 and [n for n in memory.asked if n > 400] == [n for n in memory.asked if n > 400][:1], "once too many"
    by_hand = trained("hand", **changes, **AUTO | {"train__micro_batch_tokens": found})
    assert distance(measured, by_hand) == 0
    other = trained("other", **changes, **AUTO | {"train__micro_batch_tokens": 160})
    assert distance(measured, other) < BOUND, "another cut has the same masks"


def test_a_whole_window_is_the_bound(trained, memory, capsys):
    trained("auto", **AUTO, train__max_steps=2)
    (found,) = said(capsys)
    assert found == max(memory.asked) + 8  # eight of the longest; an input has one token less than its example


@pytest.mark.parametrize("packing", [False, True])
def test_memory_that_runs_out_repeats_the_step_with_half(trained, memory, capsys, monkeypatch, packing):
    calls, real_pass = [], auto_batch.forward_backward

    def shrinking(*args, **kwargs):
        calls.append(1)
        return real_pass(*args, **kwargs)

    monkeypatch.setattr(auto_batch, "forward_backward", shrinking)  # the measuring alone; afterwards there is less
    real = auto_batch.AutoBatchSize.measure
    monkeypatch.setattr(auto_batch.AutoBatchSize, "measure", lambda self, size: (real(self, size), setattr(memory, "tokens", 200)))
    whole = trained("whole", train__micro_batch_size=8, data__packing=packing, train__max_steps=3)
    memory.asked.clear()
    got = trained("auto", **AUTO, data__packing=packing, train__max_steps=3)
    first, *halves = said(capsys)
    assert calls and first > 200 and halves and halves[-1] <= 200 and sum(n > 200 for n in memory.asked[len(calls) + 2 :]) <= len(halves)
    assert distance(got, whole) < BOUND


@pytest.mark.slow
def test_after_that_the_run_is_that_of_the_smaller_budget(make_recipe, memory, capsys, monkeypatch):
    """Dropout and all: a run that went on after step 2 with the smaller number, given by hand, is the same to the last bit."""
    from llmkd.errors import Stopped
    from llmkd.training import loop
    from llmkd.training.shutdown import ShutdownRequest

    stop, move = ShutdownRequest(), loop.optimizer_step

    def less_after_two(learner, step, *rest):
        move(learner, step, *rest)
        memory.tokens = 200 if step >= 2 else 10**9
        stop.asked = step == 1 and stopping  # heard in the next step

    monkeypatch.setattr(loop, "optimizer_step", less_after_two)
    stopping = False
    run(make_recipe("one", **AUTO, **DROPOUT), stop=stop)
    first, *_, last = said(capsys)
    assert last < first
    memory.tokens, stopping = 10**9, True
    with pytest.raises(Stopped):
        run(make_recipe("two", **DROPOUT, **AUTO | {"train__micro_batch_tokens": first}), stop=stop)
    stop.asked = stopping = False
    recipe = make_recipe("two", **DROPOUT, **AUTO | {"train__micro_batch_tokens": last})
    run(recipe, resume=True, stop=stop)
    assert distance(weights(Path(recipe.output_dir)), weights(Path(make_recipe("one").output_dir))) == 0


@pytest.mark.parametrize("tokens", ["auto", 400])
def test_where_nothing_smaller_can_help_the_error_comes_out(make_recipe, memory, monkeypatch, tokens):
    """Single examples that do not fit; and a number given by hand is kept to."""
    real = auto_batch.AutoBatchSize.measure
    monkeypatch.setattr(auto_batch.AutoBatchSize, "measure", lambda self, size: (real(self, size), setattr(memory, "tokens", 30)))
    if tokens == 400:
        memory.tokens = 120
    with pytest.raises(torch.OutOfMemoryError):
        run(make_recipe(**AUTO | {"train__micro_batch_tokens": tokens}))
    assert tokens == "auto" or sum(n > 120 for n in memory.asked) == 1


def test_an_example_that_does_not_fit_is_refused_in_words(make_recipe, memory):
    recipe = make_recipe(**AUTO)
    memory.tokens = 30
    with pytest.raises(
        UserError, match=r"^train.micro_batch_tokens: an example of \d+ tokens, the longest, does not fit .* lower data.max_length"
    ):
        run(recipe)
    assert not RunFolder(recipe, True).finished


def test_long_packed_rows_are_tried_where_attention_knows_their_examples():
    """65,536 tokens, and 8,192 where the student's or the teacher's computes all pairs of a row's positions."""
    model = lambda knows: SimpleNamespace(capabilities=SimpleNamespace(packed_attention=knows))  # noqa: E731
    for student, teacher, packing, most in ((1, 1, 1, 65_536), (0, 1, 1, 8_192), (1, 0, 1, 8_192), (0, 0, 0, 65_536)):
        source = SimpleNamespace(micro_batch_size=TokenBudget(9, bool(packing)))
        state = SimpleNamespace(distiller=SimpleNamespace(student=model(bool(student))))
        auto = auto_batch.AutoBatchSize(source, [state], LiveTeacher(model(bool(teacher))), None, None)
        assert auto._most_tokens == most


def test_other_errors_pass_through(make_recipe, monkeypatch):
    monkeypatch.setattr(auto_batch, "forward_backward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(make_recipe(**AUTO))


@pytest.mark.parametrize(("cautious", "grows", "times"), [(True, [20, 45, 60], 4), (False, [20, 45, 60, 99], 8), (False, [20, 45, 101], 2)])
def test_free_memory_bounds_the_budget(trained, capsys, monkeypatch, cautious, grows, times):
    """100 MB: on a CPU a doubling must stay inside them, on a GPU it is tried, and what it took is looked at."""

    class Gauge:
        room, taken = 100e6, property(lambda self: next(self.peaks))

        def __init__(self, device):
            self.cautious, self.peaks = cautious, iter([n * 10**6 for n in grows])

    monkeypatch.setattr(auto_batch, "memory_gauge", Gauge)
    trained("auto", **AUTO, train__max_steps=2)
    assert said(capsys) == [152 * times]


@pytest.mark.parametrize(("room", "more", "times"), [(100e6, 1, 4), (50e6, 1, 2), (100e6, 3, 1)])
def test_where_processes_compute_together_the_one_with_the_least_memory_decides(make_recipe, capsys, monkeypatch, room, more, times):
    """Another process has so much room, and takes so many times what this one does: a doubling must stay inside what both have."""

    class Gauge:
        cautious, room, taken = False, 100e6, property(lambda self: next(self.peaks))

        def __init__(self, device):
            self.peaks = iter([20e6, 45e6, 60e6, 99e6])

    class Both:
        def __init__(self, one):
            self.one = one

        def __getattr__(self, name):
            return getattr(self.one, name)

        def gather(self, own):
            return torch.cat([own, own * more if own < 0 else torch.full_like(own, room)])

    def together(self, *args):
        begin(self, *args[:6], together=True)
        self.accelerator = Both(self.accelerator)

    def passed(*args):
        exchanged.append(args[6])
        return forward_backward(*args)

    begin, forward_backward, exchanged = auto_batch.AutoBatchSize.__init__, auto_batch.forward_backward, []
    monkeypatch.setattr(auto_batch, "memory_gauge", Gauge)
    monkeypatch.setattr(auto_batch.AutoBatchSize, "__init__", together)
    monkeypatch.setattr(auto_batch, "forward_backward", passed)
    run(make_recipe(**AUTO, train__max_steps=2))
    assert said(capsys) == [152 * times] and exchanged and all(exchanged)


def test_memory_that_runs_out_while_they_compute_together_ends_the_run(make_recipe, memory, monkeypatch):
    memory.tokens, begin = 30, auto_batch.AutoBatchSize.__init__
    monkeypatch.setattr(auto_batch.AutoBatchSize, "__init__", lambda self, *args: begin(self, *args[:6], together=True))
    with pytest.raises(torch.OutOfMemoryError):
        run(make_recipe(**AUTO, train__max_steps=2))


def test_room_is_kept_for_the_optimizers_state(trained, monkeypatch):
    """Of AdamW two numbers for each of 2,176 parameters."""

    class Gauge:
        cautious, taken = False, 20e6

        def __init__(self, device):
            self.room = 20e6 + spare

    monkeypatch.setattr(auto_batch, "memory_gauge", Gauge)
    spare = 4 * 2176
    with pytest.raises(UserError, match="does not fit into memory"):
        trained("auto", **AUTO, train__max_steps=2)
    spare = 2 * 8 * 2176
    trained("more", **AUTO, train__max_steps=2)


def test_the_gauge_sees_what_is_taken_and_given_back():
    gauge = memory_gauges.CpuMemory()
    assert gauge.room > 50e6 and gauge.taken < 50e6
    held = torch.ones(100_000_000, dtype=torch.uint8)
    del held
    assert 90e6 < gauge.taken < 250e6
    assert memory_gauges.CpuMemory().taken < 50e6


@pytest.mark.parametrize("processes", [1, 4])
def test_half_of_what_is_free_is_room_for_the_processes_of_a_machine(monkeypatch, processes):
    read = Path.read_text
    said = "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 800 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda path, *rest: said if str(path) == "/proc/meminfo" else read(path, *rest))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert memory_gauges.CpuMemory().room == 800 * 1024 / 2 / processes


def test_a_stream_is_measured_on_its_first_step(trained, memory, capsys):
    memory.tokens = 400
    changes = {"data__streaming": True, "train__max_steps": 4, **DROPOUT}
    measured = trained("auto", **AUTO, **changes)
    (found,) = said(capsys)
    assert distance(measured, trained("hand", **changes, **AUTO | {"train__micro_batch_tokens": found})) == 0


def test_what_a_teacher_reads_counts_where_it_is_more():
    own, read = (TokenExamples(np.zeros(n, np.int32), np.ones(n, bool), np.array([0, 3, n]), np.arange(2)) for n in (8, 7))
    assert own.max_lengths.tolist() == [3, 5]
    own.teacher_view = dataclasses.replace(read, offsets=np.array([0, 4, 7]))
    assert own.max_lengths.tolist() == [4, 5]


def test_what_a_sweep_is_said_to_need_follows_the_budget():
    lengths = np.array([5, 40, 9, 30, 8])
    cases = {(2, None): 70, (None, 50): 50, (None, 10): 40, (None, 1000): 92, (None, "auto"): 40}
    assert {case: largest_micro_batch_tokens(lengths, *case) for case in cases} == cases


def train_with_less_on_the_second(words: list[str]) -> int:
    """`llmkd train` in one of two processes, of which the second is out of memory in its first pass, and above 200 tokens."""
    outputs, asked = LanguageModel.outputs, []

    def limited(self, view, *taps):
        if os.environ["RANK"] == "1" and self.training and torch.is_grad_enabled() and inspect.stack()[1].function == "forward":
            asked.append(view.inputs["input_ids"].numel())
            if len(asked) == 1 or asked[-1] > 200:
                raise torch.OutOfMemoryError(f"{asked[-1]} tokens")
        return outputs(self, view, *taps)

    LanguageModel.outputs = limited
    return main(["train", *words])


@pytest.mark.slow
def test_two_processes_agree_on_a_budget(world, trained, tmp_path):
    """The second has less memory: it tries less, and no process waits for another in a pass."""
    one = trained("one", train__micro_batch_size=8)
    (tmp_path / "two.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "two")))
    words = ["--train.micro_batch_size", "null", "--train.micro_batch_tokens", "auto", "--data.packing", "true"]
    done = launch(2, train_with_less_on_the_second, ["--config", str(tmp_path / "two.yaml"), *words], limit=60)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = re.findall(r"micro-batches of at most ([\d,]+) tokens", done.stderr)
    assert int(found) <= 200
    assert distance(weights(tmp_path / "two"), one) < BOUND


@pytest.mark.parametrize(
    ("vocab", "free", "rows"),
    [
        (128_256, 60e9, 2048),  # tiles of 2.1 GB
        (128_256, 12e9, 1408),
        (128_256, 1e9, 1024),
        (32_000, 1e9, 1024),
        (32_000, 5e9, 2048),
    ],
)
def test_chunks_of_the_head_follow_from_what_is_free_on_a_gpu(monkeypatch, vocab, free, rows):
    monkeypatch.setattr(auto_batch, "memory_gauge", lambda device: SimpleNamespace(room=free))
    lines = []
    assert auto_batch.head_chunk_size(vocab, torch.device("cuda"), lines.append) == rows
    assert rows == 1024 or 8 * vocab * rows <= free / 8
    assert len(lines) == 1 and lines[0].startswith(f"head: chunks of {rows:,} rows")
    assert auto_batch.head_chunk_size(vocab, torch.device("cpu"), lines.append) is None and len(lines) == 1


class Head:
    """Memory that chunks of more than so many rows do not fit into, after the measuring."""

    rows = 10**9

    def __init__(self, monkeypatch):
        from llmkd.losses import terms

        self.asked, real = [], terms.fused_parts

        def limited(*args):
            self.asked.append(args[5])
            if (args[5] or 4096) > self.rows:
                raise torch.OutOfMemoryError("a tile")
            return real(*args)

        monkeypatch.setattr(terms, "fused_parts", limited)


@pytest.mark.parametrize("found_while_measuring", [True, False])
def test_memory_that_runs_out_halves_the_chunks_too(trained, capsys, monkeypatch, found_while_measuring):
    whole, head = trained("whole", train__micro_batch_size=8, train__max_steps=2), Head(monkeypatch)
    real = auto_batch.AutoBatchSize.measure
    if found_while_measuring:
        head.rows = 600
    else:
        monkeypatch.setattr(auto_batch.AutoBatchSize, "measure", lambda self, size: (real(self, size), setattr(head, "rows", 600)))
    got = trained("auto", **AUTO, train__max_steps=2)
    assert head.asked[-1] == 512 and distance(got, whole) < BOUND
    said = [line.split("chunks of ")[1] for line in capsys.readouterr().err.splitlines() if "chunks of" in line]
    assert said == (["512 rows"] if found_while_measuring else ["2,048 rows", "1,024 rows", "512 rows"])


@pytest.mark.parametrize("given", [None, 4096])
def test_chunks_are_not_halved_for_ever_and_a_number_given_is_kept_to(make_recipe, monkeypatch, given):
    head, real = Head(monkeypatch), auto_batch.AutoBatchSize.measure
    monkeypatch.setattr(auto_batch.AutoBatchSize, "measure", lambda self, size: (real(self, size), setattr(head, "rows", 100)))
    with pytest.raises(torch.OutOfMemoryError):
        run(make_recipe(**AUTO, loss__chunk_size=given))
    assert head.asked[-1] == (given or 128)
