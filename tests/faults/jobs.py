"""The commands that the soak test disturbs: how each is called, what it is given, and what of its result must not depend on a kill."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmkd.files import read_sealed, sha256_file
from tests.conftest import make_world, plain_recipe

LLMKD = [sys.executable, "-m", "llmkd"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "llmkd"]
#: What a line of metrics says of the clock and the machine, and in a summary the hash of all lines.
MEASURED = {"targets_per_s", "peak_memory", "metrics.jsonl"}


@dataclass(frozen=True)
class Job:
    """One command, called in a folder of its own with the same words until it is done.

    command   its words. A command that is called again after a kill is called with the same words
    begin     fills the folder before the first call
    result    what it has left, by name: texts to be compared with those of a run that nobody disturbed
    """

    name: str
    command: list[str]
    begin: Callable[[Path], None]
    result: Callable[[Path], dict[str, str]]


def make_inputs(root: Path) -> None:
    """Models, data, recipes, and a task of lm-evaluation-harness whose questions come from a local file."""
    import yaml

    make_world(root)
    base = plain_recipe(root, Path("out")) | {"validation": {"every": 3}, "checkpoint": {"every": 2, "keep": 2, "best_by": "forward_kl"}}
    base["data"] |= {"validation": {"path": str(root / "held.jsonl")}}
    base["student"] |= {"lora": {"rank": 4, "dropout": 0.1}}
    base["train"] |= {"epochs": 4}
    cache = base | {"teacher": base["teacher"] | {"cache": {"path": "cache", "kind": "topk", "k": 8}}}
    sweep = {
        "output_dir": "sweep",
        "recipe": str(root / "train.json"),
        "grid": {"loss.kd_ratio": [0, 0.5], "optim.lr": [1e-2, 3e-3]},
        "set": {"train.epochs": 2},
    }
    make = {
        "output_dir": "made",
        "writer": {"model": str(root / "adapter"), "temperature": 1.0, "max_new_tokens": 24, "batch_size": 4},
        "seeds": {"path": str(root / "train.jsonl")},
        "stages": [{"do": "explain", "samples": 4}, {"do": "answer", "samples": 2}, {"do": "keep", "near_duplicate": 0.9}],
    }
    for name, content in (("train", base), ("cache", cache), ("sweep", sweep), ("make", make)):
        (root / f"{name}.json").write_text(json.dumps(content))
    (root / "tasks").mkdir()
    questions = [{"question": f"Say {i}", "choices": ["Yes.", "No!", "Perhaps."], "answer": i % 3} for i in range(24)]
    (root / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    task = {
        "task": "soak",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(root / "questions.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}\n",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (root / "tasks" / "soak.yaml").write_text(yaml.safe_dump(task))


def jobs(inputs: Path, finished: Path) -> list[Job]:
    """All of them. `finished` is the folder of a training that is done; evaluations and exports are made from a copy of it."""

    def nothing(folder: Path) -> None:
        pass

    def of_a_run(folder: Path) -> None:
        shutil.copytree(finished, folder / "out")

    train = ["train", "--config", str(inputs / "train.json"), "--resume"]
    cache = ["cache", "--config", str(inputs / "cache.json")]
    evaluate = ["eval", "out", "--tasks", "soak", "--tasks_dir", str(inputs / "tasks"), "--batch_size", "8"]
    sweep = ["sweep", "--config", str(inputs / "sweep.json"), "--resume"]
    roll = ["roll", "student", "--config", str(inputs / "train.json"), "--to", "rolled.jsonl", "--samples", "20", "--max_new_tokens", "24"]
    return [
        Job("train", LLMKD + train, nothing, run_result),
        Job("train on two processes", TWO + train, nothing, run_result),
        Job("cache", LLMKD + cache, nothing, cache_result),
        Job("cache on two processes", TWO + cache, nothing, cache_result),
        Job("sweep", LLMKD + sweep, nothing, sweep_result),
        Job("eval", LLMKD + evaluate, of_a_run, eval_result),
        Job("eval on two processes", TWO + evaluate, of_a_run, eval_result),
        Job("export", [*LLMKD, "export", "out"], of_a_run, export_result),
        Job("roll", LLMKD + roll, nothing, roll_result),
        Job("make", [*LLMKD, "make", "--config", str(inputs / "make.json")], nothing, make_result),
    ]


def run_result(folder: Path, run: str = "out") -> dict[str, str]:
    """Weights to the bit, the metrics of every step and validation, the summary, and the names of all files."""
    out = folder / run
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    summary = read_sealed(out / "summary.json")
    assert summary["files"]["metrics.jsonl"] == sha256_file(out / "metrics.jsonl")
    found = {f"{run}/metrics.jsonl": _steady(lines), f"{run}/summary.json": _steady(summary), f"{run}: files": names(out)}
    return found | hashes(folder, f"{run}/adapter/*.safetensors", f"{run}/held_out.jsonl")


def cache_result(folder: Path) -> dict[str, str]:
    return {"cache: files": names(folder / "cache")} | hashes(folder, "cache/**/*.safetensors", "cache/**/*.npy", "cache/**/*.bin")


def sweep_result(folder: Path) -> dict[str, str]:
    state = read_sealed(folder / "sweep/sweep.json")
    found = {
        "arms": json.dumps({name: arm["status"] for name, arm in state["arms"].items()}),
        "sweep: files": names(folder / "sweep", depth=1),
    }
    for arm in state["arms"]:
        found |= run_result(folder, f"sweep/arms/{arm}")
    return found


def eval_result(folder: Path) -> dict[str, str]:
    result = read_sealed(folder / "out/eval/soak.json")
    return {"metrics": json.dumps(result["metrics"]), "out: files": names(folder / "out")} | hashes(folder, "out/eval/soak.jsonl")


def export_result(folder: Path) -> dict[str, str]:
    return {"out: files": names(folder / "out")} | hashes(folder, "out/merged/*")


def roll_result(folder: Path) -> dict[str, str]:
    return {"files": " ".join(path.name for path in sorted(folder.glob("rolled*")))} | hashes(folder, "rolled*")


def make_result(folder: Path) -> dict[str, str]:
    """The data to the byte; of the answers what they say, in whatever order they came."""
    answers = [json.loads(line) for line in (folder / "made/answers.jsonl").read_bytes().splitlines()]
    said = json.dumps(sorted([one["key"], one["text"], one["finish"]] for one in answers))
    return {"answers": said, "made: files": names(folder / "made")} | hashes(folder, "made/train.jsonl", "made/rejected.jsonl")


def hashes(folder: Path, *patterns: str) -> dict[str, str]:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    own = str(folder).encode()  # a model card says where the model lies
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes().replace(own, b"")).hexdigest() for path in files}


def names(folder: Path, depth: int = 9) -> str:
    """The relative names of all that lies in a folder: what a kill left behind would be among them."""
    return " ".join(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if len(p.relative_to(folder).parts) <= depth))


def _steady(value) -> str:
    """The same as a text, without what was measured of the machine."""

    def only(value):
        if isinstance(value, list):
            return [only(one) for one in value]
        return {key: only(one) for key, one in value.items() if key not in MEASURED} if isinstance(value, dict) else value

    return json.dumps(only(value), sort_keys=True)
