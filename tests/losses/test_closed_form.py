"""Divergences in closed form, through the objective that uses them: against the definitions in float64, and on hard inputs."""

import inspect
import math

import pytest
import torch
from torch.testing import assert_close

from llmkd.config.recipe import DIVERGENCES
from llmkd.losses import closed_form as closed
from llmkd.losses import divergences
from llmkd.losses.objective import Objective
from tests.losses import test_divergences as plain
from tests.losses.test_divergences import FINITE, HARD, KINDS, SIGN_IS_ROUNDING, definition, noise, randn, ruled_out

CLOSED = [kind for kind in KINDS if kind[0] not in ("adaptive_kl", "alpha_beta")]
each_closed = pytest.mark.parametrize("name, options", CLOSED, ids=str)


def loss_and_grad(name, options, student, teacher, kd_ratio=1.0, temperature=1.0, labels=None):
    """Values [n] and gradient of the logits, in tiles that start full of rubbish."""
    held = {}

    def tile(name):
        return held.setdefault(name, torch.full_like(student, math.nan))

    labels = torch.zeros(len(student), dtype=torch.long) if labels is None else labels
    before, grad = student.clone(), torch.full_like(student, math.nan)
    objective = Objective(kd_ratio, temperature, divergences.make_divergence(name, **options))
    terms = objective.loss_and_grad(student, labels, tile, grad, teacher)
    assert torch.equal(student, before) or student.isnan().any()
    return objective.combine(terms) if kd_ratio < 1 else terms["kd"], grad


def test_which_have_a_closed_form():
    having = {name for name in DIVERGENCES if closed.closed_form(divergences.make_divergence(name))}
    assert having == {name for name, _ in CLOSED} and closed.closed_form(lambda log_q, log_p: log_q.sum(-1)) is None
    for name in having:
        own, twin = (inspect.signature(getattr(module, name)).parameters for module in (divergences, closed))
        assert {k: v.default for k, v in list(own.items())[2:]} == {k: v.default for k, v in list(twin.items())[4:]}


@pytest.mark.parametrize("seed, size, spread", [(0, 2, 1), (1, 40, 1), (2, 40, 4)])
@each_closed
def test_equals_its_definition(name, options, seed, size, spread):
    student, teacher = spread * randn(16, size, seed=seed), spread * randn(16, size, seed=seed + 100)
    right = plain.value_and_gradient(definition(name, options), student, teacher)
    assert_close(loss_and_grad(name, options, student, teacher.log_softmax(-1)), right, rtol=1e-11, atol=1e-13)
    assert_close(loss_and_grad(name, options, student, teacher + 30), right, rtol=1e-11, atol=1e-13)  # a teacher's logits


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_of_the_mixed_loss(name, temperature, kd_ratio):
    student, teacher, labels = 2 * randn(9, 30), 2 * randn(9, 30, seed=1), torch.arange(9) * 3
    logits = student.clone().requires_grad_()
    ce = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    kd = temperature**2 * divergences.make_divergence(name)((logits / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1))
    mixed = (1 - kd_ratio) * ce + kd_ratio * kd
    found = loss_and_grad(name, {}, student, teacher / temperature, kd_ratio, temperature, labels)
    assert_close(found, (mixed.detach(), torch.autograd.grad(mixed.sum(), logits)[0]), rtol=1e-11, atol=1e-13)


def assert_accurate(name, options, student, teacher):
    """As in `test_divergences`, from both models' logits."""
    value, gradient = loss_and_grad(name, options, student, teacher)
    right, slope = plain.value_and_gradient(definition(name, options), student.double(), teacher.double())
    assert value.dtype == torch.float32 and value.isfinite().all() and gradient.isfinite().all() and (value >= 0).all()
    assert ((value - right).abs() <= (2e-6 * right).clamp_min(3e-7 if name == "total_variation" else 1e-7)).all()
    floor = 1e-7 * max(2, plain.ROUNDINGS.get(name, 3)) * right.clamp_min(1)[:, None]
    assert ((gradient - slope).abs() <= torch.maximum(2e-5 * slope.abs(), floor)).all()


