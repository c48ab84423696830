"""Shared by the tests of the fused loss: small heads and teachers, and the same loss from whole logits."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from llmkd.head import Head
from llmkd.losses.divergences import make_divergence
from llmkd.losses.objective import Objective
from llmkd.signals import Dense

N, H, H_T, V = 50, 8, 12, 61  # H_T, the teacher's width, tells its products from the student's


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(width, rows=V, bias=False, train=False, seed=1, dtype=torch.float64, size=0.7):
    project = nn.Linear(width, rows, bias=bias, dtype=dtype)
    for i, parameter in enumerate(project.parameters()):
        parameter.data.copy_(size * randn(*parameter.shape, seed=seed + 10 * i))
    return project.requires_grad_(train)


class Adapted(nn.Module):
    """A frozen Linear and a trained product of two thin matrices, as PEFT makes it."""

    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = linear(H), nn.Parameter(randn(3, H, seed=5)), nn.Parameter(randn(V, 3, seed=6))

    def forward(self, hidden):
        return self.base(hidden) + hidden @ self.a.T @ self.b.T


def teacher(n=N, rows=V, vocab=V, dtype=torch.float64, size=0.7):
    return Dense(randn(n, H_T, seed=2, dtype=dtype), Head(linear(H_T, rows, seed=3, dtype=dtype, size=size), vocab))


def case(n=N, vocab=V, dtype=torch.float64):
    return randn(n, H, dtype=dtype).requires_grad_(), torch.arange(n) * 7 % vocab


def objective(kd_ratio=0.25, temperature=2.0, divergence="forward_kl"):
    return Objective(kd_ratio, temperature, make_divergence(divergence))


def dense_loss(hidden, head, labels, objective, signal=None):
    """The same from whole logits, left to autograd."""

    def logits(head, hidden):
        x = head.project(hidden)[:, : head.vocab] * head.scale
        return head.softcap * torch.tanh(x / head.softcap) if head.softcap else x

    student, T, ratio = logits(head, hidden), objective.temperature, objective.kd_ratio
    rows = {"ce": F.cross_entropy(student, labels, reduction="none")}
    if signal is None:
        return rows["ce"].sum(), rows
    soft_teacher = F.log_softmax(logits(signal.head, signal.hidden_NH) / T, -1).detach()
    rows["kd"] = T**2 * objective.divergence(F.log_softmax(student / T, -1), soft_teacher)
    return ((1 - ratio) * rows["ce"] + ratio * rows["kd"]).sum(), rows


def results(loss, hidden, head, *arguments, scale=1.0, **options):
    """Value, rows and every gradient of `loss` (which is scaled by `scale` before the backward pass)."""
    hidden = hidden.detach().requires_grad_()
    weights = head.trainable()
    total, rows = loss(hidden, head, *arguments, **options)
    gradients = torch.autograd.grad(total * scale, [hidden, *weights])
    return total.detach(), {name: row.detach() for name, row in rows.items()}, gradients


def close(found, expected, bound):
    """Equal within `bound` of the largest entry, tensor by tensor."""
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert_close(x, y, rtol=0, atol=bound * y.abs().max().item())
