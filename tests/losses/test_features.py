"""Hidden states against a teacher's: distances, the linear map's start and the term, each against formulas in numpy, float64."""

import numpy as np
import pytest
import torch

from llmkd.batch import Batch, View
from llmkd.head import Head
from llmkd.losses.features import DISTANCES, FeatureTerm, Spread
from llmkd.losses.least_squares import LeastSquares
from llmkd.losses.terms import StudentOutputs
from llmkd.signals import Dense, Taps

PAIRS, WIDTHS, N = ((1, 2), (0, 3)), ((4, 6), (4, 5)), 7


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def plain_distance(name: str, a: np.ndarray, b: np.ndarray) -> float:
    """Of two vectors, element by element."""
    if name == "mse":
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / len(a)
    size_a, size_b = (sum(x * x for x in v) ** 0.5 for v in (a, b))
    if name == "cosine":
        return 1 - sum(x * y for x, y in zip(a, b, strict=True)) / size_a / size_b
    return sum((x / size_a - y / size_b) ** 2 for x, y in zip(a, b, strict=True))


def plain_slope(name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the distance with respect to a."""
    if name == "mse":
        return 2 * (a - b) / len(a)
    size_a, size_b = np.sqrt(a @ a), np.sqrt(b @ b)
    return (1 if name == "cosine" else 2) * (a * (a @ b) / size_a**3 / size_b - b / size_a / size_b)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_is_that_of_each_row_alone(name):
    a, b = numbers(N, 5), numbers(N, 5, seed=1)
    expected = [plain_distance(name, x, y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(DISTANCES[name](torch.tensor(a), torch.tensor(b)), expected, rtol=1e-12)
    half = DISTANCES[name](torch.tensor(a).bfloat16(), torch.tensor(b).bfloat16())
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half, DISTANCES[name](torch.tensor(a).bfloat16().double(), torch.tensor(b).bfloat16().double()), rtol=1e-5)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("mapped", [True, False])
def test_the_same_states_are_no_loss_and_have_no_gradient(name, mapped):
    states = torch.tensor(numbers(N, 4)).requires_grad_()
    options = {"init": "identity"} if mapped else {"projection": "none"}
    term = FeatureTerm([(1, 1)], [(4, 4)], 1.0, name, **options, dtype=torch.float64)
    outputs, signal = StudentOutputs(states, None, {1: states}), Dense(None, None, {1: states.detach()})
    loss = term(outputs, signal, batch(N))
    loss.total.backward()
    assert (loss.rows["features"] == 0).all() and (states.grad == 0).all()
    assert [name for name, p in term.named_parameters() if p.grad is None or p.grad.any()] == []


def batch(targets: int, **weights) -> Batch:
    view, labels_N = View({}, torch.arange(targets)), torch.arange(targets)
    return Batch(labels_N, labels_N, view, view, (), {name: torch.tensor(w) for name, w in weights.items()})


def case(name: str, projection: str = "linear") -> tuple[FeatureTerm, dict, dict]:
    widths = WIDTHS if projection == "linear" else ((4, 4), (4, 4))
    term = FeatureTerm(PAIRS, widths, 0.7, name, projection, dtype=torch.float64, seed=3)
    term.scales.copy_(torch.tensor([0.5, 3.0]))
    for n, one in enumerate(term.maps or ()):
        one.bias.data.copy_(torch.tensor(numbers(one.out_features, seed=20 + n)))
    ours = {s: torch.tensor(numbers(N, d, seed=s)).requires_grad_() for (s, _), (d, _) in zip(PAIRS, widths, strict=True)}
    theirs = {t: torch.tensor(numbers(N, e, seed=10 + t)) for (_, t), (_, e) in zip(PAIRS, widths, strict=True)}
    return term, ours, theirs


@pytest.mark.parametrize("projection", ["linear", "none"])
@pytest.mark.parametrize("name", DISTANCES)
def test_the_term_and_its_gradients_are_the_formulas(name, projection):
    """Weight times the sum over targets of the mean over pairs of D(R h_S, h_T) / scale; slopes of states, weights and biases by hand."""
    term, ours, theirs = case(name, projection)
    head = Head(torch.nn.Linear(4, 9, dtype=torch.float64), 9)
    loss = term(StudentOutputs(torch.zeros(N, 4), head, ours), Dense(torch.zeros(N, 4), head, theirs), batch(N))
    loss.total.backward()
    rows = np.zeros(N)
    for n, ((s, t), scale) in enumerate(zip(PAIRS, (0.5, 3.0), strict=True)):
        x, y = ours[s].detach().numpy(), theirs[t].numpy()
        W, b = (p.detach().numpy() for p in term.maps[n].parameters()) if projection == "linear" else (np.eye(4), np.zeros(4))
        of_x, of_W, of_b = np.zeros_like(x), np.zeros_like(W), np.zeros_like(b)
        for i in range(N):
            mapped = W @ x[i] + b
            rows[i] += plain_distance(name, mapped, y[i]) / scale / len(PAIRS)
            slope = 0.7 * plain_slope(name, mapped, y[i]) / scale / len(PAIRS)
            of_x[i], of_W, of_b = W.T @ slope, of_W + np.outer(slope, x[i]), of_b + slope
        np.testing.assert_allclose(ours[s].grad, of_x, rtol=1e-9, atol=1e-12)
        if projection == "linear":
            np.testing.assert_allclose(term.maps[n].weight.grad, of_W, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(term.maps[n].bias.grad, of_b, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(loss.rows["features"], rows, rtol=1e-12)
    assert loss.total.item() == pytest.approx(0.7 * rows.sum(), rel=1e-12) and not loss.rows["features"].requires_grad
    assert term.combine({"features": 2.0}) == 1.4
    assert (term.student_taps, term.teacher_taps) == (Taps(frozenset({0, 1})), Taps(frozenset({2, 3}))) and term.needs_teacher


def test_a_batch_without_targets_gives_every_map_a_gradient_of_zero():
    """Ranks would wait for one that is missing."""
    term, ours, theirs = case("cosine")
    loss = term(
        StudentOutputs(None, None, {k: v[:0] for k, v in ours.items()}), Dense(None, None, {k: v[:0] for k, v in theirs.items()}), batch(0)
    )
    loss.total.backward()
    assert loss.total == 0 and all(p.grad is not None and not p.grad.any() for p in term.parameters())


def test_only_targets_that_count_are_mapped_and_compared(monkeypatch):
    """Some are not kept, and some of the others have no weight."""
    term, ours, theirs = case("mse")
    W, b = term.maps[0].weight.detach().numpy(), term.maps[0].bias.detach().numpy()
    term.pairs, seen, mapped = term.pairs[:1], [], FeatureTerm.mapped
    monkeypatch.setattr(FeatureTerm, "mapped", lambda self, pair, x: seen.append(len(x)) or mapped(self, pair, x))
    w = [2.0, 1.0, 0.0, -1.0, 1.0, 0.0, 0.5]
    given = batch(N, features=w).keeping(torch.tensor([0, 2, 3, 6]))
    for one, carried in ((given, [0, 3, 6]), (batch(N, features=w), [0, 1, 3, 4, 6]), (batch(N).keeping(torch.tensor([1, 5])), [1, 5])):
        seen.clear()
        for x in ours.values():
            x.grad = None
        loss = term(StudentOutputs(None, None, ours), Dense(None, None, theirs), one)
        expected = np.zeros(N)
        for i in carried:
            distance = plain_distance("mse", W @ ours[1][i].detach().numpy() + b, theirs[2][i].numpy()) / 0.5
            expected[i] = distance * (w[i] if one.weights else 1)
        np.testing.assert_allclose(loss.rows["features"], expected, rtol=1e-12)
        assert seen == [len(carried)] and loss.total.item() == pytest.approx(0.7 * expected.sum(), rel=1e-12)
        loss.total.backward()
        assert ours[1].grad.abs().sum(1).nonzero().flatten().tolist() == carried


def test_half_precision_states_are_compared_in_float32():
    term = FeatureTerm([(1, 1)], [(4, 6)], seed=1)
    x, y = torch.tensor(numbers(N, 4)).bfloat16(), torch.tensor(numbers(N, 6)).bfloat16()
    loss = term(StudentOutputs(None, None, {1: x}), Dense(None, None, {1: y}), batch(N))
    W = term.maps[0].weight.detach().double().numpy()
    expected = [plain_distance("mse", W @ a, b) for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True)]
    np.testing.assert_allclose(loss.rows["features"].numpy(), expected, rtol=1e-5)


def test_maps_start_as_they_are_named():
    one, same, other = (FeatureTerm(PAIRS, WIDTHS, seed=seed) for seed in (1, 1, 2))
    for n, (d, e) in enumerate(WIDTHS):
        weight = one.maps[n].weight
        assert torch.equal(weight, same.maps[n].weight) and not torch.equal(weight, other.maps[n].weight)
        assert weight.abs().max() <= (6 / (d + e)) ** 0.5 and not one.maps[n].bias.any(), "Glorot and Bengio 2010, equation 16"
    assert not torch.equal(one.maps[0].weight[:4, :4], one.maps[1].weight[:4, :4])
    assert torch.equal(FeatureTerm([(1, 1)], [(4, 4)], init="identity").maps[0].weight, torch.eye(4))


def solved(x: np.ndarray, y: np.ndarray, batch: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """The map of states that are added in ragged batches, of which one is empty."""
    fit = LeastSquares(x.shape[1], y.shape[1])
    for rows in (slice(0, 0), *(slice(start, start + batch) for start in range(0, len(x), batch))):
        fit.add(torch.tensor(x[rows]), torch.tensor(y[rows]))
    return fit.map()


@pytest.mark.parametrize("size, offset", [(1.0, 0.0), (1e4, 0.0), (1.0, 1e6)])
def test_least_squares_are_numpys(size, offset):
    """With one dimension thousands of times the others, far from 0, and one that is always the same."""
    x, noise = numbers(60, 5), numbers(60, 3, seed=1)
    x[:, 2], x[:, 4] = size * x[:, 2] + offset, 7.0
    y = x[:, :4] @ numbers(4, 3, seed=2) + noise + 5
    W, b = solved(x, y)
    A = np.concatenate([x - [0, 0, offset, 0, 0], np.ones((60, 1))], 1)
    solution, *_ = np.linalg.lstsq(A, y, rcond=None)
    found = x @ W.numpy().T + b.numpy()
    np.testing.assert_allclose(found, A @ solution, rtol=1e-8, atol=1e-8 * np.abs(y).max())
    np.testing.assert_allclose(W.numpy()[:, :4], solution[:4].T, rtol=1e-8)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e7])
def test_least_squares_of_dimensions_that_are_nearly_one(condition):
    """Mapped states are numpy's up to the square of the condition number; past 1e5 the direction is left out, and little is lost."""
    x, y = numbers(400, 6), numbers(400, 3, seed=1)
    x[:, 5] = x[:, 0] + x[:, 5] / condition
    W, b = solved(x, y, 64)
    A = np.concatenate([x, np.ones((400, 1))], 1)
    best, found = A @ np.linalg.lstsq(A, y, rcond=None)[0], x @ W.numpy().T + b.numpy()
    if condition < 1e5:
        np.testing.assert_allclose(found, best, rtol=0, atol=100 * condition**2 * 1e-16 * np.abs(y).max())
    assert np.square(found - y).sum() <= np.square(best - y).sum() * (1 + 2 / 400)
    assert np.abs(W.numpy()).max() < 10 * condition


def test_a_spread_is_the_mean_distance_from_the_mean():
    y = numbers(40, 3, seed=1) * np.array([1.0, 2.0, 9.0]) + 4
    for name, distance in DISTANCES.items():
        each = [plain_distance(name, y.mean(0), one) for one in y]
        found, still = Spread(distance), Spread(distance)
        for start in range(0, 40, 9):
            found.add(torch.tensor(y[start : start + 9]).float() if start else torch.tensor(y[:9]))
            still.add(torch.full((9, 3), 0.1))
        assert found.value == pytest.approx(np.mean(each), rel=1e-6) and still.value == 0, name