@pytest.mark.parametrize("name, options, case", [(*kind, case) for kind in CLOSED for case in HARD if (kind[0], case) != SIGN_IS_ROUNDING])
def test_float32_is_exact_and_finite_on_hard_inputs(name, options, case):
    assert_accurate(name, options, *HARD[case])


@pytest.mark.parametrize("apart", [1e-2, 1e-3])
@each_closed
def test_a_small_divergence_keeps_its_leading_digits(name, options, apart):
    teacher = 3 * randn(16, 300, dtype=torch.float32)
    student = teacher + apart * randn(16, 300, seed=1, dtype=torch.float32)
    value, gradient = loss_and_grad(name, options, student, teacher)
    right, slope = plain.value_and_gradient(divergences.make_divergence(name, **options), student.double(), teacher.double())
    assert right.max() < 1e-4 or name == "total_variation"
    assert_close(value.double(), right, rtol=1e-6 / apart + 1e-3, atol=0)
    assert (gradient - slope).norm() <= 1e-5 * (1e-3 / apart + 1) * slope.norm()


@pytest.mark.parametrize("apart", [0, 1e-1, 1e-2, 1e-4, 1e-6, 1e-7])
@each_closed
def test_never_negative(name, options, apart):
    teacher = 4 * randn(16, 8000, dtype=torch.float32)
    assert (loss_and_grad(name, options, teacher + apart * randn(16, 8000, seed=1, dtype=torch.float32), teacher)[0] >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_closed
def test_identical_models_do_not_differ(name, options, dtype):
    logits = 5 * randn(8, 1000, dtype=dtype)
    value, gradient = loss_and_grad(name, options, logits, logits)
    assert not value.any() and gradient.abs().max() < 5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name, options", FINITE, ids=str)
def test_tokens_that_the_teacher_rules_out_count_exactly(name, options):
    assert_accurate(name, options, *ruled_out())


BOUNDED = [kind for kind in CLOSED if kind[0] in ("generalized_jsd", "skewed_forward_kl", "skewed_reverse_kl", "total_variation")]


@pytest.mark.parametrize("name, options", BOUNDED, ids=str)
def test_tokens_that_the_student_rules_out_are_no_nan(name, options):
    teacher, student = (x.double() for x in ruled_out())
    value, gradient = loss_and_grad(name, options, student, teacher)
    right = definition(name, options)(student.log_softmax(-1), teacher.log_softmax(-1))
    assert_close(value, right, rtol=1e-12, atol=0)
    assert gradient.isfinite().all() and not gradient[:, ::3].any()


@pytest.mark.parametrize("name, options", [("reverse_kl", {}), ("symmetric_kl", {})])
def test_a_token_that_the_teacher_rules_out_makes_reverse_kl_infinite(name, options):
    teacher = noise(2, 1)
    teacher[:, 0] = -math.inf
    assert (loss_and_grad(name, options, noise(2), teacher)[0] == math.inf).all()


def test_a_token_that_the_student_rules_out_makes_forward_kl_infinite():
    student = noise(2)
    student[:, 0] = -math.inf
    assert (loss_and_grad("forward_kl", {}, student, noise(2, 1))[0] == math.inf).all()


@each_closed
def test_tokens_that_both_rule_out_do_not_count(name, options):
    student, teacher = randn(4, 30), randn(4, 30, seed=1)
    short = loss_and_grad(name, options, student[:, 10:].contiguous(), teacher[:, 10:].contiguous())
    student[:, :10] = teacher[:, :10] = -math.inf
    value, gradient = loss_and_grad(name, options, student, teacher, labels=torch.full((4,), 20))
    assert_close((value, gradient[:, 10:]), short, rtol=1e-12, atol=1e-14)
    assert not gradient[:, :10].any()


@pytest.mark.parametrize("who", ["student", "teacher"])
@each_closed
def test_a_nan_of_either_model_is_seen(name, options, who):
    student, teacher = randn(4, 30), randn(4, 30, seed=1)
    (student if who == "student" else teacher)[1, 5] = math.nan
    value, gradient = loss_and_grad(name, options, student, teacher)
    assert value.isnan().tolist() == [False, True, False, False] and gradient.isnan().any(-1).tolist() == [False, True, False, False]
