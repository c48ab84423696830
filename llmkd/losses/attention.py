"""How far the student's attention is from the teacher's, for each target: attention maps, and relations of queries, keys and values.

Shapes: n targets of one example, m of the example's own positions, h query heads, g key heads (h is a multiple of g), d the width of a head,
r relation heads. A target at position t is compared over the positions up to t that both models let it see; both are normalised over
those alone. Everything is computed in at least float32, a chunk of targets at a time, and again in the backward pass.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..batch import Batch, View
from ..errors import UserError
from ..head import widen
from ..signals import AttentionInputs, Dense, Taps
from .divergences import forward_kl
from .terms import RowTerm, StudentOutputs

#: Bytes of the float32 scores of one chunk of targets, of either model.
_TILE = 32 * 2**20


def seen(place_n: Tensor, m: int, windows: tuple[int | None, ...] = ()) -> Tensor:
    """Which of m positions the targets at `place_n` see, [n, m]: their own and those before, in every sliding window (the target's own
    position counted) of `windows`; None is no window."""
    back_nm = place_n[:, None] - torch.arange(m, device=place_n.device)
    sees_nm = back_nm >= 0
    for window in windows:
        if window is not None:
            sees_nm &= back_nm < window
    return sees_nm


def scores(query_nhd: Tensor, key_gmd: Tensor, scaling: float) -> Tensor:
    """scaling q k [n, h, m]. Query head i reads key head i // (h / g), as in transformers."""
    n, h, _ = query_nhd.shape
    g, m, _ = key_gmd.shape
    query_gad = widen(query_nhd).unflatten(1, (g, h // g)).transpose(0, 1).flatten(1, 2)
    scores_gam = torch.bmm(query_gad, widen(key_gmd).transpose(1, 2)) * scaling
    return scores_gam.view(g, n, h // g, m).transpose(0, 1).reshape(n, h, m)


def relations(vectors_nc: Tensor, vectors_mc: Tensor, heads: int) -> Tensor:
    """Scores [n, r, m] of vectors with one another, cut into `heads` parts: a_n a_m / sqrt(c / r) (MiniLMv2, arXiv:2012.15828, section 3.1)."""
    ours_rnd, theirs_rmd = (widen(x).unflatten(-1, (heads, -1)).transpose(0, 1) for x in (vectors_nc, vectors_mc))
    return torch.bmm(ours_rnd, theirs_rmd.transpose(1, 2)).transpose(0, 1) / math.sqrt(ours_rnd.shape[-1])


def log_map(scores_nhm: Tensor, sees_nm: Tensor) -> Tensor:
    """Log-probabilities [n, h, m] over the positions that are seen; -inf elsewhere."""
    return scores_nhm.masked_fill(~sees_nm[:, None], -math.inf).log_softmax(-1)


def mean_of_heads(log_nhm: Tensor) -> Tensor:
    """The log of the heads' mean probabilities, [n, 1, m]."""
    least = torch.finfo(log_nhm.dtype).min / 4  # logsumexp of -inf alone has no gradient
    mean_n1m = log_nhm.clamp_min(least).logsumexp(1, keepdim=True) - math.log(log_nhm.shape[1])
    return mean_n1m.masked_fill(log_nhm[:, :1] == -math.inf, -math.inf)


def divergence(student_nhm: Tensor, teacher_nhm: Tensor, sees_nm: Tensor, mean: bool = False) -> Tensor:
    """KL(teacher || student) of the maps of two models' scores, [n], the mean over heads; with `mean` that of the heads' mean maps."""
    log_q, log_p = (log_map(x, sees_nm) for x in (student_nhm, teacher_nhm))
    if mean:
        log_q, log_p = mean_of_heads(log_q), mean_of_heads(log_p)
    return forward_kl(log_q, log_p).mean(-1)


def in_chunks(values: Callable[..., Tensor], rows: tuple[Tensor, ...], row_bytes: int, *whole) -> Tensor:
    """`values(*chunks of rows, *whole)` [n], row by row, in chunks whose rows of `row_bytes` fit into a tile; what is between is computed
    again in the backward pass and not kept."""
    size = max(1, _TILE // row_bytes)
    chunks = zip(*(x.split(size) for x in rows), strict=True)
    return torch.cat([checkpoint(values, *chunk, *whole, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


def map_divergence(student: AttentionInputs, teacher: AttentionInputs, view: View, counts: Sequence[int], mean: bool = False) -> Tensor:
    """KL of the two models' attention maps for each of a view's targets, [N]: the mean over heads, or with `mean` that of the heads' mean
    maps. `counts`: the targets of each example."""

    def values(query_nhd, query_T_nhd, place_n, key_gmd, key_T_gmd):
        sees_nm = seen(place_n, key_gmd.shape[1], (student.window, teacher.window))
        ours, theirs = scores(query_nhd, key_gmd, student.scaling), scores(query_T_nhd, key_T_gmd, teacher.scaling)
        return divergence(ours, theirs, sees_nm, mean)

    found = []
    tensors = (view.by_example(x) for x in (student.query, teacher.query, student.key, teacher.key))
    for place_n, *queries, key, key_T in zip(view.places(counts), *tensors, strict=True):
        rows = (*(query_hmd[:, place_n].transpose(0, 1) for query_hmd in queries), place_n)
        found.append(in_chunks(values, rows, 4 * max(map(len, queries)) * key.shape[1], key, key_T))
    return torch.cat(found)


def relation_divergence(student: AttentionInputs, teacher: AttentionInputs, view: View, counts: Sequence[int], heads: int) -> Tensor:
    """MiniLMv2 (arXiv:2012.15828, section 3): the KLs of the relations of queries, of keys and of values with one another, added up, [N].

    The vectors of all heads of a position stand one after another and are cut into `heads` parts, so that two models may have any heads
    and widths. Keys and values count once for all queries that read them.
    """

    def values(vectors_nc, vectors_T_nc, place_n, vectors_mc, vectors_T_mc):
        sees_nm = seen(place_n, len(vectors_mc), (student.window, teacher.window))
        return divergence(relations(vectors_nc, vectors_mc, heads), relations(vectors_T_nc, vectors_T_mc, heads), sees_nm)

    total_N = []
    for pair in ((student.query, teacher.query), (student.key, teacher.key), (student.value, teacher.value)):
        found = []
        for place_n, *vectors in zip(view.places(counts), *map(view.by_example, pair), strict=True):
            ours, theirs = (x_hmd.transpose(0, 1).flatten(1) for x_hmd in vectors)
            found.append(in_chunks(values, (ours[place_n], theirs[place_n], place_n), 4 * heads * len(ours), ours, theirs))
        total_N.append(torch.cat(found))
    return torch.stack(total_N).sum(0)


class AttentionTerm(RowTerm):
    """The mean over pairs of layers (the student's, the teacher's) of `map_divergence`, or with `relation_heads` of `relation_divergence`.

    mean   compare the heads' mean maps

    UserError for a batch whose teacher reads other positions than the student.
    """

    needs_teacher = True

    def __init__(self, weight: float, pairs: Sequence[tuple[int, int]], mean: bool = False, relation_heads: int | None = None):
        super().__init__("attention", weight)
        self.pairs, self.mean, self.relation_heads = tuple(pairs), mean, relation_heads
        self.student_taps, self.teacher_taps = (
            Taps(attention=frozenset(layers), queries=relation_heads is not None) for layers in zip(*pairs, strict=True)
        )

    def rows(self, student: StudentOutputs, signal: Dense, batch: Batch) -> Tensor:
        if batch.teacher is not batch.student:
            raise UserError(
                "loss.attention: a row has a teacher_context, which gives the teacher other positions; remove it, or leave the term out"
            )
        view, counts = batch.student, [example.num_targets for example in batch.examples]
        if not counts:
            return student.hidden_NH[:, 0]
        found = []
        for pair in self.pairs:
            both = student.attention[pair[0]], signal.attention[pair[1]]
            if self.relation_heads is None:
                found.append(map_divergence(*both, view, counts, self.mean))
            else:
                found.append(relation_divergence(*both, view, counts, self.relation_heads))
        return torch.stack(found).mean(0)
