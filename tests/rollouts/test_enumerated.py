"""A world small enough to enumerate, three tokens and answers of at most three: what a step's gradient is, and what it is on average.

The references are loops over sequences with one plain forward pass each; padding and end token are the same token.
"""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch

from llmkd.config.on_policy import LongHorizon, OnPolicy
from llmkd.config.recipe import Loss
from llmkd.config.target_weights import TargetWeights
from llmkd.data.batch_source import PlannedSource
from llmkd.data.batching import BatchPlan
from llmkd.data.examples import Collator, TokenExamples
from llmkd.data.written import prompts_of
from llmkd.models.language_model import LanguageModel
from llmkd.rollouts.draw import together, with_share
from llmkd.rollouts.engine import prefix_weights
from llmkd.rollouts.generate import Completion, Mix
from llmkd.rollouts.sampling import Sampling
from llmkd.rollouts.source import OnPolicySource
from llmkd.rollouts.writer import LocalWriter
from llmkd.teachers.live import LiveTeacher
from llmkd.teachers.mixture import Mixture
from llmkd.training.build_student import build_terms, long_horizon_terms
from llmkd.training.distiller import Distiller
from tests.kit.families import tiny

V, T, END = 3, 3, 2
PROMPT = [0, 1]
ANSWERS = [
    answer
    for length in range(1, T + 1)
    for answer in itertools.product(range(V), repeat=length)
    if END not in answer[:-1] and (answer[-1] == END or length == T)
]
DIVERGENCES = {
    "reverse_kl": lambda q, p: (q * (q / p).log()).sum(-1),
    "forward_kl": lambda q, p: (p * (p / q).log()).sum(-1),
    "generalized_jsd": lambda q, p: ((p * (2 * p / (p + q)).log()) + (q * (2 * q / (p + q)).log())).sum(-1) / 2,
}


def model(seed: int):
    found = tiny("gpt2", vocab_size=V, n_embd=8, n_inner=8, n_head=2).eval()  # whose norms are float64 too
    torch.manual_seed(seed)
    for p in found.parameters():
        torch.nn.init.normal_(p, std=0.6)
    return found


@pytest.fixture(scope="module")
def student() -> LanguageModel:
    return LanguageModel(model(1), V).eval()


@pytest.fixture(scope="module")
def teacher() -> LanguageModel:
    return LanguageModel(model(2).requires_grad_(False), V).eval()


class Dictated:
    """Writes what it is told, one answer after another."""

    def __init__(self, answers):
        self.answers = iter(answers)

    def write(self, prompts, keys, sampling):
        return [Completion(tuple(ids), ids[-1] == END) for ids in itertools.islice(self.answers, len(prompts))]


def source_of(
    writer, steps: int, batch_size: int = 1, share: float = 1.0, answer=(0, 1, END), packing=False, teacher=None, **settings
) -> OnPolicySource:
    """Every step has one prompt, as often as `batch_size` says."""
    one = np.array([*PROMPT, *answer], np.int32)
    masks = np.tile(np.arange(len(one)) >= len(PROMPT), batch_size)
    data = TokenExamples(
        np.tile(one, batch_size), masks, np.arange(batch_size + 1) * len(one), np.arange(batch_size), collator=Collator(END, packing)
    )
    plan = BatchPlan(data.lengths, 5, batch_size, None, steps)
    planned = PlannedSource(data, [f"f:{i}" for i in range(batch_size)], plan, 2)
    settings = OnPolicy(share=share, max_new_tokens=T, **settings)
    return OnPolicySource(planned, prompts_of(data, planned.places, T, 16, None), writer, settings, 1 << 20, {-1: teacher})


@pytest.fixture(scope="module")
def drawn(student) -> torch.Tensor:
    return draw(student)


