"""Groups of targets for attention scores: few large products, and no score between two examples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import View

_FEW = 64  # targets: below this number a group of a long example may have more pairs, see `grouped`


@dataclass(frozen=True)
class Group:
    """b examples, or parts of their targets, each padded to n targets and m positions. Padding repeats the last target and the last position.

    target_bn     indices among the view's targets
    real_bn       whether an entry is a target and not padding
    place_bn      the target's place among its example's positions
    position_bm   the example's positions among the view's flattened ones
    """

    target_bn: Tensor
    real_bn: Tensor
    place_bn: Tensor
    position_bm: Tensor

    def sees(self, windows: Sequence[int | None] = ()) -> Tensor:
        """Whether each target sees each position, [b, n, m]: its own and those before it, within every sliding window.

        windows   the number of positions in each window, the target's own included; None: no window
        """
        back_bnm = self.place_bn[:, :, None] - torch.arange(self.position_bm.shape[1], device=self.place_bn.device)
        sees_bnm = back_bnm >= 0
        for window in windows:
            if window is not None:
                sees_bnm &= back_bnm < window
        return sees_bnm


def grouped(view: View, counts: Sequence[int], most: int, long: int = 0) -> list[Group]:
    """A view's targets in groups with at most `most` pairs of a target and a position (b n m), unless a single target has more.

    counts   the number of targets of each example
    long     the number of pairs for an example whose groups would else have fewer than 64 targets, since each group gathers its keys again
    """
    groups, device = [], view.rows_N.device
    for parts in _parted(view, counts, most, long):
        first, count, prefix, shared, own, length = torch.tensor(parts).T[..., None].to(device, non_blocking=True)  # [b, 1] each
        number_n = torch.arange(max(part[1] for part in parts), device=device)
        number_m = torch.arange(max(part[3] + part[5] for part in parts), device=device)
        target_bn, number_bm = first + torch.minimum(number_n, count - 1), torch.minimum(number_m, shared + length - 1)
        position_bm = number_bm + torch.where(number_bm < shared, prefix, own - shared)
        groups.append(Group(target_bn, number_n < count, view.rows_N[target_bn] - (own - shared), position_bm))
    return groups


def _parted(view: View, counts: Sequence[int], most: int, long: int) -> Iterator[list[tuple[int, ...]]]:
    """The parts of each group: first target, number of targets, and the example's `Span`. Parts of similar size are grouped, so that padding
    takes at most half as many pairs as the parts themselves, plus a sixteenth of `most`."""
    parts, first = [], 0
    for span, count in zip(view.spans, counts, strict=True):
        m = span.shared + span.length
        size = max(1, most // m, min(_FEW, long // m))
        parts += [(first + at, min(size, count - at), *span) for at in range(0, count, size)]
        first += count
    group, n, pairs = [], 0, 0
    for part in sorted(parts, key=lambda part: (part[3] + part[5], part[1])):
        m = part[3] + part[5]
        n, pairs = max(n, part[1]), pairs + part[1] * m
        if group and (len(group) + 1) * n * m > min(most, 1.5 * pairs + most / 16):
            yield group
            group, n, pairs = [], part[1], part[1] * m
        group.append(part)
    if group:
        yield group
