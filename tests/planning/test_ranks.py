"""Plans of several processes, made by one: memory against what two real ones allocate, exchanges against what FSDP2 asks for."""

import contextlib
import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmkd.commands.plan_ranks import ways_to_hold
from llmkd.commands.plan_runs import Runs
from llmkd.config import loader
from llmkd.errors import UserError
from llmkd.models.parts import local
from llmkd.output.run_folder import RunFolder
from llmkd.planning.build import build
from llmkd.planning.devices import Device
from llmkd.planning.exchange import Sizes, exchanged, how_sharded, sizes_of, speeds
from llmkd.planning.fakes import fake_tensors
from llmkd.planning.find import find
from llmkd.planning.models import full_depth
from llmkd.planning.plan import plan
from llmkd.planning.ranks import fake_ranks
from llmkd.planning.step import watched_step
from llmkd.planning.work import work_of
from llmkd.training.build import build_setup
from llmkd.training.launch import start
from llmkd.training.loop import train, unwrap
from llmkd.training.prepare import prepare
from tests.conftest import plain_recipe
from tests.kit.processes import launch

FEW = {"data.train.limit": 16, "train.batch_size": 16, "train.micro_batch_size": 4, "train.epochs": 2, "loss.chunk_size": 8}
#: Two micro-batches of each process in a step, but for the last.
RECIPES = {
    "whole, its teacher sharded": {"student.method": "full", "student.lora": None, "teacher.shard": "full"},
    "sharded": {"train.shard": "full", "student.gradient_checkpointing": True},
}


def balance(profiler) -> tuple[int, int]:
    """Bytes that the CPU's allocator gave out in all, and at most at a time."""
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return now, most


def watch() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def allocate(files: list[str], out: str) -> int:
    """The peak of each recipe's steps in this process: weights as they were loaded or sharded, the buffers of DDP's reducer, and what is given
    out in training. (What DDP copies at its very beginning is freed in a thread of gloo's, which the profiler does not see.)"""
    found, own = [], torch.distributed.Reducer
    for file in files:
        recipe, accelerator = loader.load_recipe(file), start()
        torch.distributed.Reducer = functools.partial(_taken, own, taken := [])
        setup = build_setup([recipe], prepare(recipe), [RunFolder(recipe, False)], accelerator, lambda: False)
        state = setup.students[0].state
        models = unwrap(state), setup.teacher.model
        tensors = [local(x) for model in models for x in (*model.parameters(), *model.buffers())]
        weights = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
        with watch() as profiler, contextlib.closing(train(setup.source, [state], setup.teacher, accelerator)) as steps:
            for _ in steps:
                pass
        found.append(weights + sum(taken) + balance(profiler)[1])
    Path(out, f"peaks-{os.environ['RANK']}.json").write_text(json.dumps(found))
    return 0


def _taken(own, taken: list[int], *args, **options):
    with watch() as profiler:
        reducer = own(*args, **options)
    taken.append(balance(profiler)[0])
    return reducer


@pytest.mark.slow
def test_the_peak_of_a_process_is_within_five_percent_of_what_two_allocate(world, tmp_path):
    """By the allocator of PyTorch, the larger of two processes over gloo."""
    files = []
    for number, changes in enumerate(RECIPES.values()):
        file = tmp_path / f"{number}.yaml"
        file.write_text(loader.dump(_recipe(world, tmp_path / f"out{number}", FEW | changes)))
        files.append(str(file))
    done = launch(2, allocate, files, str(tmp_path), limit=180)
    assert done.returncode == 0, done.stderr[-3000:]
    real = [max(each) for each in zip(*(json.loads((tmp_path / f"peaks-{rank}.json").read_text()) for rank in range(2)), strict=True)]
    for name, file, measured in zip(RECIPES, files, real, strict=True):
        recipe = loader.load_recipe(file)
        planned = plan([recipe], find([recipe], tmp_path), None, gpu=False, ranks=2)
        assert math.isclose(planned.peak, measured, rel_tol=0.05), (name, planned.peak, measured, planned.parts)