def draw(student, mix: Mix | None = None) -> torch.Tensor:
    """How often each answer is written in the 2,000 steps of a run whose weights stand still."""
    n, asked = 2000, []

    class Asked:
        def write(self, prompts, keys, sampling):
            asked.append((prompts[0], keys[0]))
            return [Completion((END,), True)]

    list(source_of(Asked(), n).schedule())
    written = LocalWriter(student, {END}, n, mix).write([p for p, _ in asked], [key for _, key in asked], Sampling(1.0, T, 5))
    counts = torch.tensor([sum(one.ids == answer for one in written) for answer in ANSWERS], dtype=torch.float64)
    assert counts.sum() == n and all(one.finished == (one.ids[-1] == END) for one in written)
    return counts


def gradients(student, teacher, source, loss: Loss, long_horizon: LongHorizon | None = None) -> list[tuple[float, torch.Tensor]]:
    """The loss and its gradient of every step, as the training loop makes them."""
    terms = [*build_terms(loss), *long_horizon_terms(OnPolicy(long_horizon=long_horizon), loss)]
    distiller, found = Distiller(student, terms), []
    for step, micro_batches in source.steps():
        distiller.zero_grad()
        total = 0.0
        for batch in micro_batches:
            out = distiller(batch, LiveTeacher(teacher)(batch))
            (out.total / step.num_targets).backward()
            total += out.total.item() / step.num_targets
        found.append((total, torch.cat([p.grad.flatten() for p in student.parameters()])))
    return found


def distributions(student, teacher, answer) -> tuple[torch.Tensor, torch.Tensor]:
    """q and p at every token of an answer, [t, V]; q has a gradient."""
    ids, first = torch.tensor([[*PROMPT, *answer]]), len(PROMPT) - 1
    return tuple(torch.softmax(one.model(ids, use_cache=False).logits[0, first:-1], -1) for one in (student, teacher))


def probability(student, teacher, answer) -> torch.Tensor:
    q = distributions(student, teacher, answer)[0]
    return q[range(len(answer)), list(answer)].prod().detach()


def gradient_of(student, value: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(student.parameters()), retain_graph=True)])


def test_the_answers_are_all_that_there_are(student, teacher):
    assert len(ANSWERS) == 1 + 2 + 12
    assert sum(float(probability(student, teacher, answer)) for answer in ANSWERS) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_mean_gradient_is_that_of_the_enumerated_objective(student, teacher, drawn, name):
    """E over y ~ q of the mean divergence at the tokens of y, without a gradient through q; exactly, and within three standard errors of the mean
    over what the writer draws."""
    objective, chances = 0.0, []
    for answer in ANSWERS:
        chance = float(probability(student, teacher, answer))
        chances.append(chance)
        objective = objective + chance * DIVERGENCES[name](*distributions(student, teacher, answer)).mean()
    expected = gradient_of(student, objective)
    loss = Loss(kd_ratio=1.0, divergence=name)
    found = gradients(student, teacher, source_of(Dictated(ANSWERS), len(ANSWERS)), loss)
    each = torch.stack([g for _, g in found])
    assert (torch.tensor(chances, dtype=torch.float64) @ each - expected).abs().max() < 1e-12 * expected.abs().max()
    assert sum(c * value for c, (value, _) in zip(chances, found, strict=True)) == pytest.approx(objective.item(), rel=1e-12)

    n = drawn.sum()
    mean = drawn / n @ each
    deviation = (drawn / n @ (each - mean) ** 2).sqrt() / n**0.5
    apart = (mean - expected).abs() / deviation.clamp(min=1e-9)
    assert apart.max() < 4.5 and (apart < 3).double().mean() > 0.98, "hundreds of weights are compared"
    assert deviation.max() < 0.1 * expected.abs().max(), "it says something"


