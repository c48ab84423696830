"""Schedules of a setting: values by step, written out, and what is no schedule."""

import math

import pytest

from llmkd.config import loader
from llmkd.config.dotted import flatten
from llmkd.config.schedule import SHAPES, in_words, length, middle, value_at
from llmkd.config.sweep import Sweep, expand
from llmkd.errors import UserError
from llmkd.teachers.resolve import SignalUse, sample_problems


@pytest.mark.parametrize(
    "setting, expected",
    [
        ({"from": 1.0, "to": 0.2}, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"from": 0.2, "to": 1.0, "shape": "cosine"}, [0.2, 0.6 - 0.4 * math.sqrt(0.5), 0.6, 0.6 + 0.4 * math.sqrt(0.5), 1.0]),
        ({"from": 4.0, "to": 1.0, "steps": 3}, [4.0, 2.5, 1.0, 1.0, 1.0]),
        ({"from": 4.0, "to": 1.0, "ratio": 0.6}, [4.0, 2.5, 1.0, 1.0, 1.0]),
        ({"from": 0.0, "to": 1.0, "shape": "constant", "ratio": 0.5}, [0.0, 0.0, 1.0, 1.0, 1.0]),
        (0.3, [0.3] * 5),
    ],
    ids=str,
)
def test_values_by_step(setting, expected):
    found = [value_at(setting, step, 5) for step in range(1, 6)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15) and found[0] == expected[0] and found[-1] == expected[-1]


def test_short_runs():
    falling = {"from": 1.0, "to": 0.0}
    assert [value_at(falling, step, 1) for step in (1, 2)] == [1.0, 0.0] and [value_at(falling, step, 2) for step in (1, 2)] == [1.0, 0.0]
    assert length(falling, 7) == 7 and length({**falling, "ratio": 0.5}, 7) == 4 and length({**falling, "steps": 3}, 7) == 3
    assert (
        length({**falling, "ratio": 0.07}, 100) == 7 and length({**falling, "ratio": 0.55}, 100) == 55
    )  # 0.07 * 100 is more than 7 in floating point
    assert all(shape(0.0) == 0 and shape(1.0) == 1 for shape in SHAPES.values())


def test_words_and_the_middle():
    assert middle({"from": 1.0, "to": 0.5}) == 0.75 and middle(2.0) == 2.0
    assert in_words(0.5) == "0.5" and in_words({"from": 1, "to": 0.25}) == "1 to 0.25 (linear)"
    assert in_words({"from": 1, "to": 0.25, "shape": "cosine", "steps": 9}) == "1 to 0.25 (cosine, 9 steps)"
    assert in_words({"from": 1, "to": 0.25, "ratio": 0.5}) == "1 to 0.25 (linear, 0.5 of the run)"


GOOD = {"from": 1.0, "to": 0.3, "shape": "cosine"}


def test_it_is_one_value_of_a_setting(make_recipe, tmp_path):
    recipe = make_recipe(loss__kd_ratio=GOOD, loss__temperature={"from": 4, "to": 1})
    assert flatten(recipe)["loss.kd_ratio"] == GOOD
    (tmp_path / "again.yaml").write_text(loader.dump(recipe, tmp_path))
    assert loader.load_recipe(tmp_path / "again.yaml") == recipe
    assert loader.parse_overrides(["--loss.kd_ratio", "{from: 1, to: 0.3}"]) == {"loss.kd_ratio": {"from": 1, "to": 0.3}}
    arms = expand(
        Sweep(
            output_dir="x",
            recipe="r.yaml",
            grid={"loss.kd_ratio": [0.5, GOOD]},
            arms={"hot": {"loss.temperature": {"from": 4, "to": 1}}},
        )
    )
    assert [spec.changes for spec in arms] == [{"loss.kd_ratio": 0.5}, {"loss.kd_ratio": GOOD}, {"loss.temperature": {"from": 4, "to": 1}}]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"loss__kd_ratio": {"from": 1.5, "to": 0.3}}, "loss.kd_ratio.from: found 1.5, expected a number 0 to 1"),
        ({"loss__kd_ratio": {"from": 1, "to": True}}, "loss.kd_ratio.to: found True"),
        ({"loss__kd_ratio": {"from": 1}}, "loss.kd_ratio.to: not given"),
        ({"loss__kd_ratio": {}}, "loss.kd_ratio.from: not given"),
        ({"loss__kd_ratio": GOOD | {"form": "x"}}, "loss.kd_ratio.form: no such part"),
        ({"loss__kd_ratio": GOOD | {"shape": "cos"}}, "loss.kd_ratio.shape: found 'cos', expected linear, cosine, constant"),
        ({"loss__kd_ratio": GOOD | {"steps": 1}}, "loss.kd_ratio.steps: found 1, expected a whole number >= 2"),
        ({"loss__kd_ratio": GOOD | {"steps": 4, "ratio": 0.5}}, "loss.kd_ratio.ratio: given together"),
        ({"loss__kd_ratio": GOOD | {"ratio": 0}}, "loss.kd_ratio.ratio: found 0"),
        ({"loss__kd_ratio": GOOD | {"steps": 9}, "train__max_steps": 8}, "loss.kd_ratio.steps: found 9, more than train.max_steps (8)"),
        ({"loss__kd_ratio": {"from": 1, "to": 0, "shape": "constant"}}, "loss.kd_ratio.shape: found constant without steps or ratio"),
        ({"loss__kd_ratio": {"from": 0.5, "to": 0.5}}, "loss.kd_ratio.to: found 0.5 for both"),
        ({"loss__kd_ratio": GOOD, "teacher": None}, "loss.kd_ratio: found {"),
        ({"loss__kd_ratio": [1, 0]}, "loss.kd_ratio: found [1, 0]"),
        ({"loss__temperature": {"from": 0, "to": 2}}, "loss.temperature.from: found 0, expected a number 0.001 to 1000"),
        ({"loss__temperature": 0}, "loss.temperature: found 0, expected a number >= 0.001, <= 1000"),
        (
            {"loss__temperature": {"from": 2, "to": 1}, "teacher__cache": {"path": "c", "kind": "sampled"}},
            "loss.temperature: found a schedule",
        ),
    ],
    ids=str,
)
def test_what_is_refused(make_recipe, changes, words):
    with pytest.raises(UserError) as error:
        make_recipe(**changes)
    assert words in "\n".join(error.value.problems), error.value.problems


def test_samples_of_one_temperature_are_not_used_at_others(make_recipe):
    """Also where only the cache on the disk says that it is a sampled one."""
    recipe = make_recipe(loss__temperature={"from": 2, "to": 1})
    use = SignalUse(recipe.loss, recipe.mixture, None)
    (problem,) = sample_problems(use, "c", {"name": "sampled", "temperature": 1.0})
    assert problem.startswith("loss.temperature: found 2 to 1 (linear)")
