"""Shared by the tests of sweeps."""

import json

import pytest

from tests.conftest import plain_recipe

GRID = {"loss.kd_ratio": [0, 0.5, 1.0], "optim.lr": [1e-2, 3e-3]}


@pytest.fixture
def sweep(world, tmp_path):
    """Write a sweep of the small world's recipe, and give the path of its file."""

    def make(recipe: dict | None = None, **changes) -> str:
        base = plain_recipe(world, tmp_path / "unused") | {"data": {"train": {"path": str(world / "train.jsonl")}, "max_length": 256}}
        base["optim"]["warmup_steps"] = 1
        base |= recipe or {}
        (tmp_path / "base.yaml").write_text(json.dumps(base))
        file = {"output_dir": str(tmp_path / "sweep"), "recipe": "base.yaml", "grid": GRID} | changes
        (tmp_path / "sweep.yaml").write_text(json.dumps(file))
        return str(tmp_path / "sweep.yaml")

    return make
