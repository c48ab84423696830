"""Plans of several processes, made by one: memory against what two real ones allocate, exchanges against what FSDP2 asks for."""

import contextlib
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


@pytest.mark.parametrize("changes", [{"student.method": "full", "student.lora": None}, {"student.gradient_checkpointing": True}], ids=str)
def test_what_is_exchanged_is_what_fsdp_asks_for(world, tmp_path, changes):
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
        with Gathered() as counted:
            watched_step(ready, batch, False, ranks)
    sizes = sizes_of(recipe, found)
    padded = pytest.approx(1, rel=0.02)  # rows are filled up to a multiple of two
    once = exchanged(sizes, how_sharded(recipe, found), 1)
    found = counted.gathered / (once.gathered + once.first), counted.reduced / once.reduced
    assert found == (padded, padded), once


def test_what_is_sent_by_hand():
    """Of 4 ranks 3 of 4 parts are sent. A student of 10 layers' bytes and 4 of the rest, of which 6 train; a teacher of 100 and 20. Two micro-batches."""
    sizes = Sizes(10.0, 4.0, 6.0, 100.0, 20.0)
    assert exchanged(sizes, (True, True), 2).sent(4) == 0.75 * (2 * (2 * 10 + 4 + 100) + 6)
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
