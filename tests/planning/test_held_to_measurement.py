"""The plan against PyTorch's own record of what a real run allocates."""

import contextlib
import math

import pytest
import torch

from llmkd.models.load import LoadContext
from llmkd.planning.plan import find, plan
from llmkd.planning.step import OneProcess
from llmkd.training.build import build_student, load, longest_row, open_teacher
from llmkd.training.loop import train
from llmkd.training.prepare import prepare

FEW = {"data__train__limit": 8, "train__batch_size": 8, "train__micro_batch_size": 4, "train__epochs": 2}
LESS_LOSS = {"loss__chunk_size": 8}  # the head then holds less than the layers do
FULL = {"student__method": "full", "student__lora": None}

RECIPES = {
    "plain": {},
    "full": FULL | LESS_LOSS,
    "checkpointed": {"student__gradient_checkpointing": True} | LESS_LOSS,
    "packed": {"data__packing": True} | LESS_LOSS,
    "without a teacher, one micro-batch a step": {"teacher": None, "train__micro_batch_size": 8} | FULL,
}


def allocated(recipe) -> int:
    """Bytes: the largest sum of weights and of what PyTorch's CPU allocator gave out in two steps of a run, by its profiler."""
    prepared = prepare(recipe)
    device, accelerator = torch.device("cpu"), OneProcess("cpu")
    live = [(source.setting, source.settings) for source in prepared.teachers if source.needs_model]
    packing = recipe.data.packing * longest_row(recipe.train, recipe.data)
    students, teachers = load([recipe.student], live, LoadContext(prepared.vocab, device, 0, packing), recipe.data.share_prefixes, False)
    state = build_student(recipe.loss, recipe.optim, students[0], 3, accelerator)
    teacher = open_teacher(prepared.teachers, recipe.mixture, teachers, {}, device, {})
    tensors = [x for model in (*students, *teachers) for x in (*model.parameters(), *model.buffers())]
    weights = sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
    watch = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with watch as profiler, contextlib.closing(train(prepared.source, [state], teacher, accelerator)) as steps:
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
    recipe = make_recipe(**FEW | RECIPES[name])
    planned, real = plan(recipe, find(recipe, tmp_path), None, gpu=False), allocated(recipe)
    assert math.isclose(planned.peak, real, rel_tol=0.05), planned.parts
