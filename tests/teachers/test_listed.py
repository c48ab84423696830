"""The signal of listed tokens, against float64 loops over the listing."""

import math

import numpy as np
import pytest
import torch

from llmkd.losses.divergences import forward_kl
from llmkd.teachers import listed
from llmkd.teachers.sparse import TopK

V, K = 40, 6


@pytest.fixture(scope="module")
def log_p_NV() -> np.ndarray:
    logits_NV = 3 * np.random.default_rng(0).standard_normal((5, V))
    return logits_NV - np.log(np.exp(logits_NV).sum(1, keepdims=True))


def listing(log_p_NV, count, labels):
    """As vLLM lists: the most likely tokens, and the target's own."""
    rows = [list(dict.fromkeys([*np.argsort(-row)[:count].tolist(), label])) for row, label in zip(log_p_NV, labels, strict=True)]
    ids_NM, log_p_NM = np.full((len(rows), count + 1), -1), np.full((len(rows), count + 1), -math.inf)
    for n, ids in enumerate(rows):
        ids_NM[n, : len(ids)], log_p_NM[n, : len(ids)] = ids, log_p_NV[n, ids]
    return ids_NM, log_p_NM, log_p_NV[np.arange(len(rows)), labels]


@pytest.mark.parametrize("count", [K, K + 3])
def test_it_is_that_of_the_live_distribution_at_temperature_1(log_p_NV, count):
    labels = np.array([0, 7, 39, 12, 5])
    found = listed.top_k(*listing(log_p_NV, count, labels), K, V)
    live = TopK.of(torch.from_numpy(log_p_NV), K, torch.from_numpy(labels))
    assert torch.equal(found.ids_NK, live.ids_NK)
    assert (found.events(slice(None)) - live.events(slice(None))).abs().max() < 1e-9
    assert (found.label_log_p_N - live.label_log_p_N).abs().max() < 1e-12
    log_q_NV = torch.randn(5, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(1)
    values = found.divergence(forward_kl, slice(None), log_q_NV)
    for n in range(5):  # by an explicit loop over K + 1 events
        best = np.argsort(-log_p_NV[n])[:K].tolist()
        p, q = ([math.exp(x[i]) for i in best] for x in (log_p_NV[n], log_q_NV[n].tolist()))
        events = [*zip(p, q, strict=True), (1 - math.fsum(p), 1 - math.fsum(q))]
        assert abs(values[n].item() - math.fsum(a * math.log(a / b) for a, b in events)) < 1e-9


def test_entries_beyond_the_vocabulary_and_negligible_ones_are_the_tail(log_p_NV):
    ids_NM = np.array([[3, V + 2, 9, 4, 0, 1, 2, -1]])
    log_p_NM = np.log(np.array([[0.4, 0.2, 0.1, 0.05, 0.01, 0.005, 1e-60, 1]]))
    log_p_NM[0, -1] = -math.inf
    found = listed.top_k(ids_NM, log_p_NM, np.array([math.log(0.1)]), K, V)
    kept = {i: math.exp(p) for i, p in zip(found.ids_NK[0].tolist(), found.log_p_NK[0].tolist(), strict=True) if p > -math.inf}
    assert kept.keys() == {3, 9, 4, 0, 1} and abs(kept[4] - 0.05) < 1e-12
    assert len(set(found.ids_NK[0].tolist())) == K and found.ids_NK[0].tolist() == sorted(found.ids_NK[0].tolist())
    assert abs(found.tail_NS[0, 0].exp().item() - (1 - 0.4 - 0.1 - 0.05 - 0.01 - 0.005)) < 1e-12


def test_a_label_that_is_not_known_is_as_likely_as_the_rest_of_the_tail(log_p_NV):
    ids_NM, log_p_NM, _ = listing(log_p_NV, K, [int(row.argmax()) for row in log_p_NV])
    found = listed.top_k(ids_NM, log_p_NM, np.full(5, math.nan), K, V)
    for n in range(5):
        rest = 1 - math.fsum(sorted(np.exp(log_p_NV[n]).tolist(), reverse=True)[:K])
        assert abs(found.label_log_p_N[n].item() - math.log(rest / (V - K))) < 1e-9


def test_all_tokens_listed_leave_no_tail_and_rounding_makes_none(log_p_NV):
    ids_NM, log_p_NM = np.arange(V)[None].repeat(5, 0), log_p_NV + 1e-7
    found = listed.top_k(ids_NM, log_p_NM, log_p_NM[:, 0], V, V)
    assert (found.tail_NS == -math.inf).all() and found.events(slice(None)).exp().sum(1).sub(1).abs().max() < 1e-6
