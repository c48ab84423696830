"""Codes of tokens and values; a teacher known by its likeliest tokens or by draws: against sums by hand in float64."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llmkd.batch import Example
from llmkd.head import Head
from llmkd.losses.divergences import forward_kl, make_divergence
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.losses.terms import HeadTerm
from llmkd.signals import Dense
from llmkd.teachers.cache import records
from llmkd.teachers.cache.codec import decode_ids, decode_values, encode_ids, encode_values, id_bytes, packed_bytes
from llmkd.teachers.cache.records import SampledFormat, TopKFormat, uniform_draws
from llmkd.teachers.sparse import Sampled, TopK, interpolate
from tests.losses.test_divergences import each_kind, randn

N, V = 12, 40
ALL = slice(None)
KL = forward_kl


def dense(spread=2.0, n=N, vocab=V, seed=0):
    return (spread * randn(n, vocab, seed=seed)).log_softmax(1)


def labels(n=N, vocab=V):
    return torch.arange(n) * 7 % vocab


def examples(*targets, first=0):
    return [Example(f"{first + i:016x}", n, -1) for i, n in enumerate(targets)]


@pytest.mark.parametrize("vocab", [1, 2, 61, 1000, 128256, 300_000])
@pytest.mark.parametrize("count", [1, 2, 50, 64, 200])
def test_ids_come_back_whatever_they_are(count, vocab):
    drawn = torch.randint(vocab, (40, count), generator=torch.Generator().manual_seed(count)).sort(1).values
    edges = torch.tensor([[0] * count, [vocab - 1] * count])
    ids = torch.cat([drawn, edges])
    code = encode_ids(ids, vocab)
    assert code.shape == (42, id_bytes(count, vocab)) and code.dtype == torch.uint8
    assert torch.equal(decode_ids(code, count, vocab), ids)


def test_the_sizes_are_those_that_are_told():
    sizes = [(id_bytes(k, 128256), packed_bytes(k, 8)) for k in (50, 64, 128)]
    assert sizes == [(83, 50), (104, 64), (192, 128)]
    assert [TopKFormat(128256, k, b).bytes for k, b in ((50, 4), (50, 8), (64, 4), (64, 8), (128, 4), (128, 6), (128, 8))] == [
        *(122, 147, 150, 182, 270, 302, 334)
    ]
    assert SampledFormat(128256, 50, 1.0, 0).bytes == 89


@pytest.mark.parametrize("bits", [4, 5, 8, 12, 16])
def test_values_come_back_within_half_a_step_and_minus_infinity_as_it_is(bits):
    values = torch.cat([torch.zeros(N, 1), -8 * torch.rand(N, 30, generator=torch.Generator().manual_seed(0))], 1).double()
    values[2, 5:] = values[3] = -math.inf
    code, spread = encode_values(values, bits)
    found = decode_values(code, spread, 31, bits).double()
    assert torch.equal(found == -math.inf, values == -math.inf)
    finite = values > -math.inf
    step = 8 * (4 / 3 * math.log(4)) / (2**bits - 2)  # the widest one, at the least likely token
    assert (found - values)[finite].abs().max() < step / 2 + 8 / 2048  # and the rounding of the range to float16
    near = finite & (values > -0.2)
    assert (found - values)[near].abs().max() < step / 2 * (1 + 3 * 0.25 / 8) / 4 + 0.2 / 2048
    assert not found[~(values < 0)].any()


def test_equal_values_and_a_single_one():
    for values in (torch.full((2, 5), -3.0), torch.full((2, 1), -3.0)):
        code, spread = encode_values(values, 8)
        assert not decode_values(code, spread, values.shape[1], 8).any()


def test_the_tails_mass_is_exact_at_the_nodes_and_close_between():
    log_p = (-1.3 * torch.arange(1, 5001).double().log()[None]).log_softmax(1)
    known = TopK.of(log_p, 20, torch.tensor([3]))
    for temperature in (0.5, 0.7, 1, 1.5, 2, 3, 4, 8):
        true = torch.logsumexp(log_p[:, 20:] / temperature, 1) - torch.logsumexp(log_p / temperature, 1)
        error = abs(known.events(ALL, temperature)[0, -1].exp() - true.exp()).item()
        assert error < (1e-12 if temperature in (0.5, 1, 2, 4) else 0.01), temperature


def test_at_a_high_temperature_all_tokens_are_alike():
    last = TopK.of(dense(), 7, labels()).events(ALL, 1e9)[:, -1]
    assert_close(last.exp(), torch.full((N,), (V - 7) / V, dtype=torch.float64))


def test_a_falling_function_stays_falling_and_two_nodes_make_a_line():
    nodes, values = (0.0, 0.5, 1.0, 2.0), torch.tensor([[10.0, 4.0, -1.0, -1.5], [3.0, 2.9, -9.0, -30.0]]).double()
    path = torch.stack([interpolate(nodes, values, s / 50) for s in range(126)], 1)
    assert (path.diff(dim=1) <= 1e-12).all()
    assert_close(path[:, [0, 25, 50, 100]], values)
    assert_close(interpolate((0.0, 1.0), torch.tensor([[4.0, 2.0]]), 0.25), torch.tensor([3.5]))


def by_hand(divergence, log_q, log_p, k, temperature):
    """K + 1 events, target by target: likeliest first, all others summed."""
    out = []
    for p, q in zip((log_p / temperature).softmax(1), (log_q / temperature).softmax(1), strict=True):
        order = log_p[len(out)].argsort(descending=True)
        merged = [torch.cat([x[order[:k]], x[order[k:]].sum()[None]]) for x in (q, p)]
        out.append(divergence(*(x[None].log() for x in merged))[0])
    return torch.stack(out)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@each_kind
def test_it_is_the_divergence_over_the_kept_tokens_and_one_bucket(name, options, temperature):
    log_p, log_q = dense(), dense(seed=1)
    divergence = make_divergence(name, **options)
    soft = (log_q / temperature).log_softmax(1)
    found = TopK.of(log_p, 7, labels()).divergence(divergence, ALL, soft, temperature)
    assert_close(found, by_hand(divergence, log_q, log_p, 7, temperature), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.0, 3.0])
@each_kind
def test_all_tokens_kept_is_the_dense_divergence_and_gradient(name, options, temperature):
    log_p, student = dense(), randn(N, V, seed=1).requires_grad_()
    divergence = make_divergence(name, **options)
    values = []
    for signal in (TopK.of(log_p, V, labels()), None):
        log_q = (student / temperature).log_softmax(1)
        value = (
            signal.divergence(divergence, ALL, log_q, temperature) if signal else divergence(log_q, (log_p / temperature).log_softmax(1))
        )
        values.append((value.detach(), *torch.autograd.grad(value.sum(), student)))
    assert_close(values[0], values[1], rtol=1e-9, atol=1e-13)


@each_kind
def test_gradients_through_the_bucket(name, options):
    if name == "adaptive_kl":
        return  # its weight takes no gradient
    signal, divergence = TopK.of(dense(n=3, vocab=9), 4, labels(3, 9)), make_divergence(name, **options)
    student = randn(3, 9, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: signal.divergence(divergence, ALL, x.log_softmax(1), 2.0), student)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_it_lies_between_nothing_and_the_dense_divergence(name, temperature):
    log_p, log_q = dense(3.0), dense(3.0, seed=1)
    divergence = make_divergence(name)
    p, q = ((x / temperature).log_softmax(1) for x in (log_p, log_q))
    before = torch.zeros(N, dtype=torch.float64)
    for k in (1, 3, 10, 25, V):
        found = TopK.of(log_p, k, labels()).divergence(divergence, ALL, q, temperature)
        assert (found >= before - 1e-3).all() and (found <= divergence(q, p) + 1e-3).all()
        if temperature == 1:
            assert (found >= before - 1e-12).all() and (found <= divergence(q, p) + 1e-12).all()
        before = found
    assert_close(before, divergence(q, p))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_densified_it_says_the_same_and_shares_the_rest_as_the_student_does(temperature):
    log_p, log_q = dense(), (dense(seed=1) / temperature).log_softmax(1)
    signal = TopK.of(log_p, 7, labels())
    whole = signal.log_probs(ALL, log_q, temperature)
    assert_close(whole.logsumexp(1), torch.zeros(N, dtype=torch.float64))
    for divergence in (make_divergence("forward_kl"), make_divergence("reverse_kl"), make_divergence("generalized_jsd")):
        assert_close(divergence(log_q, whole), signal.divergence(divergence, ALL, log_q, temperature))
    assert_close(signal.log_probs(ALL).logsumexp(1), torch.zeros(N, dtype=torch.float64))
    assert_close(signal.log_probs(torch.tensor([5, 2]), log_q[[5, 2]], temperature), whole[[5, 2]])


def test_tokens_that_the_teacher_rules_out_belong_to_the_rest():
    log_p = dense()
    log_p[:, 4:] = -math.inf
    log_p, student = log_p.log_softmax(1), randn(N, V, seed=1).requires_grad_()
    signal = TopK.of(log_p, 9, labels() % 4)
    log_q = student.log_softmax(1)
    value = signal.divergence(KL, ALL, log_q)
    assert_close(value, KL(log_q, log_p))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()
    assert_close(gradient, log_q.exp().detach() - log_p.exp(), rtol=1e-8, atol=1e-12)


def test_the_code_of_a_target_loses_little_and_its_events_sum_to_one():
    log_p, log_q = dense(3.0, 200, 3000).float(), dense(2.0, 200, 3000, seed=1).float()
    know = labels(200, 3000)
    for bits, most in ((4, 1e-2), (6, 5e-4), (8, 3e-5), (16, 1e-6)):
        record_format = TopKFormat(3000, 64, bits)
        signal = record_format.signal(torch.from_numpy(record_format.record(dense_signal(log_p), know, examples(200))), "cpu")
        exact = TopK.of(log_p.double(), 64, know)
        assert_close(signal.ids_NK, exact.ids_NK)
        assert_close(signal.events(ALL, 1.7).logsumexp(1), torch.zeros(200), atol=1e-6, rtol=0)
        assert forward_kl(signal.events(ALL).double(), exact.events(ALL)).mean() < most
        assert_close(signal.divergence(KL, ALL, log_q).mean().double(), exact.divergence(KL, ALL, log_q.double()).mean(), rtol=0.01, atol=0)
        exact_metrics = signal.exact_metrics(ALL, know, log_q)
        assert_close(exact_metrics["teacher_ce"], -log_p.gather(1, know[:, None])[:, 0], rtol=1e-3, atol=0)
        assert_close(exact_metrics["top1_agreement"], (log_p.argmax(1) == log_q.argmax(1)).float())
        assert_close(exact_metrics["teacher_entropy"], -(log_p.exp() * log_p).sum(1), rtol=1e-3, atol=0)
        assert_close(signal.label_log_probs(slice(3, 5), know[3:5]), -exact_metrics["teacher_ce"][3:5])


def dense_signal(log_p):
    """A live signal whose hidden states are its logits."""
    return Dense(log_p, Head(torch.nn.Identity(), log_p.shape[1]))


def test_a_code_in_which_nothing_is_kept_compares_nothing():
    record_format = TopKFormat(V, 5, 8, (1.0,))
    nothing = TopK(
        torch.arange(5)[None], torch.full((1, 5), -math.inf), torch.zeros(1, 1), V, torch.zeros(1), torch.full((1,), math.nan), (1.0,)
    )
    signal = record_format.signal(record_format.encode(nothing), "cpu")
    student = randn(1, V).float().requires_grad_()
    for temperature in (1.0, 3.0):
        value = signal.divergence(KL, ALL, (student / temperature).log_softmax(1), temperature)
        assert value.abs().item() < 1e-6 and torch.autograd.grad(value.sum(), student)[0].abs().max() < 1e-6
    assert signal.exact_metrics(ALL, labels(1), student.detach()).keys() == {"teacher_ce", "top1_agreement"}


def test_the_fused_loss_takes_it_in_chunks():
    hidden, head = randn(N, 8).requires_grad_(), Head(torch.nn.Linear(8, V, bias=False, dtype=torch.float64).requires_grad_(False), V)
    signal, objective = TopK.of(dense(), 6, labels()), Objective(0.5, 2.0, make_divergence("generalized_jsd"))
    results = []
    for chunk in (5, N):
        total, _ = fused_loss(hidden, head, labels(), objective, signal, chunk)
        results.append((total.detach(), *torch.autograd.grad(total, hidden)))
    assert_close(results[0], results[1])


# Draws


def sampled(log_p, draws, temperature=1.0, seed=0, first=0):
    record_format = SampledFormat(log_p.shape[1], draws, temperature, seed)
    records = record_format.record(dense_signal(log_p), labels(len(log_p), log_p.shape[1]), examples(len(log_p), first=first))
    return record_format.signal(torch.from_numpy(records), "cpu")


def test_draws_follow_from_seed_example_and_place_alone():
    whole = uniform_draws(3, examples(4, 2, 5), 6)
    assert whole.shape == (11, 6) and whole.min() >= 0 and whole.max() < 1
    assert np.array_equal(uniform_draws(3, examples(5, first=2), 6), whole[6:])
    assert len(np.unique(whole)) == 66 and not np.array_equal(uniform_draws(4, examples(4, 2, 5), 6), whole)
    assert np.array_equal(uniform_draws(3, examples(1, first=2), 3)[0], whole[6, :3])
    many = uniform_draws(0, examples(*[10] * 300), 50)
    assert abs(many.mean() - 0.5) < 4 / math.sqrt(12 * many.size)
    assert abs(np.corrcoef(many[:, 0], many[:, 1])[0, 1]) < 4 / math.sqrt(3000)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_and_value_are_right_on_average(temperature):
    log_p, student = dense(n=4, vocab=12).float(), randn(4, 12, seed=1).float().requires_grad_()
    log_q = (student / temperature).log_softmax(1)
    soft = (log_p / temperature).log_softmax(1)
    (want,) = torch.autograd.grad(KL(log_q, soft).sum(), student, retain_graph=True)
    found, values = [], []
    for i in range(400):
        value = sampled(log_p, 20, temperature, first=i).divergence(make_divergence("forward_kl"), ALL, log_q, temperature)
        values.append(value.detach())
        found.append(torch.autograd.grad(value.sum(), student, retain_graph=True)[0])
    for many, target in ((torch.stack(found), want), (torch.stack(values), KL(log_q, soft).detach())):
        error = (many.mean(0) - target).abs()
        assert (error < 4.5 * many.std(0) / math.sqrt(400) + 1e-3).all()
        assert many.std(0).max() > 0.01  # they were drawn
    single = sampled(log_p, 20, temperature)
    log_share = single.log_probs(ALL, log_q, temperature)
    (plain,) = torch.autograd.grad(KL(log_q, log_share).sum(), student, retain_graph=True)
    value = single.divergence(KL, ALL, log_q, temperature).sum()
    assert_close(torch.autograd.grad(value, student, retain_graph=True)[0], plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("chance, drawn", [(None, {2, 7}), (0.0, {2}), (1 - 2.0**-53, {7})])
def test_draws_never_fall_on_what_is_ruled_out(monkeypatch, chance, drawn):
    log_p = torch.full((3, 10), -math.inf)
    log_p[:, [2, 7]] = math.log(0.5)
    if chance is not None:
        monkeypatch.setattr(records, "uniform_draws", lambda seed, examples, draws: np.full((3, draws), chance))
    signal = sampled(log_p, 200)
    assert set(signal.ids_ND.flatten().tolist()) == drawn
    assert_close(signal.entropy_N, torch.full((3,), math.log(2)), rtol=1e-3, atol=0)


def test_samples_are_for_their_own_temperature_and_the_forward_kl():
    signal: Sampled = sampled(dense().float(), 5, 2.0)
    log_q = dense(seed=1).float()
    with pytest.raises(ValueError, match="found 1, and the tokens were sampled at 2"):
        signal.divergence(KL, ALL, log_q)
    with pytest.raises(ValueError, match="temperature"):
        signal.log_probs(ALL)
    with pytest.raises(ValueError, match="estimate forward_kl only"):
        signal.divergence(make_divergence("reverse_kl"), ALL, log_q, 2.0)
    assert signal.exact_metrics(ALL, labels(), log_q).keys() == {"teacher_ce", "teacher_entropy"}


@pytest.mark.parametrize("mask", [-1e4, -65504.0])
def test_tokens_that_a_model_masks_do_not_blur_the_others(mask):
    """Two live tokens among masked ones, as after a model's own bias: the code's levels are not spent on the masks, and nothing overflows."""
    log_p = torch.full((4, 512), mask).index_add(1, torch.tensor([3, 9]), torch.tensor([[1.0, 0.3]] * 4) - mask).log_softmax(1)
    log_q = dense(2.0, 4, 512, seed=1).float()
    record_format, know = TopKFormat(512, 64, 8), torch.tensor([3, 9, 3, 400])
    signal = record_format.signal(torch.from_numpy(record_format.record(dense_signal(log_p), know, examples(4))), "cpu")
    assert_close(signal.divergence(KL, ALL, log_q), forward_kl(log_q, log_p), rtol=1e-3, atol=0)
    assert torch.isfinite(signal.divergence(make_divergence("reverse_kl"), ALL, log_q)).all()


def test_what_is_not_finite_before_a_teacher_known_by_samples_is_not_laid_at_its_door():
    """Drawn at another temperature than 1, and without most tokens: neither is a fault of its own."""
    from types import SimpleNamespace

    from llmkd.batch import Batch, View
    from llmkd.data.batch_source import Step
    from llmkd.training.step_result import Accumulated, TargetCounts, diagnose_nonfinite

    signal = sampled(dense().float(), 5, 2.0)
    count = len(signal.ids_ND)
    view = View({}, torch.arange(count))
    batch = Batch(torch.zeros(count, dtype=torch.long), torch.arange(count), view, view)
    ask = type("Teacher", (), {"metrics": ("teacher_ce",), "__call__": lambda self, batch: signal})()
    rows = {"ce": torch.zeros(count), "kd": torch.zeros(count).index_fill(0, torch.tensor([1]), math.inf)}
    result = SimpleNamespace(step=Step(3, 0), accumulated=Accumulated([batch], TargetCounts(count), 1.0, {0: [rows]}, {}))
    explain = HeadTerm(Objective(0.5, 2.0)).explain_nonfinite
    found = diagnose_nonfinite(result, 0, {"ce": 0.0, "kd": math.inf}, explain, ask, SimpleNamespace(device="cpu", num_processes=1))
    assert (found.step, found.term, found.places) == (3, "kd", ["example 1"])
