"""The order of training is a pure function of (seed, epoch), and how a window is cut loses nothing."""

import dataclasses
import math
import random

import numpy as np
import pytest

from llmkd.data.batch_source import PlannedSource
from llmkd.data.batching import BatchPlan, TokenBudget, make_micro_batches
from llmkd.data.examples import TokenExamples
from llmkd.training.loop import derived_seed
from llmkd.training.optim import learning_rate

SHAPES = [(1, 1), (5, 8), (8, 8), (37, 8), (64, 8), (100, 7)]


def make_plan(examples: int = 37, batch_size: int = 8, **changes) -> BatchPlan:
    lengths = np.array([2 + (i * 31) % 53 for i in range(examples)])
    return BatchPlan(**({"lengths": lengths, "seed": 3, "batch_size": batch_size, "epochs": 2, "max_steps": None} | changes))


def of_lengths(lengths: np.ndarray) -> TokenExamples:
    total = int(np.sum(lengths))
    return TokenExamples(
        np.zeros(total, np.int32), np.ones(total, bool), np.concatenate([[0], np.cumsum(lengths)]), np.arange(len(lengths))
    )


def make_source(plan: BatchPlan, size: int | TokenBudget = 3, rank: int = 0, ranks: int = 1, teacher_view: TokenExamples | None = None):
    examples = dataclasses.replace(of_lengths(plan.lengths), teacher_view=teacher_view)
    return PlannedSource(examples, [f"t:{i}" for i in range(len(examples))], plan, size).for_rank(rank, ranks)


@pytest.mark.parametrize("group_by_length", [1, 3])
@pytest.mark.parametrize(("examples", "batch_size"), SHAPES)
def test_an_epoch_has_every_example_once(examples, batch_size, group_by_length):
    plan = make_plan(examples, batch_size, group_by_length=group_by_length)
    for epoch in range(3):
        windows = plan.step_batches(epoch)
        assert sorted(i for window in windows for i in window) == list(range(examples))
        assert len(windows) == plan.steps_per_epoch == math.ceil(examples / batch_size)
        short = [n for n, window in enumerate(windows) if len(window) != batch_size]
        assert len(short) == bool(examples % batch_size)
        if group_by_length == 1 and short:
            assert short == [len(windows) - 1] and len(windows[-1]) == examples % batch_size


@pytest.mark.parametrize("group_by_length", [1, 3])
def test_the_order_depends_on_seed_and_epoch_alone(group_by_length):
    plan = make_plan(group_by_length=group_by_length)
    before = plan.step_batches(1)
    random.seed(99)
    np.random.seed(99)
    plan.step_batches(0)
    assert plan.step_batches(1) == before
    assert dataclasses.replace(plan, epochs=None, max_steps=5).step_batches(1) == before
    assert plan.step_batches(0) != before
    assert dataclasses.replace(plan, seed=4).step_batches(1) != before


