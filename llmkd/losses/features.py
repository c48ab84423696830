"""Hidden states of the student's layers against the teacher's: distances, and the loss term with its linear maps between two widths.

Shape letters in addition to those of `signals.py`: D the student's width, E the teacher's, P pairs of layers.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from ..batch import Batch, Rows
from ..head import widen
from ..signals import Signal, Taps
from .least_squares import Moments
from .terms import RowTerm, StudentOutputs


def mse(a_NE: Tensor, b_NE: Tensor) -> Tensor:
    """The mean squared difference over the width, [N] (FitNets, Romero et al. 2015, equation 3)."""
    return mse_loss(widen(a_NE), widen(b_NE), reduction="none").mean(-1)  # one pass forward and one back, not one for each operation


def normalized_mse(a_NE: Tensor, b_NE: Tensor) -> Tensor:
    """The squared distance between the states, each scaled to length 1, [N] (PKD, Sun et al. 2019, equation 7)."""
    return (normalize(widen(a_NE), dim=-1) - normalize(widen(b_NE), dim=-1)).square().sum(-1)


def cosine(a_NE: Tensor, b_NE: Tensor) -> Tensor:
    """1 - cos of the angle between the states, [N] (DistilBERT, Sanh et al. 2019). Computed as half of `normalized_mse`, it is exactly 0 for equal states."""
    return normalized_mse(a_NE, b_NE) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "normalized_mse": normalized_mse, "cosine": cosine}


class FeatureTerm(RowTerm):
    """The mean over pairs of layers of the distance between the student's mapped hidden states and the teacher's, divided by the pair's scale.

    The map is R: D -> E, on the student's side. Some papers write R: E -> D together with MSE(f_T, R(f_S)), which only fits R: D -> E. Only
    this direction is safe: a trained map of the teacher's states would have the trivial solution R = 0, f_S = 0.

    Maps start as `init` says and scales as 1; `start_features` may replace both by values measured before the first step.

    pairs       (student layer, teacher layer) of each pair
    widths      (D, E) of each pair
    projection  linear; or none, without maps, if D = E
    init        of the maps: xavier or identity
    lr          the maps' own peak learning rate, or None for the student's
    dtype       of maps and scales; half-precision states are widened to float32
    """

    needs_teacher = True

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        widths: Sequence[tuple[int, int]],
        weight: float = 1.0,
        distance: str = "mse",
        projection: str = "linear",
        init: str = "xavier",
        lr: float | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ):
        super().__init__("features", weight)
        self.pairs, self.distance, self.lr = tuple(pairs), DISTANCES[distance], lr
        self.student_taps = Taps(frozenset(s for s, _ in pairs))
        self.teacher_taps = Taps(frozenset(t for _, t in pairs))
        self.register_buffer("scales", torch.ones(len(pairs), dtype=dtype))
        self.maps = nn.ModuleList(nn.Linear(*width, dtype=dtype) for width in widths) if projection == "linear" else None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for one in self.maps or ():
                one.bias.zero_()
                if init == "identity":
                    nn.init.eye_(one.weight)
                else:
                    nn.init.xavier_uniform_(one.weight, generator=generator)

    @property
    def width(self) -> int:
        """The largest D of the maps; 0 without maps."""
        return max((one.in_features for one in self.maps or ()), default=0)

    def mapped(self, pair: int, hidden_ND: Tensor) -> Tensor:
        """The student's states [N, D] of a pair, mapped to the teacher's width, [N, E]."""
        if self.maps is None:
            return hidden_ND
        return self.maps[pair](hidden_ND.to(self.maps[pair].weight.dtype))

    def rows(self, student: StudentOutputs, signal: Signal | None, batch: Batch, targets: Rows) -> Tensor:
        each = []
        for n, (s, t) in enumerate(self.pairs):
            each.append(self.distance(self.mapped(n, student.layers[s][targets]), signal.layers[t][targets]) / self.scales[n])
        return torch.stack(each).mean(0)


class Spread:
    """The mean distance of hidden states from their mean state, in float64, over batches that are added one by one.

    With `mse` this is their variance, averaged over the width. With the other distances states and mean state are scaled to length 1: it is
    the variance of the scaled states, summed over the width, plus the squared distance between their mean and the scaled mean state.
    """

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]):
        self.distance, self.states, self.scaled = distance, Moments(), Moments()

    def add(self, hidden_NE: Tensor) -> None:
        self.states.add(hidden_NE)
        if self.distance is not mse:
            self.scaled.add(normalize(hidden_NE.double(), dim=-1))

    @property
    def value(self) -> float:
        """The spread; 0 if the states are equal up to rounding, NaN if they are not finite."""
        if not (self.states.mean.square().sum() * 1e-24 < self.states.squares / self.states.n):
            return 0.0 if self.states.squares.isfinite() else math.nan
        if self.distance is mse:
            return (self.states.squares / self.states.n).item() / len(self.states.mean)
        far = normalize(self.states.mean, dim=-1) - self.scaled.mean
        return (self.scaled.squares / self.scaled.n + far.square().sum()).item() / (2 if self.distance is cosine else 1)
