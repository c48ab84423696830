"""Shared by the tests of evaluation: questions in the forms of benchmarks, models to ask, and the harness called by hand."""

import json
from pathlib import Path

import pytest
import torch
from llmkd_eval.harness import record_files
from llmkd_eval.harness.evaluate import without_asides
from llmkd_eval.harness.local_tasks import write_tasks

from llmkd.config import loader
from llmkd.training.run import run
from tests.conftest import plain_recipe

TASKS = ["hellaswag", "commonsense_qa", "truthfulqa_mc2"]
NOUNS = "robin wren owl crow dove lark swan duck".split()


def tasks_in(place: Path) -> list[str]:
    """The tasks with both their files, in a run's folder or in the folder of results itself."""
    found = (path for folder in (place, place / "eval") for path in folder.glob("*.json"))
    return sorted({path.stem for path in found if path.with_suffix(".jsonl").exists()})


def hellaswag(i: int) -> dict:
    endings = [f"sings to the {NOUNS[(i + j) % 8]}" + " again" * j + "." for j in range(4)]
    return {"activity_label": "Birds", "ctx_a": f"The {NOUNS[i % 8]} sits.", "ctx_b": "it", "endings": endings, "label": str(i % 4)}


def commonsense_qa(i: int) -> dict:
    choices = {"label": list("ABCDE"), "text": [NOUNS[(i + j) % 8] for j in range(5)]}
    return {"id": f"q{i}", "question": f"Who sings at {i}? ", "choices": choices, "answerKey": "ABCDE"[i % 5]}


def truthfulqa(i: int) -> dict:
    right, wrong = [f"The {NOUNS[i % 8]}.", "Nobody knows."], [f"The {NOUNS[(i + 3) % 8]} and no other.", "All."]
    mc1 = {"choices": right[:1] + wrong, "labels": [1, 0, 0]}
    return {"question": f"Who sings at {i}?", "mc1_targets": mc1, "mc2_targets": {"choices": right + wrong, "labels": [1, 1, 0, 0]}}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def tasks_dir(tmp_path_factory) -> Path:
    """Task files for nine, seven and five rows, in files whose names say nothing."""
    import pyarrow.parquet  # noqa: F401

    root = tmp_path_factory.mktemp("questions")
    write_rows(root / "data/one.jsonl", [hellaswag(i) for i in range(9)])
    write_rows(root / "data/two.json", [commonsense_qa(i) for i in range(7)])
    write_rows(root / "data/three.parquet", [truthfulqa(i) for i in range(5)])
    assert set(write_tasks(root / "data", root / "tasks")) == {*TASKS, "truthfulqa_mc1"}
    return root / "tasks"


def model(folder: Path, positions: int = 2048, rows: int = 0, tied: bool = False, seed: int = 7) -> Path:
    """A float64 model with the corpus's tokenizer; `rows` more in its head than the tokenizer has entries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from llmkd.data.reading.skills import tokenizer

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()) + rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=positions,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).double().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return model(tmp_path_factory.mktemp("base") / "student")


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A context that no TruthfulQA prompt fits in."""
    return model(tmp_path_factory.mktemp("small") / "student", positions=96, seed=8)


def trained(world, tmp_path, **changes) -> Path:
    (tmp_path / "recipe.yaml").write_text(json.dumps(plain_recipe(world, tmp_path / "run")))
    plain = {"teacher": None, "loss.kd_ratio": 0.0, "train.max_steps": 2}
    run(loader.load_recipe(tmp_path / "recipe.yaml", plain | changes))
    return tmp_path / "run"


def likelihoods(place: Path, task: str) -> list[list[float]]:
    return [item["loglikelihoods"] for item in record_files.read_items(place, task)]


def by_hand(folder: Path, tasks_dir: Path, name: str, **options) -> tuple[list[list[float]], dict]:
    """The harness alone, on a folder that it loads itself: log-likelihoods of each item, and the task's metrics."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = HFLM(pretrained=str(folder), device="cpu", batch_size=3)
    index = TaskManager(include_path=str(tasks_dir), include_defaults=False)
    with without_asides():
        found = lm_eval.simple_evaluate(harness, tasks=[name], task_manager=index, log_samples=True, **options)
    return [[answer[0] for answer in sample["filtered_resps"]] for sample in found["samples"][name]], found["results"][name]
