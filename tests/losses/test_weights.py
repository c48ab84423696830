"""Target weights in the fused head: sums written out as loops in float64, rows that are not computed, and terms that are not finite."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmkd.batch import Batch, View, zeros_of
from llmkd.head import Head
from llmkd.losses.divergences import make_divergence
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.losses.terms import HeadTerm, StudentOutputs
from llmkd.signals import Dense
from tests.losses.test_counts import H_T as TEACHER_WIDTH
from tests.losses.test_counts import Audit
from tests.losses.test_counts import H as WIDTH
from tests.losses.test_counts import V as WIDE

N, H, H_T, V = 11, 5, 7, 13
CE = [0.0, 1.0, -2.0, 0.0, 3e4, 0.25, 1.0, 0.0, 1.0, -0.5, 0.0]
KD = [1.0, 0.0, 0.5, 0.0, 1.0, -3.0, 0.0, 2e4, 1.0, 1.0, 0.0]  # rows 3 and 10 have no weight at all


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(width, seed, rows=V):
    project = nn.Linear(width, rows, bias=False, dtype=torch.float64)
    project.weight.data.copy_(0.7 * randn(rows, width, seed=seed))
    return project


def weights(**given):
    return {name: torch.tensor(values, dtype=torch.float32) for name, values in given.items()}


def softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def by_loops(hidden, head, labels, teacher_hidden, teacher_head, ratio, T, ce, kd, reverse):
    """The sum, the weighted terms of each row, and the gradient of the hidden states, one number at a time."""
    hidden, head, teacher_hidden, teacher_head = (x.detach().numpy() for x in (hidden, head, teacher_hidden, teacher_head))
    total, rows, grad = 0.0, {"ce": [], "kd": []}, np.zeros(hidden.shape)
    for i in range(len(hidden)):
        z = [sum(h * w for h, w in zip(hidden[i], row, strict=True)) for row in head]
        y = [sum(h * w for h, w in zip(teacher_hidden[i], row, strict=True)) for row in teacher_head]
        hard, q, p = softmax(z), softmax([v / T for v in z]), softmax([v / T for v in y])
        a, b = (q, p) if reverse else (p, q)
        cross, distance = -math.log(hard[labels[i]]), T * T * sum(x * math.log(x / o) for x, o in zip(a, b, strict=True))
        rows["ce"].append(ce[i] * cross)
        rows["kd"].append(kd[i] * distance)
        total += (1 - ratio) * ce[i] * cross + ratio * kd[i] * distance
        for j in range(len(z)):
            slope = (1 - ratio) * ce[i] * (hard[j] - (j == labels[i]))
            of_kd = q[j] * (math.log(q[j] / p[j]) - distance / T**2) if reverse else q[j] - p[j]
            grad[i] += (slope + ratio * kd[i] * T * of_kd) * head[j]
    return total, rows, grad


def case():
    return randn(N, H).requires_grad_(), torch.arange(N) * 5 % V, linear(H, 1), Dense(randn(N, H_T, seed=2), Head(linear(H_T, 3), V))


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("chunk", [3, 100])
@pytest.mark.parametrize(
    "divergence, T, ratio", [("forward_kl", 1.0, 0.3), ("forward_kl", 2.0, 0.7), ("reverse_kl", 2.0, 0.3), ("forward_kl", 1.0, 1.0)]
)
def test_sums_are_those_of_loops(divergence, T, ratio, chunk, train_head):
    hidden, labels, project, signal = case()
    project.requires_grad_(train_head)
    given, objective = weights(ce=CE, kd=KD), Objective(ratio, T, make_divergence(divergence))
    total, rows = fused_loss(hidden, Head(project, V), labels, objective, signal, chunk, given)
    teacher = signal.hidden_NH, signal.head.project.weight
    expected = by_loops(hidden, project.weight, labels.tolist(), *teacher, ratio, T, CE, KD, divergence == "reverse_kl")
    assert total.item() == pytest.approx(expected[0], rel=1e-10)
    for name, values in expected[1].items():
        assert rows[name].tolist() == pytest.approx(values, rel=1e-10, abs=1e-12), name
    total.backward()
    np.testing.assert_allclose(hidden.grad.numpy(), expected[2], rtol=1e-9, atol=1e-9 * np.abs(expected[2]).max())
    if train_head:  # d total / d W = the logits' gradient times the hidden states; by the chain rule the same numbers in another order
        step = 1e-6
        for j, k in ((0, 0), (7, 3)):
            moved = [project.weight.detach().clone() for _ in range(2)]
            moved[0][j, k] += step
            moved[1][j, k] -= step
            sums = [by_loops(hidden, w, labels.tolist(), *teacher, ratio, T, CE, KD, divergence == "reverse_kl")[0] for w in moved]
            assert project.weight.grad[j, k].item() == pytest.approx((sums[0] - sums[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("name", ["total_variation", "generalized_jsd", "alpha_beta"])
def test_every_row_counts_as_often_as_its_weight_says(name):
    """Also of a divergence whose gradient is autograd's, and of a signal that is no whole distribution."""

    class Sparse:
        full_distribution = False

        def __init__(self, dense):
            self.dense = dense

        def divergence(self, divergence, rows, log_q_nV, temperature=1.0):
            return self.dense.divergence(divergence, rows, log_q_nV, temperature)

    hidden, labels, project, signal = case()
    ce, kd = [0, 3, 1, 2, 0, 0, 1, 1, 4, 1, 0], [2, 1, 1, 0, 3, 0, 0, 1, 1, 1, 0]
    objective = Objective(0.4, 2.0, make_divergence(name))
    for one in (signal, Sparse(signal)):
        (weighed,) = torch.autograd.grad(
            fused_loss(hidden, Head(project, V), labels, objective, one, 4, weights(ce=list(map(float, ce)), kd=list(map(float, kd))))[0],
            hidden,
        )
        expected = torch.zeros_like(hidden)
        for part, counts in ((0, ce), (1, kd)):
            for i, count in enumerate(counts):
                row = hidden[i : i + 1].detach().requires_grad_()
                alone = Dense(signal.hidden_NH[i : i + 1], signal.head)
                values = [
                    fused_loss(row, Head(project, V), labels[i : i + 1], Objective(r, 2.0, objective.divergence), alone)[0]
                    for r in (0.0, 1.0)
                ]
                expected[i] += count * (0.6, 0.4)[part] * torch.autograd.grad(values[part], row)[0][0]
        assert_close(weighed, expected, rtol=1e-10, atol=1e-12)