def _recipe(world, out, changes):
    file = out.with_suffix(".json")
    file.write_text(json.dumps(plain_recipe(world, out)))
    return loader.load_recipe(file, changes)


class Gathered(TorchDispatchMode):
    """Bytes that all processes bring together, and of gradients that they add up."""

    def __init__(self):
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "_allgather_base_":
            self.gathered += args[0].nbytes
        if name == "_reduce_scatter_base_":
            self.reduced += args[1].nbytes
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"student.method": "full", "student.lora": None}, {"student.gradient_checkpointing": True}], ids=str)
def test_what_is_exchanged_is_what_fsdp_asks_for(world, tmp_path, changes):
    """In one micro-batch, and in two of a step. Whole gradients are not kept until the second where all weights train."""
    recipe = _recipe(world, tmp_path / "out", FEW | changes | {"train.shard": "full"})
    found = find([recipe], tmp_path)
    with fake_ranks(2) as ranks, fake_tensors(False):
        ready = build(
            [recipe],
            found,
            full_depth(found.student.config, changes.get("student.gradient_checkpointing", False), ""),
            [2],
            None,
            False,
            ranks,
        )
        batch = work_of(found.data, recipe, 2).batch
        with Gathered() as one:
            phases = watched_step(ready, batch, False, ranks)
        with Gathered() as two:
            of_two = watched_step(ready, batch, True, ranks)
    sizes = sizes_of(recipe, found)
    padded = pytest.approx(1, rel=0.02)  # rows are filled up to a multiple of two
    for counted, number in ((one, 1), (two, 2)):
        said = exchanged(sizes, how_sharded(recipe, found), number)
        first = said.first * (number == 1)  # what has come together stays
        assert (counted.gathered / (said.gathered + first), counted.reduced / said.reduced) == (padded, padded), said
    assert sum(phase.flops for phase in of_two.values()) == pytest.approx(sum(phase.flops for phase in phases.values()))  # of one of them


V, P8, P70 = 128256, 8_030_261_248, 70_553_706_496  # Llama 3.1: entries, and the parameters that the models' pages give
ROOT8, ROOT70 = (2 * V * width + width for width in (4096, 8192))  # embeddings, head and last norm


def large(folder, changes: dict):
    file = folder / "large.yaml"
    recipe = {
        "output_dir": str(folder / "out"),
        "student": {"model": "meta-llama/Llama-3.1-8B-Instruct", "method": "full", "dtype": "bfloat16", "gradient_checkpointing": True},
        "teacher": {"model": "meta-llama/Llama-3.1-70B-Instruct", "dtype": "bfloat16"},
        "data": {"train": {"path": "nobody/has-it", "format": "alpaca", "chat_template": True}, "max_length": 2048},
        "train": {"batch_size": 64, "micro_batch_size": 4, "max_steps": 100, "shard": "full"},
    }
    file.write_text(json.dumps(recipe))
    return loader.load_recipe(file, changes)


@pytest.mark.slow
def test_a_teacher_of_70b_and_a_student_of_8b_on_eight_gpus_by_hand(tmp_path):
    """All of the student trains, in bfloat16, in two micro-batches of 4 x 2,047 tokens a step. Attention is causal: two products forward, five back."""
    recipe, N = large(tmp_path, {}), 4 * 2047
    found = plan([recipe], find([recipe], tmp_path), None, gpu=True, ranks=8)
    by_hand = {
        "teacher's weights": 2 * P70 / 8,
        "trained": 2 * P8 / 8,
        "gradients": 2 * P8 / 8,
        "optimizer": 2 * 2 * P8 / 8,
        "teacher's pass": 2 * ROOT70 + 2 * N * 8192,  # what stays gathered, and the hidden states
    }
    assert {name: found.parts[name] for name in by_hand} == pytest.approx(by_hand, rel=2e-3)
    again = 31 / 32 * (P8 - ROOT8) - 31 * 4096 * 14336  # the last layer is not recomputed, nor is the last product of a layer
    bodies = 2 * N * (P70 - ROOT70) + N * (6 * (P8 - ROOT8) + 2 * again)
    heads = 2 * N * V * 8192 + 6 * N * V * 4096
    attention = N * 2047 * (2 * 80 * 8192 + (7 * 32 + 2 * 31) * 4096)
    assert sum(found.flops.values()) == pytest.approx(bodies + heads + attention, rel=1e-3)
    assert found.peak < 45e9


