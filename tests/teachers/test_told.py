"""What is told of targets, as arrays: bit for bit what loops over single tokens make of it."""

import math

import numpy as np
import pytest

from llmkd.teachers.cache.import_logprobs import _of_columns
from llmkd.teachers.cache.told import Told

VOCAB = 40


@pytest.fixture
def told():
    """Sums of probabilities around each limit, places without a token, tokens twice, and numbers that are no log-probabilities."""
    draw = np.random.default_rng(0)
    ids = np.stack([draw.permutation(VOCAB)[:6] for _ in range(400)])
    log_p = draw.normal(size=(400, 6))
    total = np.repeat([0.7, 1.0, 1.001, 1.0010000001, 1.05, 1.0500000001, 1.2, 1.0009999999], 50)
    log_p += np.log(total / np.exp(log_p).sum(1))[:, None]
    log_p[draw.random((400, 6)) < 0.05] = -math.inf
    log_p[:4] = -math.inf
    log_p[4, 2], log_p[5, 3], log_p[6, 1] = math.nan, math.inf, 0.01
    ids[7, 0], ids[8, 5], ids[9, 3], ids[9, 0] = -1, VOCAB, 7, 7
    return Told(ids, log_p)


def entries(told: Told) -> list[dict[int, float]]:
    rows = zip(told.ids_NM.tolist(), told.log_p_NM.tolist(), strict=True)
    return [{a: b for a, b in zip(*row, strict=True) if b != -math.inf} for row in rows]


def test_rounded_sums_are_scaled_as_one_target_after_another_would_be(told):
    before = entries(told)
    sums = [math.fsum(math.exp(min(value, 1.0)) for value in told.log_p_NM[n].tolist()) for n in range(400)]
    rounded = [n for n, total in enumerate(sums) if 1.001 < total <= 1.05]
    assert 60 < len(rounded) < 250 and told.scale_rounded() == len(rounded)
    for n, entry in enumerate(entries(told)):
        wanted = {token: value - math.log(sums[n]) for token, value in before[n].items()} if n in rounded else before[n]
        assert repr(entry) == repr(wanted), n  # every bit, and NaN too


def test_doubtful_targets_are_all_that_a_check_of_each_would_refuse_and_few_others(told):
    refused = set()
    for n, entry in enumerate(entries(told)):
        bad = any(not 0 <= token < VOCAB or not value <= 1e-3 for token, value in entry.items())
        if not entry or bad or math.fsum(math.exp(value) for value in entry.values()) > 1.001:
            refused.add(n)
    found = told.doubtful(VOCAB).tolist()
    assert {0, 4, 5, 6, 7, 8} < refused <= set(found) and found == sorted(found)
    assert len(found) <= len(refused) + 100  # the 100 targets whose sums are within rounding of the limit


def test_labels_and_repeated_tokens(told):
    labels = np.random.default_rng(1).integers(0, VOCAB, 400)
    wanted = [entry.get(label, math.nan) for entry, label in zip(entries(told), labels.tolist(), strict=True)]
    assert repr(told.of_labels(labels).tolist()) == repr(wanted) and not all(map(math.isnan, wanted))
    assert np.flatnonzero(told.twice_N()).tolist() == [n for n in range(400) if len(entries(told)[n]) < told.known_NM[n].sum()]
    assert told.twice_N()[9]
    again = Told.of(entries(told))
    assert [again.entry(n).keys() for n in range(400)] == [one.keys() for one in entries(told)]


def test_only_columns_of_whole_numbers_and_numbers_are_taken_as_arrays():
    ids, values, places = [[5, 6], [1, 2], [3, 4]], [[-1.0, -2], [-0.5, -math.inf], [-1.0, -1.0]], np.array([1, 2])
    told = _of_columns(ids, values, places)
    assert [told.entry(0), told.entry(1)] == [{1: -0.5}, {3: -1.0, 4: -1.0}]
    twice = _of_columns([[7, 7, 8, 7]], [[-1.0, -math.inf, -2.0, -3.0]], np.array([0]))
    assert twice.ids_NM[0, :2].tolist() == [7, 8] and twice.log_p_NM.tolist() == [[-3.0, -2.0, -math.inf, -math.inf]]
    for bad_ids, bad_values in (
        (ids, [*values[:2], [True, -1.0]]),
        (ids, [*values[:2], ["-1", -1.0]]),
        (ids, [*values[:2], None]),
        (ids, [*values[:2], [-1.0]]),
        ([*ids[:2], [3.0, 4]], values),
        ([*ids[:2], [2**70, 3]], values),
    ):
        assert _of_columns(bad_ids, bad_values, places) is None
    assert _of_columns(ids, values, np.array([-1, 0])) is None
