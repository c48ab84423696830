"""The fused loss in bounded memory and work."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmkd.head import Head
from llmkd.losses.fused import default_chunk, fused_loss
from tests.kit.heads import H_T, H, N, V, case, close, dense_loss, linear, objective, teacher


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


@pytest.mark.parametrize("vocab", [10, 1000, 32000, 152000, 10**7])
@pytest.mark.parametrize("device, tile, least, most", [("cpu", 32 << 20, 128, 4096), ("cuda", 512 << 20, 1024, 2048)])
def test_the_default_chunk_keeps_one_tile_in_bounds(vocab, device, tile, least, most):
    chunk = default_chunk(vocab, device)
    assert least <= chunk <= most and (chunk == least or 4 * vocab * chunk <= tile) and (chunk == most or 4 * vocab * (chunk + 1) > tile)


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