def test_the_whole_divergence_is_the_expectation_of_the_single_sample_estimator(student, teacher):
    """Of sequences, and with less variance: log q(y) - log p(y) summed over the tokens, and the reverse KL at each of them."""
    sampled, whole, chances = [], [], []
    for answer in ANSWERS:
        q, p = distributions(student, teacher, answer)
        at = range(len(answer)), list(answer)
        sampled.append((q[at].log() - p[at].log()).sum().item())
        whole.append(DIVERGENCES["reverse_kl"](q, p).sum().item())
        chances.append(float(probability(student, teacher, answer)))
    sampled, whole, chances = map(np.array, (sampled, whole, chances))
    assert chances @ sampled == pytest.approx(chances @ whole, rel=1e-12) and chances @ whole > 0.05
    variance = [chances @ (x - chances @ x) ** 2 for x in (sampled, whole)]
    assert variance[1] < variance[0]


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_divides_by_what_was_written_and_mixes_cross_entropy_on_the_data_alone(student, teacher, packing):
    """Answers of one token (empty but for its end), of one that was cut off, and the data's; the end token pads too."""
    told, data, ratio = [(END,), (0, 1, 0), (1, END)], (0, 1, END), 0.7
    source = source_of(Dictated(told), 1, 6, 0.5, data, packing)
    (step,) = source.planned.schedule()
    ((_, micro_batches),) = list(source_of(Dictated(told), 1, 6, 0.5, data, packing).steps())
    count = sum("written" in place for place in next(source.schedule()).places)
    assert count == 3, "the seed was chosen so"
    total, targets = 0.0, 0
    for answer, written in [*((one, True) for one in told), *[(data, False)] * 3]:
        q, p = distributions(student, teacher, answer)
        ce = 0.0 if written else -q[range(len(answer)), list(answer)].log().sum()
        total = total + (1 - ratio) * ce + ratio * DIVERGENCES["reverse_kl"](q, p).sum()
        targets += len(answer)
    assert targets == 6 + 9 and sum(batch.num_targets for batch in micro_batches) == targets
    source = source_of(Dictated(told), 1, 6, 0.5, data, packing)
    ((value, gradient),) = gradients(student, teacher, source, Loss(kd_ratio=ratio, divergence="reverse_kl"))
    assert value == pytest.approx(total.item() / targets, rel=1e-12)
    expected = gradient_of(student, total / targets)
    assert (gradient - expected).abs().max() < 1e-12 * expected.abs().max()


def test_temperature_of_sampling_is_another_than_that_of_the_loss(student, teacher):
    """Which answers are written depends on the one, what is learnt at them on the other."""
    hot = dataclasses.replace(Sampling(1.0, T, 5), temperature=50.0)
    keys = list(range(1500))
    share = [
        np.mean([one.ids == (END,) for one in LocalWriter(student, {END}, 1500).write([PROMPT] * 1500, keys, sampling)])
        for sampling in (Sampling(1.0, T, 5), hot)
    ]
    assert share[1] == pytest.approx(1 / 3, abs=0.05) and share[0] == pytest.approx(float(probability(student, teacher, (END,))), abs=0.05)
    assert abs(share[0] - share[1]) > 0.12


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_what_an_older_student_wrote_has_with_importance_weights_the_mean_gradient_of_the_students_own(student, teacher, name):
    """Of the sum over an answer's tokens. The older student is a third model; weights by each token's own ratio would not do."""
    older = LanguageModel(model(3), V).eval()
    at = [(range(len(answer)), list(answer)) for answer in ANSWERS]
    log_p = [
        [distributions(one, teacher, answer)[0][i].log().detach() for one in (older, student)]
        for answer, i in zip(ANSWERS, at, strict=True)
    ]
    chances = torch.stack([then.sum().exp() for then, _ in log_p])
    objective = sum(
        now.sum().exp() * DIVERGENCES[name](*distributions(student, teacher, a)).sum() for a, (_, now) in zip(ANSWERS, log_p, strict=True)
    )
    expected = gradient_of(student, objective)

    def apart(weights) -> float:
        class Older:
            def write(self, prompts, keys, sampling):
                ids, own = next(answers)
                return [Completion(ids, ids[-1] == END, weights=own)]

        answers = zip(ANSWERS, weights, strict=True)
        found = gradients(student, teacher, source_of(Older(), len(ANSWERS)), Loss(kd_ratio=1.0, divergence=name))
        sums = torch.stack([g * len(answer) for (_, g), answer in zip(found, ANSWERS, strict=True)])  # a step is divided by its targets
        return float((chances @ sums - expected).abs().max() / expected.abs().max())

    assert apart([prefix_weights((now - then).numpy(), 1e9) for then, now in log_p]) < 1e-6  # weights are float32
    assert apart([None] * len(ANSWERS)) > 0.01 and apart([(now - then).exp().tolist() for then, now in log_p]) > 0.01


