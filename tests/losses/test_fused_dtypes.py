"""The fused loss in other types of numbers: bfloat16, a float32 head, models of two types, autocast."""

import pytest
import torch
from torch.testing import assert_close

from llmkd.head import Head
from llmkd.losses.fused import fused_loss
from llmkd.signals import Dense
from tests.kit.heads import Adapted, H, N, V, case, close, dense_loss, linear, objective, randn, results, teacher

LARGE = 150_000


def test_bfloat16_at_a_large_vocabulary_is_close_to_float32():
    labels, settings = torch.arange(6) * 1009, objective(0.5, 1.0)

    hidden = randn(6, H, dtype=torch.bfloat16)
    hidden_t = hidden + randn(6, H, seed=4, dtype=torch.bfloat16) / 50

    def total_and_rows(dtype):
        head = Head(linear(H, LARGE, dtype=torch.bfloat16).to(dtype), LARGE)
        return fused_loss(hidden.to(dtype), head, labels, settings, Dense(hidden_t.to(dtype), head))

    (narrow, rows), (wide, wide_rows) = total_and_rows(torch.bfloat16), total_and_rows(torch.float32)
    assert narrow.dtype == torch.float32 and all(row.dtype == torch.float32 for row in rows.values())
    assert (rows["kd"] >= 0).all() and (rows["kd"] < 0.1).all()
    assert_close((narrow, rows), (wide, wide_rows), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("train", [False, True])
def test_the_gradient_of_bfloat16_operands_of_a_student_close_to_its_teacher(train):
    width, labels = 32, torch.arange(6) * 1009
    project, frozen = (linear(width, LARGE, train=x, dtype=torch.bfloat16, size=0.5) for x in (train, False))
    hidden = randn(6, width, dtype=torch.bfloat16)
    signal = Dense(hidden + randn(6, width, seed=4, dtype=torch.bfloat16) / 100, Head(frozen, LARGE))
    found = results(fused_loss, hidden, Head(project, LARGE), labels, objective(1.0, 1.0), signal)
    assert [gradient.dtype for gradient in found[2]] == [torch.bfloat16] * (1 + train)
    wide = Dense(signal.hidden_NH.double(), Head(signal.head.project.double(), LARGE))
    right = results(dense_loss, hidden.double(), Head(project.double(), LARGE), labels, objective(1.0, 1.0), wide)
    assert 0 < right[1]["kd"].max() < 0.05
    for gradient, exact in zip(found[2], right[2], strict=True):
        assert (gradient - exact).norm() <= 3e-3 * exact.norm()
    assert_close(found[2][0].double(), right[2][0], rtol=2**-8, atol=1e-5 * right[2][0].abs().max().item())  # rounded once, at the end


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32():
    hidden, labels = (1 + randn(N, H) / 10).bfloat16(), case()[1]
    project = linear(H, train=True, dtype=torch.bfloat16)
    found = results(fused_loss, hidden, Head(project, V), labels, objective(), chunk=1)[2][1]
    exact = results(dense_loss, hidden.double(), Head(project.double(), V), labels, objective())[2][1]
    assert (found - exact).norm() <= 3e-3 * exact.norm()


def test_bfloat16_hidden_states_of_a_float32_head():
    hidden, labels = case(dtype=torch.bfloat16)
    arguments = Head(linear(H, train=True, dtype=torch.float32), V), labels, objective(), teacher(dtype=torch.float32)
    total, rows, (gradient, weight) = results(fused_loss, hidden, *arguments)
    exact = results(dense_loss, hidden.float(), *arguments)
    close((total, rows, weight), (exact[0], exact[1], exact[2][1]), 2e-6)
    assert_close(gradient, exact[2][0].bfloat16())


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_beta"])
@pytest.mark.parametrize("student, taught", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_models_of_two_widths_of_number(student, taught, divergence):
    hidden, labels = case(dtype=student)
    arguments = labels, objective(divergence=divergence)
    found = results(fused_loss, hidden, Head(linear(H, dtype=student), V), *arguments, teacher(dtype=taught))
    close(found, results(fused_loss, hidden, Head(linear(H, dtype=student), V), *arguments, teacher(dtype=student)), 1e-5)


def test_autocast_does_not_narrow_the_loss():
    hidden, labels = case(dtype=torch.float32)
    arguments = hidden, Head(Adapted().float(), V), labels, objective(), teacher(dtype=torch.float32)
    plain = results(fused_loss, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(results(fused_loss, *arguments), plain, 0)
