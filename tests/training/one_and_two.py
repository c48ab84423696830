"""A run on one process and on two: the same weights and records."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import distance, plain_recipe, weights
from tests.kit.processes import train_on_two
from tests.training.test_resume import comparable


def assert_two_processes_are_one(trained, world: Path, folder: Path, changes: dict[str, Any]) -> None:
    """`changes` of the plain recipe, with two underscores in the place of a dot."""
    whole = trained("one", **changes)
    (folder / "two.yaml").write_text(json.dumps(plain_recipe(world, folder / "two")))
    words = [word for key, value in changes.items() for word in ("--" + key.replace("__", "."), json.dumps(value))]
    done = train_on_two(["--config", str(folder / "two.yaml"), *words])
    assert done.returncode == 0, done.stderr[-3000:]
    assert distance(weights(folder / "two"), whole) < 1e-12
    for a, b in zip(comparable(folder / "one"), comparable(folder / "two"), strict=True):
        a, b = _flat(a), _flat(b)
        assert a.keys() == b.keys() and [b[name] for name in a] == pytest.approx(list(a.values()), rel=1e-9)


def _flat(record: dict[str, Any]) -> dict[str, float]:
    """A record with the measurements of its groups among its own."""
    groups = {name: value for name, value in record.items() if isinstance(value, dict)}
    return {k: v for k, v in record.items() if k not in groups} | {
        f"{name}.{k}": v for name, value in groups.items() for k, v in value.items()
    }
