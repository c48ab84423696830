"""`llmkd plan` on the command line."""

import json

import pytest

from llmkd.cli import main
from tests.conftest import plain_recipe


@pytest.fixture
def planned(world, tmp_path, capsys):
    """The command on a recipe of the small world: exit code, what it printed, and its JSON."""

    def go(*words: str) -> tuple[int, str, dict | None]:
        (tmp_path / "r.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "out")))
        code = main(["plan", "--config", str(tmp_path / "r.yaml"), "--json", str(tmp_path / "plan.json"), *words])
        out, path = capsys.readouterr(), tmp_path / "plan.json"
        return code, out.out + out.err, json.loads(path.read_text()) if path.exists() else None

    return go


@pytest.mark.slow
def test_a_recipe_that_does_not_fit_is_told_what_would_save_memory(planned, monkeypatch):
    changed = {"student.gradient_checkpointing", "train.micro_batch_size", "teacher.cache"}
    monkeypatch.setattr("llmkd.planning.fit.changes", _some(changed))
    code, said, numbers = planned("--memory", "9MB", "--gpu", "none", "--tflops", "0.5")
    assert code == 0 and "it does not fit" in said and "as given by --tflops" in said
    memory = numbers["memory"]
    assert memory["peak"] == pytest.approx(sum(memory["parts"].values())) == memory["needed"]
    assert not numbers["fits"] and {path for one in numbers["changes"] for path in one["settings"]} <= changed
    first, *rest = numbers["changes"]
    assert all(one["saves"] <= first["saves"] for one in rest if len(one["settings"]) == 1)
    smaller = next(one for one in numbers["changes"] if one["settings"] == {"train.micro_batch_size": 1})
    assert smaller["fits"] and smaller["saves"] == pytest.approx(memory["peak"] - smaller["needed"])
    assert numbers["run"]["steps"] == 5 and numbers["run"]["targets"] == 1180
    (here,) = numbers["devices"]
    assert here["device"] == "this machine" and here["seconds"] > 0


def _some(wanted: set[str]):
    from llmkd.planning.fit import changes

    return lambda recipe: (one for one in changes(recipe) if one.settings.keys() <= wanted)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--gpu", "5090"], "--gpu: found 5090, expected one of l4, 4090, a100-40gb, a100, h100, h200, none"),
        (["--memory", "lots"], "--memory: found lots, expected an amount of memory, such as 24GB"),
        (["--share", "1.5"], "--share: found 1.5, expected a number above 0, at most 1"),
        (["--tflops", "-1"], "--tflops: found -1, expected a number above 0"),
        (["--student.model", "nobody/nothing"], "neither in the hub's cache nor could it be downloaded"),
    ],
)
def test_mistakes_are_told_in_a_line(planned, words, expected):
    code, said, numbers = planned(*words)
    assert code == 2 and expected in said and numbers is None
