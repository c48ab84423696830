"""The divergences against their definitions in float64, hand-worked cases, limits and hard inputs."""

import inspect
import math

import pytest
import torch
from torch.testing import assert_close

from llmkd.config.recipe import DIVERGENCES
from llmkd.losses import divergences

KINDS = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("symmetric_kl", {}),
    ("symmetric_kl", {"forward_weight": 0.2}),
    ("generalized_jsd", {}),
    ("generalized_jsd", {"beta": 0.1}),
    ("generalized_jsd", {"beta": 0.8}),
    ("skewed_forward_kl", {}),
    ("skewed_forward_kl", {"alpha": 0.7}),
    ("skewed_reverse_kl", {}),
    ("skewed_reverse_kl", {"alpha": 0.7}),
    ("adaptive_kl", {}),
    ("adaptive_kl", {"head_mass": 0.8}),
    ("total_variation", {}),
    ("alpha_beta", {}),
    ("alpha_beta", {"alpha": 0.5, "beta": 0.5}),
    ("alpha_beta", {"alpha": 1.0, "beta": 2.0}),
    ("alpha_beta", {"alpha": 0.0, "beta": 0.7}),
    ("alpha_beta", {"alpha": 0.6, "beta": 0.0}),
]
each_kind = pytest.mark.parametrize(
    "name, options", KINDS, ids=lambda x: x if isinstance(x, str) else "-".join(f"{v:g}" for v in x.values())
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def of_logits(function, student, teacher):
    return function(student.log_softmax(-1), teacher.log_softmax(-1))


def value_and_gradient(function, student, teacher):
    student = student.clone().requires_grad_()
    value = of_logits(function, student, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), gradient


# The definitions, from probabilities; what has probability 0 contributes nothing to its own expectation.


def mean_log_ratio(a, log_x, log_y):
    return (a * torch.where(a > 0, log_x - log_y, 0.0)).sum(-1)


def log_of(m):
    return torch.where(m > 0, m, 1.0).log()


def d_forward_kl(log_q, log_p):
    return mean_log_ratio(log_p.exp(), log_p, log_q)


def d_reverse_kl(log_q, log_p):
    return mean_log_ratio(log_q.exp(), log_q, log_p)


def d_symmetric_kl(log_q, log_p, forward_weight=0.5):
    if forward_weight == 1:
        return d_forward_kl(log_q, log_p)
    return forward_weight * d_forward_kl(log_q, log_p) + (1 - forward_weight) * d_reverse_kl(log_q, log_p)


def d_generalized_jsd(log_q, log_p, beta=0.5):
    p, q = log_p.exp(), log_q.exp()
    log_m = log_of(beta * p + (1 - beta) * q)
    return beta * mean_log_ratio(p, log_p, log_m) + (1 - beta) * mean_log_ratio(q, log_q, log_m)


def d_skewed_forward_kl(log_q, log_p, alpha=0.1):
    return mean_log_ratio(log_p.exp(), log_p, log_of(alpha * log_p.exp() + (1 - alpha) * log_q.exp()))


def d_skewed_reverse_kl(log_q, log_p, alpha=0.1):
    return mean_log_ratio(log_q.exp(), log_q, log_of((1 - alpha) * log_p.exp() + alpha * log_q.exp()))


def d_adaptive_kl(log_q, log_p, head_mass=0.5):
    shares = []
    for p, q in zip(log_p.exp().tolist(), log_q.detach().exp().tolist(), strict=True):
        head, mass = [], 0.0
        for i in sorted(range(len(p)), key=lambda i: -p[i]):
            if mass < head_mass:
                head.append(i)
                mass += p[i]
        gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
        shares.append(sum(gaps[i] for i in head) / sum(gaps) if sum(gaps) else 0.5)
    return torch.stack([d_symmetric_kl(*row) for row in zip(log_q, log_p, torch.tensor(shares, dtype=log_q.dtype), strict=True)])


def d_total_variation(log_q, log_p):
    return (log_q.exp() - log_p.exp()).abs().sum(-1) / 2


def d_alpha_beta(log_q, log_p, alpha=0.2, beta=0.7):
    def power(s, t):
        return ((s * log_p if s else 0) + (t * log_q if t else 0)).exp()

    if alpha == 0:
        return (mean_log_ratio(power(0, beta), beta * log_q, beta * log_p) + (power(beta, 0) - power(0, beta)).sum(-1)) / beta**2
    if beta == 0:
        return d_alpha_beta(log_p, log_q, 0, alpha)
    total = alpha + beta
    return -(power(alpha, beta) - alpha / total * power(total, 0) - beta / total * power(0, total)).sum(-1) / (alpha * beta)


def definition(name, options):
    return lambda log_q, log_p: globals()[f"d_{name}"](log_q, log_p, **options)


@pytest.mark.parametrize("seed, size, spread", [(0, 2, 1), (1, 40, 1), (2, 40, 4)])
@each_kind
def test_equals_its_definition(name, options, seed, size, spread):
    student, teacher = spread * randn(16, size, seed=seed), spread * randn(16, size, seed=seed + 100)
    found = value_and_gradient(divergences.make_divergence(name, **options), student, teacher)
    assert_close(found, value_and_gradient(definition(name, options), student, teacher), rtol=1e-11, atol=1e-13)


HALVES, UNEVEN = [1 / 2, 1 / 2], [1 / 4, 3 / 4]
MIXED = 5 / 6 * (math.log(5 / 3) / 2 - math.log(2) / 10) + 1 / 6 * (0.3 * math.log(0.6) + math.log(2) / 2)
BY_HAND = [  # teacher p, student q
    ("forward_kl", {}, HALVES, UNEVEN, math.log(4 / 3) / 2),
    ("reverse_kl", {}, HALVES, UNEVEN, 3 / 4 * math.log(3) - math.log(2)),
    ("generalized_jsd", {}, HALVES, UNEVEN, math.log(16 / 15) / 4 + math.log(2 / 3) / 8 + 3 * math.log(6 / 5) / 8),
    ("generalized_jsd", {"beta": 0.25}, [1, 0], [0, 1], math.log(4) - 3 / 4 * math.log(3)),
    ("generalized_jsd", {}, [1, 0], [1 / 2, 1 / 2], 3 / 4 * math.log(4 / 3)),
    ("skewed_forward_kl", {"alpha": 0.5}, [1, 0], HALVES, math.log(4 / 3)),
    ("skewed_forward_kl", {"alpha": 0.25}, [1, 0], HALVES, math.log(8 / 5)),
    ("skewed_reverse_kl", {"alpha": 0.25}, [1, 0], HALVES, math.log(4 / 7) / 2 + math.log(4) / 2),
    ("adaptive_kl", {"head_mass": 0.7}, [0.5, 0.3, 0.2], [0.3, 0.6, 0.1], MIXED),
    ("total_variation", {}, HALVES, UNEVEN, 1 / 4),
    ("total_variation", {}, [1, 0], [0, 1], 1),
    ("alpha_beta", {"alpha": 1.0, "beta": 1.0}, HALVES, UNEVEN, 1 / 16),
    ("alpha_beta", {"alpha": 0.5, "beta": 0.5}, [1, 0], HALVES, 4 - 2 * math.sqrt(2)),
]


@pytest.mark.parametrize("name, options, p, q, expected", BY_HAND)
def test_worked_by_hand(name, options, p, q, expected):
    found = divergences.make_divergence(name, **options)(logs(q), logs(p))
    assert found.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    "name, options", [kind for kind in KINDS if kind[0] != "adaptive_kl"]
)  # its weight is constant to the gradient alone
def test_gradcheck(name, options):
    student, teacher = randn(3, 7).requires_grad_(), randn(3, 7, seed=1)
    assert torch.autograd.gradcheck(lambda x: of_logits(divergences.make_divergence(name, **options), x, teacher), student)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_kind