@pytest.mark.parametrize("group_by_length", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_going_on_after_k_steps_is_the_tail_of_the_whole(group_by_length, ranks):
    for rank in range(ranks):
        source = make_source(make_plan(group_by_length=group_by_length), rank=rank, ranks=ranks)
        whole = list(source.schedule())
        assert [step.number for step in whole] == list(range(1, source.total_steps + 1))
        for done in range(source.total_steps + 1):
            assert list(source.schedule(done)) == whole[done:]


@pytest.mark.parametrize(("epochs", "max_steps", "total"), [(1, None, 5), (3, None, 15), (None, 7, 7), (None, 2, 2)])
def test_the_run_is_as_long_as_asked(epochs, max_steps, total):
    plan = make_plan(epochs=epochs, max_steps=max_steps)
    steps = list(plan.steps())
    assert plan.total_steps == len(steps) == total
    assert [epoch for _, epoch, _ in steps] == [n // 5 for n in range(total)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8, 50])
@pytest.mark.parametrize("count", [1, 2, 7, 24])
def test_dealing_covers_a_window_once_with_equally_many_micro_batches_on_each_rank(count, micro_batch_size, ranks):
    lengths = np.array([2 + (i * 7) % 11 for i in range(100)])
    window = random.Random(count).sample(range(100), count)
    hands = [make_micro_batches(window, lengths, micro_batch_size, rank, ranks) for rank in range(ranks)]
    assert len({len(hand) for hand in hands}) == 1
    micro = [batch for turn in zip(*hands, strict=True) for batch in turn]
    assert sorted(i for batch in micro for i in batch) == sorted(window)
    assert max(map(len, micro)) <= micro_batch_size
    assert sum(not batch for batch in micro) < ranks
    longest_first = [lengths[i] for batch in micro for i in batch]
    assert longest_first == sorted(longest_first, reverse=True)


def test_dealing_does_not_depend_on_the_order_inside_the_window():
    plan = make_plan()
    window = plan.step_batches(0)[0]
    assert make_micro_batches(window[::-1], plan.lengths, 3) == make_micro_batches(window, plan.lengths, 3)


@pytest.mark.parametrize("size", [3, TokenBudget(60), TokenBudget(60, packing=True)], ids=str)
def test_all_ranks_together_train_the_same_windows_as_one(size):
    one = list(make_source(make_plan(), size).schedule())
    two = [list(make_source(make_plan(), size, rank, 2).schedule()) for rank in range(2)]
    for alone, *parts in zip(one, *two, strict=True):
        assert sorted(i for batch in alone.micro_batches for i in batch) == sorted(
            i for part in parts for batch in part.micro_batches for i in batch
        )


# ---- budgets of tokens


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 13, 40, 100, 10_000])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
def test_a_budget_covers_a_window_once_and_is_kept(count, tokens, ranks, packing):
    lengths = np.array([2 + (i * 7) % 23 for i in range(100)])
    window, budget = random.Random(count).sample(range(100), count), TokenBudget(tokens, packing)
    hands = [make_micro_batches(window, lengths, budget, rank, ranks) for rank in range(ranks)]
    assert len({len(hand) for hand in hands}) == 1 and hands[0] == make_micro_batches(window[::-1], lengths, budget, 0, ranks)
    micro = [batch for turn in zip(*hands, strict=True) for batch in turn]
    assert sorted(i for batch in micro for i in batch) == sorted(window)
    sums = [budget.of(lengths[batch]) for batch in micro]
    assert all(used <= tokens or len(batch) == 1 for used, batch in zip(sums, micro, strict=True))
    if tokens == 10_000:  # one micro-batch would hold everything: each rank has one, and a share of the examples
        assert len(hands[0]) == bool(count) and sum(not batch for batch in micro) == (max(0, ranks - count) if count else 0)


def test_micro_batches_of_a_budget_are_even_and_as_few_as_can_be():
    lengths = np.full(20, 10)
    assert [len(batch) for batch in make_micro_batches(list(range(20)), lengths, TokenBudget(80))] == [7, 7, 6]
    assert sorted(len(batch) for batch in make_micro_batches(list(range(20)), lengths, TokenBudget(80, packing=True))) == [6, 7, 7]
    assert [len(batch) for rank in (0, 1) for batch in make_micro_batches(list(range(20)), lengths, TokenBudget(80), rank, 2)] == [
        5,
        5,
        5,
        5,
    ]
    assert len(make_micro_batches(list(range(400)), np.full(400, 10), TokenBudget(4000))) == 1, "there is nothing to pad"
    assert make_micro_batches([0, 1, 2, 3], np.array([7, 3, 6, 4]), TokenBudget(10, packing=True)) == [[0, 1], [2, 3]]


def alpaca_like(count: int) -> np.ndarray:
    """Log-normal, of mean 126 tokens and a quarter above 150: the law of the published data, roughly."""
    return np.clip(np.random.default_rng(0).lognormal(math.log(105), 0.6, count), 20, 512).astype(int)


def test_under_five_in_a_hundred_of_the_tokens_are_padding():
    lengths = alpaca_like(6400)

    def shares(size, batch_size: int, group_by_length: int = 1) -> float:
        """Padding, and with packing what is unused of the budget, of all slots."""
        plan = BatchPlan(lengths, 3, batch_size, 1, None, group_by_length)
        used = [lengths[batch] for step in make_source(plan, size).schedule() for batch in step.micro_batches]
        packed = isinstance(size, TokenBudget) and size.packing
        slots = sum(size.tokens if packed else len(batch) * batch.max() for batch in used)
        return 1 - sum(int(batch.sum()) for batch in used) / slots

    assert 0.2 < shares(4, 4) < 0.6  # what a batch of four as drawn pads
    assert shares(TokenBudget(4096), 128, 8) < 0.03
    assert shares(TokenBudget(2048), 512) < 0.03
    assert shares(TokenBudget(10**6), 512) < 0.03, "a large budget is no reason to pad"
    assert shares(TokenBudget(2048, packing=True), 800) < 0.02
    assert shares(TokenBudget(16_384, packing=True), 1600) < 0.05


def test_a_step_that_is_split_again_is_split_by_what_the_teacher_reads_too():
    source = make_source(make_plan(8, lengths=np.full(8, 10), epochs=1), TokenBudget(200), teacher_view=of_lengths(np.full(8, 50)))
    step = next(source.schedule())
    assert sorted(map(len, step.micro_batches)) == [4, 4]
    source.micro_batch_size = TokenBudget(100)
    again = source.resplit(step)
    assert sorted(map(len, again.micro_batches)) == [2, 2, 2, 2] and again.examples == step.examples


