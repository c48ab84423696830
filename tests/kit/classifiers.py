"""Small classifiers of generated texts, and their recipes."""

import json
from pathlib import Path

from llmkd.config import loader
from llmkd.config.recipe import Recipe

SMALL = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 64,
}
ROWS = {"path": "builtin:skills", "name": "kinds", "format": "labelled"}
BASE = {
    "task": "classification",
    "student": {"architecture": SMALL, "tokenizer": "builtin:skills", "method": "full"},
    "data": {"train": {**ROWS, "limit": 40}, "validation": {**ROWS, "split": "validation", "limit": 24}, "max_length": 64},
    "train": {"batch_size": 10, "max_steps": 4},
    "optim": {"lr": 2e-2},
    "validation": {"every": 2, "teacher_check": 4},
    "checkpoint": {"every": 2, "best_by": "f1"},
}


def made(folder: Path, name: str, **changes) -> Recipe:
    """BASE with changes, which runs into `folder/name`."""
    (folder / "base.yaml").write_text(json.dumps(BASE | {"output_dir": str(folder / name)}))
    return loader.load_recipe(folder / "base.yaml", {key.replace("__", "."): value for key, value in changes.items()})


def rows_of(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
