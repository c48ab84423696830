"""Linear least squares from sums that are accumulated batch by batch.

Shapes: N states of a batch; D the width of the states that are mapped, E of their targets.
"""

import torch
from torch import Tensor


class Moments:
    """Moments of the states x [N, D] that were added, in float64: their number n, their mean [D], and `squares`, the sum of squared distances from it.

    Batches are merged as in Chan, Golub and LeVeque 1983 (The American Statistician 37, equation 2.1), which has no cancellation if states are
    far from 0.
    """

    def __init__(self):
        self.n, self.mean, self.squares = 0, None, None

    def add(self, x_ND: Tensor) -> tuple[Tensor, Tensor, float]:
        """Add a batch. Returns what a sum of products needs to be merged: the batch's centred states [N, D], its mean minus the mean so far [D],
        and the factor of the product of two such differences."""
        x_ND = x_ND.double()
        if self.mean is None:
            self.mean, self.squares = x_ND.new_zeros(x_ND.shape[1]), x_ND.new_zeros(())
        if not len(x_ND):
            return x_ND, self.mean, 0.0
        n, N = self.n, len(x_ND)
        own_D = x_ND.mean(0)
        x_ND, apart_D, factor = x_ND - own_D, own_D - self.mean, n * N / (n + N)
        self.squares = self.squares + x_ND.square().sum() + factor * apart_D.square().sum()
        self.n, self.mean = n + N, self.mean + apart_D * (N / (n + N))
        return x_ND, apart_D, factor


class LeastSquares:
    """The map y = W x + b with the smallest sum of squared differences over all pairs of states that were added.

    It holds 8 D (D + E) bytes, whatever their number. It solves the normal equations of centred and standardised columns, in float64. These
    square the condition number k of the columns, so that mapped states differ from those of an orthogonal factorisation by about k^2 1e-16 of
    their size, at most 1e-6: directions in which x varies by less than 1e-5 of the most are left out, since a map of them would be noise in a
    float32 model.
    """

    def __init__(self, D: int, E: int, device: torch.device | str = "cpu"):
        self.x, self.y = Moments(), Moments()
        self.xx_DD = torch.zeros(D, D, dtype=torch.float64, device=device)
        self.xy_DE = torch.zeros(D, E, dtype=torch.float64, device=device)

    def add(self, x_ND: Tensor, y_NE: Tensor) -> None:
        """Add a batch of pairs of states."""
        (x_ND, apart_D, factor), (y_NE, apart_E, _) = self.x.add(x_ND), self.y.add(y_NE)
        self.xx_DD.addmm_(x_ND.T, x_ND).addr_(apart_D, apart_D, alpha=factor)
        self.xy_DE.addmm_(x_ND.T, y_NE).addr_(apart_D, apart_E, alpha=factor)

    def map(self) -> tuple[Tensor, Tensor]:
        """The map's W [E, D] and b [E]."""
        size_D = self.xx_DD.diagonal().sqrt()
        size_D = torch.where(size_D > 0, size_D, 1.0)
        values_D, vectors_DD = torch.linalg.eigh(self.xx_DD / size_D / size_D[:, None])
        inverse_D = torch.where(values_D > 1e-10 * values_D.max(), 1 / values_D, 0.0)
        weight_DE = vectors_DD @ (inverse_D[:, None] * (vectors_DD.T @ (self.xy_DE / size_D[:, None])))
        weight_ED = (weight_DE / size_D[:, None]).T
        return weight_ED, self.y.mean - weight_ED @ self.x.mean