def test_all_ones_are_todays_bits():
    hidden, labels, project, signal = case()
    objective, ones = Objective(0.3, 2.0), weights(ce=[1.0] * N, kd=[1.0] * N)
    plain, term = fused_loss(hidden, Head(project, V), labels, objective, signal, 4), HeadTerm(objective, 4)
    view = View({}, torch.arange(N))
    batch = Batch(labels, torch.zeros(N, dtype=torch.long), view, view, (), ones)
    assert batch.weights == {} and not batch.zeros
    loss = term(StudentOutputs(hidden, Head(project, V)), signal, batch)
    assert torch.equal(loss.total, plain[0]) and all(torch.equal(loss.rows[name], plain[1][name]) for name in plain[1])
    assert torch.equal(*(torch.autograd.grad(x, hidden)[0] for x in (plain[0], loss.total)))


def test_rows_without_a_weight_are_not_multiplied():
    """Of 40 rows 8 have no weight, and 12 only one of the labels: the teacher's head sees 20, the student's 32, forward and backward."""
    ce, kd = torch.ones(40), torch.ones(40)
    ce[:8] = kd[:8] = 0
    kd[20:32] = 0
    project = nn.Linear(WIDTH, WIDE, bias=False).requires_grad_(False)
    teacher = Dense(torch.randn(40, TEACHER_WIDTH), Head(nn.Linear(TEACHER_WIDTH, WIDE, bias=False).requires_grad_(False), WIDE))
    hidden = torch.randn(40, WIDTH).requires_grad_()
    with Audit() as audit:
        total, _ = fused_loss(hidden, Head(project, WIDE), torch.arange(40), Objective(0.5), teacher, 10, {"ce": ce, "kd": kd})
    assert audit.products == {WIDTH: 2 * 32, TEACHER_WIDTH: 20}
    total.backward()
    assert (hidden.grad[:8] == 0).all() and (hidden.grad[8:].abs().sum(1) > 0).all()
    with Audit() as audit:
        total, rows = fused_loss(hidden, Head(project, WIDE), torch.arange(40), Objective(0.5), teacher, 10, {"ce": 0 * ce, "kd": 0 * kd})
    assert not audit.products and total == 0 and (rows["ce"] == 0).all() and (rows["kd"] == 0).all()
    assert (torch.autograd.grad(total, hidden)[0] == 0).all()


