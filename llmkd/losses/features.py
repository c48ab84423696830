"""Hidden states of the student's layers against the teacher's: distances, the linear map between two widths, and the term.

Shape letters in addition to those of `signals.py`: D the student's width, E the teacher's, P pairs of layers.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..batch import Batch, Rows
from ..head import widen
from ..signals import Signal, Taps
from .terms import RowTerm, StudentOutputs


def mse(a_NE: Tensor, b_NE: Tensor) -> Tensor:
    """The mean of the squared differences, [N] (FitNets, Romero et al. 2015, equation 3, over the width)."""
    return (widen(a_NE) - widen(b_NE)).square().mean(-1)


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


def spread(distance: Callable[[Tensor, Tensor], Tensor], hidden_NE: Tensor) -> float:
    """The mean distance of states from their mean state: with `mse` their variance, mean over the width. In float64."""
    hidden_NE = hidden_NE.double()
    return distance(hidden_NE.mean(0, keepdim=True), hidden_NE).mean().item()


def least_squares(x_ND: Tensor, y_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [E, D] and bias [E] of the linear map with the least sum of squared differences from y, in float64.

    From the normal equations of centred and standardised columns; directions in which x varies by less than 1e-5 of the most are left out.
    """
    x_ND, y_NE = x_ND.double(), y_NE.double()
    mean_D, mean_E = x_ND.mean(0), y_NE.mean(0)
    size_D = (x_ND - mean_D).square().mean(0).sqrt()
    size_D = torch.where(size_D > 0, size_D, 1.0)
    z_ND = (x_ND - mean_D) / size_D
    values_D, vectors_DD = torch.linalg.eigh(z_ND.T @ z_ND)
    inverse_D = torch.where(values_D > 1e-10 * values_D.max(), 1 / values_D, 0.0)
    weight_DE = vectors_DD @ (inverse_D[:, None] * (vectors_DD.T @ (z_ND.T @ (y_NE - mean_E))))
    weight_ED = (weight_DE / size_D[:, None]).T
    return weight_ED, mean_E - weight_ED @ mean_D


def share_unexplained(distance: Callable[[Tensor, Tensor], Tensor], found_NE: Tensor, hidden_NE: Tensor) -> float:
    """The mean distance of `found_NE` from the states, as a share of that of their mean state: with `mse` 1 - R^2, of all dimensions at once."""
    return distance(found_NE.double(), hidden_NE.double()).mean().item() / spread(distance, hidden_NE)
