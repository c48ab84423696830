"""Shared by the tests of comparisons: results of runs, written as evaluation and training write them."""

import json
from pathlib import Path

import numpy as np
import pytest
from llmkd_eval.comparison.item_results import parse_arms


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluated(run: str, metrics: dict[str, list[float]], task: str = "quiz", order=None, hashes=None, seed=None, **record) -> Path:
    """A run's folder with one task's record and items, in the order given."""
    folder = Path(run) / "eval"
    folder.mkdir(parents=True, exist_ok=True)
    n = len(next(iter(metrics.values())))
    hashes = hashes or [f"h{i}" for i in range(n)]
    order = range(n) if order is None else order
    lines = [json.dumps({"id": k, "hash": hashes[i], "metrics": {m: float(x[i]) for m, x in metrics.items()}}) for k, i in enumerate(order)]
    (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    values = {m: {"value": float(np.mean(x)), "stderr": 0.1, "higher_is_better": m != "loss"} for m, x in metrics.items()}
    whole = {"task": task, "version": 1.0, "harness": "0.4.13", "fewshot": 0, "limit": None, "n": n, "metrics": values, "truncated": 0}
    (folder / f"{task}.json").write_text(json.dumps(whole | record))
    if seed is not None:
        (Path(run) / "recipe.yaml").write_text(f"seed: {seed}\n")
    return Path(run)


def held_out(run: str, sums: dict[str, list[float]], targets: list[int], places=None, hashes=None, **more) -> Path:
    Path(run).mkdir(parents=True, exist_ok=True)
    lines = []
    for i, count in enumerate(targets):
        item = {"id": i, "hash": hashes[i] if hashes else f"h{i}", "place": places[i] if places else f"t.jsonl:{i}", "targets": int(count)}
        lines.append(json.dumps(item | more | {"sums": {name: float(x[i]) for name, x in sums.items()}}))
    (Path(run) / "held_out.jsonl").write_text("\n".join(lines) + "\n")
    return Path(run)


def of_items(run: str, metric: str, task: str = "quiz") -> dict[str, float]:
    """Read back without the code under test."""
    lines = (Path(run) / "eval" / f"{task}.jsonl").read_text().splitlines()
    return {item["hash"]: item["metrics"][metric] for item in map(json.loads, lines)}


def answers(n: int, share: float, seed: int) -> np.ndarray:
    hard = np.random.default_rng(0).random(n)
    return (hard + 0.15 * np.random.default_rng(seed).standard_normal(n) < share).astype(float)


def arms(*runs: str) -> dict[str, list[Path]]:
    return parse_arms(list(runs))
