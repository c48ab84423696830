"""Parts of the fused loss one by one: heads with a bias, a factor or a module round them; terms of rows; signals of one's own."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from llmkd.batch import Batch, View
from llmkd.head import Head
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.losses.terms import Loss, RowTerm
from llmkd.signals import FullDistribution


class Around(nn.Module):
    """As an adapter's layer is."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("padding", [0, 5])
def test_the_gradients_of_weight_bias_and_hidden_states_are_autograds(around, padding):
    torch.manual_seed(0)
    linear, hidden_NH = nn.Linear(6, 11 + padding, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    labels_N, head = torch.arange(9), Head(Around(linear) if around else linear, 11, scale=0.3)
    given = [hidden_NH, linear.weight, linear.bias]
    logits_NV = 0.3 * linear(hidden_NH)[:, :11]
    assert_close(head.logits(hidden_NH), logits_NV, rtol=1e-12, atol=0)
    expected = torch.autograd.grad(3 * nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum"), given)
    total, rows = fused_loss(hidden_NH, head, labels_N, Objective(), chunk=4)
    (3 * total).backward()
    assert set(rows) == {"ce"} and rows["ce"].shape == (9,)
    for one, grad in zip(given, expected, strict=True):
        assert_close(one.grad, grad, rtol=1e-10, atol=1e-14)


def test_a_term_of_rows_has_its_weight_in_the_loss_and_in_what_is_shown():
    class Squares(RowTerm):
        def rows(self, student, signal, batch, targets):
            return student[targets] ** 2

    def one(**weights):
        view = View({}, torch.arange(3))
        return Batch(torch.arange(3), torch.zeros(3), view, view, (), {name: torch.tensor(w) for name, w in weights.items()})

    x_N, term = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), Squares("squares", 0.25)
    loss: Loss = term(x_N, None, one())
    assert loss.total.item() == 0.25 * 14 and term.combine({"squares": 8.0}) == 2.0
    assert loss.rows["squares"].tolist() == [1, 4, 9] and not loss.rows["squares"].requires_grad
    loss.total.backward()
    assert x_N.grad.tolist() == [0.5, 1.0, 1.5]
    loss = term(x_N, None, one(squares=[0.0, -1.0, 2.0]))
    assert loss.total.item() == 0.25 * 14 and loss.rows["squares"].tolist() == [0, -4, 18]


def test_a_signal_with_a_divergence_of_its_own_is_not_taken_for_a_plain_distribution():
    class Plain(FullDistribution):
        def log_probs(self, rows, log_q_nV=None, temperature=1.0):
            return torch.full((9, 11), 1 / 11, dtype=torch.float64).log()[rows]

    class Own(Plain):
        def divergence(self, divergence, rows, log_q_nV, temperature=1.0):
            return 7 + 0 * log_q_nV.sum(-1)

    class Said(Own):
        full_distribution = True

        def divergence(self, divergence, rows, log_q_nV, temperature=1.0):
            return super().divergence(divergence, rows, log_q_nV, temperature)

    assert (Plain.full_distribution, Own.full_distribution, Said.full_distribution) == (True, False, True)
    hidden_NH, head, labels_N = torch.randn(9, 6, dtype=torch.float64), Head(nn.Linear(6, 11, dtype=torch.float64), 11), torch.arange(9)
    assert fused_loss(hidden_NH, head, labels_N, Objective(0.5), Own())[1]["kd"].tolist() == [7.0] * 9
    assert 7.0 not in fused_loss(hidden_NH, head, labels_N, Objective(0.5), Plain())[1]["kd"].tolist()
