"""What a run is expected to cost."""

import dataclasses

import pytest

from llmkd.commands import plan


def test_a_small_model_costs_what_its_layers_take_to_be_called(make_recipe, monkeypatch):
    """Two layers each: the teacher's forward pass, and three passes of every student, for each of 37 / 4 micro-batches an epoch."""
    monkeypatch.setattr(plan, "matmul_flops", lambda device: 1e30)
    one, plain = make_recipe(train__epochs=3), make_recipe("plain", loss__kd_ratio=0.0, train__epochs=3)
    for recipes, passes in (([one], 1 + 3), ([one, plain], 1 + 2 * 3), ([plain], 3)):
        assert plan.estimate(recipes, {}).seconds == pytest.approx(3 * 37 / 4 * 2 * passes * plan.PER_LAYER)


def test_micro_batches_are_counted_as_they_are_made(make_recipe):
    train = make_recipe(train__batch_size=8, train__micro_batch_size=4).train
    assert plan.micro_batches(100, 5000, train) == 25
    for tokens, expected in ((500, 12.5), (200, 25), ("auto", 12.5)):
        by_tokens = dataclasses.replace(train, micro_batch_size=None, micro_batch_tokens=tokens)
        assert plan.micro_batches(100, 5000, by_tokens) == expected
