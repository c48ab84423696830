"""The table of needs in recipes/README.md against the plans that it is made of."""

from pathlib import Path

import pytest

from tests.kit.scripts import load_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def needs():
    return load_script(ROOT / "docs" / "needs.py")


def _rows(needs) -> dict[tuple[str, int], list[float]]:
    """GB of each stage, as the page has them."""
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    found = {}
    for line in text.split(needs.BEGIN)[1].split(needs.END)[0].removeprefix(needs.HEAD).splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        folder, stage = name.split()
        found[folder.strip("`"), int(stage)] = [float(cell or 0) for cell in cells]
    return found


def test_the_table_has_every_recipe_whose_models_are_known(needs):
    """Weights by hand: 16 bits for each of Llama's published parameters, of the teacher's with an adapter in float32."""
    rows = _rows(needs)
    assert list(rows) == [(folder, stage) for folder in needs.FOLDERS for stage in (1, 2)]
    assert rows["llama3_8b_to_1b", 1][0] == pytest.approx(2 * 8.030e9 / 1e9, abs=0.06)
    assert rows["llama3_8b_to_1b", 2][0] == pytest.approx(2 * 1.236e9 / 1e9, abs=0.06)
    assert all(cells[0] + cells[1] + cells[2] + cells[3] < cells[4] for cells in rows.values())


@pytest.mark.slow
def test_a_line_is_what_a_plan_says_now(needs):
    folder, stage = "laptop_360m_to_135m", 1
    now = needs.row(folder, stage, needs.needs(folder, stage))
    cells = [float(cell.strip() or 0) for cell in now.strip("|\n").split("|")[1:]]
    assert cells == pytest.approx(_rows(needs)[folder, stage], abs=0.11)
