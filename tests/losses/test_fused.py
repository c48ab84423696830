"""The fused head and loss: equal to autograd on dense logits, whatever the chunk, and in bounded memory and work."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkd import signals
from llmkd.config.recipe import DIVERGENCES
from llmkd.head import Head
from llmkd.losses import fused
from llmkd.losses.divergences import make_divergence
from llmkd.losses.fused import default_chunk, fused_loss
from llmkd.losses.objective import Objective
from llmkd.signals import Dense, FullDistribution, for_students

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


PROJECTS = {
    "frozen": lambda: linear(H),
    "training": lambda: linear(H, train=True),
    "frozen, bias": lambda: linear(H, bias=True),
    "training, bias": lambda: linear(H, bias=True, train=True),
    "adapted": Adapted,
}


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


class Products(TorchDispatchMode):
    """Multiplications in matrix products of tensors with a side of `width`."""

    NAMES = ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear")

    def __init__(self, width):
        super().__init__()
        self.width, self.multiplications = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in self.NAMES:
            left, right = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            if self.width in (*left.shape, *right.shape):
                self.multiplications += left.numel() * right.shape[-1]
        return function(*args, **(kwargs or {}))


class Storages(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive now, the most there were, and the largest tensor."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest = {}, 0, 0

    @property
    def bytes(self):
        return sum(self.alive.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.largest = max(self.largest, x.numel())
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, self.bytes)
        return out


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


@pytest.mark.parametrize("vocab", [10, 1000, 32000, 152000, 10**7])
@pytest.mark.parametrize("device, tile, least, most", [("cpu", 32 << 20, 128, 4096), ("cuda", 512 << 20, 1024, 2048)])
def test_the_default_chunk_keeps_one_tile_in_bounds(vocab, device, tile, least, most):
    chunk = default_chunk(vocab, device)
    assert least <= chunk <= most and (chunk == least or 4 * vocab * chunk <= tile) and (chunk == most or 4 * vocab * (chunk + 1) > tile)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "train_hidden, train_head, student_passes", [(True, False, 2), (True, True, 3), (False, True, 2), (False, False, 1)]
)
def test_matrix_products_per_row(train_hidden, train_head, student_passes, dtype):
    hidden, labels = case(dtype=dtype)
    head, signal = Head(linear(H, train=train_head, dtype=dtype), V), teacher(dtype=dtype)
    with Products(H) as student, Products(H_T) as taught:
        total, _ = fused_loss(hidden.detach().requires_grad_(train_hidden), head, labels, objective(), signal, chunk=17)
        if total.requires_grad:
            total.backward()
    assert (student.multiplications / (N * V * H), taught.multiplications / (N * V * H_T)) == (student_passes, 1)


def test_without_gradients_only_the_logits_are_computed():
    hidden, labels = case()
    arguments = hidden, Head(linear(H, train=True), V), labels, objective(), teacher()
    with torch.no_grad(), Products(H) as student:
        total, rows = fused_loss(*arguments)
    assert student.multiplications == N * V * H and not total.requires_grad
    close((total, rows), dense_loss(*arguments), 1e-12)


WIDE, TILE_ROWS = 3000, 64


def memory(n, train=False, chunk=TILE_ROWS, divergence="forward_kl", kd_ratio=0.5):
    """Storages during both passes over n rows, and the bytes alive between them."""
    hidden, labels = case(n, WIDE, torch.float32)
    head = Head(linear(H, WIDE, train=train, dtype=torch.float32), WIDE)
    signal = teacher(n, WIDE, WIDE, torch.float32)
    with Storages() as storages:
        total, rows = fused_loss(hidden, head, labels, objective(kd_ratio, divergence=divergence), signal, chunk)
        between = storages.bytes
        total.backward()
    return storages, between


def test_the_meter_sees_dense_logits():
    hidden, labels = case(128, WIDE, torch.float32)
    with Storages() as storages:
        (hidden @ linear(H, WIDE, dtype=torch.float32).weight.T).log_softmax(-1).sum().backward()
    assert storages.largest == 128 * WIDE and storages.peak >= 2 * 4 * 128 * WIDE


@pytest.mark.parametrize("divergence", ["forward_kl", "generalized_jsd"])
@pytest.mark.parametrize("train", [False, True])
def test_memory_grows_by_rows_of_hidden_width_only(train, divergence):
    small, large = memory(512, train, divergence=divergence)[0], memory(4096, train, divergence=divergence)[0]
    row = 4 * (2 * H + 6)  # the gradient, its scaled copy, and a few numbers
    assert large.peak - small.peak <= (4096 - 512) * row
    assert large.largest < 512 * WIDE and large.largest <= max(TILE_ROWS * WIDE, 4096 * H)


@pytest.mark.parametrize("kd_ratio", [0.0, 0.5, 1.0])
def test_several_chunks_need_no_more_than_one(kd_ratio):
    one, several = memory(TILE_ROWS, kd_ratio=kd_ratio)[0], memory(4 * TILE_ROWS, kd_ratio=kd_ratio)[0]
    assert several.peak - one.peak <= 3 * TILE_ROWS * 4 * (2 * H + 6)


def test_tiles_alive_at_once():
    assert memory(4 * TILE_ROWS)[0].peak <= 9 * 4 * TILE_ROWS * WIDE


def test_a_frozen_head_leaves_nothing_of_the_vocabularys_size_behind():
    _, between = memory(512)
    assert between <= 512 * 4 * (H + 2) + 16


def test_a_bfloat16_head_is_never_widened_whole():
    hidden, labels = case(4, 30_000, torch.bfloat16)
    head = Head(linear(H, 30_000, dtype=torch.bfloat16), 30_000)
    with Storages() as storages:
        fused_loss(hidden, head, labels, objective())[0].backward()
    assert storages.largest < 30_000 * H


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


def test_autocast_does_not_narrow_the_loss():
    hidden, labels = case(dtype=torch.float32)
    arguments = hidden, Head(Adapted().float(), V), labels, objective(), teacher(dtype=torch.float32)
    plain = results(fused_loss, *arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(results(fused_loss, *arguments), plain, 0)


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
