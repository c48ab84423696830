"""What the tests of stores share: runs that learn from one."""

from pathlib import Path

from llmkd.training.run import run
from tests.conftest import weights

FLOAT32 = {"student__dtype": "float32", "teacher__dtype": "float32", "validation__teacher_check": 0}


def from_store(make_recipe, stores, kind: str, out: str, **changes):
    """A run that has the store and nothing else of the teacher."""
    return make_recipe(out, **(FLOAT32 | {"teacher": {"cache": {"path": str(stores / kind)}}, "teacher__dtype": "auto"} | changes))


def trained_by(recipe) -> dict:
    run(recipe)
    return weights(Path(recipe.output_dir))
