"""Divergences of attention maps and of relations against numpy, written out in loops, in float64."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llmkd.batch import View
from llmkd.losses import attention
from llmkd.signals import AttentionInputs

PLACES = [1, 4, 6]  # of the targets, among seven positions


def randn(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def maps(query, key, scaling, places, windows) -> list[list[np.ndarray]]:
    """For each target and head the probabilities of the positions that it sees: query [n, h, d], key [g, m, d]."""
    query, key, out = query.detach().numpy(), key.detach().numpy(), []
    for i, t in enumerate(places):
        sees = [j for j in range(key.shape[1]) if j <= t and all(window is None or t - j < window for window in windows)]
        per = query.shape[1] // key.shape[0]
        out.append([softmax(np.array([scaling * query[i, a] @ key[a // per, j] for j in sees])) for a in range(query.shape[1])])
    return out


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("windows", [(None, None), (3, None), (4, 2)], ids=str)
@pytest.mark.parametrize("mean", [False, True])
def test_maps_equal_loops_in_numpy(windows, mean):
    """The student has 4 heads on 2 key heads, 3 wide; the teacher as many on 4, or for the mean 6 on 3, 5 wide."""
    h = 6 if mean else 4
    student, teacher = (
        (randn(3, 4, 3), randn(2, 7, 3, seed=1), 0.7),
        (randn(3, h, 5, seed=2), randn(h // 2 if mean else 4, 7, 5, seed=3), 0.4),
    )
    sees = attention.seen(torch.tensor(PLACES), 7, windows)
    found = attention.divergence(attention.scores(*student), attention.scores(*teacher), sees, mean)
    expected = []
    for q, p in zip(maps(*student, PLACES, windows), maps(*teacher, PLACES, windows), strict=True):
        if mean:
            q, p = [np.mean(q, 0)], [np.mean(p, 0)]
        expected.append(np.mean([kl(b, a) for a, b in zip(q, p, strict=True)]))
    assert_close(found, torch.tensor(expected), rtol=1e-12, atol=1e-14)


def relation_kl(student: np.ndarray, teacher: np.ndarray, heads: int, t: int) -> float:
    """MiniLMv2: of vectors [m, width], cut into relation heads, the target's relations with the positions up to its own."""
    total = 0.0
    for a in range(heads):
        rows = []
        for x in (student, teacher):
            d = x.shape[1] // heads
            part = x[:, a * d : (a + 1) * d]
            rows.append(softmax(np.array([part[t] @ part[j] / math.sqrt(d) for j in range(t + 1)])))
        total += kl(rows[1], rows[0])
    return total / heads


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relations_equal_loops_in_numpy(heads):
    student, teacher, places = randn(7, 8), randn(7, 12, seed=1), torch.tensor(PLACES)
    found = attention.divergence(*(attention.relations(x[places], x, heads) for x in (student, teacher)), attention.seen(places, 7))
    expected = [relation_kl(student.numpy(), teacher.numpy(), heads, t) for t in PLACES]
    assert_close(found, torch.tensor(expected), rtol=1e-12, atol=1e-14)


def inputs(h: int, g: int, d: int, d_v: int, window: int | None, seed: int) -> AttentionInputs:
    """Of two examples of seven positions."""
    sizes = (2, h, 7, d), (2, g, 7, d), (2, g, 7, d_v)
    return AttentionInputs(*(randn(*size, seed=seed + i) for i, size in enumerate(sizes)), 0.3 + seed, window)


#: Two examples padded to seven positions: targets at 1, 4 and 6 of the first, and at 2 of the second.
VIEW, COUNTS = View({"input_ids": torch.zeros(2, 7, dtype=torch.long)}, torch.tensor([1, 4, 6, 9])), [3, 1]


