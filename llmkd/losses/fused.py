"""The head and the loss in one function that never holds the [N, V] logits of either model.

For each chunk of rows the forward pass computes both models' logits, every term of the loss, the gradient with respect to
the student's logits (written over them), and from that the gradients of the student's hidden states and, if it trains, of the
head's weights. It keeps [N, H] for the backward pass, which only scales it. The student's head costs two matrix products per
row (three if it trains), the teacher's head one.

Two buffers [chunk, V] exist throughout a call. The element-wise work between the matrix products is done on blocks of a few
rows, whose own buffers stay in a CPU's cache.
"""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..batch import Rows, zeros_of
from ..console import info, warn
from ..errors import ArgumentError, brief
from ..head import Head
from ..signals import Dense, FullDistribution, Signal
from .closed_form import closed_form
from .divergences import divergence_name
from .objective import Objective
from .rows import Divergences, Part, joined, parted, weighted, within
from .target_weights import TargetWeights

_TILE_BYTES = {"cuda": 512 << 20, "cpu": 32 << 20}  # of a chunk's logits: large matrix products are faster
_BLOCK_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}  # of a block's buffer, on a CPU for each thread
LEAST_ROWS = {"cuda": 1024, "cpu": 128}  # with fewer, reading the weights takes longer than multiplying
MOST_ROWS = {"cuda": 2048, "cpu": 4096}  # more bring no gain


