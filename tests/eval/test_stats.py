"""The statistics against hand-worked values, brute force, identities between the tests, and simulations."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from llmkd_eval.comparison import stats


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def test_mean_and_standard_error_by_hand():
    value, stderr = stats.ratio_stderr(np.array([1.0, 0, 0, 1, 1]))
    assert value == pytest.approx(0.6) and stderr == pytest.approx(math.sqrt(0.3 / 5))  # s² = (3 · 0.4² + 2 · 0.6²) / 4 = 0.3
    value, stderr = stats.ratio_stderr(np.array([0.25]))
    assert value == 0.25 and math.isnan(stderr)


def test_a_ratio_by_hand_and_with_equal_weights():
    value, stderr = stats.ratio_stderr(np.array([2.0, 9.0]), np.array([1.0, 3.0]))
    assert value == 2.75 and stderr == pytest.approx(math.sqrt(2 * (0.75**2 + 0.75**2)) / 4)
    x = np.array([1.0, 4.0, 2.0])
    assert stats.ratio_stderr(7 * x, np.full(3, 7.0)) == pytest.approx(stats.ratio_stderr(x))


def test_a_ratio_s_standard_error_is_the_bootstrap_s(rng):
    w = np.ceil(rng.lognormal(3, 1, 150))
    x = w * rng.gamma(2, 0.5, 150)
    drawn = [rng.integers(0, 150, 150) for _ in range(4000)]
    brute = np.std([x[i].sum() / w[i].sum() for i in drawn])
    naive = np.std(x / w, ddof=1) / math.sqrt(150)  # of the unweighted mean: another number
    assert stats.ratio_stderr(x, w)[1] == pytest.approx(brute, rel=0.05) and abs(naive / brute - 1) > 0.1


@pytest.mark.parametrize("weighted", [False, True])
def test_a_paired_difference_has_the_brute_force_bootstrap_s_interval(rng, weighted):
    a, b = rng.gamma(2, 1, 300), rng.gamma(2, 0.9, 300)
    w = rng.integers(1, 30, 300).astype(float) if weighted else None
    got = stats.paired_difference(a, b, w)
    weights = np.ones(300) if w is None else w
    assert got.value == pytest.approx(a.sum() / weights.sum() - b.sum() / weights.sum())
    drawn = [rng.integers(0, 300, 300) for _ in range(6000)]
    brute = np.array([(a[i].sum() - b[i].sum()) / weights[i].sum() for i in drawn])
    assert got.stderr == pytest.approx(brute.std(), rel=0.04)
    assert got.interval == pytest.approx(np.quantile(brute, [0.025, 0.975]), abs=0.12 * got.stderr)
    assert got == stats.paired_difference(a, b, w) != stats.paired_difference(a, b, w, seed=1)


def test_a_ratio_s_denominator_is_drawn_with_its_items():
    w = np.arange(1.0, 81)
    got = stats.paired_difference(0.3 * w, np.zeros(80), w)  # every sample of items has this ratio
    assert got.interval == pytest.approx((0.3, 0.3)) and got.stderr == pytest.approx(0, abs=1e-12)


def test_pairing_takes_out_what_makes_an_item_hard_for_both(rng):
    hard = rng.normal(0, 1, 500)
    a, b = hard + rng.normal(0, 0.1, 500), hard + rng.normal(0, 0.1, 500)
    apart = math.hypot(stats.ratio_stderr(a)[1], stats.ratio_stderr(b)[1])
    assert stats.paired_difference(a, b).stderr < apart / 5


def test_few_different_values_are_resampled_alike_by_counts_and_by_items(rng):
    d = rng.choice([1.0, 0.0, -1.0], 400, p=[0.2, 0.7, 0.1])
    by_counts = stats.bootstrap(d, None, 20_000, np.random.default_rng(0))
    by_items = stats.bootstrap(d, np.ones(400), 20_000, np.random.default_rng(0))
    quantiles = [0.025, 0.16, 0.5, 0.84, 0.975]
    assert not np.array_equal(by_counts, by_items)
    assert np.quantile(by_counts, quantiles) == pytest.approx(np.quantile(by_items, quantiles), abs=0.003)  # se 0.026
    d = rng.integers(-3, 4, 400) / 3
    by_counts, by_items = stats.sign_flip(d), stats.sign_flip(d + 1e-6 * rng.standard_normal(400))
    assert by_counts[0] == pytest.approx(by_items[0], abs=0.02) and 0.02 < by_counts[0] < 0.98


@pytest.mark.parametrize("n", [200, 10_042])
def test_memory_stays_bounded(n, monkeypatch):
    monkeypatch.setattr(stats, "_CELLS", 1 << 14)  # many blocks: the last is a short one
    rng, d = np.random.default_rng(0), np.linspace(-1, 1.1, n)
    assert stats.bootstrap(d, None, 333, rng).shape == (333,) and stats.flipped_sums(d, 333, rng).shape == (333,)


def test_sign_flips_enumerate_every_pattern(rng):
    for n in (1, 2, 5, 9):
        d = rng.normal(0.4, 1, n).round(1)
        sums = [abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=n)]
        p, exact = stats.sign_flip(np.concatenate([d, np.zeros(30)]))  # zeros change nothing
        assert exact and p == pytest.approx(np.mean(np.array(sums) >= abs(d.sum()) - 1e-9))


def test_sign_flips_by_hand_and_their_resolution():
    assert stats.sign_flip(np.array([1.0, 2, 3])) == (0.25, True)  # |sum| = 6: two patterns of eight
    assert stats.sign_flip(np.array([1.0, 2, -3])) == (1.0, True)
    assert stats.sign_flip(np.full(20, 0.1)) == (2 / 2**20, True)
    assert stats.sign_flip(np.full(200, 0.1)) == (1 / 10_001, False)  # drawn patterns are never all
    thirds = np.array([1 - 2 / 3, 1 / 3, -1 / 3, 2 / 3, -2 / 3, 1 / 3])  # ties that rounding would break; sum 2/3
    sums = [abs(sum(s * x for s, x in zip(signs, (1, 1, -1, 2, -2, 1), strict=True))) for signs in itertools.product((1, -1), repeat=6)]
    assert stats.sign_flip(thirds)[0] == np.mean(np.array(sums) >= 2)


def test_drawn_patterns_agree_with_enumerated_ones(rng, monkeypatch):
    for seed, d in enumerate((rng.normal(0.35, 1, 18), rng.integers(-2, 4, 18) / 3)):
        exact, _ = stats.sign_flip(d)
        monkeypatch.setattr(stats, "_EXACT", 0)
        drawn, whole = stats.sign_flip(d, 20_000, seed)
        monkeypatch.undo()
        assert not whole and drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000) + 1e-4)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 5), (3, 9), (13, 4), (0, 12)])
def test_mcnemar_is_the_binomial_test_and_the_sign_flip_of_the_discordant_pairs(wins, losses):
    a, b = np.r_[np.ones(wins), np.zeros(losses), 1, 1, 0], np.r_[np.zeros(wins), np.ones(losses), 1, 1, 0]
    n = wins + losses
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(min(wins, losses) + 1))
    assert stats.mcnemar(a, b) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)
    assert stats.mcnemar(a, b) == pytest.approx(stats.sign_flip(a - b)[0], rel=1e-12)
    assert stats.mcnemar(a, b) == stats.mcnemar(b, a)


def test_mcnemar_of_thousands_neither_underflows_nor_is_ever_nought():
    a, b = np.r_[np.ones(1400), np.zeros(1200)], np.r_[np.zeros(1400), np.ones(1200)]
    exact = float(2 * sum(math.comb(2600, k) for k in range(1201)) / Fraction(2**2600))
    assert stats.mcnemar(a, b) == pytest.approx(exact, rel=1e-9) and 1e-5 < exact < 1e-3
    assert 0 < stats.mcnemar(np.ones(10_042), np.zeros(10_042)) < 1e-300


def test_holm_on_a_textbook_s_example():
    assert stats.holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm(np.array([0.5, 0.9])) == pytest.approx([1.0, 1.0])
    assert stats.holm(np.array([0.04])) == pytest.approx([0.04])
    p = np.random.default_rng(0).random(8) ** 3  # step down by definition
    rejected, left = set(), sorted(range(8), key=lambda i: p[i])
    while left and p[left[0]] < 0.05 / len(left):
        rejected.add(left.pop(0))
    assert rejected and {i for i in range(8) if stats.holm(p)[i] < 0.05} == rejected


def test_spread_over_seeds_by_hand():
    sd, stderr = stats.seed_spread([0.50, 0.52, 0.57])
    assert sd == pytest.approx(math.sqrt(0.0026 / 2)) and stderr == pytest.approx(sd / math.sqrt(3))
    assert all(map(math.isnan, stats.seed_spread([0.5])))


def test_intervals_over_seeds_by_hand():
    a, b = np.array([0.50, 0.52, 0.57]), np.array([0.49, 0.50, 0.54])  # differences 0.01, 0.02, 0.03: sd 0.01
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert stats.seed_interval(a, b, paired=True) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-7)
    apart = stats.seed_interval(a, b[:2], paired=False)  # se² 0.0013 / 3 + 0.00005 / 2 = 0.000458333; df 2.23 -> 2
    half = 4.302653 * math.sqrt(0.0013 / 3 + 0.00005 / 2)
    assert apart == pytest.approx((0.53 - 0.495 - half, 0.53 - 0.495 + half), abs=1e-7)
    assert stats.seed_interval(a, b[:1], paired=False) is None
    assert stats.seed_interval(np.full(3, 0.5), np.full(3, 0.5), paired=False) == (0.0, 0.0)


def test_student_s_quantiles_are_those_of_printed_tables():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 19: 2.0930, 30: 2.0423, 99: 1.9842, 10_041: 1.9602}
    assert {df: round(stats.t_quantile(0.95, df), 4) for df in table} == table
    assert stats.t_quantile(0.99, 7) == pytest.approx(3.4995, abs=1e-4)


def test_a_detectable_difference_is_found_four_times_in_five(rng):
    assert stats.detectable(1.0) == pytest.approx(2.8016, abs=1e-4)
    assert stats.detectable(1.0, 5) == pytest.approx(2.5758 + 0.8416, abs=1e-4)  # 0.05 / 5 two-sided: z = 2.5758
    n, found = 400, 0
    for _ in range(500):
        d = rng.standard_normal(n) + stats.detectable(1 / math.sqrt(n))
        found += stats.sign_flip(d, 500)[0] < 0.05
    assert 0.75 < found / 500 < 0.85  # three standard errors


def test_no_items_give_a_smaller_p_than_the_least():
    for n in range(1, 12):
        assert stats.sign_flip(np.ones(n))[0] == stats.least_p(n) == 2 / 2**n
        assert stats.mcnemar(np.ones(n), np.zeros(n)) == pytest.approx(2 / 2**n)
    assert stats.least_p(6, 4) == stats.holm(np.full(4, stats.sign_flip(np.arange(1.0, 7))[0])).min() == 0.125
    assert stats.least_p(2, 9) == 1 and stats.least_p(10_042) == 0


@pytest.mark.parametrize("kind", ["normal", "answers", "ratio"])
def test_the_interval_covers_95_times_in_100(kind, rng):
    n, times, covered = 40, 1000, 0
    for i in range(times):
        w = rng.integers(1, 60, n).astype(float) if kind == "ratio" else None
        if kind == "answers":
            d, true = rng.choice([1.0, 0.0, -1.0], n, p=[0.3, 0.5, 0.2]), 0.1
        else:
            d, true = (0.3 + rng.standard_normal(n)) * (1 if w is None else w), 0.3
        low, high = stats.paired_difference(d, np.zeros(n), w, resamples=600, seed=i).interval
        covered += low <= true <= high
    assert 0.93 < covered / times < 0.97


@pytest.mark.parametrize("kind", ["drawn", "enumerated", "thirds", "mcnemar"])
def test_where_there_is_nothing_5_in_100_are_called_something(kind, rng):
    times, called = 1500, 0
    for i in range(times):
        if kind == "mcnemar":
            a, b = (rng.random((2, 300)) < 0.3 + 0.4 * (rng.random(300) < 0.5)).astype(float)
            called += stats.mcnemar(a, b) < 0.05
        else:
            d = rng.integers(-3, 4, 60) / 3 if kind == "thirds" else rng.standard_normal(12 if kind == "enumerated" else 60)
            called += stats.sign_flip(d, 400, i)[0] < 0.05
    assert (0.02 if kind == "mcnemar" else 0.033) < called / times < 0.067  # the exact test keeps below


def test_equal_arms_differ_by_nothing():
    x = np.random.default_rng(0).random(50)
    for w in (None, np.arange(1.0, 51)):
        assert stats.paired_difference(x, x, w) == stats.Difference(0.0, 0.0, (0.0, 0.0))
    assert stats.sign_flip(x - x) == (1.0, True) and stats.mcnemar(x > 0.5, x > 0.5) == 1.0
    assert stats.paired_difference(x + 1, x).interval == pytest.approx((1.0, 1.0))


def test_one_item_shows_nothing():
    got = stats.paired_difference(np.array([1.0]), np.array([0.0]))
    assert got.value == 1 and math.isnan(got.stderr) and all(map(math.isnan, got.interval))
    assert stats.sign_flip(np.array([1.0])) == (1.0, True) and stats.mcnemar(np.ones(1), np.zeros(1)) == 1.0
    assert stats.paired_difference(np.array([1.0, 1.0]), np.array([0.0, 1.0])).interval == (0.0, 1.0)
