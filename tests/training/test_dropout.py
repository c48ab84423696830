"""Dropout masks: another for each step, micro-batch, rank and seed; the same again where these are the same."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator

from llmkd.data.batch_source import Step
from llmkd.data.collate import collate
from llmkd.training.build import build_student
from llmkd.training.loop import accumulate_gradients
from llmkd.training.prepare import prepare
from tests.kit.models import load_student


def test_masks_differ_by_step_micro_batch_rank_and_seed(make_recipe):
    recipe = make_recipe(teacher=None, student__lora__dropout=0.5)
    prepared, accelerator = prepare(recipe), Accelerator(cpu=True)
    states = [
        build_student(recipe.loss, recipe.optim, load_student(recipe.student, prepared.vocab, "cpu", 0), 4, accelerator) for _ in "ab"
    ]
    micro, seen = collate(prepared.train, [3, 4], pad=1), []
    for state in states:
        dropout = next(module for module in state.distiller.modules() if isinstance(module, torch.nn.Dropout) and module.p)
        dropout.register_forward_hook(lambda module, args, out: seen.append((out == 0).flatten().numpy().tobytes()))

    def masks(seed: int, number: int, rank: int) -> list[bytes]:
        """Of three equal micro-batches, for each of two students: the first module's masks."""
        seen.clear()
        ranks = SimpleNamespace(
            process_index=rank, num_processes=2, device="cpu", no_sync=accelerator.no_sync, backward=accelerator.backward
        )
        accumulate_gradients(seed, Step(number, 0), 9, dict(enumerate(states)), None, ranks, [micro] * 3)
        assert seen[0::2] == seen[1::2], "a student's masks depend on those beside it"
        return seen[0::2]

    every = [mask for seed in (0, 1) for number in (1, 2, 3) for rank in (0, 1) for mask in masks(seed, number, rank)]
    assert len(every) == 36 == len(set(every))
    assert masks(0, 2, 1) == every[9:12]
