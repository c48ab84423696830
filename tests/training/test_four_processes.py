"""Four processes, with whole and with sharded models, are one; and a run goes on by any number of processes and either strategy."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import distance, plain_recipe, weights
from tests.kit.processes import launch, train_each
from tests.training.test_resume import comparable, unfinish

BOUND = 1e-12  # float64, after five steps
SHARDS = ("none", "full")
DROPOUT = {"student.lora.dropout": 0.3}
#: Several micro-batches a step, of which the last has 5 of 8 examples: processes have fewer than others, or none in some micro-batches.
RUNS = {
    "lora": DROPOUT | {"train.micro_batch_size": None, "train.micro_batch_tokens": 90, "data.packing": True},
    "full": {"train.micro_batch_size": 1, "student.method": "full"},
}
#: Three examples a step, of which the fourth process never has any; validated before some of its checkpoints.
FEW = DROPOUT | {"train.batch_size": 3, "train.max_steps": 5, "validation.every": 2, "checkpoint.every": 1, "checkpoint.keep": 9}
#: By the step after which it goes on: processes and strategy. What goes on has been written by those before it, at first by one process.
CHAIN = {1: (4, "none"), 2: (4, "full"), 3: (2, "none")}


def words(world: Path, out: Path, changes: dict, shard: str) -> list[str]:
    """The command line of a run, with its recipe in the parent of its output."""
    out.parent.mkdir(exist_ok=True)
    recipe = plain_recipe(world, out)
    recipe["data"]["validation"] = {"path": str(world / "held.jsonl")} if changes is FEW else None
    (out.parent / f"{out.name}.yaml").write_text(json.dumps(recipe))
    given = changes | {"train.shard": shard}
    return [
        "--config",
        str(out.parent / f"{out.name}.yaml"),
        *(word for key, value in given.items() for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))),
    ]


@pytest.fixture(scope="module")
def root(world, tmp_path_factory) -> Path:
    """The folders of all runs of one process (`one`) and of four, whole (`none`) and sharded (`full`)."""
    root = tmp_path_factory.mktemp("four")
    assert train_each([words(world, root / "one" / name, changes, "none") for name, changes in RUNS.items()]) == 0
    mine = [words(world, root / shard / name, changes, shard) for shard in SHARDS for name, changes in RUNS.items()]
    done = launch(4, train_each, mine, limit=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def numbers(out: Path) -> list[dict]:
    """The records of metrics, flat."""
    found = []
    for record in comparable(out):
        groups = {key: value if isinstance(value, dict) else {"": value} for key, value in record.items()}
        found.append({f"{key}.{name}": one for key, group in groups.items() for name, one in group.items()})
    return found


def assert_same(out: Path, one: Path) -> None:
    assert distance(weights(out), weights(one)) < BOUND
    for a, b in zip(numbers(one), numbers(out), strict=True):
        assert b == pytest.approx(a, rel=1e-9, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("name", RUNS)
def test_four_processes_are_one(root, name, shard):
    assert_same(root / shard / name, root / "one" / name)


@pytest.mark.slow
def test_a_run_goes_on_by_any_number_of_processes_and_either_strategy(world, tmp_path):
    one, out = tmp_path / "one", tmp_path / "out"
    assert train_each([words(world, one, FEW, "none")]) == 0
    shutil.copytree(one, out)
    for step, (count, shard) in CHAIN.items():
        unfinish(out, step)
        done = launch(count, train_each, [[*words(world, out, FEW, shard), "--resume"]], limit=200)
        assert done.returncode == 0 and f"resuming after step {step} of 5" in done.stderr, done.stderr[-3000:]
    assert_same(out, one)
