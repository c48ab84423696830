"""CE and forward KL from the ratio of probabilities: as float64 has them, however close the models are; left where it would not be right."""

import pytest
import torch

from llmkd.losses import ratio
from llmkd.losses.objective import Objective

KD = 0.7


def case(gap: float, offset: float = 0.0, rows: int = 16, vocab: int = 3000):
    generator = torch.Generator().manual_seed(0)
    teacher_nV, noise_nV = (torch.randn(rows, vocab, generator=generator) for _ in range(2))
    return 2 * teacher_nV + gap * noise_nV + offset, 2 * teacher_nV, torch.arange(rows) * 7


def exact(student_nV, teacher_nV, labels_n, kd: float):
    """By autograd in float64: CE, KL and the gradient."""
    z_nV, log_p_nV = student_nV.double().requires_grad_(), teacher_nV.double().log_softmax(-1)
    log_q_nV = z_nV.log_softmax(-1)
    ce_n, kl_n = -log_q_nV.gather(1, labels_n[:, None])[:, 0], (log_p_nV.exp() * (log_p_nV - log_q_nV)).sum(-1)
    (grad_nV,) = torch.autograd.grad(((1 - kd) * ce_n + kd * kl_n).sum(), z_nV)
    return ce_n.detach(), kl_n.detach(), grad_nV


def found(student_nV, teacher_nV, labels_n, kd: float):
    grad_nV, held = torch.empty_like(student_nV), {}
    tile = lambda name: held.setdefault(name, torch.empty_like(student_nV))  # noqa: E731
    terms = Objective(kd).loss_and_grad(student_nV, labels_n, tile, grad_nV, teacher_nV)
    return terms["ce"], terms["kd"], grad_nV, set(held)


@pytest.mark.parametrize("gap, offset, of_kl", [(1e-4, 0.0, 1e-5), (1e-3, 2.0, 1e-3), (0.1, -10.0, 1e-4), (3.0, 1.0, 1e-5)])
def test_in_float32_it_is_float64s_to_rounding(gap, offset, of_kl):
    """The gradient of the KL alone is as small as the models' difference, and still has five digits."""
    given = case(gap, offset)
    for kd, most in ((KD, 1e-6), (1.0, of_kl)):
        right, own = exact(*given, kd), found(*given, kd)
        assert own[3] == {"p", "d", "q"}, "the general form has more tiles"
        assert (own[0] - right[0]).abs().max() < 4e-6 and ((own[1] - right[1]).abs() / right[1]).max() < 5e-3
        assert (own[2] - right[2]).norm() < most * right[2].norm()


@pytest.mark.parametrize("whose, value, general", [(1, -200.0, True), (0, -200.0, False), (1, -torch.inf, True), (0, -torch.inf, True)])
def test_where_it_would_not_be_right_the_general_form_is_taken(whose, value, general):
    """One token of the first row is ruled out by one of the models, as far as float32 tells or altogether."""
    given = case(1.0)
    given[whose][0, 5] = value
    terms, right = found(*given, KD), exact(*given, KD)
    assert ("scratch 0" in terms[3]) == general
    rows = slice(1 if value == -torch.inf else 0, None)  # there autograd has no number
    assert (terms[0] - right[0]).abs().max() < 4e-6
    assert torch.allclose(terms[1][rows].double(), right[1][rows], rtol=1e-5)
    assert (terms[2][rows] - right[2][rows]).norm() < 1e-6 * right[2][rows].norm()
    assert terms[1][0].isfinite() == (value != -torch.inf or whose == 1)


@pytest.mark.parametrize("offset, general", [(-31.0, False), (-33.0, True), (1000.0, True)])
def test_a_large_offset_between_the_models_logits_costs_no_digits(offset, general):
    """No softmax sees it, and the difference of the logits is rounded by it: at 1000 the gradient would be off by 0.2 %."""
    given = case(0.01, offset)
    own, right = found(*given, 1.0), exact(*given, 1.0)
    assert ("scratch 0" in own[3]) == general
    assert (own[0] - right[0]).abs().max() < 4e-6
    assert (own[2] - right[2]).norm() < (2e-5 if general else 3e-4) * right[2].norm()


def test_only_for_forward_kl_at_temperature_1_and_on_a_cpu():
    from llmkd.losses.divergences import make_divergence

    logits_nV = torch.zeros(1, 3)
    assert ratio.applies(make_divergence("forward_kl"), 1.0, logits_nV)
    assert not ratio.applies(make_divergence("forward_kl"), 2.0, logits_nV) and not ratio.applies(
        make_divergence("reverse_kl"), 1.0, logits_nV
    )
