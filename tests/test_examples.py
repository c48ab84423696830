"""The examples and the notebook are run as they are, with fewer steps."""

import json
from pathlib import Path

import pytest

from tests.kit.scripts import load_script

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_every_example_has_a_test():
    assert {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} == {
        "own_loop",
        "custom_divergence",
        "custom_teacher",
        "quickstart",
    }


def test_own_loop():
    results = load_script(EXAMPLES / "own_loop.py").main(steps=25)
    assert results["student distilled"].keys() == {"ce", "kd"} and results["student alone"].keys() == {"ce"}
    assert 2 < results["teacher"]["ce"] < 3.9  # log 48 is 3.87


def test_custom_divergence():
    terms = load_script(EXAMPLES / "custom_divergence.py").main()
    assert ((terms > 0) & (terms < 4)).all()


def test_custom_teacher():
    found = load_script(EXAMPLES / "custom_teacher.py").main(steps=40)
    assert found["after"] < found["before"] / 3


@pytest.fixture
def agg(monkeypatch):
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    drawn = []
    monkeypatch.setattr(pyplot, "show", lambda: drawn.append(pyplot.gcf()) or pyplot.close())
    return drawn


@pytest.mark.slow
def test_the_notebook(agg, monkeypatch, tmp_path, capsys):
    """All its cells, in one namespace, from the folder that Jupyter would start it in."""
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "STEPS = 60" in code[0]
    code[0] = code[0].replace("STEPS = 60", "STEPS = 3")
    namespace = {"__name__": "__main__"}
    for number, source in enumerate(code):
        exec(compile(source, f"quickstart.ipynb, code cell {number}", "exec"), namespace)
    told = capsys.readouterr().out
    assert len(agg) == 2 and "top-1 agreement" in told and "student, distilled" in told
    assert namespace["kd"]["validation"]["forward_kl"] > 0
