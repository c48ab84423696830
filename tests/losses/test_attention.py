"""Divergences of attention maps and of relations against numpy, written out in loops, in float64."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llmkd.batch import Batch, Example, PackedLayout, View
from llmkd.losses import attention
from llmkd.losses.attention_groups import Group, grouped
from llmkd.losses.terms import StudentOutputs
from llmkd.signals import AttentionInputs, Dense

PLACES = [1, 4, 6]  # of the targets, among seven positions


def randn(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def maps(query, key, scaling, places, windows, softcap=None) -> list[list[np.ndarray]]:
    """For each target and head the probabilities of the positions that it sees: query [n, h, d], key [g, m, d]."""
    query, key, out = query.detach().numpy(), key.detach().numpy(), []
    for i, t in enumerate(places):
        sees = [j for j in range(key.shape[1]) if j <= t and all(window is None or t - j < window for window in windows)]
        per = query.shape[1] // key.shape[0]
        scores = [np.array([scaling * query[i, a] @ key[a // per, j] for j in sees]) for a in range(query.shape[1])]
        out.append([softmax(x if softcap is None else softcap * np.tanh(x / softcap)) for x in scores])
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
    made = [attention.scores(query[None], key.transpose(0, 1)[None], scaling) for query, key, scaling in (student, teacher)]
    found, slope = attention.divergence(*made, group(PLACES).sees(windows), mean)
    expected = []
    for q, p in zip(maps(*student, PLACES, windows), maps(*teacher, PLACES, windows), strict=True):
        if mean:
            q, p = [np.mean(q, 0)], [np.mean(p, 0)]
        expected.append(np.mean([kl(b, a) for a, b in zip(q, p, strict=True)]))
    assert_close(found, torch.tensor([expected]), rtol=1e-12, atol=1e-14)
    assert slope.shape == (1, 4, 3, 7) and slope.sum(-1).abs().max() < 1e-15


def group(places: list[int], m: int = 7) -> Group:
    return Group(
        torch.arange(len(places))[None], torch.ones(1, len(places), dtype=torch.bool), torch.tensor([places]), torch.arange(m)[None]
    )


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


def inputs(h: int, g: int, d: int, d_v: int, window: int | None, seed: int) -> AttentionInputs:
    """Of two examples of seven positions."""
    sizes = (2, h, 7, d), (2, g, 7, d), (2, g, 7, d_v)
    return AttentionInputs(*(randn(*size, seed=seed + i) for i, size in enumerate(sizes)), 0.3 + seed, window)


#: Two examples padded to seven positions: targets at 1, 4 and 6 of the first, and at 2 of the second.
VIEW, COUNTS = View({"input_ids": torch.zeros(2, 7, dtype=torch.long)}, torch.tensor([1, 4, 6, 9])), [3, 1]


def expected_maps(student: AttentionInputs, teacher: AttentionInputs, mean: bool = False) -> torch.Tensor:
    windows, found = (student.window, teacher.window), []
    for b, t in ((0, 1), (0, 4), (0, 6), (1, 2)):
        q, p = (maps(x.query[b, :, [t]].transpose(0, 1), x.key[b], x.scaling, [t], windows, x.softcap)[0] for x in (student, teacher))
        q, p = ([np.mean(q, 0)], [np.mean(p, 0)]) if mean else (q, p)
        found.append(np.mean([kl(b, a) for a, b in zip(q, p, strict=True)]))
    return torch.tensor(found)


def expected_relations(student: AttentionInputs, teacher: AttentionInputs, heads: int) -> torch.Tensor:
    found = []
    for b, t in ((0, 1), (0, 4), (0, 6), (1, 2)):
        first = max([0, *(t - window + 1 for window in (student.window, teacher.window) if window)])
        vectors = [
            [x[b].detach().transpose(0, 1).reshape(7, -1)[first:].numpy() for x in (one.query, one.key, one.value)]
            for one in (student, teacher)
        ]
        found.append(sum(relation_kl(a, b, heads, t - first) for a, b in zip(*vectors, strict=True)))
    return torch.tensor(found)


@pytest.mark.parametrize("windows", [(None, None), (3, None), (None, 2)], ids=str)
@pytest.mark.parametrize("tile", [1, 400, 10**6])
@pytest.mark.parametrize("mean", [False, True])
def test_maps_of_the_targets_of_a_batch_in_their_order(tile, windows, mean):
    """The student has 4 heads on 2; the teacher 4 on 1, or for the mean 6 on 3."""
    student, teacher = inputs(4, 2, 6, 4, windows[0], seed=0), inputs(6 if mean else 4, 3 if mean else 1, 8, 12, windows[1], seed=5)
    _, found = attention.map_divergence(student, teacher, VIEW, COUNTS, mean, tile=tile)
    assert_close(found, expected_maps(student, teacher, mean), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("windows", [(None, None), (3, None), (None, 2)], ids=str)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relations_of_queries_keys_and_values_are_added_up(heads, windows):
    """The widths are 24, 12 and 8, and the teacher's 32, 8 and 12."""
    student, teacher = inputs(4, 2, 6, 4, windows[0], seed=0), inputs(4, 1, 8, 12, windows[1], seed=5)
    _, found = attention.relation_divergence(student, teacher, VIEW, COUNTS, heads)
    assert_close(found, expected_relations(student, teacher, heads), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("caps", [(1.5, None), (None, 0.5), (2.0, 3.0)], ids=str)
@pytest.mark.parametrize("mean", [False, True])
def test_soft_caps_of_either_model(mean, caps):
    student, teacher = (
        replace(inputs(4, 2, 6, 4, window, seed=seed), softcap=cap) for window, seed, cap in zip((3, None), (0, 5), caps, strict=True)
    )
    _, found = attention.map_divergence(student, teacher, VIEW, COUNTS, mean)
    assert_close(found, expected_maps(student, teacher, mean), rtol=1e-12, atol=1e-14)
    assert (
        found - attention.map_divergence(*(replace(x, softcap=None) for x in (student, teacher)), VIEW, COUNTS, mean)[1]
    ).abs().max() > 0.01


WAYS = {
    "maps": functools.partial(attention.map_divergence, mean=False),
    "mean maps": functools.partial(attention.map_divergence, mean=True),
    "relations": functools.partial(attention.relation_divergence, heads=2),
}
WAY = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@WAY
@pytest.mark.parametrize("tile", [1, 10**6])
def test_weights_multiply_values_and_gradients_which_are_those_of_finite_differences(way, tile):
    weight_N = torch.tensor([0.5, 0.0, -2.0, 3.0], dtype=torch.float64)
    student, teacher = replace(inputs(4, 2, 6, 4, 4, seed=0), softcap=1.5), inputs(4, 1, 8, 12, None, seed=5)
    given = [x.requires_grad_() for x in (student.query, student.key, student.value)]

    def total(*given, weight_N=weight_N):
        return way(AttentionInputs(*given, student.scaling, student.window, 1.5), teacher, VIEW, COUNTS, weight_N=weight_N, tile=tile)[0]

    assert torch.autograd.gradcheck(total, given, fast_mode=True)
    value, rows = way(student, teacher, VIEW, COUNTS, weight_N=weight_N, tile=tile)
    assert_close(rows, way(student, teacher, VIEW, COUNTS)[1] * weight_N, rtol=1e-14, atol=0)
    assert not rows.requires_grad
    assert_close(value, rows.sum(), rtol=1e-14, atol=0)
    ones = torch.autograd.grad(total(*given, weight_N=torch.ones(4)), given, allow_unused=True)
    for a, b in zip(ones, torch.autograd.grad(total(*given, weight_N=None), given, allow_unused=True), strict=True):
        assert a is b is None or torch.equal(a, b)


@WAY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_attention_gives_zero_and_no_gradient(dtype, way):
    one = inputs(4, 2, 6, 4, None, seed=0).each(lambda x: x.to(dtype))
    own = one.each(lambda x: x.clone().requires_grad_())
    total, rows = way(own, one, VIEW, COUNTS)
    total.backward()
    assert rows.dtype == total.dtype == torch.float32 and not rows.any()
    for x in (own.query, own.key):
        assert x.grad.dtype == dtype and not x.grad.any()


@WAY
def test_half_precision_is_computed_in_float32_and_its_gradients_are_rounded_alone(way):
    student, teacher = (inputs(4, 2, 6, 4, None, seed=seed).each(lambda x: x.bfloat16()) for seed in (0, 5))
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        own = student.each(lambda x, dtype=dtype: x.detach().to(dtype).requires_grad_())
        total, rows = way(own, teacher.each(lambda x, dtype=dtype: x.to(dtype)), VIEW, COUNTS)
        (total / 7).backward()
        found.append((rows, own.query.grad, own.key.grad))
    for x, (a, b) in enumerate(zip(*found, strict=True)):
        assert_close(a.double(), b, rtol=2**-7 if x else 1e-6, atol=1e-4 if x else 1e-6)


@WAY
def test_what_a_target_does_not_see_changes_nothing_and_gets_no_gradient(way):
    """The first example's targets are at 1, 4 and 6 and see two positions each; the second's is at 2."""
    student, teacher = inputs(4, 2, 6, 4, 2, seed=0), inputs(4, 2, 8, 12, None, seed=5)
    rows, unseen = way(student, teacher, VIEW, COUNTS)[1], [(0, 2), (1, 0), (1, 3), (1, 4), (1, 5), (1, 6)]
    for x in (student.query, student.key, student.value, teacher.key, teacher.value):
        for b, t in unseen:
            x[b, :, t] = 1e6
    for x in (student.query, student.key, student.value):
        x.requires_grad_()
    total, other = way(student, teacher, VIEW, COUNTS)
    assert torch.equal(other, rows)
    total.backward()
    moved = {(b, t) for b in range(2) for t in range(7)} - set(unseen)
    assert {(b, t) for b in range(2) for t in range(7) if student.key.grad[b, :, t].any()} == moved


def test_without_a_gradient_none_is_computed(monkeypatch):
    monkeypatch.setattr(attention, "backward", None)
    student, teacher = inputs(4, 2, 6, 4, None, seed=0), inputs(4, 1, 8, 12, None, seed=5)
    for x in (student.query, student.key, student.value):
        x.requires_grad_()
    with torch.no_grad():
        assert not attention.map_divergence(student, teacher, VIEW, COUNTS)[0].requires_grad
    with pytest.raises(TypeError):
        attention.map_divergence(student, teacher, VIEW, COUNTS)


LAYOUTS = {
    "apart": View({"input_ids": torch.zeros(5, 8, dtype=torch.long)}, torch.tensor([3, 6, 8, 9, 10, 11, 12, 31, 39])),
    "packed": View({"input_ids": torch.zeros(1, 19, dtype=torch.long)}, torch.arange(19), PackedLayout.of([8, 1, 2, 7, 1])),
    "shared": View(
        {"input_ids": torch.zeros(1, 19, dtype=torch.long)},
        torch.tensor([6, 7, 8, 11, 12, 18]),
        PackedLayout.of([6, 3, 4, 5, 1], [-1, 0, 0, -1, 0], [-1, 0, 1, 2, 3]),
    ),
}
TARGETS = {"apart": [2, 5, 0, 1, 1], "packed": [8, 1, 2, 7, 1], "shared": [3, 2, 0, 1]}
#: Of each example the flattened positions of its tokens.
OWN = {
    "apart": [[*range(8 * b, 8 * b + 8)] for b in range(5)],
    "packed": [[*range(8)], [8], [9, 10], [*range(11, 18)], [18]],
    "shared": [[*range(9)], [*range(6), *range(9, 13)], [*range(13, 18)], [*range(6), 18]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("most", [1, 7, 8, 30, 10**6])
def test_groups_hold_every_target_once_with_its_own_positions(layout, most):
    view, counts, found = LAYOUTS[layout], TARGETS[layout], {}
    examples = [e for e, n in enumerate(counts) for _ in range(n)]
    groups = grouped(view, counts, most)
    for one in groups:
        (b, n), m = one.target_bn.shape, one.position_bm.shape[1]
        assert b * n * m <= most or b * n == 1
        assert one.real_bn.shape == one.place_bn.shape == (b, n) and one.real_bn[:, 0].all()
        for i, j in one.real_bn.nonzero().tolist():
            target, place = int(one.target_bn[i, j]), int(one.place_bn[i, j])
            own = OWN[layout][examples[target]]
            assert one.position_bm[i].tolist() == own + own[-1:] * (m - len(own))
            assert own[place] == view.rows_N[target] and target not in found
            found[target] = place
    assert sorted(found) == list(range(sum(counts)))
    assert len(groups) == 1 if most == 10**6 else most > 1 or len(groups) == sum(counts)


def test_groups_are_padded_by_half_at_most():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 400, 60)
    view = View(
        {"input_ids": torch.zeros(1, int(lengths.sum()), dtype=torch.long)}, torch.arange(lengths.sum()), PackedLayout.of(lengths.tolist())
    )
    groups = grouped(view, lengths.tolist(), 10**6)
    assert sum(one.target_bn.numel() * one.position_bm.shape[1] for one in groups) < 1.5 * (lengths**2).sum() + len(groups) * 10**6 / 16
    assert len(groups) < 15


@pytest.mark.parametrize("heads", [None, 4])
def test_only_targets_that_count_are_compared(heads, monkeypatch):
    """Some are not kept, some have no weight; of an example none may be left, and of a batch neither."""
    student, teacher = inputs(4, 2, 6, 4, 3, seed=0), inputs(4, 1, 8, 12, None, seed=5)
    whole = expected_relations(student, teacher, 4) if heads else expected_maps(student, teacher)
    student.query.requires_grad_()
    outputs = StudentOutputs(torch.zeros(4, 3, dtype=torch.float64), None, {}, {1: student})
    term, labels, seen = attention.AttentionTerm(0.7, [(1, 2)], relation_heads=heads), torch.arange(4), []
    real = attention.grouped
    monkeypatch.setattr(attention, "grouped", lambda view, counts, *most: seen.append(counts) or real(view, counts, *most))

    def batch(**weights):
        return Batch(labels, labels, VIEW, VIEW, (Example("", 3, -1), Example("", 1, -1)), weights)

    w = torch.tensor([0.0, 2.0, -1.0, 1.0])
    for one, expected, counts in (
        (batch(attention=w), whole * w, [2, 1]),
        (batch(attention=w).keeping(torch.tensor([0, 1])), whole * torch.tensor([0, 2, 0, 0]), [1, 0]),
        (batch().keeping(torch.tensor([0, 3])), whole * torch.tensor([1, 0, 0, 1]), [1, 1]),
        (batch(attention=w).keeping(torch.tensor([0])), 0 * whole, [0, 0]),
        (batch(), whole, [3, 1]),
    ):
        student.query.grad = None
        loss = term(outputs, Dense(None, None, {}, {2: teacher}), one)
        assert_close(loss.rows["attention"], expected, rtol=1e-11, atol=1e-14)
        assert loss.total.item() == pytest.approx(0.7 * expected.sum().item(), rel=1e-11) and seen[-1] == counts
        loss.total.backward()
        if not heads:
            assert student.query.grad.abs().sum((1, 3)).flatten().nonzero().flatten().tolist() == VIEW.rows_N[expected != 0].tolist()


def test_a_long_example_is_parted_into_groups_of_64_targets_if_these_are_not_too_large():
    view = View({"input_ids": torch.zeros(1, 1000, dtype=torch.long)}, torch.arange(800))
    for most, long, sizes in ((5000, 0, [5] * 160), (5000, 10**5, [64] * 12 + [32]), (5000, 40_000, [40] * 20), (10**5, 10**5, [100] * 8)):
        assert [one.target_bn.shape[1] for one in grouped(view, [800], most, long)] == sorted(sizes)


@pytest.mark.parametrize(
    "dtypes", [("float32", "float64"), ("bfloat16", "float64"), ("float64", "float32"), ("float32", "bfloat16")], ids=str
)
@WAY
def test_a_teacher_may_have_another_type_than_the_student(way, dtypes):
    student, teacher = (
        inputs(4, 2, 6, 4, None, seed=seed).each(lambda x, dtype=dtype: x.to(getattr(torch, dtype)).requires_grad_())
        for seed, dtype in zip((0, 5), dtypes, strict=True)
    )
    total, rows = way(student, teacher.each(torch.detach), VIEW, COUNTS)
    total.backward()
    wide = [one.each(lambda x: x.detach().double()) for one in (student, teacher)]
    assert_close(rows.double(), way(*wide, VIEW, COUNTS)[1], rtol=1e-5, atol=1e-6)
    assert rows.dtype == (torch.float64 if dtypes[0] == "float64" else torch.float32) and student.key.grad.dtype == student.key.dtype


def test_an_example_of_many_targets_does_not_pad_those_of_few():
    view = View({"input_ids": torch.zeros(21, 400, dtype=torch.long)}, torch.arange(320))
    assert sorted(one.target_bn.shape for one in grouped(view, [*[1] * 10, 300, *[1] * 10], 10**7)) == [(1, 300), (20, 1)]
