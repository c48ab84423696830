"""Targets of several divergences in one batch: each row is that of its own source, in float64 by loops; and what is divided how."""

import math

import pytest
import torch

from llmkd.batch import Batch, Example, View
from llmkd.head import Head
from llmkd.losses import fused
from llmkd.losses.divergences import make_divergence
from llmkd.losses.objective import Objective
from llmkd.losses.rows import Divergences, Part
from llmkd.losses.terms import HeadTerm, StudentOutputs
from llmkd.signals import Dense
from tests.losses.test_weights import CE, H_T, KD, H, N, V, linear, randn, softmax, weights

COUNTS, SOURCES = (2, 3, 1, 4, 1), (1, 0, 2, 1, 0)  # N = 11 targets
OF_TARGET = [source for source, n in zip(SOURCES, COUNTS, strict=True) for _ in range(n)]
RATIO, T, ALPHA = 0.6, 2.0, 0.2


def distance(source: int, p: list[float], q: list[float]) -> float:
    """Forward KL; KL(p || alpha p + (1 - alpha) q); KL(q || alpha q + (1 - alpha) p): Ko et al. 2024."""
    a, b = (q, p) if source == 2 else (p, q)
    m = b if source == 0 else [ALPHA * x + (1 - ALPHA) * y for x, y in zip(a, b, strict=True)]
    return sum(x * math.log(x / y) for x, y in zip(a, m, strict=True))


def by_loops(hidden, head, labels, teacher, teacher_head, ce, kd):
    total, rows = 0.0, {"ce": [], "kd": []}
    for i in range(len(hidden)):
        z = [float(hidden[i] @ row) for row in head]
        y = [float(teacher[i] @ row) for row in teacher_head]
        q, p = softmax([v / T for v in z]), softmax([v / T for v in y])
        rows["ce"].append(ce[i] * -math.log(softmax(z)[labels[i]]))
        rows["kd"].append(kd[i] * T * T * distance(OF_TARGET[i], p, q))
        total += (1 - RATIO) * rows["ce"][-1] + RATIO * rows["kd"][-1]
    return total, rows


def batch(labels, given=None) -> Batch:
    view = View({}, torch.arange(N))
    examples = tuple(Example("", n, -1, source) for n, source in zip(COUNTS, SOURCES, strict=True))
    return Batch(labels, torch.zeros(N), view, view, examples, given or {})


def term(chunk: int | None = None) -> HeadTerm:
    others = {1: make_divergence("skewed_forward_kl", alpha=ALPHA), 2: make_divergence("skewed_reverse_kl", alpha=ALPHA)}
    return HeadTerm(Objective(RATIO, T, make_divergence("forward_kl")), chunk, by_source=others)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_every_row_has_the_divergence_of_its_source(chunk, given):
    hidden, labels, project = randn(N, H).requires_grad_(), torch.arange(N) * 5 % V, linear(H, 1)
    project.weight.requires_grad_(False)
    signal = Dense(randn(N, H_T, seed=2), Head(linear(H_T, 3), V))
    ce, kd = (CE, KD) if given else ([1.0] * N, [1.0] * N)
    found = term(chunk)(StudentOutputs(hidden, Head(project, V)), signal, batch(labels, weights(ce=CE, kd=KD) if given else None))
    fixed = project.weight.numpy(), labels.tolist(), signal.hidden_NH.numpy(), signal.head.project.weight.detach().numpy(), ce, kd
    total, rows = by_loops(hidden.detach().numpy(), *fixed)
    assert found.total.item() == pytest.approx(total, rel=1e-10)
    for name, values in rows.items():
        assert found.rows[name].tolist() == pytest.approx(values, rel=1e-10, abs=1e-12), name
    found.total.backward()
    for i in range(N):
        for k in (0, H - 1):
            moved = [hidden.detach().numpy().copy() for _ in range(2)]
            moved[0][i, k] += 1e-5
            moved[1][i, k] -= 1e-5
            slope = (by_loops(moved[0], *fixed)[0] - by_loops(moved[1], *fixed)[0]) / 2e-5
            assert hidden.grad[i, k].item() == pytest.approx(slope, rel=1e-5, abs=1e-5 * max(1.0, abs(total) / N))


def test_a_signal_that_is_no_whole_distribution_is_asked_for_each_divergence_at_its_own_rows():
    asked = []

    class Sparse:
        full_distribution = False

        def divergence(self, divergence, rows, log_q_nV, temperature=1.0):
            places = torch.arange(N)[rows].tolist()
            asked.append((getattr(divergence, "func", divergence).__name__, places))
            return (log_q_nV * log_q_nV.new_tensor(places)[:, None]).sum(-1)

    hidden = randn(N, H).requires_grad_()
    term(4)(StudentOutputs(hidden, Head(linear(H, 1), V)), Sparse(), batch(torch.arange(N) % V))
    names = ("forward_kl", "skewed_forward_kl", "skewed_reverse_kl")
    for source, name in enumerate(names):
        assert [i for one, places in asked for i in places if one == name] == [i for i in range(N) if OF_TARGET[i] == source]


def test_the_backend_is_chosen_for_each_divergence(monkeypatch):
    seen, real = [], fused._choose_backend
    monkeypatch.setattr(fused, "_choose_backend", lambda objective, *rest: seen.append(objective.divergence) or real(objective, *rest))
    signal = Dense(randn(N, H_T, seed=2), Head(linear(H_T, 3), V))
    term(100)(StudentOutputs(randn(N, H).requires_grad_(), Head(linear(H, 1), V)), signal, batch(torch.arange(N) % V))
    assert len(seen) == len(set(map(str, seen))) == 3, "a kernel may have one of them and not the other"


def test_without_a_teacher_and_without_other_divergences_nothing_is_parted(monkeypatch):
    parts = []
    real = fused._Fused.apply
    monkeypatch.setattr(fused._Fused, "apply", lambda *args: parts.append(args[5]) or real(*args))
    outputs, plain = StudentOutputs(randn(N, H).requires_grad_(), Head(linear(H, 1), V)), batch(torch.arange(N) % V)
    signal = Dense(randn(N, H_T, seed=2), Head(linear(H_T, 3), V))
    term()(outputs, None, plain)
    HeadTerm(Objective(RATIO, T))(outputs, signal, plain)
    assert [[(one.rows, one.divergence) for one in each] for each in parts] == [[(slice(0, N), None)]] * 2


def test_rows_that_are_chosen_are_parted_by_their_own_numbers():
    kind = torch.tensor([0, 1, 0, 1, 1])
    chosen = Part(torch.tensor([4, 3, 2]), object(), {"kd": torch.tensor([40.0, 30.0, 20.0])})
    one, two = Divergences([None, "other"], kind).split(chosen, torch.device("cpu"))
    assert (one.rows.tolist(), one.weights["kd"].tolist(), one.divergence) == ([2], [20.0], None)
    assert (two.rows.tolist(), two.weights["kd"].tolist(), two.divergence) == ([4, 3], [40.0, 30.0], "other")
    (alone,) = Divergences([None, "other"], kind).split(Part(slice(3, 5), object()), torch.device("cpu"))
    assert (alone.rows, alone.divergence) == (slice(3, 5), "other")
    (none,) = Divergences([None, "other"], kind).split(Part(slice(0, 5), None), torch.device("cpu"))
    assert none.divergence is None
    first, other = Divergences([None, "other"], kind).split(Part(slice(1, 5), object()), torch.device("cpu"))
    assert (first.rows, other.rows.tolist()) == (slice(2, 3), [1, 3, 4]), "counted from the batch's first target"
