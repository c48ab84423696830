"""Divergence of the student's attention from the teacher's at each target: of attention maps, or of relations of queries, keys and values.

Shapes: N targets of a batch, P flattened positions of a view, h query heads, g key heads (h is a multiple of g), d the width of a head; in a
group of b examples n targets of each, and m of the example's own positions. A target at position t is compared over the positions up to t
that both models let it see; both models' attention is normalised over those positions only.

The gradient is computed together with the divergence: for KL(p || q) with q = softmax(s) it is q - p with respect to the scores s. So only
the scores [b, h, n, m] of one group are held at a time, in at least float32. The gradient is kept for the backward pass, which only scales
it; it is as large as the student's queries at the targets and its keys.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..batch import Batch, View
from ..errors import UserError
from ..head import widen
from ..signals import AttentionInputs, Dense, Taps
from .attention_groups import grouped
from .divergences import kl_and_slope
from .rows import joined, weighted
from .terms import Loss, SingleTerm, StudentOutputs

#: Bytes of one group's float32 scores, for each model: on a CPU they stay in its cache.
_TILE = {"cuda": 32 << 20, "cpu": 2 << 20}
_LONG = 32 << 20  # for an example so long that a tile holds only few of its targets
_LEAST_TILE = 1 << 18  # tiles are not halved below it


def default_tile(device: str) -> int:
    """Bytes of one group's float32 scores on a kind of device."""
    return _TILE.get(device, _TILE["cuda"])


def scores(query_bnhd: Tensor, key_bmgd: Tensor, scaling: float) -> Tensor:
    """scaling q k [b, h, n, m]. Query head i reads key head i // (h / g), as in transformers."""
    (b, n, h, _), (m, g) = query_bnhd.shape, key_bmgd.shape[1:3]
    scores_xam = torch.bmm(_by_key_head(query_bnhd, g), key_bmgd.permute(0, 2, 3, 1).flatten(0, 1))
    return scores_xam.mul_(scaling).view(b, h, n, m)


def capped(scores_bhnm: Tensor, softcap: float | None, train: bool = False) -> tuple[Tensor, Tensor | None]:
    """softcap * tanh(scores / softcap), and with `train` its derivative; the scores are overwritten. Without a soft cap: the scores, and None."""
    if softcap is None:
        return scores_bhnm, None
    tanh_bhnm = scores_bhnm.div_(softcap).tanh_()
    return tanh_bhnm * softcap, tanh_bhnm.square_().neg_().add_(1.0) if train else None