def test_identical_models_do_not_differ(name, options, dtype):
    logits = 5 * randn(8, 1000, dtype=dtype)
    value, gradient = value_and_gradient(divergences.make_divergence(name, **options), logits, logits)
    eps = torch.finfo(dtype).eps
    assert (value >= 0).all() and value.max() < eps and gradient.abs().max() < 5 * eps


@each_kind
def test_a_shift_of_the_logits_changes_nothing(name, options):
    function, student, teacher = divergences.make_divergence(name, **options), randn(4, 30), randn(4, 30, seed=1)
    shifted = value_and_gradient(function, student + torch.tensor([[0.5], [-3], [100], [1e4]]), teacher - 7)
    assert_close(shifted, value_and_gradient(function, student, teacher), rtol=1e-9, atol=1e-12)


@each_kind
def test_inputs_are_left_as_they_were_and_the_teacher_gets_no_gradient(name, options):
    log_q, log_p = randn(4, 30).log_softmax(-1).requires_grad_(), randn(4, 30, seed=1).log_softmax(-1)
    before = log_q.detach().clone(), log_p.clone()
    value = divergences.make_divergence(name, **options)(log_q, log_p)
    value.sum().backward()
    assert value.shape == (4,) and torch.equal(log_q, before[0]) and torch.equal(log_p, before[1]) and log_p.grad is None


