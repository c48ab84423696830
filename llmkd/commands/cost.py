"""Estimates of a run's time and memory before it starts, from the models' sizes, the data and the measured speed of a matrix product."""

import json
import time
from dataclasses import dataclass

import numpy as np

from ..config.recipe import LayerChoice, Lora, Recipe, Train, distils, used_teachers
from ..console import duration
from ..errors import UserError
from ..model_folder.files import find
from ..models.size import ModelSize, adapter_parameters, model_size, weight_bytes
from ..training.prepare import prepare, student_files

EFFICIENCY = 0.4  # training speed over that of a large matrix product
PER_LAYER = 5e-4  # seconds that a pass through a layer takes at least, however small it is: what Python and its kernels cost


@dataclass(frozen=True)
class Cost:
    seconds: float
    bytes: float

    def __str__(self) -> str:
        return f"about {duration(self.seconds)} and {self.bytes / 1e9:.1f} GB"


def estimate(recipes: list[Recipe], sizes: dict) -> Cost | None:
    """Cost of training the recipes' students side by side. `sizes` caches counts of data. None for a stream, for new random weights, and for other tasks than language models.

    UserError for what ends all of them. A student that is refused for what is its own will not train, and is not counted.
    """
    recipe = recipes[0]
    if recipe.task != "causal_lm":
        return None
    files, train = student_files(recipe.student), recipe.train
    key = json.dumps([repr(recipe.data), recipe.student.tokenizer])
    if key not in sizes:
        try:
            prepared, sizes[key] = prepare(recipe), None
        except UserError as error:
            if getattr(error, "student", None) is None:
                raise
            return estimate(recipes[1:], sizes) if recipes[1:] else None
        encoded = prepared.train
        if prepared.source.complete:
            sizes[key] = encoded.lengths, int(encoded.num_targets.sum()), int(encoded.max_lengths.sum())
    if sizes[key] is None or files is None:
        return None
    lengths, supervised, read = sizes[key]
    passes = train.epochs or train.max_steps * train.batch_size / len(lengths)
    tokens, targets = passes * int(lengths.sum()), passes * supervised

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = recipe.student.layers
    kept = layers.count if isinstance(layers, LayerChoice) else None  # also where they are chosen by a measurement that is still to be made
    student, present = model_size(files, kept), []
    bytes_ = student.parameters * weight_bytes(files, recipe.student.dtype, recipe.student.quantization)
    for setting, one in used_teachers(recipe):
        if one.cache is None and not one.server:
            theirs = find(one.model, f"{setting}.model", one.revision, one.base)
            present.append(model_size(theirs))
            shared = (
                one.share_base
                and not one.is_transformed
                and recipe.student.method == "lora"
                and theirs.base.resolve() == files.base.resolve()
            )
            bytes_ += 0 if shared else present[-1].parameters * weight_bytes(theirs, one.dtype, one.quantization)
    full, checkpointing = recipe.student.method == "full", recipe.student.recomputed
    trained = sum(student.parameters if full else adapter_parameters(files, r.student.lora or Lora(), kept) for r in recipes)
    longest = largest_micro_batch_tokens(lengths, train.micro_batch_size, train.micro_batch_tokens)
    operations = step_operations(
        student, present if any(map(distils, recipes)) else [], len(recipes), tokens, targets, full, checkpointing, passes * read
    )
    forward = sum(teacher.layers for teacher in present) if any(map(distils, recipes)) else 0
    layers = forward + len(recipes) * student.layers * (3 + checkpointing)  # a backward pass is as two
    least = PER_LAYER * layers * micro_batches(passes * len(lengths), tokens, train)
    return Cost(
        operations / (EFFICIENCY * matmul_flops(device)) + least, bytes_ + training_memory(student, trained, longest, checkpointing)
    )


def micro_batches(examples: float, tokens: float, train: Train) -> float:
    """How many micro-batches hold so many examples of so many tokens; `auto` takes a step's in one."""
    if train.micro_batch_tokens is None:
        return examples / min(train.micro_batch_size, train.batch_size)
    return max(examples / train.batch_size, tokens / train.micro_batch_tokens if isinstance(train.micro_batch_tokens, int) else 0)


def largest_micro_batch_tokens(lengths: np.ndarray, size: int | None, tokens: int | str | None) -> int:
    """Tokens of the largest micro-batch. `auto` needs no more than the longest example, and uses the memory there is."""
    if tokens:
        return max(int(lengths.max()), min(tokens, int(lengths.sum())) if isinstance(tokens, int) else 0)
    return int(np.sort(lengths)[-size:].sum())


def step_operations(
    student: ModelSize,
    teachers: list[ModelSize],
    students: int,
    tokens: float,
    targets: float,
    full: bool,
    checkpointing: float,
    read: float,
) -> float:
    """Multiplications and additions for `tokens` (without padding) with `targets` among them; a teacher reads `read` tokens.

    2 per weight and token in a forward pass, as many again for the gradient of the activations, and for that of the weights if all
    of them train. The head is computed at targets alone; a teacher's body once for all students, its head once per student. Reading a
    teacher cache costs next to nothing.
    """
    passes = 4 + (2 if full else 0) + 2 * checkpointing
    own = passes * student.body * tokens + (6 if full else 4) * student.vocab * student.hidden * targets
    teachers_own = sum(students * 2 * teacher.vocab * teacher.hidden * targets + 2 * teacher.body * read for teacher in teachers)
    return students * own + teachers_own


def training_memory(student: ModelSize, trained: int, tokens: int, checkpointing: float) -> float:
    """Bytes apart from frozen weights: 16 per trained parameter (weight, gradient, two moments), activations of one micro-batch of `tokens`,
    and half a gigabyte for the rest. recipes/README.md has finer formulas."""
    kept = (60 - 58 * checkpointing) * student.layers + 60 * (checkpointing > 0)
    return 16.0 * trained + tokens * student.hidden * kept + 0.5e9


def matmul_flops(device: str) -> float:
    """Operations per second of a matrix product on `device` (bfloat16 on a GPU, float32 on a CPU), measured for 0.3 seconds."""
    import torch

    kind = torch.bfloat16 if device == "cuda" else torch.float32
    n = 4096 if device == "cuda" else 512
    a = torch.ones(n, n, device=device, dtype=kind)
    best, until = 0.0, time.monotonic() + 0.3
    while time.monotonic() < until:
        start = time.monotonic()
        b = a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.monotonic() - start))
        del b
    return best