def test_with_the_long_horizon_part_it_is_the_gradient_of_the_reverse_kl_of_whole_answers(student, teacher, drawn):
    """MiniLLM's objective, with the gradient through the sampling; and within three standard errors over what the writer draws."""
    objective, chances = 0.0, []
    for answer in ANSWERS:
        at = range(len(answer)), list(answer)
        q, p = (one[at].log().sum() for one in distributions(student, teacher, answer))
        objective = objective + q.exp() * (q - p)
        chances.append(q.exp().item())
    expected = gradient_of(student, objective)
    loss, whole = Loss(kd_ratio=1.0, divergence="reverse_kl"), LongHorizon(gamma=1.0, length_normalized=False)
    lengths, chances = (torch.tensor(x, dtype=torch.float64) for x in ([len(answer) for answer in ANSWERS], chances))
    with_it, without = (
        torch.stack([g for _, g in gradients(student, teacher, source_of(Dictated(ANSWERS), 15, long_horizon=ahead), loss, ahead)])
        * lengths[:, None]  # a step is divided by its targets
        for ahead in (whole, None)
    )
    assert (chances @ with_it - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (chances @ without - expected).abs().max() > 0.05 * expected.abs().max(), "the part is not small here"
    n, mean = drawn.sum(), drawn / drawn.sum() @ with_it
    deviation = (drawn / n @ (with_it - mean) ** 2).sqrt() / n**0.5
    apart = (mean - expected).abs() / deviation.clamp(min=1e-9)
    assert apart.max() < 4.5 and (apart < 3).double().mean() > 0.98


def test_forward_kl_at_what_the_teacher_writes_is_the_kl_of_whole_answers(student, teacher):
    """KL(p || q) of sequences, whose gradient is that of cross-entropy on the teacher's answers too (sequence-level distillation): without any
    cross-entropy it is there already, with less variance."""
    kl, ce, chances = 0.0, 0.0, []
    for answer in ANSWERS:
        at = range(len(answer)), list(answer)
        q, p = (one[at].log().sum() for one in distributions(student, teacher, answer))
        chances.append(p.exp().item())
        kl, ce = kl + p.exp().detach() * (p.detach() - q), ce - p.exp().detach() * q
    expected = gradient_of(student, kl)
    source = source_of(None, 15, share=0.0, teacher=Dictated(ANSWERS), teacher_writes=1.0)
    found = gradients(student, teacher, source, Loss(kd_ratio=1.0, divergence="forward_kl"))
    each = torch.stack([g for _, g in found]) * torch.tensor([[len(answer)] for answer in ANSWERS])
    chances = torch.tensor(chances, dtype=torch.float64)
    assert (chances @ each - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (gradient_of(student, ce) - expected).abs().max() < 1e-12 * expected.abs().max()
    value = sum(c * v * len(answer) for c, (v, _), answer in zip(chances, found, ANSWERS, strict=True))
    assert value.item() == pytest.approx(kl.item(), rel=1e-12)


SHARE = 0.3  # of the teacher, while sampling


def mixture(student, teacher, answer) -> torch.Tensor:
    """The probability of an answer whose tokens are drawn from the mixture."""
    q, p = distributions(student, teacher, answer)
    return (SHARE * p + (1 - SHARE) * q)[range(len(answer)), list(answer)].prod().detach()


def test_products_of_importance_weights_make_up_for_a_mixture_exactly(student, teacher):
    """Sampled from a mixture with the teacher, the mean gradient is that of the reverse KL of whole answers; and within three standard errors
    over what is drawn. With weights of each token alone it is not."""
    objective, chances = 0.0, []
    for answer in ANSWERS:
        at = range(len(answer)), list(answer)
        q, p = (one[at].log().sum() for one in distributions(student, teacher, answer))
        objective = objective + q.exp() * (q - p)
        chances.append(mixture(student, teacher, answer).item())
    expected = gradient_of(student, objective)
    assert sum(chances) == pytest.approx(1, abs=1e-12)
    loss, lengths = Loss(kd_ratio=1.0, divergence="reverse_kl"), torch.tensor([len(answer) for answer in ANSWERS], dtype=torch.float64)
    by_products, by_token = (
        torch.stack([g for _, g in gradients(student, teacher, source_of(Dictated(ANSWERS), 15, long_horizon=ahead), loss, ahead)])
        * lengths[:, None]
        for ahead in (LongHorizon(gamma=1.0, length_normalized=False, teacher_mix=SHARE, mix_weights=how) for how in ("product", "token"))
    )
    chances = torch.tensor(chances, dtype=torch.float64)
    assert (chances @ by_products - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (chances @ by_token - expected).abs().max() > 0.01 * expected.abs().max()
    drawn = draw(student, Mix((teacher,), functools.partial(with_share, share=SHARE, weights=[1.0])))
    n, mean = drawn.sum(), drawn / drawn.sum() @ by_products
    deviation = (drawn / n @ (by_products - mean) ** 2).sqrt() / n**0.5
    apart = (mean - expected).abs() / deviation.clamp(min=1e-9)
    assert apart.max() < 4.5 and (apart < 3).double().mean() > 0.98
    share = drawn / n
    assert ((share - chances).abs() < 4 * (chances * (1 - chances) / n).sqrt() + 1e-12).all(), "it is drawn from the mixture"


@pytest.mark.parametrize("geometric", [False, True])
def test_several_teachers_write_from_the_distribution_that_the_loss_compares_with(student, teacher, geometric):
    """Of an ensemble: what is drawn has its probability of whole answers, and it is what a mixture's signal says."""
    other, weights = LanguageModel(model(3), V).eval(), [0.3, 0.7]
    chances = []
    for answer in ANSWERS:
        p = [distributions(one, teacher, answer)[0].detach() for one in (teacher, other)]
        if geometric:
            one = p[0] ** 0.3 * p[1] ** 0.7
            one = one / one.sum(-1, keepdim=True)
        else:
            one = 0.3 * p[0] + 0.7 * p[1]
        chances.append(one[range(len(answer)), list(answer)].prod())
    chances, mix = torch.stack(chances), Mix((other,), functools.partial(together, weights=weights, geometric=geometric), whole=True)
    assert chances.sum().item() == pytest.approx(1, abs=1e-12)
    drawn = draw(teacher, mix)
    n = drawn.sum()
    assert ((drawn / n - chances).abs() < 4 * (chances * (1 - chances) / n).sqrt() + 1e-12).all()
    assert (chances - torch.stack([probability(teacher, teacher, answer) for answer in ANSWERS])).abs().max() > 0.05, "not the first one's"
    (batch,) = next(iter(source_of(Dictated([(0, 1, 0)]), 1).steps()))[1]
    combined = Mixture([LiveTeacher(one) for one in (teacher, other)], weights, "log_probabilities" if geometric else "probabilities")
    said = combined(batch).label_log_probs(slice(None), batch.labels_N)
    assert said.sum().exp().item() == pytest.approx(chances[ANSWERS.index((0, 1, 0))].item(), rel=1e-12)
    (written,) = LocalWriter(teacher, {END}, 1, mix).write([PROMPT], [0], Sampling(1.0, 1, 5))
    ahead = torch.stack([sum(c for c, a in zip(chances, ANSWERS, strict=True) if a[0] == token) for token in range(V)])
    assert written.entropy == pytest.approx(-(ahead * ahead.log()).sum().item(), rel=1e-12), "of all of them together"


def test_weights_of_each_token_alone_have_the_expectation_of_minillms(student, teacher):
    """Of its equation with w_t at the divergence of a token too, whose expectation over the token is 1."""
    gamma, objective, chances = 0.6, 0.0, []
    for answer in ANSWERS:
        q, p = distributions(student, teacher, answer)
        at = range(len(answer)), list(answer)
        rewards, w = (p[at] / q[at]).log().detach(), (q[at] / (SHARE * p + (1 - SHARE) * q)[at]).detach()
        divergence, chance = DIVERGENCES["reverse_kl"](q, p), mixture(student, teacher, answer)
        for t in range(len(answer)):
            later = range(t + 1, len(answer))
            ahead = sum(gamma ** (k - t - 1) * rewards[k] for k in later) / max(1, len(later))
            objective = objective + chance * w[t] * (divergence[t] - ahead * q[at][t].log())
        chances.append(chance)
    settings, loss = LongHorizon(gamma, True, teacher_mix=SHARE), Loss(kd_ratio=1.0, divergence="reverse_kl")
    found = gradients(student, teacher, source_of(Dictated(ANSWERS), 15, long_horizon=settings), loss, settings)
    mean = sum(chance * len(answer) * g for chance, answer, (_, g) in zip(chances, ANSWERS, found, strict=True))
    expected = gradient_of(student, objective)
    assert (mean - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("mix", [None, "token", "product"])
@pytest.mark.parametrize("normalized", [True, False])
def test_the_long_horizon_part_is_of_written_answers_alone_discounted_and_divided(student, teacher, normalized, mix):
    told, data, gamma, ratio = [(0, 1, 0), (1, END), (1, 1, END)], (0, 1, END), 0.6, 0.7
    ahead = LongHorizon(gamma, normalized, "sampled", SHARE if mix else 0.0, mix or "token")
    total, targets = 0.0, 0
    for answer, written in [*((one, True) for one in told), *[(data, False)] * 3]:
        q, p = distributions(student, teacher, answer)
        divergence, at = DIVERGENCES["reverse_kl"](q, p), (range(len(answer)), list(answer))
        targets += len(answer)
        log_q, log_p = q[at].log(), p[at].log()
        if not written:
            total = total - (1 - ratio) * log_q.sum() + ratio * divergence.sum()
            continue
        w = (q[at] / (SHARE * p + (1 - SHARE) * q)[at]).detach().tolist() if mix else [1.0] * len(answer)
        products = np.cumprod(w) if mix == "product" else np.ones(len(answer))
        for t in range(len(answer)):
            later, of_all = range(t + 1, len(answer)), 1.0 if mix == "product" else w[t]
            reward = sum(gamma ** (k - t - 1) * products[k] * (log_p[k] - log_q[k]).item() for k in later)
            reward = of_all * reward / (len(later) if normalized and later else 1)
            total = total - ratio * reward * log_q[t] + ratio * (products[t - 1] if t else 1.0) * divergence[t]
    source = source_of(Dictated(told), 1, 6, 0.5, data, long_horizon=ahead)
    ((value, gradient),) = gradients(student, teacher, source, Loss(kd_ratio=ratio, divergence="reverse_kl"), ahead)
    assert value == pytest.approx(total.item() / targets, rel=1e-12)
    expected = gradient_of(student, total / targets)
    assert (gradient - expected).abs().max() < 1e-12 * expected.abs().max()


RULES = {
    "teacher_entropy": lambda t, q, p: -(p * p.log()).sum() / np.log(V),
    "student_entropy": lambda t, q, p: -(q * q.log()).sum() / np.log(V),
    "divergence": lambda t, q, p: (((p.sqrt() - q.sqrt()) ** 2).sum() / 2).sqrt(),
    "position": lambda t, q, p: 0.5 ** (t / 2.0),
}


@pytest.mark.parametrize(
    ("name", "temperature", "rule", "mix"),
    [
        ("forward_kl", 1.0, None, False),
        ("generalized_jsd", 2.0, "student_entropy", False),
        ("forward_kl", 0.5, "teacher_entropy", True),
        ("reverse_kl", 2.0, "position", True),
        ("reverse_kl", 1.0, "divergence", False),
    ],
)
def test_exact_rewards_make_the_gradient_of_any_weighted_divergence_of_whole_answers(student, teacher, name, temperature, rule, mix):
    """Of E over y ~ q of the sum of w_t T^2 D_t, with the gradient through the sampling and none through the weights; sampled from a mixture with
    the teacher too."""
    objective, chances = 0.0, []
    for answer in ANSWERS:
        q, p = distributions(student, teacher, answer)
        chances.append((mixture(student, teacher, answer) if mix else probability(student, teacher, answer)).item())
        soft_q, soft_p = (torch.softmax(one.log() / temperature, -1) for one in (q, p))
        weights = [float(RULES[rule](t, q[t].detach(), p[t])) if rule else 1.0 for t in range(len(answer))]
        costs = torch.tensor(weights, dtype=torch.float64) * temperature**2 * DIVERGENCES[name](soft_q, soft_p)
        objective = objective + q[range(len(answer)), list(answer)].prod() * costs.sum()
    expected = gradient_of(student, objective)
    weighing = {"by": rule, "half_life": 2.0 if rule == "position" else None}
    loss = Loss(kd_ratio=1.0, divergence=name, temperature=temperature, target_weights=TargetWeights(**weighing) if rule else None)
    ahead = LongHorizon(1.0, False, "exact", *((SHARE, "product") if mix else ()))
    lengths, chances = (torch.tensor(x, dtype=torch.float64) for x in ([len(answer) for answer in ANSWERS], chances))
    found, without = (
        torch.stack([g for _, g in gradients(student, teacher, source_of(Dictated(ANSWERS), 15, long_horizon=one), loss, one)])
        * lengths[:, None]
        for one in (ahead, None)
    )
    assert (chances @ found - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (chances @ without - expected).abs().max() > 0.02 * expected.abs().max(), "the part is not small here"


def test_exact_rewards_vary_less_than_sampled_ones_with_the_same_mean(student, teacher):
    loss = Loss(kd_ratio=1.0, divergence="reverse_kl")
    chances = torch.tensor([float(probability(student, teacher, answer)) for answer in ANSWERS], dtype=torch.float64)
    lengths, found = torch.tensor([[len(answer)] for answer in ANSWERS]), []
    for ahead in (LongHorizon(0.8, False, how) for how in ("sampled", "exact")):
        source = source_of(Dictated(ANSWERS), 15, long_horizon=ahead)
        each = torch.stack([g for _, g in gradients(student, teacher, source, loss, ahead)]) * lengths
        found.append((chances @ each, (chances @ (each - chances @ each) ** 2).sum()))
    (mean, variance), (exact, less) = found
    assert (mean - exact).abs().max() < 1e-12 * mean.abs().max() and less < 0.9 * variance


@pytest.mark.parametrize("rewards", ["sampled", "exact"])
def test_what_the_teacher_writes_has_the_divergence_alone(student, teacher, rewards):
    """It is no sample of the student: of the others each has its part."""
    ahead, loss = LongHorizon(1.0, False, rewards, SHARE, "product"), Loss(kd_ratio=1.0, divergence="reverse_kl")
    own, theirs, data = (0, 1, 0), (1, 0, END), (1, END)
    settings = {"long_horizon": ahead, "teacher": Dictated(itertools.repeat(theirs)), "teacher_writes": 0.3}
    source = source_of(Dictated(itertools.repeat(own)), 1, 12, 0.4, data, **settings)
    places = next(source.schedule()).places
    of_each = [sum(word in place for place in places) for word in ("written at", "by the teacher")]
    counts = {own: of_each[0], theirs: of_each[1], data: 12 - sum(of_each)}
    assert all(count > 1 for count in counts.values())
    total = 0.0
    for answer, count in counts.items():
        q, p = distributions(student, teacher, answer)
        divergence, at = DIVERGENCES["reverse_kl"](q, p), (range(len(answer)), list(answer))
        log_q, log_p = q[at].log(), p[at].log()
        w = (q[at] / (SHARE * p + (1 - SHARE) * q)[at]).detach().numpy() if answer == own else np.ones(len(answer))
        through, before = np.cumprod(w), np.cumprod([1.0, *w[:-1]])
        value = (torch.tensor(before) * divergence).sum()
        for t in range(len(answer)) if answer == own else ():
            later = range(t + 1, len(answer))
            rewards_of = [
                through[k] * (log_p - log_q)[k].item() if rewards == "sampled" else -before[k] * divergence[k].item() for k in later
            ]
            value = value - sum(rewards_of) * log_q[t]
        total = total + count * value
    targets = sum(count * len(answer) for answer, count in counts.items())
    settings["teacher"] = Dictated(itertools.repeat(theirs))
    ((_, gradient),) = gradients(student, teacher, source_of(Dictated(itertools.repeat(own)), 1, 12, 0.4, data, **settings), loss, ahead)
    expected = gradient_of(student, total / targets)
    assert (gradient - expected).abs().max() < 1e-12 * expected.abs().max()


def test_the_long_horizon_part_follows_the_divergences_weight_and_what_it_is_divided_by(student, teacher):
    """A schedule of kd_ratio, and with `normalize: weights` the sum of the divergence's weights."""
    batch = next(iter(source_of(Dictated([(0, 1, 0)]), 1, long_horizon=LongHorizon()).steps()))[1][0]

    def gradient(step: int, scale: dict[str, float], **changes) -> torch.Tensor:
        loss, ahead = Loss(divergence="reverse_kl", **changes), OnPolicy(long_horizon=LongHorizon(0.9, rewards="exact"))
        distiller = Distiller(student, [*build_terms(loss, None, 5), *long_horizon_terms(ahead, loss, None, 5)])
        distiller.start_step(step, scale)
        out = distiller(batch, LiveTeacher(teacher)(batch))
        values = {name: rows_N.sum().item() for name, rows_N in out.rows.items()}
        assert distiller.combiner()(values) == pytest.approx(out.total.item(), rel=1e-12)
        return gradient_of(student, out.total)

    schedule, whole = {"from": 1.0, "to": 0.5}, gradient(1, {}, kd_ratio=1.0)
    assert torch.allclose(gradient(5, {}, kd_ratio=schedule), whole / 2, rtol=1e-12)
    assert torch.allclose(gradient(1, {}, kd_ratio=schedule), whole, rtol=1e-12)
    scaled = {"kd": 1.7, "long_horizon": 9.0, "ce": 5.0}
    assert torch.allclose(gradient(1, scaled, kd_ratio=1.0, normalize="weights"), 1.7 * whole, rtol=1e-12)
    assert torch.equal(gradient(1, scaled, kd_ratio=1.0), whole)


def test_costs_are_those_of_the_step(student, teacher):
    """With a schedule of the temperature the rewards have that of the step, as the divergence has."""
    batch, found = next(iter(source_of(Dictated([(0, 1, 0)]), 1, long_horizon=LongHorizon()).steps()))[1][0], []
    for temperature, step in (({"from": 1.0, "to": 3.0}, 5), (3.0, 1)):
        loss, ahead = Loss(kd_ratio=1.0, divergence="forward_kl", temperature=temperature), LongHorizon(rewards="exact")
        distiller = Distiller(student, [*build_terms(loss, None, 5), *long_horizon_terms(OnPolicy(long_horizon=ahead), loss, None, 5)])
        distiller.start_step(step, {})
        found.append(gradient_of(student, distiller(batch, LiveTeacher(teacher)(batch)).total))
    assert torch.equal(*found)


def test_costs_have_the_weight_of_their_example_once(student, teacher):
    """As the divergence has it: a row that counts twice has twice the gradient."""
    ahead, loss, found = LongHorizon(1.0, False, "exact"), Loss(kd_ratio=1.0, divergence="reverse_kl"), []
    for weight in (1.0, 2.0):
        source = source_of(Dictated([(0, 1, 0)]), 1, long_horizon=ahead)
        source.examples.weights["kd"] = np.full(1, weight, np.float32)
        found.append(gradients(student, teacher, source, loss, ahead)[0][1])
    assert torch.allclose(found[1], 2 * found[0], rtol=1e-12)


@pytest.mark.parametrize("rewards", ["sampled", "exact"])
def test_a_step_in_which_nothing_is_written_has_no_long_horizon_part(student, teacher, rewards):
    ahead, loss = LongHorizon(rewards=rewards), Loss(kd_ratio=0.7, divergence="reverse_kl")
    pair = [
        gradients(student, teacher, source_of(None, 1, 3, {"from": 0.0, "to": 1e-12}, long_horizon=one), loss, one)[0]
        for one in (ahead, None)
    ]
    assert pair[0][0] == pair[1][0] and torch.equal(pair[0][1], pair[1][1])