def pair(spread=2, size=50, dtype=torch.float64):
    return (spread * randn(20, size, dtype=dtype)).log_softmax(-1), (spread * randn(20, size, seed=1, dtype=dtype)).log_softmax(-1)


def test_the_jsd_ends_in_the_two_kls():
    q, p = pair(spread=1)
    jsd, forward, reverse = divergences.generalized_jsd, divergences.forward_kl(q, p), divergences.reverse_kl(q, p)
    assert torch.equal(jsd(q, p, 0), forward) and torch.equal(jsd(q, p, 1), reverse)
    assert_close(jsd(q, p, 1e-4) / 1e-4, forward, rtol=1e-2, atol=0)
    assert_close(jsd(q, p, 1 - 1e-4) / 1e-4, reverse, rtol=1e-2, atol=0)


def test_the_even_jsd_is_symmetric_and_bounded():
    q, p = pair(spread=30)
    jsd = divergences.generalized_jsd(q, p)
    assert_close(jsd, divergences.generalized_jsd(p, q), rtol=1e-12, atol=0)
    assert jsd.max() <= math.log(2) * (1 + 1e-15) and jsd.max() > 0.99 * math.log(2)
    assert_close(divergences.generalized_jsd(q, p, 0.3), divergences.generalized_jsd(p, q, 0.7), rtol=1e-12, atol=0)


def test_total_variation_is_bounded():
    q, p = pair(spread=30)
    assert 0.99 < divergences.total_variation(q, p).max() <= 1 + 1e-15


def test_skew_leads_from_the_kls_to_nothing():
    q, p = pair()
    assert torch.equal(divergences.skewed_forward_kl(q, p, 0), divergences.forward_kl(q, p))
    assert torch.equal(divergences.skewed_reverse_kl(q, p, 0), divergences.reverse_kl(q, p))
    for skewed in (divergences.skewed_forward_kl, divergences.skewed_reverse_kl):
        assert not skewed(q, p, 1).any()
        values = torch.stack([skewed(q, p, alpha) for alpha in (0, 0.01, 0.3, 0.6, 0.99)])
        assert (values.diff(dim=0) < 0).all()


def test_symmetric_kl_shares():
    q, p = pair()
    forward, reverse = divergences.forward_kl(q, p), divergences.reverse_kl(q, p)
    assert torch.equal(divergences.symmetric_kl(q, p, 1), forward) and torch.equal(divergences.symmetric_kl(q, p, 0), reverse)
    assert_close(divergences.symmetric_kl(q, p, 0.2), 0.2 * forward + 0.8 * reverse, rtol=1e-14, atol=0)
    assert_close(divergences.symmetric_kl(q, p), divergences.symmetric_kl(p, q), rtol=1e-14, atol=0)


@pytest.mark.parametrize("head_mass, weight", [(0.0, 0), (1.0, 1)])
def test_an_adaptive_head_of_nothing_or_everything_is_a_plain_kl(head_mass, weight):
    q, p = pair()
    assert_close(divergences.adaptive_kl(q, p, head_mass), divergences.symmetric_kl(q, p, weight), rtol=1e-12, atol=0)