def default_chunk(vocab: int, device: str) -> int:
    """Rows per chunk: as many as fit a float32 buffer of 512 MiB on a GPU (1024 to 2048 rows) or 32 MiB on a CPU (128 to 4096 rows)."""
    return max(_of(LEAST_ROWS, device), min(_of(MOST_ROWS, device), _of(_TILE_BYTES, device) // (4 * vocab)))


def _of(table: dict[str, int], device: str) -> int:
    return table.get(device, table["cuda"])


def fused_loss(
    hidden_NH: Tensor,
    head: Head,
    labels_N: Tensor,
    objective: Objective,
    signal: Signal | None = None,
    chunk: int | None = None,
    weights: dict[str, Tensor] | None = None,
    zeros: dict[tuple[str, ...], Rows] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the weighted loss over all rows (differentiable), and each term per row, [N] and detached.

    hidden_NH   the student's last hidden states at the supervised positions
    labels_N    the token of each row
    chunk       rows per chunk; it changes memory and speed, never the result
    weights     by term, the weight of each row, [N]; 1 without an entry. The returned terms are multiplied by their weights, and 0 where the
                weight is 0, even if the term is not finite there. A row whose weights are all 0 is not computed, and one whose "kd" weight
                is 0 not by the teacher
    zeros       `Batch.zeros`, if it is known; finding it waits for the device

    Arguments are not checked here; `llmkd.fused_loss` checks them.
    """
    total, terms, _ = fused_parts(hidden_NH, head, labels_N, objective, signal, chunk, weights, zeros)
    return total, terms


def fused_parts(
    hidden_NH: Tensor,
    head: Head,
    labels_N: Tensor,
    objective: Objective,
    signal: Signal | None = None,
    chunk: int | None = None,
    weights: dict[str, Tensor] | None = None,
    zeros: dict[tuple[str, ...], Rows] | None = None,
    rule: TargetWeights | None = None,
    position_N: Tensor | None = None,
    kept: Tensor | None = None,
    divergences: Divergences | None = None,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """`fused_loss`, and the weights [N] of the terms that `rule` weighs, detached: the rule's times `weights`, 0 where nothing was computed.

    rule         a rule that reads logits; it is called for each chunk of rows
    position_N   the number of each target within its example, from 0; for the rule
    kept         indices of the rows that count; the others are not computed. None: all count
    divergences  for rows with another divergence than the objective's
    """
    chunk = chunk or default_chunk(head.vocab, hidden_NH.device.type)
    trained = head.trainable()
    train = torch.is_grad_enabled() and (hidden_NH.requires_grad or bool(trained))
    shares = objective.shares(signal is not None)
    weights = {name: w_N for name, w_N in (weights or {}).items() if name in shares}
    parts = [Part(slice(0, len(hidden_NH)), signal)]
    if weights or kept is not None:
        zeros = zeros_of(weights) if zeros is None else zeros
        parts = list(parted(len(hidden_NH), shares, signal, weights, zeros, kept, hidden_NH.device))
    if divergences and signal is not None:
        parts = [one for part in parts for one in divergences.split(part, hidden_NH.device)]
    ruled = None if rule is None else (rule, position_N)
    total, *found = _Fused.apply(hidden_NH, head, labels_N, objective, shares, parts, chunk, train, ruled, *trained)
    terms, of_rule = found[: len(shares)], found[len(shares) :]
    return total, dict(zip(shares, terms, strict=True)), dict(zip(_weighed(rule, shares), of_rule, strict=True))


def _weighed(rule: TargetWeights | None, terms: Iterable[str]) -> list[str]:
    """The terms that a rule weighs."""
    return [name for name in terms if rule is not None and name in rule.terms]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, head, labels_N, objective, shares, parts, chunk, train, ruled, *trained):
        needs_hidden = train and hidden_NH.requires_grad
        trained = trained if train else ()
        grad_hidden = torch.zeros_like(hidden_NH) if needs_hidden else None
        grad_weights = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in trained]
        total, pieces = hidden_NH.new_zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32)), []
        tiles = Tiles(head.vocab, hidden_NH.device)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for part in parts:
                own = objective if part.divergence is None else dataclasses.replace(objective, divergence=part.divergence)
                for rows, weights in part.chunks(chunk):
                    student = (_Product if head.is_affine else _Module)(head, hidden_NH[rows].detach(), tiles, needs_hidden, trained, rows)
                    terms, weights = _loss_and_grad(own, student, labels_N[rows], part.signal, rows, tiles, train, shares, weights, ruled)
                    if train:
                        _back_to(grad_hidden, rows, student, grad_weights)
                    terms = {name: weighted(term, weights.get(name)) for name, term in terms.items()}
                    total += _sum(objective.combine(terms, shares))
                    pieces.append((rows, terms, weights))
        ctx.grads, ctx.dtypes = (grad_hidden, grad_weights), [w.dtype for w in trained]
        rows_N = [joined([(rows, terms) for rows, terms, _ in pieces], name, len(hidden_NH), total) for name in shares]
        for name in _weighed(ruled and ruled[0], shares):
            rows_N.append(joined([(rows, weights) for rows, _, weights in pieces], name, len(hidden_NH), total))
        ctx.mark_non_differentiable(*rows_N)
        return total, *rows_N

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, *_):
        grad_hidden, grad_weights = ctx.grads
        if grad_hidden is not None:  # scaled in float32: a bfloat16 scale would be wrong by up to 0.4 %
            grad_hidden = (grad_hidden.to(scale.dtype) * scale).to(grad_hidden.dtype)
        grads = [(g * scale).to(dtype) for g, dtype in zip(grad_weights, ctx.dtypes, strict=True)]
        return grad_hidden, None, None, None, None, None, None, None, None, *grads


def _sum(loss_n: Tensor | int) -> Tensor | int:
    return loss_n.sum() if isinstance(loss_n, Tensor) else loss_n


def _back_to(grad_hidden: Tensor | None, rows: Rows, student: "_Product | _Module", grad_weights: list[Tensor]) -> None:
    """The backward pass of a chunk: into its rows of `grad_hidden`, and added to the weights' gradients."""
    if grad_hidden is None or isinstance(rows, slice):
        student.backward(None if grad_hidden is None else grad_hidden[rows], grad_weights)
    else:
        own = grad_hidden.new_empty(len(rows), grad_hidden.shape[1])
        student.backward(own, grad_weights)
        grad_hidden.index_copy_(0, rows, own)


def _loss_and_grad(
    objective: Objective,
    student: "_Product | _Module",
    labels_n: Tensor,
    signal: Signal | None,
    rows: Rows,
    tiles: "Tiles",
    train: bool,
    shares: dict[str, float],
    weights: dict[str, Tensor],
    ruled: tuple[TargetWeights, Tensor] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The unweighted terms of one chunk of rows, and their weights, a rule's included. With `train`, the gradient is written to
    `student.grad_nV`."""
    kernel, how = _choose_backend(objective, student, signal, ruled and ruled[0])
    if train:
        log_backend(how)
    n, T = len(labels_n), objective.temperature
    grad_nV = student.grad_nV if train else None
    log_p_nV = teacher_log_probs(signal, rows, T, tiles, soften=not kernel) if has_full_distribution(signal) else None
    if log_p_nV is not None and log_p_nV.shape != student.logits_nV.shape:
        raise ArgumentError(f"signal: {_found_probs(signal, log_p_nV)}, expected {tuple(student.logits_nV.shape)}")
    if kernel:
        return kernel(objective, student.logits_nV, labels_n, grad_nV, log_p_nV, shares, weights), weights
    block = block_rows(tiles.vocab, labels_n.device.type, signal)
    pieces, by_row = [], []
    for start in range(0, n, block):
        part = slice(start, min(start + block, n))
        log_p = None if log_p_nV is None else log_p_nV[part].to(student.logits_nV.dtype)
        of_signal, asked, places = None, signal, within(rows, part)
        if signal is not None and log_p is None:
            if hasattr(signal, "at"):  # a mixture's heads are then computed once for the divergence and a rule
                asked, places = signal.at(places), slice(0, part.stop - part.start)
            of_signal = _divergence_of(asked, objective, places)
        tile = tiles.of("block", part.stop - part.start, min(block, n), student.logits_nV.dtype)
        grad = None if grad_nV is None else grad_nV[part]
        own = {name: w_n[part] for name, w_n in weights.items()}
        if ruled:
            position_n = ruled[1][within(rows, part)]
            own |= _by_rule(ruled[0], position_n, objective, student.logits_nV[part], labels_n[part], asked, log_p, places, own)
        by_row.append(own)
        logits_nV, zeros = student.logits_nV[part], ruled is not None  # only a rule gives weights of 0 here: `parted` leaves out the others
        pieces.append(objective.loss_and_grad(logits_nV, labels_n[part], tile, grad, log_p, of_signal, shares, own, zeros))
    return tuple({name: torch.cat([piece[name] for piece in each]) for name in each[0]} for each in (pieces, by_row))


def _by_rule(
    rule: TargetWeights,
    position_n: Tensor,
    objective: Objective,
    logits_nV: Tensor,
    labels_n: Tensor,
    signal: Signal | None,
    log_p_nV: Tensor | None,
    rows: Rows,
    weights: dict[str, Tensor],
) -> dict[str, Tensor]:
    """A rule's weights times those that the rows have already, by term.

    log_p_nV   the teacher's whole distribution at the objective's temperature, or None for a signal without one
    """
    names = _weighed(rule, ("ce",) if signal is None else ("ce", "kd"))
    if not names:
        return {}
    log_q_nV = torch.log_softmax(logits_nV, -1)
    if rule.needs_teacher and log_p_nV is not None:
        log_p_nV = torch.log_softmax(log_p_nV * objective.temperature, -1)
    score_n = rule.scores(labels_n, rows, position_n, signal, log_p_nV, log_q_nV, logits_nV.shape[-1])
    of_rule_n = rule.weights(score_n).to(logits_nV.dtype)
    return {name: of_rule_n * weights[name] if name in weights else of_rule_n for name in names}


def _choose_backend(
    objective: Objective, student: "_Product | _Module", signal: Signal | None, rule: TargetWeights | None = None
) -> tuple[Callable | None, str]:
    """The kernel that computes the terms and their gradient (None: `Objective.loss_and_grad`, in PyTorch), and a line for the log."""
    name = "cross-entropy" if signal is None else divergence_name(objective.divergence)
    name += f" weighed by {rule.name}" if rule else ""
    plain = type(student) is _Product and student.logits_nV.dtype == torch.float32 and (signal is None or type(signal) is Dense)
    if plain and rule is None and kernels_run(student.logits_nV.device):
        from . import kernels

        if signal is None or kernels.kind(objective):
            return kernels.loss_and_grad, f"{name}, by the Triton kernel"
    if signal is None or (has_full_distribution(signal) and closed_form(objective.divergence)):
        return None, f"{name}, by PyTorch, with its gradient in closed form"
    if has_full_distribution(signal):
        return None, f"{name}, by PyTorch, with its gradient by autograd, which is slower than a closed form"
    return None, f"{name} of a {type(signal).__name__.lower()} teacher, by PyTorch, with its gradient by autograd"


@functools.cache
def kernels_run(device: torch.device) -> bool:
    """Whether to use the Triton kernel: on a GPU (or in Triton's interpreter), if Triton is installed and agrees with PyTorch on a small case."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (device.type == "cuda" or interpreted) or importlib.util.find_spec("triton") is None:
        return False
    try:
        from . import kernels

        if kernels.agrees(device):
            return True
        reason = "it does not agree with PyTorch"
    except Exception as error:  # compilers raise errors of many kinds
        reason = brief(error)
    if interpreted:
        raise RuntimeError(f"the Triton kernel: {reason}")
    warn(f"note: the Triton kernel is not used on {device} ({reason}); PyTorch computes the loss, slower but as accurate")
    return False


@functools.cache
def log_backend(how: str) -> None:
    """Log a line once per process."""
    info(f"loss: {how}")


def has_full_distribution(signal: Signal | None) -> bool:
    """Whether the signal's `log_probs` are the teacher's exact distribution, so that a closed-form gradient applies."""
    return getattr(signal, "full_distribution", False)


def teacher_log_probs(signal: FullDistribution, rows: Rows, temperature: float, tiles: "Tiles", soften: bool) -> Tensor:
    """A teacher's log-probabilities [n, V] at the temperature; for a Dense signal its logits, divided by the temperature if `soften`."""
    if type(signal) is not Dense:
        return signal.log_probs(rows, None, temperature)
    hidden_nH, head = signal.hidden_NH[rows], signal.head
    logits_nV = signal.kept and signal.kept(rows, lambda: head.logits(hidden_nH.detach()))
    out = tiles("teacher", len(hidden_nH), head.dtype) if head.is_affine and (logits_nV is None or soften) else None
    if logits_nV is None:
        logits_nV = head.logits(hidden_nH.detach(), out)
    return torch.div(logits_nV, temperature, out=out) if soften and temperature != 1 else logits_nV


def _divergence_of(signal: Signal, objective: Objective, rows: Rows):
    return lambda log_q_nV: signal.divergence(objective.divergence, rows, log_q_nV, objective.temperature)


def _found_probs(signal: Signal, log_p_nV: Tensor) -> str:
    return f"{type(signal).__name__} returned log-probabilities of shape {tuple(log_p_nV.shape)}"


def block_rows(vocab: int, device: str, signal: Signal | None) -> int:
    """The number of rows in a block of element-wise work."""
    rows = max(1, _of(_BLOCK_BYTES, device) * (torch.get_num_threads() if device == "cpu" else 1) // (4 * vocab))
    approximate = signal is not None and not has_full_distribution(signal)
    return max(rows, 128) if approximate else rows  # such a signal may compute a matrix product, which is slow for few rows


class Tiles:
    """Buffers [rows, V] by name, allocated at first use and reused for every chunk."""

    def __init__(self, vocab: int, device: torch.device):
        self.vocab, self.device, self.held = vocab, device, {}

    def __call__(self, name: str, n: int, dtype: torch.dtype, rows: int = 0) -> Tensor:
        if name not in self.held or len(self.held[name]) < n:
            self.held[name] = torch.empty(max(rows, n), self.vocab, dtype=dtype, device=self.device)
        return self.held[name][:n]

    def of(self, name: str, n: int, rows: int, dtype: torch.dtype):
        return lambda part: self(f"{name} {part}", n, dtype, rows)


class _Product:
    """The logits of one chunk from a plain Linear head, and the backward pass from their gradient, which shares their memory."""

    def __init__(self, head: Head, hidden_nH: Tensor, tiles: Tiles, *_):
        self.head, self.hidden_nH = head, hidden_nH
        self.logits_nV = head.logits(hidden_nH, tiles("student", len(hidden_nH), head.dtype))
        self.grad_nV = self.logits_nV
        if hidden_nH.is_cuda:  # in the weight's dtype: a half-precision row fills the first half of its row of logits
            self.grad_nV = self.logits_nV.view(head.project.weight.dtype)[:, : head.vocab]

    def backward(self, grad_hidden_nH: Tensor | None, grad_weights: list[Tensor]) -> None:
        self.head.backward(self.grad_nV, self.hidden_nH, grad_hidden_nH, grad_weights)


class _Module:
    """The same for a head with an adapter, a soft cap or quantised weights: autograd does the backward pass."""

    def __init__(self, head: Head, hidden_nH: Tensor, tiles: Tiles, needs_hidden: bool, weights: tuple[Tensor, ...], rows: Rows):
        with torch.set_grad_enabled(needs_hidden or bool(weights)):
            self.hidden_nH, self.weights = hidden_nH.requires_grad_(needs_hidden), weights
            self.graph_nV = head.logits(self.hidden_nH, rows=rows)
        self.logits_nV = self.graph_nV.detach()
        self.grad_nV = tiles("student", len(hidden_nH), self.logits_nV.dtype)

    def backward(self, grad_hidden_nH: Tensor | None, grad_weights: list[Tensor]) -> None:
        inputs = ([] if grad_hidden_nH is None else [self.hidden_nH]) + list(self.weights)
        found = list(torch.autograd.grad(self.graph_nV, inputs, self.grad_nV, allow_unused=True))
        if grad_hidden_nH is not None:
            grad_hidden_nH.copy_(found.pop(0))
        for total, new in zip(grad_weights, found, strict=True):
            if new is not None:
                total += new
