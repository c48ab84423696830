"""Estimates of a run's time and memory before it starts, from the models' sizes, the data and the measured speed of a matrix product."""

import json
import time
from dataclasses import dataclass

import numpy as np

from ..config.recipe import LayerChoice, Lora, Recipe, Train, distils, used_teachers
from ..console import duration
from ..errors import UserError
from ..model_folder.files import ModelFiles, find
from ..models.size import ModelSize, adapter_parameters, model_size, weight_bytes
from ..training.prepare import prepare, student_files

EFFICIENCY = 0.4  # operations per second of training, as a share of those of a large matrix product
PER_LAYER = 5e-4  # least seconds of a pass through a layer, however small: the overhead of Python and of kernel launches


@dataclass(frozen=True)
class Cost:
    seconds: float
    bytes: float

    def __str__(self) -> str:
        return f"about {duration(self.seconds)} and {self.bytes / 1e9:.1f} GB"


@dataclass(frozen=True)
class DataCounts:
    """Sums over the training examples of one epoch. `read`: tokens that the student or the teacher reads, whichever is more."""

    lengths: np.ndarray  # int64 [examples], in tokens
    targets: int
    read: int


def estimate(recipes: list[Recipe], counted: dict[str, DataCounts | None]) -> Cost | None:
    """The cost of training the recipes' students side by side with one teacher.

    recipes   agree in all but loss, optimizer and adapter
    counted   caches the counts of each recipe's data between calls

    None where it cannot be estimated: for a stream, for new random weights, and for tasks other than causal_lm. UserError for a mistake
    that ends all of the runs. A student that is refused for a mistake of its own will not train, and is not counted.
    """
    recipe = recipes[0]
    if recipe.task != "causal_lm":
        return None
    files = student_files(recipe.student)
    key = json.dumps([repr(recipe.data), recipe.student.tokenizer])
    if key not in counted:
        try:
            counted[key] = _count(recipe)
        except UserError as error:
            if getattr(error, "student", None) is None:
                raise
            return estimate(recipes[1:], counted) if recipes[1:] else None
    data = counted[key]
    if data is None or files is None:
        return None
    layers = recipe.student.layers
    kept = layers.count if isinstance(layers, LayerChoice) else None  # also where a measurement that is still to come chooses them
    student = model_size(files, kept)
    teachers, bytes_ = _loaded_teachers(recipe, files)
    bytes_ += student.parameters * weight_bytes(files, recipe.student.dtype, recipe.student.quantization)
    full = recipe.student.method == "full"
    trained = sum(student.parameters if full else adapter_parameters(files, one.student.lora or Lora(), kept) for one in recipes)
    longest = largest_micro_batch_tokens(data.lengths, recipe.train.micro_batch_size, recipe.train.micro_batch_tokens)
    bytes_ += training_memory(student, trained, longest, recipe.student.recomputed)
    asked = teachers if any(map(distils, recipes)) else []
    return Cost(_seconds(recipe, len(recipes), student, asked, data), bytes_)


def _count(recipe: Recipe) -> DataCounts | None:
    """Counts of a recipe's training examples; None for a stream."""
    prepared = prepare(recipe)
    if not prepared.source.complete:
        return None
    examples = prepared.train
    return DataCounts(examples.lengths, int(examples.num_targets.sum()), int(examples.max_lengths.sum()))


def _loaded_teachers(recipe: Recipe, student: ModelFiles) -> tuple[list[ModelSize], float]:
    """The sizes of the teachers that are loaded, and the bytes of their weights, without a base that the student has in memory too."""
    sizes, bytes_ = [], 0.0
    for setting, one in used_teachers(recipe):
        if one.cache is not None or one.server:
            continue
        files = find(one.model, f"{setting}.model", one.revision, one.base)
        sizes.append(model_size(files))
        frozen = recipe.student.method == "lora" and files.base.resolve() == student.base.resolve()
        if not (frozen and one.share_base and not one.is_transformed):
            bytes_ += sizes[-1].parameters * weight_bytes(files, one.dtype, one.quantization)
    return sizes, bytes_


def _seconds(recipe: Recipe, students: int, student: ModelSize, teachers: list[ModelSize], data: DataCounts) -> float:
    """Seconds of a run: its operations at the measured speed, and at least `PER_LAYER` for each pass through a layer."""
    import torch

    train, recomputed = recipe.train, recipe.student.recomputed
    epochs = train.epochs or train.max_steps * train.batch_size / len(data.lengths)
    tokens = epochs * int(data.lengths.sum())
    operations = step_operations(
        student,
        teachers,
        students,
        tokens,
        epochs * data.targets,
        recipe.student.method == "full",
        recomputed,
        epochs * data.read,
    )
    passes = sum(teacher.layers for teacher in teachers) + students * student.layers * (3 + recomputed)  # a backward pass counts twice
    flops = matmul_flops("cuda" if torch.cuda.is_available() else "cpu")
    return operations / (EFFICIENCY * flops) + PER_LAYER * passes * micro_batches(epochs * len(data.lengths), tokens, train)


def micro_batches(examples: float, tokens: float, train: Train) -> float:
    """The number of micro-batches of so many examples with so many tokens. With `auto` a step is one micro-batch."""
    if train.micro_batch_tokens is None:
        return examples / min(train.micro_batch_size, train.batch_size)
    return max(examples / train.batch_size, tokens / train.micro_batch_tokens if isinstance(train.micro_batch_tokens, int) else 0)


def largest_micro_batch_tokens(lengths: np.ndarray, size: int | None, tokens: int | str | None) -> int:
    """Tokens of the largest micro-batch. For `auto` those of the longest example, since it needs no more: it fills the memory that is free."""
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
    """Floating-point operations for `tokens` tokens (without padding), of which `targets` are targets; a teacher reads `read` tokens.

    2 per weight and token in a forward pass, as many again for the gradient of the activations, and again for that of the weights if
    all of them train. The head is computed at the targets only, and once per student, also the teacher's; the teacher's body is computed
    once for all students. Reading a teacher cache costs next to nothing.
    """
    passes = 4 + (2 if full else 0) + 2 * checkpointing
    own = passes * student.body * tokens + (6 if full else 4) * student.vocab * student.hidden * targets
    teachers_own = sum(students * 2 * teacher.vocab * teacher.hidden * targets + 2 * teacher.body * read for teacher in teachers)
    return students * own + teachers_own


def training_memory(student: ModelSize, trained: int, tokens: int, checkpointing: float) -> float:
    """Bytes in addition to frozen weights: 16 per trained parameter (weight, gradient and two moments in float32), the activations of a
    micro-batch of `tokens`, and half a gigabyte for the rest. recipes/README.md has finer formulas."""
    kept = (60 - 58 * checkpointing) * student.layers + 60 * (checkpointing > 0)
    return 16.0 * trained + tokens * student.hidden * kept + 0.5e9


def matmul_flops(device: str) -> float:
    """Operations per second of a large matrix product on `device`, bfloat16 on a GPU and float32 on a CPU: the best of 0.3 seconds."""
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
