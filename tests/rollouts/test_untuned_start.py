"""On-policy runs of the quickstart's models: from the small base as it comes, which is warned of, and after some steps of fine-tuning, which is not."""

import dataclasses
from pathlib import Path

import pytest

from llmkd.config import loader
from llmkd.training.run import run

RECIPES = Path(__file__).parents[2] / "recipes"
ALONE = {"data.choices": None, "data.validation": None, "validation.every": None, "checkpoint.every": None}


@pytest.mark.slow
def test_an_untuned_base_is_warned_of_and_a_tuned_one_is_not(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def train(recipe: str, out: str, **changes) -> str:
        changes = ALONE | {name.replace("__", "."): value for name, value in changes.items()}
        run(dataclasses.replace(loader.load_recipe(RECIPES / recipe, changes), output_dir=str(tmp_path / out)), False)
        return capfd.readouterr().err

    short = {"train__epochs": None, "data__train__limit": 640}
    train("quickstart/1_teacher.yaml", "runs/quickstart/teacher", train__max_steps=5, **short)
    train("quickstart/2_distill.yaml", "tuned", teacher=None, loss__kd_ratio=0, train__max_steps=10, **short)
    for student, untuned in ((str(RECIPES / "quickstart/base/student"), True), (str(tmp_path / "tuned/adapter"), False)):
        said = train(
            "on_policy/on_policy.yaml",
            f"untuned {untuned}",
            student__model=student,
            on_policy__share=1,
            train__max_steps=1,
            validation__samples=0,
        )
        assert ("at the start the student does not know the task" in said) == untuned and said.count("warning: on_policy") == untuned, said
