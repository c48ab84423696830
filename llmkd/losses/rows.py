"""Rows grouped by what is computed for them, cut into chunks, and their results joined again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..batch import Rows, rows_where, zeros_of
from ..signals import Divergence, Signal


@dataclass(frozen=True)
class Part:
    """Rows that are computed in the same way.

    signal       the teacher's; None for rows without "kd"
    weights      by term, the weight of each row, [n]
    divergence   None: the objective's
    """

    rows: Rows
    signal: Signal | None
    weights: dict[str, Tensor] = field(default_factory=dict)
    divergence: Divergence | None = None

    def chunks(self, size: int) -> Iterator[tuple[Rows, dict[str, Tensor]]]:
        """At most `size` rows at a time, with their weights."""
        n = _count(self.rows)
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            yield within(self.rows, part), {name: w_n[part] for name, w_n in self.weights.items()}


def parted(
    N: int,
    shares: dict[str, float],
    signal: Signal | None,
    weights: dict[str, Tensor],
    zeros: dict[tuple[str, ...], Rows],
    kept: Tensor | None,
    device: torch.device,
) -> Iterator[Part]:
    """Two parts at most: the rows whose "kd" weight is not 0, with the teacher, and those with a weight for "ce" only, without it.

    zeros   `Batch.zeros`
    kept    indices of the rows that count; None: all count
    """
    groups = zeros or {(): slice(0, N)}
    if kept is not None:
        own = zeros_of({name: w_N[kept] for name, w_N in weights.items()}) if zeros else {}
        groups = {without: kept[rows] for without, rows in own.items()} or {(): kept}
    with_kd, without_kd = [], []
    for without, rows in groups.items():
        carried = set(shares) - set(without)
        if carried:
            (with_kd if "kd" in carried else without_kd).append(rows)
    for own, teacher, names in ((with_kd, signal, ("ce", "kd")), (without_kd, None, ("ce",))):
        if own:
            whole = sum(map(_count, own)) == N
            rows = slice(0, N) if whole else own[0] if len(own) == 1 else torch.cat([_indices(one, device) for one in own])
            yield Part(rows, teacher, {name: weights[name][rows] for name in names if name in weights})


@dataclass(frozen=True)
class Divergences:
    """The divergence of each target: `kind_N` [N], on the CPU, is its index in `found`, in which None means the objective's."""

    found: Sequence[Divergence | None]
    kind_N: Tensor

    def split(self, part: Part, device: torch.device) -> Iterator[Part]:
        """A part for each divergence among its rows; a part without a teacher is not split."""
        kind_n = self.kind_N[part.rows if isinstance(part.rows, slice) else part.rows.cpu()]
        kinds = kind_n.unique().tolist()
        if part.signal is None or len(kinds) < 2:
            yield replace(part, divergence=self.found[kinds[0]]) if kinds and part.signal is not None else part
            return
        for kind in kinds:
            own = rows_where(kind_n == kind)
            if isinstance(own, slice):
                rows = within(part.rows, own)
            else:
                own = own.to(device)
                rows = own + part.rows.start if isinstance(part.rows, slice) else part.rows[own]
            yield Part(rows, part.signal, {name: w_n[own] for name, w_n in part.weights.items()}, self.found[kind])


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def within(rows: Rows, part: slice) -> Rows:
    """The rows `part` of `rows`."""
    return slice(rows.start + part.start, rows.start + part.stop) if isinstance(rows, slice) else rows[part]


def _indices(rows: Rows, device: torch.device) -> Tensor:
    return torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows


def weighted(term_n: Tensor, weight_n: Tensor | None) -> Tensor:
    """A term times its weight at each row; 0 where the weight is 0, even if the term is not finite there."""
    return term_n if weight_n is None else torch.where(weight_n == 0, 0.0, weight_n * term_n)


def joined(pieces: list[tuple[Rows, dict[str, Tensor]]], name: str, N: int, like: Tensor) -> Tensor:
    """A term at all N rows, [N], from its values at some; 0 where it was not computed. `like` gives device and default dtype."""
    found = [(rows, terms[name]) for rows, terms in pieces if name in terms]
    if found and all(isinstance(rows, slice) for rows, _ in found) and sum(len(term) for _, term in found) == N:
        return torch.cat([term for _, term in sorted(found, key=lambda one: one[0].start)])
    out = like.new_zeros(N, dtype=found[0][1].dtype if found else like.dtype)
    for rows, term in found:
        out[rows] = term
    return out