def _by_key_head(query_bnhd: Tensor, g: int) -> Tensor:
    """Queries as [b g, h / g n, d], grouped by the key head that they read."""
    b, n, h, d = query_bnhd.shape
    return query_bnhd.transpose(1, 2).reshape(b * g, h // g * n, d)


def divergence(student_bhnm: Tensor, teacher_bhnm: Tensor, sees_bnm: Tensor, mean: bool = False) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) of the attention maps of two models' scores, averaged over heads, [b, n]; and its gradient with respect to the
    student's scores, [b, h, n, m]. Both scores are overwritten.

    sees   [b, n, m], whether a target sees a position
    mean   compare the maps averaged over heads: with these averages P and Q, the gradient for the student's head a is
           (q_a / Q (Q - P) - q_a sum(q_a / Q (Q - P))) / h
    """
    h = student_bhnm.shape[1]
    unseen_b1nm = torch.zeros_like(sees_bnm, dtype=student_bhnm.dtype).masked_fill_(~sees_bnm, -math.inf)[:, None]
    log_q, log_p = (x.add_(unseen_b1nm).log_softmax(-1) for x in (student_bhnm, teacher_bhnm))  # five times as fast as masked_fill
    if not mean:
        value_bhn, slope_bhnm = kl_and_slope(log_p, log_q)
        return value_bhn.mean(1), slope_bhnm.div_(h)
    log_mean_q, log_mean_p = (x.logsumexp(1, keepdim=True) - math.log(x.shape[1]) for x in (log_q, log_p))
    value_b1n, slope_b1nm = kl_and_slope(log_mean_p, log_mean_q)
    of_head_bhnm = (log_q - log_mean_q).nan_to_num_(0.0).exp_().mul_(slope_b1nm)
    return value_b1n[:, 0], of_head_bhnm.sub_(log_q.exp_().mul_(of_head_bhnm.sum(-1, keepdim=True))).div_(h)


class _Divergence(torch.autograd.Function):
    """The weighted sum of `divergence` over N targets, differentiable in the student's queries and keys; and its weighted values, [N].

    query_Nhd, key_Pgd            the student's, then the teacher's
    scalings, softcaps, windows   of student and teacher, in this order
    weight_N                      the targets' weights, or None
    train                         whether a gradient is needed
    """

    @staticmethod
    def forward(ctx, query_Nhd, key_Pgd, teacher_query_Nhd, teacher_key_Pgd, groups, scalings, softcaps, windows, mean, weight_N, train):
        needs_query, needs_key = (train and needed for needed in ctx.needs_input_grad[:2])
        grad_query = torch.zeros_like(query_Nhd, dtype=widen(query_Nhd[:0]).dtype) if needs_query else None
        grad_key = torch.zeros_like(key_Pgd, dtype=widen(key_Pgd[:0]).dtype) if needs_key else None
        rows_N = widen(query_Nhd[:0]).new_zeros(len(query_Nhd))
        with torch.autocast(query_Nhd.device.type, enabled=False):
            for group in groups:
                target, position = group.target_bn, group.position_bm
                query, key = widen(query_Nhd[target]), widen(key_Pgd[position])
                theirs = scores(*(x.to(query.dtype) for x in (teacher_query_Nhd[target], teacher_key_Pgd[position])), scalings[1])
                ours, slope_of_cap = capped(scores(query, key, scalings[0]), softcaps[0], train)
                value_bn, slope_bhnm = divergence(ours, capped(theirs, softcaps[1])[0], group.sees(windows), mean)
                weight_bn = group.real_bn.to(rows_N.dtype)
                if weight_N is not None:
                    weight_bn *= weight_N[target]
                rows_N.index_add_(0, target.flatten(), weighted(value_bn, weight_bn).flatten())
                if not (needs_query or needs_key):
                    continue
                if slope_of_cap is not None:
                    slope_bhnm.mul_(slope_of_cap)
                of_query, of_key = backward(slope_bhnm.mul_(scalings[0] * weight_bn[:, None, :, None]), query, key, needs_query, needs_key)
                if needs_query:
                    grad_query.index_add_(0, target.flatten(), of_query.flatten(0, 1))
                if needs_key:
                    grad_key.index_add_(0, position.flatten(), of_key.flatten(0, 1))
        ctx.grads, ctx.dtypes = (grad_query, grad_key), (query_Nhd.dtype, key_Pgd.dtype)
        ctx.mark_non_differentiable(rows_N)
        return rows_N.sum(), rows_N

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):
        grads = ((grad if grad is None else (grad * scale).to(dtype)) for grad, dtype in zip(ctx.grads, ctx.dtypes, strict=True))
        return *grads, *(None,) * 9


def backward(
    slope_bhnm: Tensor, query_bnhd: Tensor, key_bmgd: Tensor, needs_query: bool, needs_key: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of queries and keys, in their shapes, from the gradient of their products."""
    b, h, n, m = slope_bhnm.shape
    g = key_bmgd.shape[2]
    slope_xam, of_query, of_key = slope_bhnm.view(b * g, h // g * n, m), None, None
    if needs_query:
        of_query = torch.bmm(slope_xam, key_bmgd.transpose(1, 2).flatten(0, 1)).view(b, h, n, -1).transpose(1, 2)
    if needs_key:
        of_key = torch.bmm(slope_xam.transpose(1, 2), _by_key_head(query_bnhd, g)).view(b, g, m, -1).transpose(1, 2)
    return of_query, of_key


def map_divergence(
    student: AttentionInputs,
    teacher: AttentionInputs,
    view: View,
    counts: Sequence[int],
    mean: bool = False,
    weight_N: Tensor | None = None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """KL of the two models' attention maps: its weighted sum over a view's targets, differentiable, and its weighted values, [N].

    counts   the number of targets of each example
    mean     compare the maps averaged over heads; otherwise the KL is averaged over heads
    tile     bytes of the float32 scores of a group
    """
    heads = max(student.query.shape[1], teacher.query.shape[1])
    groups = grouped(view, counts, *_pairs(tile, heads, view))
    (query, key), (query_T, key_T) = ((_flat(x.query).index_select(0, view.rows_N), _flat(x.key)) for x in (student, teacher))
    scalings, windows = (student.scaling, teacher.scaling), (student.window, teacher.window)
    softcaps = student.softcap, teacher.softcap
    return _Divergence.apply(query, key, query_T, key_T, groups, scalings, softcaps, windows, mean, weight_N, torch.is_grad_enabled())


def relation_divergence(
    student: AttentionInputs,
    teacher: AttentionInputs,
    view: View,
    counts: Sequence[int],
    heads: int,
    weight_N: Tensor | None = None,
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `map_divergence`, of MiniLMv2's relations (arXiv:2012.15828, section 3): the sum of the KLs of query, key and value relations.

    A relation is the attention map of vectors a with themselves, softmax(a a' / sqrt(d)). The vectors of all heads of a position are
    concatenated and cut into `heads` parts of width d, so that the two models may have any numbers and widths of heads. Shared keys and
    values count once, not once for each query head that reads them.
    """
    groups, found = grouped(view, counts, *_pairs(tile, heads, view)), []
    for pair in ((student.query, teacher.query), (student.key, teacher.key), (student.value, teacher.value)):
        ours, theirs = (_flat(x).flatten(1).unflatten(1, (heads, -1)) for x in pair)
        at_targets = (x.index_select(0, view.rows_N) for x in (ours, theirs))
        (query, query_T), scalings = at_targets, tuple(x.shape[-1] ** -0.5 for x in (ours, theirs))
        windows = student.window, teacher.window
        how = groups, scalings, (None, None), windows, False, weight_N, torch.is_grad_enabled()
        found.append(_Divergence.apply(query, ours, query_T, theirs, *how))
    total, rows_N = zip(*found, strict=True)
    return torch.stack(total).sum(), torch.stack(rows_N).sum(0)


def _flat(x_BhTd: Tensor) -> Tensor:
    """[B, h, T, d] as [P, h, d]."""
    return x_BhTd.transpose(1, 2).flatten(0, 1)


def _pairs(tile: int | None, heads: int, view: View) -> tuple[int, int]:
    """The number of pairs of a target and a position whose float32 scores fill a tile; and that for long examples."""
    device = view.rows_N.device.type
    tile = tile or default_tile(device)
    return max(1, tile // (4 * heads)), _LONG // default_tile(device) * tile // (4 * heads)


class AttentionTerm(SingleTerm):
    """The mean over pairs of layers (student's, teacher's) of `map_divergence`, or with `relation_heads` of `relation_divergence`.

    mean   compare the maps averaged over heads

    UserError for a batch whose teacher reads other positions than the student.
    """

    needs_teacher = True

    def __init__(self, weight: float, pairs: Sequence[tuple[int, int]], mean: bool = False, relation_heads: int | None = None):
        super().__init__("attention", weight)
        self.pairs, self.mean, self.relation_heads, self.tile = tuple(pairs), mean, relation_heads, None
        self.student_taps, self.teacher_taps = (
            Taps(attention=frozenset(layers), queries=relation_heads is not None) for layers in zip(*pairs, strict=True)
        )

    def forward(self, student: StudentOutputs, signal: Dense, batch: Batch) -> Loss:
        if batch.teacher is not batch.student:
            raise UserError(
                "loss.attention: a row has a teacher_context, which gives the teacher other positions; remove it, or leave the term out"
            )
        if not batch.num_targets:
            return Loss(student.hidden_NH.sum(), {"attention": widen(student.hidden_NH[:, 0]).detach()})
        targets, view = batch.carriers("attention"), batch.student
        weight_N, rows_n = batch.weights.get("attention"), view.rows_N[targets]
        view, counts = replace(view, rows_N=rows_n), batch.counted(targets)
        how = {"weight_N": None if weight_N is None else weight_N[targets], "tile": self.tile}
        found = []
        for pair in self.pairs:
            both = student.attention[pair[0]], signal.attention[pair[1]]
            if self.relation_heads is None:
                found.append(map_divergence(*both, view, counts, self.mean, **how))
            else:
                found.append(relation_divergence(*both, view, counts, self.relation_heads, **how))
        total, each = zip(*found, strict=True)
        mean_n = torch.stack(each).mean(0)
        rows_N = joined([(targets, {"attention": mean_n})], "attention", batch.num_targets, mean_n)
        return Loss(self.factor * torch.stack(total).mean(), {"attention": rows_N})

    def halve_chunks(self, vocab: int, device: str, least: int) -> str:
        tile = self.tile or default_tile(device)
        if tile <= _LEAST_TILE:
            return ""
        self.tile = tile // 2
        return f"attention in chunks of {self.tile // 1024:,} KiB"