def test_parts_are_put_back_in_order():
    """The rows with a teacher lie behind those without, and are more than a chunk of the first kind."""
    hidden, labels, project, signal = case()
    kd = [0.0] * 2 + [1.0] * 9
    total, rows = fused_loss(hidden, Head(project, V), labels, Objective(0.4, 2.0), signal, 100, weights(kd=kd))
    plain = fused_loss(hidden, Head(project, V), labels, Objective(0.4, 2.0), signal)[1]
    assert_close(rows["ce"], plain["ce"], rtol=1e-12, atol=0)
    assert_close(rows["kd"], plain["kd"] * torch.tensor(kd), rtol=1e-12, atol=0)
    reverse = fused_loss(hidden, Head(project, V), labels, Objective(0.4, 2.0), signal, 100, weights(kd=[1.0] * 2 + [0.0] * 9))
    assert_close(total + reverse[0] - 0.6 * plain["ce"].sum(), 0.6 * plain["ce"].sum() + 0.4 * plain["kd"].sum(), rtol=1e-12, atol=0)


def test_zeros_are_found_once_and_may_be_given():
    given = weights(ce=CE, kd=KD)
    zeros = zeros_of(given)
    assert {names: list(range(N))[rows] if isinstance(rows, slice) else rows.tolist() for names, rows in zeros.items()} == {
        (): [2, 4, 5, 8, 9],
        ("ce",): [0, 7],
        ("kd",): [1, 6],
        ("ce", "kd"): [3, 10],
    }
    assert zeros_of(weights(ce=[1.0, 2.0])) == {} and zeros_of(weights(ce=[1.0, 0.0, 0.0]))[("ce",)] == slice(1, 3)
    hidden, labels, project, signal = case()
    found = [fused_loss(hidden, Head(project, V), labels, Objective(0.3), signal, 4, given, *known)[0] for known in ((), (zeros,))]
    assert torch.equal(*found)
    view = View({}, torch.arange(N))
    moved = Batch(labels, labels, view, view, (), given).to("cpu")
    assert moved.zeros.keys() == zeros.keys() and torch.equal(moved.weights["kd"], given["kd"])


def test_an_infinite_term_without_a_weight_leaves_no_nan():
    """The student rules out the label of row 0, which has no weight for labels; the teacher rules out tokens in row 1, which has none for it."""
    hidden, labels, project, _ = case()
    hidden = hidden.detach().index_fill(0, torch.tensor([0]), 0.0).requires_grad_()
    log_p = randn(N, V, seed=4).log_softmax(-1)
    log_p[1, 3] = -math.inf

    class Known:
        full_distribution = True

        def log_probs(self, rows, log_q_nV=None, temperature=1.0):
            return log_p[rows]

    class Masked(nn.Module):
        def forward(self, x):
            return project(x).masked_fill((x == 0).all(-1, keepdim=True) & (torch.arange(V) == labels[0]), -math.inf)

    given, objective = weights(ce=[0.0] + [1.0] * 10, kd=[1.0, 0.0] + [1.0] * 9), Objective(0.5, 1.0, make_divergence("reverse_kl"))
    arguments = hidden, Head(Masked(), V), labels, objective, Known(), 4
    assert [values.isinf().nonzero().flatten().tolist() for values in fused_loss(*arguments)[1].values()] == [[0], [1]]
    total, rows = fused_loss(*arguments, given)
    assert total.isfinite() and all(values.isfinite().all() for values in rows.values())
    assert rows["ce"][0] == 0 == rows["kd"][1]
    assert torch.autograd.grad(total, hidden)[0].isfinite().all()


def test_each_term_may_be_divided_by_its_own_weights():
    """`normalized`: the loss of a step is the mean of each term over its weights, whatever the number of targets."""
    hidden, labels, project, signal = case()
    given, objective = weights(ce=[abs(w) for w in CE], kd=[abs(w) for w in KD]), Objective(0.3, 2.0)
    mass = {name: float(w.double().sum()) for name, w in given.items()}
    term = HeadTerm(objective, 4, "weights")
    term.start_step(1, {name: N / m for name, m in mass.items()})
    view = View({}, torch.arange(N))
    loss = term(StudentOutputs(hidden, Head(project, V)), signal, Batch(labels, labels, view, view, (), given))
    means = {name: loss.rows[name].sum().item() / mass[name] for name in mass}
    assert loss.total.item() / N == pytest.approx(0.7 * means["ce"] + 0.3 * means["kd"], rel=1e-12)
    of_step = term.combiner()
    term.start_step(2, {})
    assert of_step({name: loss.rows[name].sum().item() / N for name in mass}) == pytest.approx(loss.total.item() / N, rel=1e-12)
    assert term.combine({"ce": 1.0, "kd": 2.0}) == pytest.approx(0.7 + 0.3 * 2)