@pytest.mark.parametrize("windows", [(3, None), (None, 2)], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_the_targets_of_a_batch_in_their_order(rows, windows, monkeypatch):
    """The student has 4 heads on 2; the teacher 4 on 1."""
    monkeypatch.setattr(attention, "_TILE", rows * 4 * 4 * 7)
    student, teacher = inputs(4, 2, 6, 4, windows[0], seed=0), inputs(4, 1, 8, 12, windows[1], seed=5)
    found = attention.map_divergence(student, teacher, VIEW, COUNTS)
    expected = []
    for b, t in ((0, 1), (0, 4), (0, 6), (1, 2)):
        q, p = (maps(x.query[b, :, [t]].transpose(0, 1), x.key[b], x.scaling, [t], windows)[0] for x in (student, teacher))
        expected.append(np.mean([kl(b, a) for a, b in zip(q, p, strict=True)]))
    assert_close(found, torch.tensor(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("windows", [(None, None), (3, None), (None, 2)], ids=str)
def test_relations_of_queries_keys_and_values_are_added_up(windows):
    """Of 4 relation heads: the widths are 24, 12 and 8, and the teacher's 32, 8 and 12."""
    student, teacher, expected = inputs(4, 2, 6, 4, windows[0], seed=0), inputs(4, 1, 8, 12, windows[1], seed=5), []
    for b, t in ((0, 1), (0, 4), (0, 6), (1, 2)):
        first = max([0, *(t - window + 1 for window in windows if window)])
        vectors = [
            [x[b].transpose(0, 1).reshape(7, -1)[first:].numpy() for x in (one.query, one.key, one.value)] for one in (student, teacher)
        ]
        expected.append(sum(relation_kl(a, b, 4, t - first) for a, b in zip(*vectors, strict=True)))
    assert_close(attention.relation_divergence(student, teacher, VIEW, COUNTS, 4), torch.tensor(expected), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mean", [False, True])
def test_gradients_are_those_of_finite_differences(mean):
    given = randn(3, 4, 3).requires_grad_(), randn(2, 7, 3, seed=1).requires_grad_()
    teacher, sees = attention.scores(randn(3, 4, 5, seed=2), randn(1, 7, 5, seed=3), 0.4), attention.seen(torch.tensor(PLACES), 7, (4,))
    assert torch.autograd.gradcheck(lambda q, k: attention.divergence(attention.scores(q, k, 0.7), teacher, sees, mean), given)
    vectors = (randn(7, 8).requires_grad_(),)
    fixed, places = attention.relations(*[randn(7, 12, seed=1)] * 2, 4), torch.arange(7)
    assert torch.autograd.gradcheck(lambda x: attention.divergence(attention.relations(x, x, 4), fixed, attention.seen(places, 7)), vectors)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_attention_gives_zero_and_no_gradient(dtype, mean):
    query, key = (randn(*size).to(dtype).requires_grad_() for size in ((3, 4, 3), (2, 7, 3)))
    sees = attention.seen(torch.tensor(PLACES), 7)
    fixed = attention.scores(query, key, 0.7).detach()
    found = attention.divergence(attention.scores(query, key, 0.7), fixed, sees, mean)
    found.sum().backward()
    assert found.dtype == torch.float32 and not found.any() and not query.grad.any() and not key.grad.any()


def test_what_a_target_does_not_see_changes_nothing_and_gets_no_gradient():
    query, key = randn(3, 4, 3), randn(2, 7, 3, seed=1)
    fixed, sees = attention.scores(randn(3, 4, 3, seed=2), key, 1.0), attention.seen(torch.tensor([2, 3, 3]), 7, (2,))
    other = key.clone()
    other[:, [0, 4, 5, 6]] = 1e6  # the targets at 2 and 3 see 1 to 3
    key.requires_grad_()
    found = attention.divergence(attention.scores(query, key, 1.0), fixed, sees)
    found.sum().backward()
    assert torch.equal(found, attention.divergence(attention.scores(query, other, 1.0), fixed, sees))
    assert (key.grad.abs().sum((0, 2)) > 0).tolist() == [False, True, True, True, False, False, False]


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_chunks_change_nothing(rows, monkeypatch):
    monkeypatch.setattr(attention, "_TILE", rows * 64)
    x, y, whole, sizes = randn(11, 3).requires_grad_(), randn(11, seed=1), randn(3, 4, seed=2).requires_grad_(), []

    def values(x_n3, y_n, whole):
        sizes.append(len(x_n3))
        return (x_n3 @ whole).logsumexp(-1) * y_n

    found = attention.in_chunks(values, (x, y), 64, whole)
    assert max(sizes) == min(rows, 11) and sum(sizes) == 11
    gradients = torch.autograd.grad((found * randn(11, seed=3)).sum(), (x, whole))
    assert sum(sizes) == 22  # once more in the backward pass
    expected = (x @ whole).logsumexp(-1) * y
    assert_close(found, expected, rtol=1e-14, atol=1e-14)
    for a, b in zip(gradients, torch.autograd.grad((expected * randn(11, seed=3)).sum(), (x, whole)), strict=True):
        assert_close(a, b, rtol=1e-13, atol=1e-13)
