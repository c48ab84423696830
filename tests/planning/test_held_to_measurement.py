"""The plan against PyTorch's own record of what a real run allocates."""

import contextlib
import math

import pytest
import torch

from llmkd.planning.find import find
from llmkd.planning.here import ready_here
from llmkd.planning.plan import plan
from llmkd.planning.step import OneProcess
from llmkd.training.loop import train
from llmkd.training.prepare import prepare

FEW = {"data__train__limit": 8, "train__batch_size": 8, "train__micro_batch_size": 4, "train__epochs": 2}
LESS_LOSS = {"loss__chunk_size": 8}  # the head then holds less than the layers do
FULL = {"student__method": "full", "student__lora": None}
INSIDE = {"loss__features": {"layers": [[1, 2]], "init": "xavier", "scale": "none"}, "loss__attention": {"layers": "last"}}

RECIPES = {
    "checkpointed": {"student__gradient_checkpointing": True} | LESS_LOSS,
    "packed": {"data__packing": True} | LESS_LOSS,
    "without a teacher, one micro-batch a step": {"teacher": None, "train__micro_batch_size": 8} | FULL,
    "one layer, half of the targets": {"student__layers": [0], "loss__keep": 0.5} | FULL,
    "its own average as the teacher": {"teacher": {"ema": 0.9}} | LESS_LOSS,
    "weights by a rule": {"loss__target_weights": {"by": "student_entropy"}, "loss__normalize": "weights"},
}
#: What others train with side by side with the plain recipe.
SIDE_BY_SIDE = [{"student__lora": {"rank": 16}}, INSIDE]


def allocated(recipes) -> int:
    """Bytes: the largest sum of weights and of what PyTorch's CPU allocator gave out in two steps of a run, by its profiler."""
    prepared = prepare(recipes[0])
    ready, accelerator = ready_here(recipes, prepared, torch.device("cpu")), OneProcess("cpu")
    models = *ready.student_models, *ready.teacher_models, *(state.distiller for state in ready.students)
    tensors = [x for model in models for x in (*model.parameters(), *model.buffers())]
    weights = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
    watch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with watch as profiler, contextlib.closing(train(prepared.source, ready.students, ready.teacher, accelerator)) as steps:
        for _ in steps:
            pass
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return weights + most


@pytest.mark.parametrize("name", RECIPES)
def test_the_peak_is_within_five_percent_of_what_is_allocated(make_recipe, tmp_path, name):
    recipes = [make_recipe(**FEW | RECIPES[name])]
    planned, real = plan(recipes, find(recipes, tmp_path), None, gpu=False), allocated(recipes)
    assert math.isclose(planned.peak, real, rel_tol=0.05), planned.parts
    if name.startswith("its own average"):
        assert planned.layer_passes == 2 * 3 + 2


@pytest.mark.slow
def test_so_is_that_of_students_side_by_side(make_recipe, tmp_path):
    recipes = [make_recipe(**FEW | LESS_LOSS | changes) for changes in ({}, *SIDE_BY_SIDE)]
    planned, real = plan(recipes, find(recipes, tmp_path), None, gpu=False), allocated(recipes)
    assert math.isclose(planned.peak, real, rel_tol=0.05), planned.parts
