"""The tables of docs/evidence.md: what items can show, by formulas of this file's own, and what the recipes cost, against the recipes."""

import math
import re
from pathlib import Path
from statistics import NormalDist

import pytest

from tests.kit.scripts import load_script

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def evidence():
    return load_script(ROOT / "docs" / "evidence.py")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def lines_between(name: str) -> list[list[str]]:
    table = PAGE.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0]
    return [cells(line) for line in table.splitlines()[2:]]


def test_what_items_can_show_is_binomial_arithmetic(evidence):
    """A mean of k tasks of n_i questions each has the variance sum p (1 - p) / n_i over k squared; two scores apart have twice that."""
    shown = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.8)
    rows = lines_between("seen")
    assert len(rows) == len(evidence.CLAIMS)
    for claim, (what, items, points, error, unpaired, paired) in zip(evidence.CLAIMS, rows, strict=True):
        k, p = len(claim.parts), claim.share
        variance = sum(p * (1 - p) / n for n in claim.parts) / k**2
        assert (what, int(items.replace(",", "")), float(points)) == (claim.what, sum(claim.parts), pytest.approx(claim.points, abs=0.005))
        assert float(error) == pytest.approx(100 * math.sqrt(variance), abs=0.0051)
        assert float(unpaired) == pytest.approx(100 * shown * math.sqrt(2 * variance), abs=0.051)
        assert float(paired) == pytest.approx(100 * shown * math.sqrt(sum(0.1 / n for n in claim.parts)) / k, abs=0.051)
    assert evidence.replaced(PAGE, "seen", evidence.seen_table()) == PAGE  # which the script writes


def test_costs_are_of_the_recipes_and_studies_that_are_there(evidence):
    """The memory that a recipe's first line names is the planned one, and a study has as many runs as configurations times seeds."""
    rows = lines_between("cost")
    assert [row[0] for row in rows] == [f"`{one.recipe}`" for one in evidence.COSTS]
    for cost, (_, gpu, memory, most, mean, study) in zip(evidence.COSTS, rows, strict=True):
        said = re.search(r"\(estimate (\d+) GB\)", (ROOT / "recipes" / f"{cost.recipe}.yaml").read_text().splitlines()[0])
        assert gpu.lower() == cost.gpu and abs(int(said[1]) - int(memory)) <= 1, cost.recipe
        assert bool(mean) == bool(cost.tokens) and float((mean or most).replace(",", "")) <= float(most.replace(",", ""))
        assert bool(study) == bool(cost.study)
        if study:
            text = (ROOT / "recipes" / f"{cost.study}.yaml").read_text()
            several = len(re.findall(r"^  [\w.-]+:", text.split("\narms:\n")[1].split("\nseeds:")[0], re.MULTILINE))
            seeds = len(re.search(r"^seeds: \[(.*)\]", text, re.MULTILINE)[1].split(","))
            assert f"{several * seeds} runs" in study and evidence.runs_of_study(cost.study) == several * seeds
