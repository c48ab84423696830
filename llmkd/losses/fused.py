"""The head and the loss in one: neither model's [N, V] logits ever exist.

For a chunk of rows: both models' logits, every term of the loss and, written over the student's logits, the gradient
with respect to them; from it the gradient with respect to the student's hidden states (and to the head's own weights
only where they train), all in the forward pass. What is kept for the backward pass is [N, H]; backward only scales
it. The student's head costs two matrix products a row (three where it trains), the teacher's one.

Two tiles [chunk, V] live through a call. What comes between the matrix products takes a block of a few rows at a time,
with tiles of its own that stay in a CPU's cache.
"""

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..console import say
from ..head import Head
from ..signals import Dense, Known, Rows, Signal
from .closed import closed_form
from .objective import Objective

_TILE_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}  # large products are fast ones
_BLOCK_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}
_LEAST_ROWS = 128  # below it a product reads its weights more than it multiplies


def default_chunk(vocab: int, device: str) -> int:
    """Rows per chunk that keep one float32 tile of logits in bounds: 256 MiB on a GPU, 32 MiB on a CPU; 128 to 4096."""
    return max(_LEAST_ROWS, min(4096, _TILE_BYTES.get(device, _TILE_BYTES["cuda"]) // (4 * vocab)))


def fused_loss(
    hidden_NH: Tensor, head: Head, labels_N: Tensor, objective: Objective, signal: Signal | None = None, chunk: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the mixed loss over all rows (differentiable), and each term row by row, [N] and detached.

    hidden_NH   the student's last hidden states at the supervised rows
    chunk       rows per chunk; it changes memory and speed, never the result
    """
    chunk = chunk or default_chunk(head.vocab, hidden_NH.device.type)
    weights = head.trainable()
    train = torch.is_grad_enabled() and (hidden_NH.requires_grad or bool(weights))
    names = ("ce", "kd") if signal is not None else ("ce",)
    total, *rows = _Fused.apply(hidden_NH, head, labels_N, objective, signal, chunk, train, *weights)
    return total, dict(zip(names, rows, strict=True))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, head, labels_N, objective, signal, chunk, train, *weights):
        needs_hidden = train and hidden_NH.requires_grad
        weights = weights if train else ()
        grad_hidden = torch.zeros_like(hidden_NH) if needs_hidden else None
        grad_weights = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights]
        total, pieces = hidden_NH.new_zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32)), []
        tiles = _Tiles(head.vocab, hidden_NH.device)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, hidden_NH.shape[0], chunk):
                rows = slice(start, min(start + chunk, hidden_NH.shape[0]))
                student = (_Product if head.plain else _Module)(head, hidden_NH[rows].detach(), tiles, needs_hidden, weights)
                terms = _visit(objective, student, labels_N[rows], signal, rows, tiles, train)
                if train:
                    student.pull_back(grad_hidden[rows] if needs_hidden else None, grad_weights)
                total += objective.mix(terms).sum()
                pieces.append(list(terms.values()))
        ctx.grads, ctx.dtypes = (grad_hidden, grad_weights), [w.dtype for w in weights]
        rows_N = [torch.cat(column) for column in zip(*pieces, strict=True)] or [
            total.new_zeros(0) for _ in range(1 if signal is None else 2)
        ]
        ctx.mark_non_differentiable(*rows_N)
        return total, *rows_N

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, *_):
        grad_hidden, grad_weights = ctx.grads
        if grad_hidden is not None:  # scaled in float32: a bfloat16 scale would be wrong by up to 0.4 %
            grad_hidden = (grad_hidden.to(scale.dtype) * scale).to(grad_hidden.dtype)
        grads = [(g * scale).to(dtype) for g, dtype in zip(grad_weights, ctx.dtypes, strict=True)]
        return grad_hidden, None, None, None, None, None, None, *grads


def _visit(
    objective: Objective, student: "_Product | _Module", labels_n: Tensor, signal: Signal | None, rows: slice, tiles: "_Tiles", train: bool
) -> dict[str, Tensor]:
    """The terms of a chunk; its logits become their gradient where one is asked for."""
    n, T = len(labels_n), objective.temperature
    block = max(1, _block_bytes(labels_n.device) // (4 * tiles.vocab))
    log_p_nV = None
    if signal is not None and train and objective.kd_ratio:
        _say_how(_how(objective, signal))
    if knows_all(signal):
        log_p_nV = _teacher(signal, rows, T, tiles)
    elif signal is not None:
        block = max(block, _LEAST_ROWS)  # it may have a head to ask, a block at a time
    pieces = []
    for start in range(0, n, block):
        part = slice(start, min(start + block, n))
        log_p, divergence = None, None
        if log_p_nV is not None:
            log_p = log_p_nV[part]
        elif signal is not None:
            divergence = _asker(signal, objective, slice(rows.start + part.start, rows.start + part.stop))
        tile = tiles.of("block", part.stop - part.start, min(block, n), student.logits_nV.dtype)
        grad = student.grad_nV[part] if train else None
        pieces.append(objective.visit(student.logits_nV[part], labels_n[part], tile, grad, log_p, divergence))
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _how(objective: Objective, signal: Signal) -> str:
    """How the gradient of the divergence is come by."""
    name = getattr(objective.divergence, "func", objective.divergence).__name__
    if not knows_all(signal):
        return f"{name} of a {type(signal).__name__.lower()} teacher: its gradient over the student's log-probabilities is autograd's"
    if not closed_form(objective.divergence):
        return f"{name} has no gradient in closed form, and takes autograd's, which is slower"
    return f"{name}: gradient in closed form"


@functools.cache
def _say_how(how: str) -> None:
    """Once in a run."""
    say(f"loss: {how}")


def knows_all(signal: Signal | None) -> bool:
    """Whether `log_probs` is all that there is to a signal, so that a divergence in closed form can be taken of it."""
    return isinstance(signal, Known) and type(signal).divergence is Known.divergence


def _teacher(signal: Known, rows: Rows, temperature: float, tiles: "_Tiles") -> Tensor:
    """A teacher's logits at the temperature, or its log-probabilities, for a chunk."""
    if type(signal) is not Dense:
        return signal.log_probs(rows, None, temperature)
    hidden_nH, head = signal.hidden_NH[rows], signal.head
    out = tiles("teacher", len(hidden_nH), head.dtype) if head.plain else None
    logits_nV = head.logits(hidden_nH.detach(), out)
    return logits_nV if temperature == 1 else torch.div(logits_nV, temperature, out=out)


def _asker(signal: Signal, objective: Objective, rows: Rows):
    return lambda log_q_nV: signal.divergence(objective.divergence, rows, log_q_nV, objective.temperature)


def _block_bytes(device: torch.device) -> int:
    return _BLOCK_BYTES.get(device.type, _BLOCK_BYTES["cuda"]) * (torch.get_num_threads() if device.type == "cpu" else 1)


class _Tiles:
    """Buffers [rows, V], made when first asked for and used again for every chunk."""

    def __init__(self, vocab: int, device: torch.device):
        self.vocab, self.device, self.held = vocab, device, {}

    def __call__(self, name: str, n: int, dtype: torch.dtype, rows: int = 0) -> Tensor:
        if name not in self.held:
            self.held[name] = torch.empty(max(rows, n), self.vocab, dtype=dtype, device=self.device)
        return self.held[name][:n]

    def of(self, name: str, n: int, rows: int, dtype: torch.dtype):
        return lambda part: self(f"{name} {part}", n, dtype, rows)


class _Product:
    """A chunk of a plain head's logits in a tile, and the way back from their gradient, which takes their place."""

    def __init__(self, head: Head, hidden_nH: Tensor, tiles: _Tiles, *_):
        self.head, self.hidden_nH = head, hidden_nH
        self.logits_nV = head.logits(hidden_nH, tiles("student", len(hidden_nH), head.dtype))
        self.grad_nV = self.logits_nV
        if hidden_nH.is_cuda:  # a row of half-precision gradient fills the first half of its row of logits
            self.grad_nV = self.logits_nV.view(head.project.weight.dtype)[:, : head.vocab]

    def pull_back(self, grad_hidden_nH: Tensor | None, grad_weights: list[Tensor]) -> None:
        self.head.pull_back(self.grad_nV, self.hidden_nH, grad_hidden_nH, grad_weights)


class _Module:
    """The same of a head with an adapter, a soft cap or other weights, whose way back autograd knows. Its logits may be anyone's."""

    def __init__(self, head: Head, hidden_nH: Tensor, tiles: _Tiles, needs_hidden: bool, weights: tuple[Tensor, ...]):
        with torch.set_grad_enabled(needs_hidden or bool(weights)):
            self.hidden_nH, self.weights = hidden_nH.requires_grad_(needs_hidden), weights
            self.graph_nV = head.logits(self.hidden_nH)
        self.logits_nV = self.graph_nV.detach()
        self.grad_nV = tiles("student", len(hidden_nH), self.logits_nV.dtype)

    def pull_back(self, grad_hidden_nH: Tensor | None, grad_weights: list[Tensor]) -> None:
        inputs = ([] if grad_hidden_nH is None else [self.hidden_nH]) + list(self.weights)
        found = list(torch.autograd.grad(self.graph_nV, inputs, self.grad_nV, allow_unused=True))
        if grad_hidden_nH is not None:
            grad_hidden_nH.copy_(found.pop(0))
        for total, new in zip(grad_weights, found, strict=True):
            if new is not None:
                total += new