def test_alpha_beta_holds_the_kls_and_is_continuous():
    q, p = pair(spread=1)
    ab, forward, reverse = divergences.alpha_beta, divergences.forward_kl(q, p), divergences.reverse_kl(q, p)
    assert_close(ab(q, p, 1, 0), forward, rtol=1e-12, atol=0)
    assert_close(ab(q, p, 0, 1), reverse, rtol=1e-12, atol=0)
    for fixed in (0.4, 1):
        assert_close(ab(q, p, fixed, 1e-6), ab(q, p, fixed, 0), rtol=1e-4, atol=0)
        assert_close(ab(q, p, 1e-6, fixed), ab(q, p, 0, fixed), rtol=1e-4, atol=0)
        assert_close(ab(q, p, fixed, 0.3), ab(p, q, 0.3, fixed), rtol=1e-12, atol=0)


def spike(token, size=300, height=1e4):
    logits = torch.zeros(16, size)
    logits[:, token] = height
    return logits


def noise(spread, seed=0, size=300):
    return spread * randn(16, size, seed=seed, dtype=torch.float32)


HARD = {
    "identical": (noise(30), noise(30)),
    "mild": (noise(1), noise(1, 1)),
    "x30": (noise(30), noise(30, 1)),
    "1e4": (noise(1e4), noise(1e4, 1)),
    "spikes": (spike(0), spike(1)),
    "same spike": (spike(0), spike(0)),
    "spiked student": (spike(0), noise(1)),
    "spiked teacher": (noise(1), spike(0)),
    "both signs": (noise(1).sign() * 1e4 + noise(10, 2), noise(1, 1).sign() * 1e4 + noise(10, 3)),
    "T=4": (noise(3) / 4, noise(3, 1) / 4),
    "T=0.5": (noise(3) / 0.5, noise(3, 1) / 0.5),
    "T=0.05": (noise(3) / 0.05, noise(3, 1) / 0.05),
    "close at T=0.05": (noise(3) / 0.05, (noise(3) + noise(0.01, 1)) / 0.05),
    "0.1 apart": (noise(3), noise(3) + noise(0.1, 1)),
    "0.01 apart": (noise(3), noise(3) + noise(0.01, 1)),
    "0.001 apart": (noise(3), noise(3) + noise(0.001, 1)),
}
# How many roundings of the largest term a gradient may be off by: alpha_beta divides its own by alpha, total variation has a kink.
# Reverse KL's is q (log q - log p - D), whose log-probabilities are larger than D and rounded by kernels that differ by processor.
ROUNDINGS = {"forward_kl": 1, "reverse_kl": 4, "total_variation": 5, "alpha_beta": 10}


def assert_accurate(name, options, student, teacher):
    """float32 against the definition in float64: 2e-6 of the value, 2e-5 of the gradient, or a few roundings."""
    value, gradient = value_and_gradient(divergences.make_divergence(name, **options), student, teacher)
    right, slope = value_and_gradient(definition(name, options), student.double(), teacher.double())
    assert value.dtype == torch.float32 and value.isfinite().all() and gradient.isfinite().all() and (value >= 0).all()
    assert ((value - right).abs() <= (2e-6 * right).clamp_min(3e-7 if name == "total_variation" else 1e-7)).all()
    floor = 1e-7 * ROUNDINGS.get(name, 3) * right.clamp_min(1)[:, None]
    assert ((gradient - slope).abs() <= torch.maximum(2e-5 * slope.abs(), floor)).all()


SIGN_IS_ROUNDING = ("total_variation", "0.001 apart")  # where the gradient is +-q, whichever way the gap was rounded


@pytest.mark.parametrize("name, options, case", [(*kind, case) for kind in KINDS for case in HARD if (kind[0], case) != SIGN_IS_ROUNDING])
def test_float32_is_exact_and_finite_on_hard_inputs(name, options, case):
    assert_accurate(name, options, *HARD[case])


@pytest.mark.parametrize("rows, size", [(16, 8000), (50_000, 3)])
@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-4, 1e-6, 1e-7])
@each_kind
def test_never_negative(name, options, apart, rows, size):
    teacher = 4 * randn(rows, size, dtype=torch.float32)
    student = teacher + apart * randn(rows, size, seed=1, dtype=torch.float32)
    assert (of_logits(divergences.make_divergence(name, **options), student, teacher) >= 0).all()


