"""The statistics of a comparison: pure functions on numpy arrays, two-sided throughout, the same result for the same seed.

The unit of sampling is the item: a question of a task, or a held-out row. All tests are paired: both models answered the same items.
"""

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.05
POWER = 0.8
_EXACT = 20  # differences: 2^19 sums, 4 MiB
_CELLS = 1 << 22  # random numbers held at once
_FEW = 64  # different values; with fewer, resampling draws how often each occurs


def ratio_stderr(x: np.ndarray, w: np.ndarray | None = None, strata: np.ndarray | None = None) -> tuple[float, float]:
    """r = sum(x) / sum(w) over items, such as nats per token, and its standard error by the delta method.

    sqrt(n / (n - 1) · sum((x - r w)²)) / sum(w), the linearised variance of a ratio estimate (Cochran, Sampling Techniques, 3rd ed.,
    section 2.11, without the finite population's correction). The items are what is drawn, so a long example weighs more and also
    varies more. Without w it is the mean and s / sqrt(n), lm-evaluation-harness's `mean_stderr`. x, w: [n], w > 0. One item: NaN.
    With strata (`strata_variances`) it is the mean and sqrt(sum of their parts of the variance).
    """
    x = np.asarray(x, float)
    if strata is not None:
        return float(x.mean()), float(np.sqrt(strata_variances(x, strata)[0].sum()))
    w = np.ones(len(x)) if w is None else np.asarray(w, float)
    n, total = len(x), w.sum()
    ratio = x.sum() / total
    return float(ratio), float(np.sqrt(n / (n - 1) * np.square(x - ratio * w).sum()) / total) if n > 1 else math.nan


