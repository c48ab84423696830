"""Shared by the tests of sweeps: a sweep's state, an arm's recipe run by itself, and a recipe with held-out rows."""

from pathlib import Path

import torch

from llmkd.config import loader
from llmkd.files import read_sealed
from llmkd.training.run import run
from tests.conftest import weights

HELD = {"validation": {"every": 2, "teacher_check": 4}, "checkpoint": {"every": 2}}


def state(folder: Path) -> dict:
    return read_sealed(folder / "sweep.json")


def alone(folder: Path, name: str, out: Path) -> dict[str, torch.Tensor]:
    """The arm's own recipe, run by itself elsewhere."""
    run(loader.load_recipe(folder / "arms" / name / "recipe.yaml", {"output_dir": str(out)}))
    return weights(out)