def ruled_out():
    """A teacher that rules out a third of the tokens."""
    teacher = noise(2, 1)
    teacher[:, ::3] = -math.inf
    return noise(2), teacher


FINITE = [
    kind for kind in KINDS if kind[0] in ("forward_kl", "generalized_jsd", "total_variation", "skewed_forward_kl", "skewed_reverse_kl")
]


@pytest.mark.parametrize(
    "name, options", FINITE + [("symmetric_kl", {"forward_weight": 1.0}), ("alpha_beta", {}), ("alpha_beta", {"alpha": 1.0, "beta": 0.0})]
)
def test_tokens_that_the_teacher_rules_out_count_exactly(name, options):
    assert_accurate(name, options, *ruled_out())


@pytest.mark.parametrize(
    "name, options", [("reverse_kl", {}), ("symmetric_kl", {}), ("adaptive_kl", {}), ("alpha_beta", {"alpha": 0.0, "beta": 1.0})]
)
@pytest.mark.parametrize("tokens", [1, 100])
def test_tokens_that_the_teacher_rules_out_make_reverse_kl_infinite(name, options, tokens):
    student, teacher = noise(2), noise(2, 1)
    teacher[:, :tokens] = -math.inf
    assert (of_logits(divergences.make_divergence(name, **options), student, teacher) == math.inf).all()


@pytest.mark.parametrize("name, options", [("forward_kl", {}), ("reverse_kl", {}), ("alpha_beta", {})])
def test_tokens_that_both_models_rule_out_do_not_count(name, options):
    student, teacher = ruled_out()
    kept = teacher[0].isfinite()
    value, gradient = value_and_gradient(divergences.make_divergence(name, **options), student.where(kept, -math.inf), teacher)
    assert_close(
        (value, gradient[:, kept]), value_and_gradient(divergences.make_divergence(name, **options), student[:, kept], teacher[:, kept])
    )
    assert not gradient[:, ~kept].any()


@pytest.mark.parametrize(
    "alpha, beta, case", [(1e-3, 1.0, "mild"), (1e-3, 1.0, "0.1 apart"), (1.0, 1e-3, "mild"), (1e-2, 0.5, "0.1 apart")]
)
def test_alpha_beta_is_accurate_for_small_exponents(alpha, beta, case):
    assert_accurate("alpha_beta", {"alpha": alpha, "beta": beta}, *HARD[case])


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_bfloat16_logits_of_a_large_vocabulary(name):
    for seed in range(4):
        teacher = 3 * randn(16, 151936, seed=seed, dtype=torch.float32)
        student = (teacher + 0.05 * randn(16, 151936, seed=seed + 100, dtype=torch.float32)).bfloat16()
        teacher = teacher.bfloat16()
        found = of_logits(getattr(divergences, name), student.float(), teacher.float())
        right = of_logits(definition(name, {}), student.double(), teacher.double())
        assert (found >= 0).all()
        assert_close(found.double(), right, rtol=1e-2, atol=0)


def test_names_options_and_defaults_agree_with_the_recipe():
    public = {
        name: {option: parameter.default for option, parameter in list(inspect.signature(function).parameters.items())[2:]}
        for name, function in vars(divergences).items()
        if inspect.isfunction(function) and list(inspect.signature(function).parameters)[:2] == ["log_q", "log_p"]
    }
    assert public == {name: {option: default for option, (_, _, default) in options.items()} for name, options in DIVERGENCES.items()}


@pytest.mark.parametrize("name, options", [(name, options) for name, options in KINDS if options])
def test_named_fixes_the_options(name, options):
    q, p = pair()
    assert torch.equal(divergences.make_divergence(name, **options)(q, p), getattr(divergences, name)(q, p, **options))
    assert not torch.equal(divergences.make_divergence(name, **options)(q, p), getattr(divergences, name)(q, p))


def test_every_function_is_tested():
    assert {name for name, _ in KINDS} == set(DIVERGENCES)