def strata_variances(x: np.ndarray, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of each stratum (task of a group) in the variance of mean(x), n_t s_t² / n², and its number of items n_t; NaN for a single item.

    Items are drawn within their task, tasks are not drawn, and their means are independent (stratified sampling: Cochran, section 5.4,
    without the finite population's correction). A mean of tasks that weigh otherwise than by their items is one of x times item weights.
    x, strata: [n], numbers from 0.
    """
    n = np.bincount(strata)
    squares = np.bincount(strata, np.square(x - (np.bincount(strata, x) / n)[strata]))
    with np.errstate(divide="ignore", invalid="ignore"):
        return n * squares / (n - 1) / len(x) ** 2, n


@dataclass(frozen=True)
class Difference:
    """sum(a - b) / sum(w), its standard error, and a 95 % interval."""

    value: float
    stderr: float
    interval: tuple[float, float]


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    w: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    strata: np.ndarray | None = None,
) -> Difference:
    """The difference of two means (w None) or of two ratios over the same items; a, b, w: [n].

    Standard error: `ratio_stderr` of the per-item differences, which is where pairing helps: what makes an item hard for both
    cancels. Interval: paired bootstrap over items, percentile, with Hesterberg's expansion: the quantiles are taken at
    Phi(-t(n - 1) sqrt(n / (n - 1))) instead of at 2.5 %, which makes up for the bootstrap's variance of (n - 1) / n and for the
    normal's tails (Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69(4), 2015). For
    n = 1000 that changes nothing; for n = 10 it lifts the coverage from 90 to 94 % where differences are normal, from 86 to 90 %
    where they are exponential (simulated; 93 % at n = 50, 95 % at 200). Not BCa: its corrections for a mean vanish with
    skewness / sqrt(n), its bias term is ill-defined where the bootstrap's values are few and tied, as with 0/1 metrics, and it is as
    narrow as the plain percentile just where n is small.
    One item: an interval of NaN.
    With strata each is resampled by itself. The factor that makes up for (n - 1) / n is then the ratio of the two standard errors,
    and the t has Satterthwaite's degrees of freedom, (sum v_t)² / sum(v_t² / (n_t - 1)) for variances v_t, rounded down.
    """
    d = np.asarray(a, float) - np.asarray(b, float)
    n = len(d)
    value, stderr = ratio_stderr(d, w, strata)
    if math.isnan(stderr):
        return Difference(value, stderr, (math.nan, math.nan))
    rng = np.random.default_rng(seed)
    if strata is None:
        df, wider, drawn = n - 1, math.sqrt(n / (n - 1)), bootstrap(d, w, resamples, rng)
    else:
        df, wider = _of_strata(d, strata)
        drawn = sum((m := strata == t).sum() / n * bootstrap(d[m], None, resamples, rng) for t in range(strata.max() + 1))
    tail = NormalDist().cdf(-t_quantile(1 - LEVEL, df) * wider)
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Difference(value, stderr, (float(low), float(high)))


def _of_strata(d: np.ndarray, strata: np.ndarray) -> tuple[int, float]:
    """(degrees of freedom, ratio of the standard error to that of the bootstrap, which has (n_t - 1) / n_t of each variance)."""
    v, n = strata_variances(d, strata)
    if not v.sum():
        return int(n.sum() - len(n)), 1.0
    return max(1, int(v.sum() ** 2 / (v**2 / (n - 1)).sum())), math.sqrt(v.sum() / (v * (n - 1) / n).sum())


def bootstrap(d: np.ndarray, w: np.ndarray | None, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """sum(d) / sum(w) of `resamples` samples of n items with replacement."""
    n = len(d)
    if w is None:
        values, counts = np.unique(d.round(12), return_counts=True)  # 1 - 2/3 and 1/3 are one value
        if len(values) <= min(_FEW, n // 4):  # the same distribution, a hundred times faster for 10,000 questions
            return rng.multinomial(n, counts / n, size=resamples) @ values / n
    out, rows = [], max(1, _CELLS // n)
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, n, size=(min(rows, resamples - start), n), dtype=np.int32)
        out.append(d[drawn].sum(axis=1) / (n if w is None else w[drawn].sum(axis=1)))
    return np.concatenate(out)


def sign_flip(d: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, bool]:
    """Paired permutation test of the per-item differences d [n]: p, and whether it is exact.

    Where the two models are exchangeable on every item, each difference is as likely to have the other sign; p is the share of the
    2^n sign patterns with |sum| at least as large as the one observed (Fisher, Design of Experiments, 1935, section 21). Differences
    of 0 change nothing and are left out. Up to 20 others are enumerated. Beyond that `resamples` patterns are drawn and p is
    (b + 1) / (m + 1), which counts the observed one in and is never 0 (Phipson and Smyth, Permutation P-values Should Never Be
    Zero, 2010): no p below 1 / 10,001 can come out, and one near 0.05 has a standard error of 0.002. A weighted difference of
    ratios has the same test: signs do not change sum(w).
    Few and very skewed differences around a mean of 0 are not exchangeable, and too many pass: 7 % at n = 50 for exponential ones
    (simulated), 5 % at 400.
    """
    d = np.asarray(d, float)
    d = d[np.abs(d) > 1e-12 * np.abs(d).max(initial=0)]
    if not len(d):
        return 1.0, True
    enough = abs(d.sum()) - 1e-10 * np.abs(d).sum()  # the last digits of a sum depend on its order
    if len(d) <= _EXACT:
        sums = d[:1]  # with its own sign only, as the mirrored pattern has the same |sum|
        for x in d[1:]:
            sums = np.concatenate([sums + x, sums - x])
        return float((np.abs(sums) >= enough).mean()), True
    as_large = (np.abs(flipped_sums(d, resamples, np.random.default_rng(seed))) >= enough).sum()
    return float((as_large + 1) / (resamples + 1)), False


def flipped_sums(d: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """sum(s d) for `resamples` draws of signs s."""
    n, (sizes, counts) = len(d), np.unique(np.abs(d).round(12), return_counts=True)
    if len(sizes) <= min(_FEW, n // 4):
        return (2 * rng.binomial(counts, 0.5, size=(resamples, len(sizes))) - counts) @ sizes
    out, rows = [], max(1, _CELLS // n)
    for start in range(0, resamples, rows):
        some = rng.integers(0, 256, size=(min(rows, resamples - start), -(-n // 8)), dtype=np.uint8)
        out.append(2 * (np.unpackbits(some, axis=1)[:, :n].astype(float) @ d) - d.sum())
    return np.concatenate(out)


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """McNemar's exact test for two models' 0/1 answers a, b [n]: p.

    Of the items on which they differ, each wins as many as a fair coin: p = min(1, 2 P(X <= min(wins))), X ~ Binomial(their number,
    1/2) (McNemar 1947; exact form in Agresti, Categorical Data Analysis, section 11.1). Summed in logarithms, so that thousands
    of such items do not underflow. It is `sign_flip` of a - b enumerated whole, and somewhat conservative, as exact tests are.
    """
    a, b = np.asarray(a), np.asarray(b)
    wins, losses = int((a > b).sum()), int((a < b).sum())
    n, few = wins + losses, min(wins, losses)
    k = np.arange(few)
    logs = np.concatenate([[0.0], np.cumsum(np.log((n - k) / (k + 1)))]) - n * math.log(2)  # of C(n, k) / 2^n, k = 0 .. few
    p = 2 * math.exp(logs.max()) * np.exp(logs - logs.max()).sum()
    return float(min(1.0, max(p, sys.float_info.min)))  # too small for a float, but not 0


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p values [m] of a family of m tests (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979).

    Sorted upwards, the i-th is max over j <= i of min(1, (m - j + 1) p_j). Below 0.05: rejected, and the chance of one or more false
    rejections in the family is at most 5 %, however the tests depend on one another.
    """
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(np.minimum(1, p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def seed_spread(values: np.ndarray) -> tuple[float, float]:
    """Standard deviation (n - 1) of one metric over seeds, and the standard error of its mean, sd / sqrt(seeds). One seed: NaN."""
    values = np.asarray(values, float)
    sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return sd, sd / math.sqrt(len(values))


def seed_interval(a: np.ndarray, b: np.ndarray, paired: bool) -> tuple[float, float] | None:
    """95 % interval of mean(a) - mean(b), a metric of two arms' seeds, by Student's t; None if an arm has only one seed.

    Paired (the same seeds in the same order): mean ± t(k - 1) sd(a - b) / sqrt(k). Otherwise Welch's: standard error
    sqrt(se_a² + se_b²), degrees of freedom by Welch and Satterthwaite, rounded down. Two seeds give t(1) = 12.7: next to nothing is shown.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if min(len(a), len(b)) < 2:
        return None
    if paired:
        stderr, df = seed_spread(a - b)[1], len(a) - 1
    else:
        parts = np.array([seed_spread(a)[1], seed_spread(b)[1]]) ** 2
        below = (parts**2 / [len(a) - 1, len(b) - 1]).sum()
        stderr, df = math.sqrt(parts.sum()), max(1, int(parts.sum() ** 2 / below)) if below else 1
    half = t_quantile(1 - LEVEL, df) * stderr
    middle = a.mean() - b.mean()
    return float(middle - half), float(middle + half)


@lru_cache
def t_quantile(level: float, df: int) -> float:
    """t with P(|T| <= t) = level for Student's T with a whole number of degrees of freedom.

    Bisection on the closed form in theta = atan(t / sqrt(df)), Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even).
    """
    odd = df % 2
    j = np.arange(1, (df - 1) // 2 if odd else df // 2)
    ratios = 2 * j / (2 * j + 1) if odd else (2 * j - 1) / (2 * j)

    def inside(theta: float) -> float:
        cos, sin = math.cos(theta), math.sin(theta)
        series = 1 + np.cumprod(ratios * cos**2).sum()
        if odd:
            return 2 / math.pi * (theta + (sin * cos * series if df > 1 else 0))
        return sin * series

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.sqrt(df) * math.tan(low)


def least_p(n: int, family: int = 1) -> float:
    """The smallest p value by Holm's method that n items can give in a family: all differ in one direction, as in one of 2^(n - 1) sign patterns.

    Holm multiplies the smallest p of a family by its size, and none comes out below that one.
    """
    return min(1.0, family * 0.5 ** (n - 1))


def detectable(stderr: float, family: int = 1) -> float:
    """The true difference that a comparison with this standard error shows with a probability of 80 % (4 times in 5).

    (z(1 - 0.05 / (2 family)) + z(0.8)) stderr: 2.80 standard errors for one comparison, more where Holm's first step asks
    for 0.05 / family (Cohen, Statistical Power Analysis; the normal approximation, so too small for a handful of items).
    """
    z = NormalDist().inv_cdf
    return (z(1 - LEVEL / (2 * family)) + z(POWER)) * stderr
