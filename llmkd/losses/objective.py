"""What the student minimises: (1 - kd_ratio) CE + kd_ratio T^2 D, from the logits of a few rows at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..signals import Divergence, Signal
from .divergences import forward_kl


@dataclass(frozen=True)
class Objective:
    """Cross-entropy and a divergence, mixed by `kd_ratio`.

    The divergence is taken between both models softened by `temperature` and multiplied by its square, so that its
    gradient keeps its size and kd_ratio means the same at every temperature (Hinton et al. 2015, section 2).
    """

    kd_ratio: float = 0.0
    temperature: float = 1.0
    divergence: Divergence = forward_kl

    def rows(self, logits_nV: Tensor, labels_n: Tensor, signal: Signal | None, rows: slice) -> dict[str, Tensor]:
        """The terms for each row: {"ce": [n]}, and with a signal "kd": [n], which is T^2 D.

        logits_nV   the student's logits, float32 or wider
        labels_n    the tokens to predict
        rows        which of the signal's targets these rows are
        """
        log_q_nV = torch.log_softmax(logits_nV, dim=-1)
        terms = {"ce": -log_q_nV.gather(-1, labels_n[:, None])[:, 0]}
        if signal is not None:
            T = self.temperature
            soft_nV = log_q_nV if T == 1 else torch.log_softmax(logits_nV / T, dim=-1)
            terms["kd"] = T * T * signal.divergence(self.divergence, rows, soft_nV, T)
        return terms

    def mix(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms, row by row. A term without weight is left out, so it cannot spoil the rest."""
        weights = {"ce": 1 - self.kd_ratio, "kd": self.kd_ratio} if "kd" in terms else {"ce": 1.0}
        return sum(weights[name] * term for name, term in terms.items() if weights[name])
