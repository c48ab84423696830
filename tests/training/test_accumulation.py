"""The passes of one optimizer step: sums over micro-batches and ranks, when ranks exchange gradients, and dropout masks."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from llmkd.data.batch_source import Step
from llmkd.data.collate import collate
from llmkd.training.build_student import build_student
from llmkd.training.loop import accumulate_gradients, count_targets
from llmkd.training.prepare import prepare
from llmkd.training.step_result import Accumulated, StepResult, TargetCounts
from tests.kit.models import load_student


@pytest.fixture
def parts(make_recipe):
    """Two students without a teacher, and a micro-batch."""
    recipe = make_recipe(teacher=None, student__lora__dropout=0.5)
    prepared, accelerator = prepare(recipe), Accelerator(cpu=True)
    states = [
        build_student(recipe.loss, recipe.optim, load_student(recipe.student, prepared.vocab, "cpu", 0), 4, accelerator) for _ in "ab"
    ]
    return states, collate(prepared.train, [3, 4], pad=1)


def a_rank(rank: int = 0, ranks: int = 2, quiet=contextlib.nullcontext):
    return SimpleNamespace(process_index=rank, num_processes=ranks, device="cpu", no_sync=quiet, backward=lambda loss: loss.backward())


def test_what_is_drawn_differs_by_step_micro_batch_rank_and_seed(parts):
    """The masks of a batch whose positions have no keys, as those of a model's own dropout."""
    states, micro = parts
    seen: list[bytes] = []
    for state in states:
        dropout = next(module for module in state.distiller.modules() if isinstance(module, torch.nn.Dropout) and module.p)
        dropout.register_forward_hook(lambda module, args, out: seen.append((out == 0).flatten().numpy().tobytes()))

    def masks(seed: int, number: int, rank: int) -> list[bytes]:
        """Of three equal micro-batches, for each of two students: the first module's masks."""
        seen.clear()
        accumulate_gradients(
            seed,
            Step(number, 0),
            TargetCounts(9),
            dict(enumerate(states)),
            None,
            a_rank(rank, quiet=lambda _: contextlib.nullcontext()),
            [micro] * 3,
        )
        assert seen[0::2] == seen[1::2], "a student's masks depend on those beside it"
        return seen[0::2]

    every = [mask for seed in (0, 1) for number in (1, 2, 3) for rank in (0, 1) for mask in masks(seed, number, rank)]
    assert len(every) == 36 == len(set(every))
    assert masks(0, 2, 1) == every[9:12]


def test_gradients_are_sums_over_ranks_and_exchanged_with_the_last_micro_batch(parts):
    """A rank's gradients are its number of ranks times too large, since the ranks' mean is taken."""
    (state, _), micro = parts
    state.distiller.eval()
    grads, silent = [], []

    @contextlib.contextmanager
    def quiet(module):
        silent.append(sum(p.grad is not None for p in state.parameters.values()))
        yield

    for rank, ranks in ((0, 1), (0, 2), (1, 2)):
        accumulated = accumulate_gradients(
            0, Step(1, 0), TargetCounts(2 * micro.num_targets), {0: state}, None, a_rank(rank, ranks, quiet), [micro] * 3
        )
        grads.append({name: p.grad / accumulated.scale for name, p in state.parameters.items()})
        assert len(silent) == 2 and silent[0] == 0 < silent[1], "the last of three micro-batches alone is exchanged"
        silent.clear()
        state.optimizer.zero_grad(set_to_none=True)
    assert max(g.abs().max() for g in grads[0].values()) > 0
    for name, grad in grads[0].items():
        for of_a_rank in grads[1:]:
            torch.testing.assert_close(of_a_rank[name], 2 * grad, rtol=1e-12, atol=0)


def test_what_is_shown_of_a_step_is_summed_over_ranks():
    """Two ranks with the same values: their sum over the targets of both."""
    reduced = SimpleNamespace(num_processes=2, reduce=lambda x, how: {"sum": 2 * x, "mean": x}[how])
    rows = [{"ce": torch.tensor([1.0, 2.0])}, {"ce": torch.tensor([3.0])}]
    done = Accumulated([], TargetCounts(6), 1.0, {0: rows}, {0: lambda values: values["ce"]})
    terms, norms, stop = StepResult(Step(1, 0), done, {0: torch.tensor(5.0)}, {}, True, reduced).read({0})
    assert terms == {0: {"ce": 2 * (1 + 2 + 3) / 6, "loss": 2.0}} and norms == {0: 5.0} and stop


def test_targets_that_no_source_has_counted_are_those_of_every_micro_batch():
    sizes = [SimpleNamespace(num_targets=n, weights={}) for n in (3, 5, 0)]
    alone, two = a_rank(0, 1), SimpleNamespace(num_processes=2, device="cpu", reduce=lambda counts, how: {"sum": 2 * counts}[how])
    assert count_targets(Step(1, 0), sizes, alone).targets == 8 and count_targets(Step(1, 0, 11), sizes, alone).targets == 11
    assert count_targets(Step(1, 0), sizes, two).targets == 16 and count_targets(Step(1, 0), sizes[2:], two).targets == 1
