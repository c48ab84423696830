"""The signal of a teacher of which some tokens are listed with their log-probabilities, by a server or in a file: no logits, no hidden states."""

import math

import numpy as np
import torch

from ..config.teacher import LISTED_EXPONENTS
from .sparse import NEGLIGIBLE, TopK


def top_k(ids_NM: np.ndarray, log_p_NM: np.ndarray, label_log_p_N: np.ndarray, k: int, vocab: int) -> TopK:
    """The k most likely of the listed tokens; what is not listed, is below exp(-100), or is no entry of the vocabulary is the tail.

    ids_NM          listed tokens, each once in its row; -1: none
    log_p_NM        their natural logarithms of probability at temperature 1; the rows sum to at most 1, but for rounding
    label_log_p_N   the target's own; NaN where it is not known: then as if the tail were even

    In float64: the tail's mass is 1 minus the sum of the others, so it is known as well as these are (float32: about 1e-7).
    """
    count = len(ids_NM)
    if ids_NM.shape[1] < k:
        ids_NM, log_p_NM = (
            np.pad(x_NM, ((0, 0), (0, k - ids_NM.shape[1])), constant_values=none) for x_NM, none in ((ids_NM, -1), (log_p_NM, -math.inf))
        )
    kept_NM = (ids_NM >= 0) & (ids_NM < vocab) & (log_p_NM > NEGLIGIBLE)
    log_p_NM = np.where(kept_NM, np.minimum(log_p_NM, 0.0), -math.inf)
    best_NK = np.argsort(-log_p_NM, axis=1, kind="stable")[:, :k]
    ids_NK, log_p_NK = (np.take_along_axis(x_NM, best_NK, 1) for x_NM in (ids_NM, log_p_NM))
    for n in np.flatnonzero((log_p_NK == -math.inf).any(1)):  # fewer than k: other ids stand in their places, as parts of the tail
        lacking = log_p_NK[n] == -math.inf
        ids_NK[n, lacking] = np.setdiff1d(np.arange(k), ids_NK[n, ~lacking])[: lacking.sum()]
    order_NK = np.argsort(ids_NK, axis=1)
    ids_NK, log_p_NK = (np.take_along_axis(x_NK, order_NK, 1) for x_NK in (ids_NK, log_p_NK))
    rest_N = np.array([1 - math.fsum(row) for row in np.exp(log_p_NK).tolist()])
    with np.errstate(divide="ignore"):
        rest_N = np.log(np.maximum(rest_N, 0.0))
    evenly_N = rest_N - np.log(np.maximum(1, vocab - (log_p_NK > -math.inf).sum(1)))
    label_N = np.minimum(np.where(np.isnan(label_log_p_N), evenly_N, label_log_p_N), 0.0)
    parts = (torch.from_numpy(np.ascontiguousarray(x)) for x in (ids_NK, log_p_NK, rest_N[:, None]))
    return TopK(*parts, vocab, torch.from_numpy(label_N), torch.full((count,), math.nan), LISTED_EXPONENTS)
