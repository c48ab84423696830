"""The fused head and loss: equal to autograd on dense logits, whatever the chunk."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from llmkd import signals
from llmkd.config.recipe import DIVERGENCES
from llmkd.head import Head
from llmkd.losses import fused
from llmkd.losses.divergences import make_divergence
from llmkd.losses.fused import fused_loss
from llmkd.losses.objective import Objective
from llmkd.signals import Dense, FullDistribution, for_students
from tests.kit.heads import H_T, Adapted, H, N, V, case, close, dense_loss, linear, objective, randn, results, teacher

PROJECTS = {
    "frozen": lambda: linear(H),
    "training": lambda: linear(H, train=True),
    "frozen, bias": lambda: linear(H, bias=True),
    "training, bias": lambda: linear(H, bias=True, train=True),
    "adapted": Adapted,
}


@pytest.mark.parametrize("project", PROJECTS)
@pytest.mark.parametrize("kd_ratio, temperature", [(None, 1.0), (0.25, 1.0), (0.25, 2.0), (1.0, 1.0), (1.0, 2.0)])
def test_equals_autograd_on_the_dense_logits(project, kd_ratio, temperature):
    hidden, labels = case()
    signal = None if kd_ratio is None else teacher()
    arguments = hidden, Head(PROJECTS[project](), V), labels, objective(kd_ratio or 0, temperature), signal
    close(results(fused_loss, *arguments, chunk=16, scale=1 / 7), results(dense_loss, *arguments, scale=1 / 7), 1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence_equals_autograd_on_the_dense_logits(divergence):
    hidden, labels = case()
    arguments = hidden, Head(linear(H, train=True), V), labels, objective(0.6, 1.5, divergence), teacher()
    close(results(fused_loss, *arguments, chunk=16), results(dense_loss, *arguments), 1e-12)


@pytest.mark.parametrize("scale, softcap", [(0.25, None), (1.0, 2.0), (4.0, 3.0)])
def test_scale_and_softcap_of_both_heads(scale, softcap):
    hidden, labels = case()
    signal = teacher()
    signal = Dense(signal.hidden_NH, Head(signal.head.project, V, scale=1.5, softcap=5.0))
    arguments = hidden, Head(linear(H, train=True), V, scale, softcap), labels, objective(), signal
    close(results(fused_loss, *arguments, chunk=16), results(dense_loss, *arguments), 1e-12)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 2e-6)])
@pytest.mark.parametrize("chunk", [1, 7, 17, 64, None])
def test_the_chunk_changes_nothing(chunk, dtype, bound):
    hidden, labels = case(dtype=dtype)
    arguments = hidden, Head(linear(H, bias=True, train=True, dtype=dtype), V), labels, objective(), teacher(dtype=dtype)
    close(results(fused_loss, *arguments, chunk=chunk), results(fused_loss, *arguments, chunk=N), bound)


@pytest.mark.parametrize("with_teacher", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_no_rows_give_a_zero_with_a_graph(train, with_teacher):
    hidden, labels = case(0)
    head, signal = Head(linear(H, bias=True, train=train), V), teacher(0) if with_teacher else None
    total, rows = fused_loss(hidden, head, labels, objective(), signal)
    total.backward()
    assert total.item() == 0 and hidden.grad.shape == (0, H)
    assert {name: row.shape for name, row in rows.items()} == dict.fromkeys(["ce", "kd"] if with_teacher else ["ce"], (0,))
    assert all((p.grad is not None and not p.grad.any()) if train else p.grad is None for p in head.project.parameters())


def test_a_frozen_head_and_the_teacher_get_no_gradient():
    hidden, labels = case()
    head, signal = Head(linear(H, bias=True), V), teacher()
    signal.head.project.requires_grad_()
    fused_loss(hidden, head, labels, objective(), signal)[0].backward()
    assert hidden.grad.any() and all(p.grad is None for p in (*head.project.parameters(), *signal.head.project.parameters()))


@pytest.mark.parametrize("divergence", ["forward_kl", "generalized_jsd"])
def test_a_teacher_that_speaks_through_the_trained_head_stays_a_constant(divergence):
    hidden, labels = case()
    head = Head(linear(H, train=True), V)
    arguments = hidden, head, labels, objective(1.0, divergence=divergence), Dense(randn(N, H, seed=4), head)
    close(results(fused_loss, *arguments, chunk=16), results(dense_loss, *arguments), 1e-12)


def test_a_head_that_trains_alone():
    hidden, labels = case()
    head = Head(linear(H, train=True), V)
    fused_loss(hidden.detach(), head, labels, objective(), teacher())[0].backward()
    close(head.project.weight.grad, results(dense_loss, hidden, head, labels, objective(), teacher())[2][1], 1e-12)


class Weighed:
    """A teacher that says its own divergence: twice the plain one."""

    def __init__(self, log_p_NV):
        self.log_p_NV = log_p_NV

    def divergence(self, divergence, rows, log_q_nV, temperature=1.0):
        return 2 * divergence(log_q_nV, (self.log_p_NV[rows] / temperature).log_softmax(-1))


class Whole(FullDistribution):
    """A teacher whose log-probabilities are at hand, and are not to be written over."""

    def __init__(self, log_p_NV):
        self.log_p_NV = log_p_NV

    def log_probs(self, rows, log_q_nV=None, temperature=1.0):
        return (self.log_p_NV[rows] / temperature).log_softmax(-1) if temperature != 1 else self.log_p_NV[rows]


@pytest.mark.parametrize("divergence", ["forward_kl", "generalized_jsd", "alpha_beta"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_other_signals(monkeypatch, temperature, divergence):
    monkeypatch.setattr(fused, "_BLOCK_BYTES", {"cpu": 5 * 4 * V, "cuda": 1})  # blocks of five rows
    hidden, labels = case()
    head, signal = Head(linear(H, train=True), V), teacher()
    log_p = signal.log_probs(slice(0, N))
    arguments = hidden, head, labels, objective(0.4, temperature, divergence)
    right = results(fused_loss, *arguments, signal, chunk=16)
    before = log_p.clone()
    close(results(fused_loss, *arguments, Whole(log_p), chunk=16), right, 1e-12)
    total, rows, gradients = results(fused_loss, *arguments, Weighed(log_p), chunk=16)
    assert torch.equal(log_p, before)
    close(rows, {"ce": right[1]["ce"], "kd": 2 * right[1]["kd"]}, 1e-12)
    halves = [results(fused_loss, hidden, head, labels, objective(r, temperature, divergence), signal) for r in (0.0, 1.0)]
    close(gradients, [0.6 * a + 0.8 * b for a, b in zip(halves[0][2], halves[1][2], strict=True)], 1e-12)


def test_the_log_says_once_which_way_it_went(monkeypatch):
    said = []
    fused.log_backend.cache_clear()
    monkeypatch.setattr(fused, "info", said.append)
    hidden, labels = case()
    for divergence in ("forward_kl", "forward_kl", "adaptive_kl"):
        fused_loss(hidden, Head(linear(H), V), labels, objective(divergence=divergence), teacher(), 16)
    assert ["closed form" in line for line in said] == [True, True] and ["autograd" in line for line in said] == [False, True]


def test_padding_of_the_vocabulary_is_not_seen():
    hidden, labels = case()
    padded, padded_teacher = linear(H, V + 128, bias=True, train=True), linear(H_T, V + 64, seed=3)
    plain, plain_teacher = linear(H, V, bias=True, train=True), linear(H_T, V, seed=3)
    for short, long in ((plain, padded), (plain_teacher, padded_teacher)):
        for name, parameter in short.named_parameters():
            parameter.data.copy_(long.get_parameter(name)[:V])
    hidden_t = randn(N, H_T, seed=2)
    total, rows, (grad, *weights) = results(
        fused_loss, hidden, Head(padded, V), labels, objective(), Dense(hidden_t, Head(padded_teacher, V))
    )
    assert all(not w[V:].any() for w in weights)
    expected = results(fused_loss, hidden, Head(plain, V), labels, objective(), Dense(hidden_t, Head(plain_teacher, V)))
    close((total, rows, (grad, *(w[:V] for w in weights))), expected, 1e-14)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_the_gradient_keeps_its_size_at_any_temperature(divergence):
    hidden, labels = case()
    head, signal = Head(linear(H, size=0.05), V), teacher(size=0.05)
    norms = [results(fused_loss, hidden, head, labels, objective(1.0, T, divergence), signal)[2][0].norm() for T in (1.0, 4.0)]
    assert 0.8 < norms[1] / norms[0] < 1.25


def test_temperature_leaves_the_cross_entropy_alone():
    hidden, labels = case()
    arguments = hidden, Head(linear(H), V), labels
    assert_close(fused_loss(*arguments, objective(0.0, 5.0))[0], F.cross_entropy(hidden @ linear(H).weight.T, labels, reduction="sum"))


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_both_terms_are_reported_whatever_they_weigh(kd_ratio):
    hidden, labels = case()
    arguments = hidden, Head(linear(H), V), labels
    total, rows = fused_loss(*arguments, objective(kd_ratio), teacher(), chunk=16)
    close(rows, dense_loss(*arguments, objective(0.5), teacher())[1], 1e-12)
    assert not any(row.requires_grad for row in rows.values())
    assert_close(total, ((1 - kd_ratio) * rows["ce"] + kd_ratio * rows["kd"]).sum())


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it():
    hidden, labels = case(dtype=torch.float32)
    head = Head(linear(H, dtype=torch.float32), V)
    total, _, (gradient,) = results(fused_loss, hidden, head, labels, objective(1.0), Dense(hidden.detach(), head))
    assert total.item() == 0 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("kd_ratio, name", [(0.0, "kd"), (1.0, "ce")])
def test_a_term_of_no_weight_is_left_out_even_when_infinite(kd_ratio, name):
    terms = {"ce": torch.ones(3), "kd": torch.ones(3)} | {name: torch.full((3,), math.inf)}
    assert torch.equal(objective(kd_ratio).combine(terms), torch.ones(3))


def test_without_a_teacher_the_mix_is_the_cross_entropy():
    assert torch.equal(objective(0.7).combine({"ce": torch.ones(3)}), torch.ones(3))


def test_an_infinite_divergence_of_no_weight_spoils_no_gradient():
    hidden, labels = case()
    project = linear(H_T, bias=True, seed=3)
    project.bias.data[::5] = -math.inf
    head, signal = Head(linear(H), V), Dense(randn(N, H_T, seed=2), Head(project, V))
    total, rows, gradients = results(fused_loss, hidden, head, labels, objective(0.0, divergence="reverse_kl"), signal)
    assert (rows["kd"] == math.inf).all()
    close((total, gradients), results(fused_loss, hidden, head, labels, objective(0.0))[::2], 1e-14)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_students_of_one_micro_batch_compute_a_teachers_head_once_and_end_as_alone(monkeypatch, temperature):
    """Chunk by chunk, to the last bit; also where one student has other chunks or asks nothing, and where only a part is kept."""
    torch.manual_seed(0)
    students, labels_N, asked = [torch.randn(13, 6, dtype=torch.float64) for _ in range(3)], torch.arange(13), []
    heads, teacher_NH = [nn.Linear(6, 21, bias=False, dtype=torch.float64) for _ in range(2)], torch.randn(13, 6, dtype=torch.float64)
    own, theirs = (Head(one.requires_grad_(False), 20) for one in heads)

    def outcomes(signal, chunks=(5, 5, 5), kd=(0.5, 0.5, 0.5)) -> list[torch.Tensor]:
        found = []
        for hidden_NH, chunk, share in zip(students, chunks, kd, strict=True):
            given = hidden_NH.clone().requires_grad_()
            objective = Objective(share, temperature, make_divergence("reverse_kl"))
            total, terms = fused_loss(given, own, labels_N, objective, signal if share else None, chunk)
            found += [total.detach(), *terms.values(), *torch.autograd.grad(total, given)]
        return found

    plain, logits = Dense(teacher_NH, theirs), theirs.logits
    for options, calls in (({}, 3), ({"chunks": (5, 13, 5)}, 4), ({"kd": (0.5, 0.0, 0.5)}, 3)):
        alone = outcomes(plain, **options)
        monkeypatch.setattr(theirs, "logits", lambda *args, **kwargs: (asked.append(1), logits(*args, **kwargs))[1])
        signal = for_students(plain, 3)
        assert all(map(torch.equal, outcomes(signal, **options), alone)) and len(asked) == calls
        monkeypatch.setattr(theirs, "logits", logits)
        asked.clear()
        assert bool(signal.kept._held) == bool(options)
    monkeypatch.setattr(signals, "MOST_KEPT", 1)
    monkeypatch.setattr(theirs, "logits", lambda *args, **kwargs: (asked.append(1), logits(*args, **kwargs))[1])
    assert all(map(torch.equal, outcomes(for_students(plain, 3)), outcomes(for_students(plain, 1)))) and len(asked) == 3 * 3 - 2 + 9
