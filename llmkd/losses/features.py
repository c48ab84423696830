"""Hidden states of the student's layers against the teacher's: distances, and the term with its linear maps between two widths.

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
    """The mean of the squared differences, [N] (FitNets, Romero et al. 2015, equation 3, over the width)."""
    return mse_loss(widen(a_NE), widen(b_NE), reduction="none").mean(-1)  # fewer passes than of the difference, its square and theirs back


def normalized_mse(a_NE: Tensor, b_NE: Tensor) -> Tensor:
    """The squared distance of the states scaled to length 1, [N] (PKD, Sun et al. 2019, equation 7)."""
    return (normalize(widen(a_NE), dim=-1) - normalize(widen(b_NE), dim=-1)).square().sum(-1)


def cosine(a_NE: Tensor, b_NE: Tensor) -> Tensor:
    """1 - cos of the angle between the states, [N] (DistilBERT, Sanh et al. 2019): half of `normalized_mse`, so that it is exactly 0."""
    return normalized_mse(a_NE, b_NE) / 2


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "normalized_mse": normalized_mse, "cosine": cosine}


class FeatureTerm(RowTerm):
    """The distance of the student's mapped hidden states from the teacher's, each pair's divided by its scale; the mean over the pairs.

    The map is R: D -> E, on the student's side. Some texts write R: E -> D and MSE(f_T, R(f_S)), which only this direction fits; and only
    this one is safe: a map of the teacher's states that trains has the trivial solution R = 0, f_S = 0.

    Maps and scales (1) are those of `init` (xavier or identity) until they are set to what is measured before the first step.

    pairs       (student layer, teacher layer)
    widths      (D, E) of each pair
    projection  linear, or none where D = E: no map
    lr          the maps' own peak learning rate, or None
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
        """The largest D of a map; 0 without maps."""
        return max((one.in_features for one in self.maps or ()), default=0)

    def mapped(self, pair: int, hidden_ND: Tensor) -> Tensor:
        """The student's states of a pair as the teacher's, [N, E]."""
        if self.maps is None:
            return hidden_ND
        return self.maps[pair](hidden_ND.to(self.maps[pair].weight.dtype))

    def rows(self, student: StudentOutputs, signal: Signal | None, batch: Batch, targets: Rows) -> Tensor:
        each = []
        for n, (s, t) in enumerate(self.pairs):
            each.append(self.distance(self.mapped(n, student.layers[s][targets]), signal.layers[t][targets]) / self.scales[n])
        return torch.stack(each).mean(0)


class Spread:
    """The mean distance of states from their mean state, of batches that are added one by one: with `mse` their variance, mean over the width.

    In float64. By the other distances it is that of the states scaled to length 1 from the scaled mean m: their variance, summed over the width,
    and the squared distance of their own mean from m.
    """

    def __init__(self, distance: Callable[[Tensor, Tensor], Tensor]):
        self.distance, self.states, self.scaled = distance, Moments(), Moments()

    def add(self, hidden_NE: Tensor) -> None:
        self.states.add(hidden_NE)
        if self.distance is not mse:
            self.scaled.add(normalize(hidden_NE.double(), dim=-1))

    @property
    def value(self) -> float:
        """0 where the states are the same up to rounding."""
        if not (self.states.mean.square().sum() * 1e-24 < self.states.squares / self.states.n):
            return 0.0 if self.states.squares.isfinite() else math.nan
        if self.distance is mse:
            return (self.states.squares / self.states.n).item() / len(self.states.mean)
        far = normalize(self.states.mean, dim=-1) - self.scaled.mean
        return (self.scaled.squares / self.scaled.n + far.square().sum()).item() / (2 if self.distance is cosine else 1)
