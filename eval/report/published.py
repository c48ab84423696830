"""Published results to compare with: torchtune's study of Llama-3.1-8B to Llama-3.2-1B."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from llmkd.config import loader

from .sweep_files import read_json

SOURCE = "pytorch.org/blog/llama-into-torchtune"
TITLE = "torchtune's study (Linda Wang, Evan Smothers, Kartikay Khandelwal, November 2024)"
#: (task, metric) of each column, as lm-evaluation-harness names them, and one binomial standard error at the task's number of questions.
COLUMNS = {
    ("truthfulqa_mc2", "acc"): 0.017,
    ("hellaswag", "acc"): 0.005,
    ("hellaswag", "acc_norm"): 0.004,
    ("commonsense_qa", "acc"): 0.014,
}


@dataclass(frozen=True)
class Published:
    """One model of the study. `conditions` by dotted path and `teacher` (None, "tuned" or "untuned") say which arm of ours is its like."""

    name: str
    values: tuple[float, float, float, float]
    teacher: str | None = None
    conditions: dict = field(default_factory=dict)
    trained: bool = True
    student_tuned_before: bool = False


def _kd(ratio: float, lr: float = 3e-4) -> dict:
    return {"loss.kd_ratio": ratio, "optim.lr": lr}


ROWS = (
    Published("Llama-3.1-8B-Instruct, as it is", (0.5401, 0.5911, 0.7915, 0.7707), trained=False),
    Published("Llama-3.1-8B-Instruct, tuned by LoRA (the teacher)", (0.5475, 0.6031, 0.7951, 0.7789), trained=False),
    Published("Llama-3.2-1B-Instruct, as it is", (0.4384, 0.4517, 0.6064, 0.5536), trained=False),
    Published("1B tuned by LoRA without a teacher", (0.4492, 0.4595, 0.6132, 0.5528), None, {"optim.lr": 3e-4}),
    Published("1B distilled, untuned teacher", (0.4440, 0.4576, 0.6123, 0.5561), "untuned", _kd(0.5)),
    Published("1B distilled, kd_ratio 0.5, lr 3e-4", (0.4481, 0.4603, 0.6157, 0.5569), "tuned", _kd(0.5)),
    Published("tuned 1B distilled, untuned teacher", (0.4508, 0.4480, 0.6004, 0.5274), "untuned", _kd(0.5), student_tuned_before=True),
    Published("tuned 1B distilled, tuned teacher", (0.4713, 0.4512, 0.5990, 0.5233), "tuned", _kd(0.5), student_tuned_before=True),
    Published("1B distilled, lr 1e-3", (0.4453, 0.4535, 0.6071, 0.5258), "tuned", _kd(0.5, 1e-3)),
    Published("1B distilled, lr 1e-4", (0.4489, 0.4606, 0.6156, 0.5586), "tuned", _kd(0.5, 1e-4)),
    Published("1B distilled, lr 1e-5", (0.4547, 0.4548, 0.6114, 0.5487), "tuned", _kd(0.5, 1e-5)),
    Published("1B distilled, kd_ratio 0.25", (0.4485, 0.4595, 0.6155, 0.5602), "tuned", _kd(0.25)),
    Published("1B distilled, kd_ratio 0.75", (0.4543, 0.4630, 0.6189, 0.5643), "tuned", _kd(0.75)),
    Published("1B distilled, kd_ratio 1.0", (0.4537, 0.4641, 0.6177, 0.5717), "tuned", _kd(1.0)),
)

#: Settings of the study that are settings of ours; what differs in a base recipe is said in the report.
CONDITIONS = {
    "student.model": "meta-llama/Llama-3.2-1B-Instruct",
    "student.method": "lora",
    "student.lora.rank": 64,
    "student.lora.alpha": 128,
    "student.quantization": None,
    "teacher.quantization": None,
    "data.train.path": "yahma/alpaca-cleaned",
    "data.train_on_input": True,
    "loss.divergence": "forward_kl",
    "loss.temperature": 1.0,
    "optim.lr": 3e-4,
    "optim.weight_decay": 0.01,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 100,
    "optim.max_grad_norm": None,
    "train.batch_size": 128,
    "train.max_steps": 404,
}
#: What differs whatever the recipe says.
ALWAYS = (
    "The published results have no seeds and no error bars, and were made with lm-evaluation-harness of autumn 2024; its truthfulqa_mc2 was "
    "changed since (version 3 no longer takes the labels for sorted). Ours are made with the versions named in this report.",
    "Their loss was a mean over micro-batches of a mean over 8 chunks; ours is the exact mean over a step's targets.",
    "Their adapters were bfloat16, ours are float32, and their seed isn't known.",
    "The tokenizer's own chat template, where a recipe of ours uses it, adds a system block with two dates and trims turns; theirs did neither.",
)
#: What the study says of a teacher that isn't tuned, in our words.
ADVICE = (
    "Published advice: tune the teacher on the data before distilling. With an untuned teacher the study found a higher loss, and a KD loss that "
    "hardly moves, and took it for a sign that the teacher's distribution is not that of the data."
)

_STUDENT, _TEACHER = re.compile(r"Llama-3\.2-1B"), re.compile(r"Llama-3\.1-8B")


def applies(base: dict, folder: Path) -> bool:
    """Whether a sweep's base recipe distils Llama-3.1-8B, itself or an adapter on it, into Llama-3.2-1B."""
    student, teacher = str(base.get("student.model") or ""), str(base.get("teacher.model") or "")
    names = (teacher, str(base.get("teacher.base") or ""), adapter_base(teacher), stage_base(teacher, folder))
    return "Llama-3.2-1B" in student and any("Llama-3.1-8B" in name for name in names)


def adapter_base(model: str) -> str:
    """The base that a local adapter names; "" where there is none."""
    return str(read_json(Path(model) / "adapter_config.json").get("base_model_name_or_path") or "")


def stage_base(model: str, folder: Path) -> str:
    """The model that a stage of the sweep in `folder` tuned, where `model` is that stage's result; else ""."""
    named = re.search(r"/stages/([^/]+)/(adapter|model|merged)/?$", model)
    path = folder / "stages" / named[1] / "recipe.yaml" if named else None
    return str((loader.read_placed(path).get("student") or {}).get("model") or "") if path and path.exists() else ""


def like(row: Published, recipe: dict, teacher: str | None, tuned_before: bool) -> bool:
    """Whether an arm of ours was trained as a published model was, as far as `row.conditions`, teacher and start go."""
    if not row.trained or row.teacher != teacher or row.student_tuned_before != tuned_before:
        return False
    return all(isinstance(recipe.get(k), int | float) and math.isclose(recipe[k], v, rel_tol=1e-6) for k, v in row.conditions.items())


def differing(base: dict) -> list[str]:
    """Where a base recipe leaves the study's conditions."""
    return [
        f"{key}: here {json.dumps(base[key])}, there {json.dumps(value)}"
        for key, value in CONDITIONS.items()
        if key in base and base[key] != value
    ]
