"""What the tests of caches share: runs that learn from one."""

from pathlib import Path

from llmkd.training.run import run
from tests.conftest import weights

FLOAT32 = {"student__dtype": "float32", "teacher__dtype": "float32", "validation__teacher_check": 0}


def from_cache(make_recipe, caches, kind: str, out: str, **changes):
    """A run that has the cache and nothing else of the teacher."""
    return make_recipe(out, **(FLOAT32 | {"teacher": {"cache": {"path": str(caches / kind)}}, "teacher__dtype": "auto"} | changes))


def trained_by(recipe) -> dict:
    run(recipe)
    return weights(Path(recipe.output_dir))
