"""What tokens are drawn from, against explicit loops in float64, and the numbers that they are drawn by."""

import math

import numpy as np
import pytest
import torch

from llmkd.rollouts.draw import choose, entropy, inverse_cdf, probabilities
from llmkd.rollouts.sampling import Sampling, uniform

LOGITS = [
    [2.0, -1.0, 0.5, 0.5, -3.0, 1.0],
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],  # equally likely: the smaller ids come first
    [-math.inf, 3.0, 2.9, -math.inf, -4.0, 0.0],  # some that the model rules out
    [9.0, -9.0, -9.0, -9.0, -9.0, -9.0],
]
CUTS = [
    {},
    {"temperature": 0.5},
    {"top_k": 1},
    {"top_k": 3},
    {"top_k": 50},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 4, "top_p": 0.7},
    {"temperature": 2.0, "top_k": 5, "top_p": 0.8, "min_p": 0.6},
]


def reference(logits: list[float], temperature=1.0, top_k=None, top_p=1.0, min_p=0.0) -> list[float]:
    """The distribution that tokens are drawn from, by loops: temperature, then the k likeliest, then the share, then the ratio."""
    weight = [math.exp((x - max(logits)) / temperature) for x in logits]
    order = sorted(range(len(weight)), key=lambda i: (-weight[i], i))[:top_k]
    total, kept, before = sum(weight[i] for i in order), [], 0.0
    for i in order:
        if before < top_p * total or not kept:
            kept.append(i)
        before += weight[i]
    kept = [i for i in kept if weight[i] >= min_p * weight[order[0]]]
    rest = sum(weight[i] for i in kept)
    return [weight[i] / rest if i in kept else 0.0 for i in range(len(weight))]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_what_is_drawn_from_is_the_definition(cut):
    found = probabilities(torch.tensor(LOGITS), Sampling(**{"temperature": 1.0} | cut))
    expected = np.array([reference(row, **cut) for row in LOGITS])
    assert np.abs((found / found.sum(-1, keepdim=True)).numpy() - expected).max() < 1e-6
    assert np.array_equal(found.numpy() > 0, expected > 0)


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_draws_have_that_distribution(cut):
    n = 4000
    drawn = choose(torch.tensor(LOGITS[:1]).expand(n, -1), [(key, 5) for key in range(n)], Sampling(1.0, seed=3, **cut))
    expected = np.array(reference(LOGITS[0], **cut))
    share = np.bincount(drawn.numpy(), minlength=6) / n
    assert (np.abs(share - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / n)).all()


def test_the_first_token_past_the_share_is_taken_and_never_an_impossible_one():
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64)
    for share, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4), (1.0, 4)):
        assert inverse_cdf(p, torch.tensor([share], dtype=torch.float64)).tolist() == [token]
        assert inverse_cdf(3.7 * p, torch.tensor([share], dtype=torch.float64)).tolist() == [token], "it need not sum to 1"


def test_every_place_of_every_text_has_a_number_of_its_own():
    keys, n = (0, 1, 2**64 - 1), 1500
    drawn = np.array([[uniform(seed, key, at) for at in range(n)] for seed in (0, 1) for key in keys])
    assert np.abs(drawn.mean(1) - 0.5).max() < 4 * (1 / 12 / n) ** 0.5 and np.abs(drawn.std(1) - 12**-0.5).max() < 0.02
    assert np.abs(np.corrcoef(drawn) - np.eye(6)).max() < 4.5 / n**0.5
    assert len(np.unique(drawn)) == drawn.size and (drawn >= 0).all() and (drawn < 1).all()
    assert abs(np.corrcoef(drawn[0, :-1], drawn[0, 1:])[0, 1]) < 4.5 / n**0.5
    assert uniform(1, 2**64 - 1, 7) == drawn[5, 7]


def test_temperature_0_is_the_most_likely_token_whatever_else_is_set():
    places = [(0, 0)] * len(LOGITS)
    assert choose(torch.tensor(LOGITS), places, Sampling(0.0, top_k=2, top_p=0.1)).tolist() == [0, 0, 1, 0]


def test_entropy_is_that_of_the_softmax():
    expected = [-sum(p * math.log(p) for p in reference(row) if p) for row in LOGITS]
    assert entropy(torch.tensor(LOGITS, dtype=torch.float64)).tolist() == pytest.approx(expected, abs=1e-12)
    assert entropy(torch.tensor(LOGITS).bfloat16()).dtype == torch.float32
