"""The head and the loss in one: neither model's [N, V] logits ever exist.

For a chunk of rows: both models' logits, every term of the loss and the gradient with respect to the student's
hidden states (and to the head's own weights only where they train), all in the forward pass. What is kept for the
backward pass is [N, H]; backward only scales it. The student's head costs two matrix products a row (three where it
trains), the teacher's one.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..head import Head
from ..signals import Signal
from .objective import Objective

_TILE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}  # a GPU wants large products, a CPU tiles that stay in its cache


def default_chunk(vocab: int, device: str) -> int:
    """Rows per chunk that keep one float32 tile of logits in bounds: 256 MiB on a GPU, 4 MiB on a CPU; 16 to 4096."""
    return max(16, min(4096, _TILE_BYTES.get(device, _TILE_BYTES["cuda"]) // (4 * vocab)))


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
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for start in range(0, hidden_NH.shape[0], chunk):
                rows = slice(start, start + chunk)
                with torch.set_grad_enabled(train):
                    h_nH = hidden_NH[rows].detach().requires_grad_(needs_hidden)
                    terms = objective.rows(head.logits(h_nH), labels_N[rows], signal, rows)
                    chunk_total = objective.mix(terms).sum()
                if train:
                    grads = list(torch.autograd.grad(chunk_total, [h_nH, *weights] if needs_hidden else weights, allow_unused=True))
                    if needs_hidden:
                        grad_hidden[rows] = grads.pop(0)
                    for held, new in zip(grad_weights, grads, strict=True):
                        if new is not None:
                            held += new
                total += chunk_total.detach()
                pieces.append([term.detach() for term in terms.values()])
                del terms, chunk_total  # or this chunk's tiles would live on beside the next one's
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
