"""The best arms, chosen by one half of the items and compared on the other."""

import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from llmkd_eval.comparison.compare import compare
from llmkd_eval.comparison.cross_fit import CrossFit, cross_fit, halves
from llmkd_eval.comparison.item_results import read
from llmkd_eval.report.best import Best, cross_fit_sentence
from llmkd_eval.report.write import read_report

from llmkd.errors import UserError
from tests.kit.sweep_report import made, written  # noqa: F401

ROWS = 24
TARGETS = np.array([2 + i % 3 for i in range(ROWS)], float)
#: Which half a row is in, from its hash: `r0` to `r23`.
HALF = np.array([zlib.crc32(f"('r{i}',)".encode()) & 1 == 1 for i in range(ROWS)])


def run(folder: Path, name: str, seed: int, ce: np.ndarray, order=range(ROWS), metric="ce", places=None) -> list[Path]:
    """A run whose held-out rows have that CE, or other metric, a target."""
    (folder / name).mkdir()
    (folder / name / "recipe.yaml").write_text(f"seed: {seed}\n")
    rows = [
        {
            "id": place,
            "hash": f"r{i}",
            "place": places[i] if places else f"held.jsonl:{i}",
            "targets": TARGETS[i],
            "sums": {metric: ce[i] * TARGETS[i]},
        }
        for place, i in enumerate(order)
    ]
    (folder / name / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [folder / name]


def test_no_row_compares_the_arms_that_it_chose(tmp_path):
    assert 6 < HALF.sum() < 18
    plain = {"plain": run(tmp_path, "plain", 0, np.full(ROWS, 0.5))}
    noise = {"a": np.where(HALF, 1.0, 0.0), "b": np.where(HALF, 0.0, 1.0)}  # each the best on one half, by luck alone
    fit = cross_fit(plain, {name: run(tmp_path, name, 0, ce) for name, ce in noise.items()}, "held_out", "ce", False)
    assert fit.chosen == (("plain", "a"), ("plain", "b"))  # by the half that is not HALF, by HALF
    assert fit.row.difference == pytest.approx(0.5, abs=1e-12) and fit.row.n == ROWS and fit.row.better is False


def test_the_difference_is_that_of_numpy_over_arms_and_seeds(tmp_path):
    rng = np.random.default_rng(11)
    of = {(name, seed): rng.normal(1, 0.3, ROWS) for name in ("p1", "p2", "p3", "d1", "d2", "d3") for seed in (0, 1)}
    order = rng.permutation(ROWS)  # the halves go by what a row holds
    runs = {name: [] for name, _ in of}
    for (name, seed), ce in of.items():
        runs[name] += run(tmp_path, f"{name}_{seed}", seed, ce, order if seed else range(ROWS))
    sides = [{name: runs[name] for name in runs if name[0] == kind} for kind in "pd"]
    fit = cross_fit(*sides, "held_out", "ce", False)
    mean = {name: (of[name, 0] + of[name, 1]) / 2 for name in runs}

    def best(kind: str, half: np.ndarray) -> str:
        return min((name for name in runs if name[0] == kind), key=lambda name: (mean[name] * TARGETS)[half].sum())

    chosen = [(best("p", half), best("d", half)) for half in (~HALF, HALF)]
    assert fit.chosen == tuple(chosen) and chosen[0] != chosen[1]
    joined = [np.where(HALF, mean[a], mean[b]) for a, b in zip(*chosen, strict=True)]
    assert fit.row.difference == pytest.approx(((joined[1] - joined[0]) * TARGETS).sum() / TARGETS.sum(), abs=1e-12)
    by_seed = [
        [(np.where(HALF, of[a, seed], of[b, seed]) * TARGETS).sum() / TARGETS.sum() for a, b in zip(*chosen, strict=True)]
        for seed in (0, 1)
    ]
    differences = np.array([d - p for p, d in by_seed])
    t = 12.706204736432095  # of 95 %, one degree of freedom
    half_width = t * differences.std(ddof=1) / np.sqrt(2)
    assert fit.row.seed_interval == pytest.approx((differences.mean() - half_width, differences.mean() + half_width), rel=1e-9)


def test_of_a_metric_of_which_more_is_better_the_highest_is_chosen(tmp_path):
    share = {"low": 0.4, "high": 0.6}
    distilled = {name: run(tmp_path, name, 0, np.full(ROWS, x), metric="top1_agreement") for name, x in share.items()}
    plain = {"plain": run(tmp_path, "plain", 0, np.linspace(0.4, 0.6, ROWS), metric="top1_agreement")}
    fit = cross_fit(plain, distilled, "held_out", "top1_agreement", True)
    assert set(fit.chosen) == {("plain", "high")} and fit.row.better is True and fit.row.value == pytest.approx(0.6)


def test_examples_of_one_row_of_data_are_in_one_half(tmp_path):
    places = [f"held.jsonl:{i // 4}" for i in range(ROWS)]
    half = halves(read(run(tmp_path, "a", 0, np.zeros(ROWS), places=places)[0], "held_out"))
    groups = read(tmp_path / "a", "held_out").groups
    of = {place: {bool(h) for h, name in zip(half, groups, strict=True) if name == place} for place in places}
    assert all(len(sides) == 1 for sides in of.values()) and len({True, False} & set().union(*of.values())) == 2


def test_where_both_halves_choose_one_pair_the_difference_is_that_of_all_rows(tmp_path):
    rng = np.random.default_rng(11)
    ce = {name: level + rng.normal(0, 0.01, ROWS) for name, level in (("p1", 1.0), ("p2", 1.4), ("d1", 0.9), ("d2", 1.2))}
    runs = {name: run(tmp_path, name, 0, x) for name, x in ce.items()}
    fit = cross_fit({n: runs[n] for n in ("p1", "p2")}, {n: runs[n] for n in ("d1", "d2")}, "held_out", "ce", False)
    assert set(fit.chosen) == {("p1", "d1")}
    assert fit.row.difference == pytest.approx(((ce["d1"] - ce["p1"]) * TARGETS).sum() / TARGETS.sum(), abs=1e-12)


def test_arms_without_a_common_seed_are_not_joined_and_other_rows_are_refused(tmp_path):
    plain = {"plain": run(tmp_path, "plain", 0, np.full(ROWS, 0.5))}
    distilled = {"a": run(tmp_path, "a", 0, np.where(HALF, 1.0, 0.0)), "b": run(tmp_path, "b", 1, np.where(HALF, 0.0, 1.0))}
    assert cross_fit(plain, distilled, "held_out", "ce", False) is None
    with pytest.raises(UserError, match="items"):
        cross_fit(plain, {"c": run(tmp_path, "c", 0, np.full(ROWS, 0.1), range(5))}, "held_out", "ce", False)


def test_the_report_says_it_and_which_arms_the_halves_choose(made):  # noqa: F811
    grid = {
        f"{kind}-{lr:g}": ({"loss.kd_ratio": ratio, "optim.lr": lr}, good)
        for kind, ratio, good in (("sft", 0, 0.3), ("kd", 0.5, 0.8))
        for lr in (0.01, 0.02)
    }
    folder = made(grid)
    text = re.sub("[`\\\\]", "", written(folder)[1])
    line = next(line for line in text.splitlines() if line.startswith("- Held-out CE: distilled against plain"))
    of = next(one for one in read_report(folder).numbers()["best"] if one["best"].metric == "ce")
    fit = of["cross_fit"]
    assert f"better ({fit.row.difference:+.4f}"[:-1] in line and "one half of the rows chooses, the other compares" in text
    assert fit.chosen[0] == fit.chosen[1] == (of["plain"].arm, of["distilled"].arm) and line.endswith("Either half chooses these two arms.")


def test_arms_that_the_halves_choose_otherwise_are_named(tmp_path):
    plain, distilled = compare({name: run(tmp_path, name, 0, np.full(ROWS, x)) for name, x in (("p", 0.5), ("d", 0.2))}, "p")
    fit = CrossFit(distilled, (("p", "d"), ("p", "e")))
    said = "".join(getattr(part, "text", part) for part in cross_fit_sentence(Best(distilled, distilled, plain, distilled, 4), fit))
    assert said.endswith("One half chooses d and p, the other e and p.")