@pytest.mark.slow
def test_70b_in_4_bit_with_an_adapter_on_two_gpus_by_hand(tmp_path):
    """Half a byte a weight is cut; a byte for 64 weights and a float32 for 256 of those are whole in both processes (`quantized.bytes_of`)."""
    more = {
        "student.model": "meta-llama/Llama-3.1-70B-Instruct",
        "student.method": "lora",
        "student.lora": {"rank": 16},
        "loss.kd_ratio": 0,
    }
    more |= {"student.quantization": {"type": "nf4"}, "teacher": None, "train.batch_size": 16, "train.micro_batch_size": 1}
    recipe = large(tmp_path, more)
    found = plan([recipe], find([recipe], tmp_path), None, gpu=True, ranks=2)
    norms, lora = 2 * 80 * 8192, 80 * 16 * (2 * 2 * 8192 + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    weights = P70 - ROOT70 - norms
    by_hand = {
        "student's weights": weights / 4 + weights / 64 * (1 + 4 / 256) + 2 * (ROOT70 + norms) / 2,
        "trained": 4 * lora / 2,
        "optimizer": 2 * 4 * lora / 2,
    }
    assert {name: found.parts[name] for name in by_hand} == pytest.approx(by_hand, rel=2e-3)


def test_what_is_sent_by_hand():
    """Of 4 ranks 3 of 4 parts are sent. A student of 10 layers' bytes and 4 of the rest, of which 6 train; a teacher of 100 and 20. Two micro-batches."""
    sizes = Sizes(10.0, 4.0, 6.0, 100.0, 20.0)
    assert exchanged(sizes, (True, True), 2).sent(4) == 0.75 * (2 * (2 * 10 + 4 + 100) + 6)
    full = dataclasses.replace(sizes, all_train=True)
    assert exchanged(full, (True, True), 2).sent(4) == 0.75 * (2 * (2 * 10 + 4 + 100) + 2 * 6)
    whole = exchanged(sizes, (False, False), 2)
    assert whole.sent(4) == 0.75 * 2 * 6 and whole.sent(1) == 0
    gpu = Device("x", 1.0, 1.0, 1.0, link=1000.0)
    alone, four, many = speeds(whole, 50.0, 0.01, gpu, (1, 4, 64))
    assert alone.tokens == 50 / 0.01 and alone.efficiency == 1
    assert (
        four.sending == pytest.approx(9 / 700)
        and four.tokens == pytest.approx(4 * 50 * 700 / 9)
        and four.efficiency == pytest.approx(0.01 * 700 / 9)
    )
    assert many.sending == pytest.approx(63 / 64 * 12 / 700)  # this one's link is slower than the network


def test_a_way_to_hold_the_models_that_is_refused_says_why(world, tmp_path, capsys):
    recipe = _recipe(world, tmp_path / "out", FEW)

    def needs(settings):
        if settings["train.shard"] == "full":
            raise UserError("a.yaml:3: train.compile: found true", "a.yaml:4: optim.name: found adamw_8bit")
        return 2e9 if settings["teacher.shard"] == "none" else 1e9

    runs = Runs("a.yaml", [], lambda change: [recipe], None)
    whole, cut, *refused = ways_to_hold(runs, needs, 1.5e9)
    assert (whole["needed"], whole["fits"], whole["refused"]) == (2e9, False, None) and (cut["fits"], cut["refused"]) == (True, None)
    why = "a.yaml:3: train.compile: found true; a.yaml:4: optim.name: found adamw_8bit"
    assert len(refused) == 2 and all((one["needed"], one["fits"], one["refused"]) == (None, None, why) for one in refused)
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].split() == "--train.shard none --teacher.shard none 2.00 no".split()
    assert lines[-1] == f"--train.shard full --teacher.shard full is refused: {why}"