def test_the_longer_of_two_views_counts():
    source = make_source(make_plan(8, lengths=np.full(8, 10), epochs=1), TokenBudget(100), teacher_view=of_lengths(np.full(8, 50)))
    assert [len(batch) for step in source.schedule() for batch in step.micro_batches] == [2, 2, 2, 2]


def test_length_grouping_pads_less():
    def padding(group_by_length: int) -> int:
        plan = make_plan(400, 8, epochs=1, group_by_length=group_by_length)
        batches = [plan.lengths[batch] for step in make_source(plan, 8).schedule() for batch in step.micro_batches]
        return sum(int(len(lengths) * lengths.max() - lengths.sum()) for lengths in batches)

    assert padding(10) < padding(1) / 3


@pytest.mark.parametrize(
    ("schedule", "warmup", "min_share", "rates"),
    [
        ("constant", 0, 0.0, [1, 1, 1, 1]),
        ("linear", 0, 0.0, [1, 0.75, 0.5, 0.25]),
        ("linear", 0, 0.2, [1, 0.8, 0.6, 0.4]),
        ("linear", 2, 0.0, [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("constant", 1, 0.0, [0.5, 1, 1]),
        ("cosine", 0, 0.0, [1, 0.8535533905932737, 0.5, 0.14644660940672627]),
        ("cosine", 1, 0.5, [0.5, 1, 0.9267766952966369, 0.75, 0.5732233047033631]),
        ("cosine", 3, 0.0, [0.25, 0.5, 0.75]),
        ("cosine", 0, 0.0, [1]),
    ],
)
def test_learning_rate(schedule, warmup, min_share, rates):
    got = [learning_rate(step, len(rates), 2e-3, schedule, warmup, min_share) for step in range(1, len(rates) + 1)]
    assert got == pytest.approx([2e-3 * rate for rate in rates], rel=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 10, 49, 50, 80])
@pytest.mark.parametrize("min_share", [0.0, 0.3, 1.0])
def test_the_rate_rises_to_its_peak_and_never_again(schedule, warmup, min_share):
    rates = [learning_rate(step, 50, 1.0, schedule, warmup, min_share) for step in range(1, 51)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert all(a < b for a, b in zip(rising, rising[1:], strict=False)) and all(0 < rate < 1 for rate in rising)
    assert falling[:1] in ([], [1.0]) and all(a >= b for a, b in zip(falling, falling[1:], strict=False))
    assert all(rate >= min_share - 1e-12 and rate > 0 for rate in falling)


def test_seeds_derived_from_different_parts_differ():
    seeds = {derived_seed(0, step, rank, micro) for step in range(20) for rank in range(4) for micro in range(5)}
    assert len(seeds) == 400 and all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(0, 1, 2, 3) == derived_seed(0, 1, 2, 3)


# ---- several sources


def weighted(*weights: float, sizes=(20, 10, 7), **changes) -> BatchPlan:
    return make_plan(sum(sizes), sources=np.repeat(np.arange(len(sizes)), sizes), weights=weights, **changes)


@pytest.mark.parametrize("weights", [(1, 1, 1), (2, 1, 0.5), (0.3, 2.5, 1), (1, 1, 0.1)])
def test_a_weight_is_how_often_a_source_is_passed_over_in_an_epoch(weights):
    plan = weighted(*weights)
    for epoch in range(3):
        counts = np.bincount([i for window in plan.step_batches(epoch) for i in window], minlength=37)
        for source, (weight, size) in enumerate(zip(weights, (20, 10, 7), strict=True)):
            mine = counts[plan.sources == source]
            assert mine.sum() == round(weight * size) and set(mine) <= {int(weight), int(weight) + 1}
        assert len(plan.step_batches(epoch)) == plan.steps_per_epoch == math.ceil(counts.sum() / 8)


def test_a_half_is_drawn_anew_each_epoch():
    plan = weighted(0.5, 1, 1)
    halves = [frozenset(i for window in plan.step_batches(epoch) for i in window if i < 20) for epoch in range(4)]
    assert all(len(half) == 10 for half in halves) and len(set(halves)) == 4


def test_weights_of_one_change_nothing():
    assert weighted(1.0, 1.0, 1.0).step_batches(2) == make_plan(37).step_batches(2)


def test_a_weighted_plan_goes_on_where_it_stopped():
    plan = weighted(2, 0.5, 1)
    whole = list(plan.steps())
    assert all(list(plan.steps(done)) == whole[done:] for done in range(plan.total_steps + 1))
