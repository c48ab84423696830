"""A run as data: every setting, its type, range, default and one sentence about it.

Plain frozen dataclasses; `loader` reads them from YAML and the command line and writes them back.
Nothing here imports torch: a recipe is checked before anything heavy is loaded.
"""

import itertools
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .data import Data, data_contradictions
from .data import Source as Source
from .features import Features, feature_contradictions
from .fields import Count, OneOrMany, Seed, as_tuple, changeable, config_dataclass, fixed, form, with_setting_names
from .schedule import Scheduled, schedule_contradictions, value_at
from .target_weights import TargetWeights, target_weight_contradictions
from .teacher import Attention, Dtype, Mixture, Quantization, Teacher, teacher_contradictions
from .terms import AttentionLoss, attention_contradictions

Share = Annotated[float, Field(ge=0, le=1)]

#: Each divergence with its options: (smallest, largest, default). `losses/divergences.py` holds the functions.
DIVERGENCES: dict[str, dict[str, tuple[float, float, float]]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {"forward_weight": (0.0, 1.0, 0.5)},
    "generalized_jsd": {"beta": (0.0, 1.0, 0.5)},
    "skewed_forward_kl": {"alpha": (0.0, 0.99, 0.1)},
    "skewed_reverse_kl": {"alpha": (0.0, 0.99, 0.1)},
    "adaptive_kl": {"head_mass": (0.0, 0.99, 0.5)},
    "total_variation": {},
    "alpha_beta": {"alpha": (0.0, 4.0, 0.2), "beta": (0.0, 4.0, 0.7)},
}


@config_dataclass
class Lora:
    rank: Count = fixed(16, description="Rank of the adapter matrices.")
    alpha: float = fixed(32.0, gt=0, description="Scale: the update is alpha / rank times B A (over sqrt(rank) with rslora).")
    dropout: float = fixed(0.0, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    target_modules: str | Annotated[tuple[str, ...], Field(min_length=1)] = fixed(
        "all-linear",
        description="Modules that get an adapter: all-linear (all but the head; experts too), a list of name endings, or a regular expression.",
    )
    modules_to_save: tuple[str, ...] = fixed(
        (), description="Modules trained in full in addition to the adapter, such as lm_head, in the base's dtype."
    )
    rslora: bool = fixed(False, description="Rank-stabilised scaling, alpha / sqrt(rank).")
    dora: bool = fixed(False, description="Weight-decomposed LoRA.")


@config_dataclass
class LayerChoice:
    count: Count = fixed(description="Number of layers that are kept.")
    by: Literal["block_influence", "even"] = fixed(
        "block_influence",
        description="block_influence: those that change the hidden states most, measured on training rows before the first step (ShortGPT); even: evenly "
        "spaced, the first and the last among them.",
    )


#: Numbers of layers, or how they are chosen. The tags make pydantic report the errors of the given form alone.
Layers = Annotated[
    Annotated[LayerChoice, Tag("one")] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Tag("several")] | Annotated[None, Tag("none")],
    Discriminator(form),
]


@config_dataclass
class Student:
    model: str | None = fixed(
        None, path="model", description="Folder or hub id of a base model, or of a LoRA adapter that is trained further."
    )
    revision: str | None = fixed(None, description="Revision of a hub model or adapter.")
    base: str | None = fixed(
        None, path="model", description="For an adapter: folder or hub id of its base, if it is not where adapter_config.json says."
    )
    architecture: dict[str, Any] | None = fixed(
        None, description="Instead of model: a transformers configuration (model_type, hidden_size, ...) for new random weights."
    )
    layers: Layers = fixed(
        None,
        description="Layers of the base that are kept, by number from 0; the others are left out before training, and the student is an ordinary smaller "
        "model. A list such as [0, 2, 5], or how they are chosen; null: all.",
    )
    tokenizer: str | None = fixed(
        None, path="model", description="Folder or hub id of the tokenizer, or builtin:skills; by default the model's own."
    )
    method: Literal["lora", "full"] = fixed("lora", description="What is trained: a LoRA adapter, or all weights.")
    lora: Lora | None = fixed(
        None,
        description="Settings of the adapter with method: lora. null: the defaults, or the settings of the adapter that student.model names.",
    )
    quantization: Quantization | None = fixed(None, description="Load the base in 4 or 8 bits (QLoRA); null: not quantised.")
    dtype: Dtype = fixed(
        "auto", description="Dtype of the base's weights; auto: the dtype they were saved in. Adapter weights train in at least float32."
    )
    attention: Attention = fixed("auto", description="Attention implementation; auto: the default of transformers.")
    mixed_precision: Literal["no", "bf16"] = fixed(
        "no",
        description="bf16: compute the matrix products of float32 weights in bfloat16 (autocast); the head and the loss stay as they are.",
    )
    gradient_checkpointing: bool | Annotated[float, Field(gt=0, lt=1)] = changeable(
        False,
        description="Recompute activations in the backward pass to save memory. true: in every layer but the last; a fraction: in that fraction of the "
        "layers, counted from the first.",
    )


@config_dataclass
class Loss:
    kd_ratio: Scheduled[Share | None] = fixed(
        None,
        description="Weight of the distillation term: the loss is (1 - kd_ratio) CE + kd_ratio T^2 D. Default 0.5 with a teacher, 0 without; with 0 no "
        "teacher is loaded, unless features need it. Or a schedule over the optimizer steps, {from: 1.0, to: 0.3, shape: cosine}: shape is linear (the default), cosine, or constant "
        "(from, and then to); to is reached in the last step, or after steps, or after a ratio of all steps.",
    )
    divergence: Literal[tuple(DIVERGENCES)] = fixed(
        "forward_kl", description="D: the divergence between the teacher's and the student's distributions."
    )
    divergence_options: dict[str, float] = fixed(
        default_factory=dict,
        description="Options of the divergence: "
        + "; ".join(
            f"{name}: " + ", ".join(f"{o} ({d:g})" for o, (_, _, d) in options.items()) for name, options in DIVERGENCES.items() if options
        )
        + ".",
    )
    temperature: Scheduled[Annotated[float, Field(gt=0)]] = fixed(
        1.0,
        description="T: both models' logits are divided by T before the divergence is computed; the divergence is then multiplied by T^2. Or a schedule, as "
        "for kd_ratio.",
    )
    normalize: Literal["targets", "weights"] = fixed(
        "targets",
        description="What the loss is divided by where sources have other weights than 1. targets: the number of targets of the optimizer step. weights: "
        "each of the two terms by the sum of its own weights (of their absolute values), so that a term that few targets carry keeps its share of "
        "the loss.",
    )
    target_weights: TargetWeights | None = fixed(
        None,
        description="Weigh each target by a rule, beside the weights of its source: a number from 0 to 1 that the models' distributions, or the "
        "target's position, give. The loss is still divided by the number of targets. null: all alike.",
    )
    features: Features | None = fixed(
        None, description="Hidden states inside the student are to be the teacher's too, as a further term; null: none."
    )
    chunk_size: Count | None = changeable(
        None,
        description="Targets whose logits are computed at a time. It changes memory and speed, not the result. Default on a GPU: 2048, or down to "
        "1024 if two tiles of logits would take more than an eighth of the memory that the models leave free. Default on a CPU: the rows of a "
        "float32 tile of 32 MiB, 128 to 4096. With train.micro_batch_tokens: auto, running out of memory halves it, down to 128.",
    )
    attention: AttentionLoss | None = fixed(None, description="Attention distillation, as a further term; null: none.")


@config_dataclass
class Optim:
    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = fixed(
        "adamw",
        description="adamw: torch's AdamW. The others are AdamW of bitsandbytes: with 8-bit state, with state paged to CPU memory, or with both.",
    )
    lr: float = fixed(2e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = fixed(0.0, ge=0, description="AdamW's decoupled weight decay, on matrices only.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = fixed(
        (0.9, 0.999), description="AdamW's decay rates."
    )
    eps: float = fixed(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float | None = fixed(1.0, gt=0, description="Clip the gradient to this norm; null: no clipping.")
    schedule: Literal["cosine", "linear", "constant"] = fixed("cosine", description="Shape of the learning rate after warm-up.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = fixed(None, description="Steps of linear warm-up.")
    warmup_ratio: Share | None = fixed(None, description="Instead of warmup_steps: warm-up as a fraction of all steps.")
    min_lr_ratio: Share = fixed(0.0, description="Learning rate at the end of the schedule, as a fraction of lr.")


@config_dataclass
class Train:
    batch_size: Count = fixed(
        32, description="Examples per optimizer step over all processes. How they are split into micro-batches does not change the result."
    )
    micro_batch_size: Count | None = changeable(
        None,
        description="Most examples in one forward pass of one process (4 unless micro_batch_tokens is set). More is faster and takes more memory.",
    )
    micro_batch_tokens: Count | Literal["auto"] | None = changeable(
        None,
        description="Instead of micro_batch_size: most tokens in one forward pass of one process, padding included; a longer example is a micro-batch "
        "of its own. auto: as many as fit into memory, measured before the first step; on one process, running out of memory while training "
        "halves it. It changes the result only through dropout, whose masks are drawn for each micro-batch.",
    )
    epochs: Count | None = fixed(None, description="Passes over the data (1 unless max_steps is set).")
    max_steps: Count | None = fixed(None, description="Instead of epochs: number of optimizer steps.")
    group_by_length: Count = fixed(
        1, description="Sort the examples of this many optimizer steps together by length, for less padding. 1: batches stay as drawn."
    )
    log_every: Count = changeable(1, description="Optimizer steps between records in metrics.jsonl.")
    compile: bool = changeable(
        False,
        description="Compile the layers of the student and of live teachers with torch.compile: some minutes at the start, then faster steps, with the "
        "same result up to rounding. Needs a C++ compiler, and on a GPU Triton.",
    )


@config_dataclass
class Validation:
    every: Count | None = changeable(None, description="Steps between validations; null: only before the first step and after the last.")
    micro_batch_size: Count = changeable(8, description="Examples per forward pass.")
    compare_to_teacher: bool = fixed(
        False,
        description="Measure KL to the recipe's teacher and agreement with it also where loss.kd_ratio is 0: the teacher is then loaded for "
        "validation alone. A sweep sets it.",
    )
    samples: Annotated[int, Field(ge=0)] = changeable(
        0,
        description="Held-out prompts that the student answers at every validation, always by the most likely token, into samples.jsonl of the run's "
        "folder; 0: none. The training is the same with and without.",
    )
    sample_tokens: Count = changeable(64, description="Longest of these answers, in tokens.")
    teacher_check: Annotated[int, Field(ge=0)] = changeable(
        64,
        description="Number of training examples on which the teacher's CE is compared with the student's before the first step; 0: no check.",
    )


@config_dataclass
class Checkpoint:
    every: Count | None = changeable(None, description="Steps between checkpoints; null: only when a signal stops the run.")
    keep: Count = changeable(2, description="Number of checkpoints kept, the newest ones.")
    best_by: Literal["ce", "forward_kl", "reverse_kl", "top1_agreement"] | None = changeable(
        None, description="Also keep the best checkpoint by this validation metric; a checkpoint is then written at every validation."
    )


@config_dataclass
class PushToHub:
    repo: str = changeable(description="Hub repository for the finished student: name or owner/name.")
    private: bool = changeable(True, description="Create the repository as a private one.")


@config_dataclass
class Recipe:
    """Every setting of a run, checked and immutable. `llmkd.load_recipe` reads one."""

    output_dir: str = changeable("", path="output", description="Folder for everything the run writes.")
    seed: Seed = fixed(0, description="Seed of the data's order, of new weights and of dropout.")
    student: Student = Field(default_factory=Student)
    teacher: OneOrMany[Teacher] = fixed(
        None, description="The model that the student learns from: one teacher, or a list of teachers; null: plain supervised fine-tuning."
    )
    mixture: Mixture = Field(default_factory=Mixture)
    data: Data = Field(default_factory=Data)
    loss: Loss = Field(default_factory=Loss)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    validation: Validation = Field(default_factory=Validation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = changeable(
        (), description="Experiment trackers that also receive the records of metrics.jsonl."
    )
    push_to_hub: PushToHub | None = changeable(None, description="Upload the finished student to the hub; null: no upload.")


#: The settings of the loss that may be schedules.
SCHEDULED = ("kd_ratio", "temperature")


def scheduled(loss: Loss, step: int, total: int) -> dict[str, float]:
    """The values in step `step` of a run of `total` steps of those settings of the loss that are schedules."""
    return {name: value_at(getattr(loss, name), step, total) for name in SCHEDULED if isinstance(getattr(loss, name), dict)}


def distils(recipe: Recipe) -> bool:
    """Whether the student learns from a teacher."""
    return bool(as_tuple(recipe.teacher)) and bool(recipe.loss.kd_ratio or recipe.loss.features or recipe.loss.attention)


def uses_teacher(recipe: Recipe) -> bool:
    """Whether the teacher is loaded: the student learns from it, or validation compares the two. If not, none is, even if the recipe names one."""
    compares = recipe.validation.compare_to_teacher and (as_tuple(recipe.data.validation) or recipe.data.validation_fraction)
    return distils(recipe) or bool(as_tuple(recipe.teacher) and compares)


def used_teachers(recipe: Recipe) -> list[tuple[str, Teacher]]:
    """The teachers that are loaded, each with the name of its setting: teacher, or teacher.0, teacher.1, ..."""
    return with_setting_names(recipe.teacher, "teacher") if uses_teacher(recipe) else []


def contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that are each valid, but not together. Yields (the settings involved, the one that the message names first; problem and fix)."""
    student, data, loss, optim, train = recipe.student, recipe.data, recipe.loss, recipe.optim, recipe.train
    if not recipe.output_dir.strip("\0 "):
        yield ("output_dir",), "not given; name a folder for the run, such as runs/first"
    elif "\0" in recipe.output_dir:
        yield ("output_dir",), "holds a NUL character; name a folder"
    yield from _student_contradictions(student)
    if student.layers is not None and student.method == "lora" and recipe.push_to_hub:
        yield (
            ("push_to_hub", "student.layers", "student.method"),
            "set with student.layers and an adapter, whose base would not be on the hub; set student.method: full, or upload what llmkd export writes",
        )
    if optim.name != "adamw" and student.dtype == "float64":
        yield ("optim.name", "student.dtype"), f"found {optim.name}, which has no float64; use adamw, or student.dtype: float32"
    yield from data_contradictions(data, train.max_steps, train.group_by_length)
    yield from teacher_contradictions(recipe.teacher, data)
    if recipe.validation.samples and not (as_tuple(data.validation) or data.validation_fraction):
        fix = "give data.validation or data.validation_fraction, or set it to 0"
        yield ("validation.samples", "data.validation"), f"found {recipe.validation.samples}, and there are no held-out rows; {fix}"
    if recipe.validation.samples and data.train_on_input:
        why = "where prompts are not known from their answers"
        yield (
            ("validation.samples", "data.train_on_input"),
            f"found {recipe.validation.samples} with data.train_on_input, {why}; set one of them to 0 or false",
        )
    if recipe.mixture != Mixture() and len(as_tuple(recipe.teacher)) < 2:
        yield ("mixture", "teacher"), "set, but there are not several teachers to mix; leave it out"
    sampled = [path for path, one in with_setting_names(recipe.teacher, "teacher") if one.cache and one.cache.kind == "sampled"]
    if sampled and loss.divergence != "forward_kl" and loss.kd_ratio:
        yield (
            ("loss.divergence", f"{sampled[0]}.cache.kind"),
            f"found {loss.divergence} with a sampled cache, which is unbiased for forward_kl only; use forward_kl, or a cache of kind topk or hidden",
        )
    if loss.kd_ratio and recipe.teacher is None:
        yield ("loss.kd_ratio", "teacher"), f"found {json.dumps(loss.kd_ratio)} without a teacher; give teacher.model, or set it to 0"
    if sampled and loss.kd_ratio != 0 and isinstance(loss.temperature, dict):
        yield (
            ("loss.temperature", f"{sampled[0]}.cache.kind"),
            "found a schedule with a sampled cache, whose tokens are drawn at one temperature; give a number, or use a cache of kind topk or hidden",
        )
    yield from schedule_contradictions(loss.kd_ratio, "loss.kd_ratio", 0.0, 1.0, train.max_steps)
    yield from schedule_contradictions(loss.temperature, "loss.temperature", 0.0, math.inf, train.max_steps)
    yield from _loss_contradictions(loss)
    yield from _weight_contradictions(recipe)
    if loss.target_weights:
        ratio = (0.5 if recipe.teacher else 0.0) if loss.kd_ratio is None else loss.kd_ratio
        yield from target_weight_contradictions(loss.target_weights, ratio, loss.normalize, recipe.teacher, data)
    if loss.attention:
        yield from attention_contradictions(loss.attention, student.attention, recipe.teacher, data)
    if loss.features:
        yield from feature_contradictions(loss.features, student.architecture is not None, recipe.teacher, data)
    if optim.warmup_steps is not None and optim.warmup_ratio is not None:
        yield ("optim.warmup_ratio", "optim.warmup_steps"), "given together with optim.warmup_steps; keep one of them"
    if train.epochs is not None and train.max_steps is not None:
        yield ("train.max_steps", "train.epochs"), "given together with train.epochs; keep one of them"
    if train.micro_batch_size is not None and train.micro_batch_tokens is not None:
        yield (
            ("train.micro_batch_tokens", "train.micro_batch_size"),
            "given together with train.micro_batch_size; keep one of them (null unsets the other)",
        )
    other = [
        f"{path}.attention"
        for path, one in (("student", student), *with_setting_names(recipe.teacher, "teacher"))
        if one.attention != "auto"
    ]
    if data.share_prefixes and other:
        yield (
            ("data.share_prefixes", other[0]),
            f"found true, but {other[0]} is set, and only llmkd's own attention can share prefixes; leave one of them out",
        )
    if train.compile and (offloaded := [path for path, one in with_setting_names(recipe.teacher, "teacher") if one.device == "offload"]):
        yield (
            ("train.compile", f"{offloaded[0]}.device"),
            f"found true, but {offloaded[0]}.device is offload, and offloaded layers cannot be compiled; leave one of them out",
        )
    if train.max_steps and optim.warmup_steps and optim.warmup_steps > train.max_steps:
        yield ("optim.warmup_steps", "train.max_steps"), f"found {optim.warmup_steps}, more than train.max_steps ({train.max_steps})"
    no_held_out = ("data.validation", "data.validation_fraction")
    if not as_tuple(data.validation) and not data.validation_fraction:
        for path, given in (("validation.every", recipe.validation.every), ("checkpoint.best_by", recipe.checkpoint.best_by)):
            if given is not None:
                yield (path, *no_held_out), "needs held-out rows, but there are none; set data.validation or data.validation_fraction"
    learns = recipe.teacher and (loss.kd_ratio != 0 or loss.attention)  # null is not resolved yet, and will be above 0
    if recipe.checkpoint.best_by not in (None, "ce") and not (learns or uses_teacher(recipe)):
        remedy = "set validation.compare_to_teacher: true" if recipe.teacher else "give teacher.model"
        yield (
            ("checkpoint.best_by", "teacher", "loss.kd_ratio", "validation.compare_to_teacher"),
            f"found {recipe.checkpoint.best_by}, which needs a teacher to compare with; {remedy}, or use ce",
        )


def _student_contradictions(student: Student) -> Iterator[tuple[tuple[str, ...], str]]:
    if student.model is None and student.architecture is None:
        yield (
            ("student.model", "student.architecture"),
            "not given; name the base model's folder or hub id (or give student.architecture for new weights)",
        )
    if student.model is not None and student.architecture is not None:
        yield ("student.architecture", "student.model"), "given together with student.model; keep one of them"
    if student.architecture is not None:
        if student.tokenizer is None:
            yield ("student.tokenizer",), "not given; new weights need it, a folder or hub id"
        if "model_type" not in student.architecture:
            yield ("student.architecture",), "has no model_type; give one, such as llama"
        if student.method == "lora":
            yield ("student.method",), "found lora with student.architecture; new random weights train with method: full"
        for name in ("revision", "base"):
            if getattr(student, name) is not None:
                yield (f"student.{name}", "student.architecture"), "set, but new weights (student.architecture) have none; leave it out"
    if student.layers is not None and student.architecture is not None:
        yield (
            ("student.layers", "student.architecture"),
            "set, but new weights (student.architecture) have no layers to leave out; leave it out",
        )
    if student.layers == ():
        yield ("student.layers",), "found an empty list; name the layers that are kept, or leave it out"
    if isinstance(student.layers, tuple) and any(a >= b for a, b in itertools.pairwise(student.layers)):
        yield ("student.layers",), f"found {list(student.layers)}, expected each number once, in ascending order"
    if student.method == "full" and student.quantization is not None:
        yield (
            ("student.quantization", "student.method"),
            "set with method: full, but quantised weights cannot be trained; set method: lora",
        )
    if student.quantization and student.quantization.type == "fp8":
        yield ("student.quantization.type",), "found fp8, which is for teachers: no gradient passes through it; use nf4"
    if student.quantization and student.quantization.type == "int8" and student.lora and student.lora.dora:
        yield (
            ("student.lora.dora", "student.quantization.type"),
            "found true with quantization int8, which PEFT's DoRA does not support; use nf4",
        )
    if student.method == "full" and student.dtype == "float16":
        yield (
            ("student.dtype", "student.method"),
            "found float16 with method: full; float16 weights cannot be trained; use float32 with mixed_precision: bf16",
        )


def _weight_contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Weights of sources that leave nothing to train on or to measure, or are nothing in float32."""
    data, ratio = recipe.data, recipe.loss.kd_ratio
    ratio = (0.5 if recipe.teacher else 0.0) if ratio is None else ratio
    train, held_out = (
        with_setting_names(value, setting) for setting, value in (("data.train", data.train), ("data.validation", data.validation))
    )
    other_terms = bool(recipe.loss.features or recipe.loss.attention)  # they teach whatever these weights are
    train, held_out = list(train), list(held_out)
    for path, source in [*train, *held_out]:
        for name, weight in vars(source.loss).items():
            if 0 < abs(weight) < 1e-6:  # far below it is 0 in float32
                yield (f"{path}.loss.{name}",), f"found {weight:g}, expected 0, or a number of 1e-06 or more, or of -1e-06 or less"
    for path, source in [*([] if other_terms else train), *held_out]:
        if not source.loss.ce and not source.loss.kd:
            yield (f"{path}.loss",), "found ce: 0 and kd: 0, so these rows count for nothing; leave the source out"
    for path, source in [] if other_terms else train:
        for name, alone in (("ce", 0), ("kd", 1)):  # the kd_ratio with which only that part teaches
            if not getattr(source.loss, name) and ratio == alone:
                fix = f"set {name} to another number, loss.kd_ratio to one between 0 and 1, or leave the source out"
                yield (f"{path}.loss.{name}", "loss.kd_ratio"), f"found 0 with loss.kd_ratio {ratio:g}, so these rows teach nothing; {fix}"
    where = held_out or (train if data.validation_fraction else [])
    best_by = recipe.checkpoint.best_by
    for name, needed in (("ce", "cross-entropy is measured on them"), ("kd", f"checkpoint.best_by is {best_by}")):
        if where and all(getattr(source.loss, name) <= 0 for _, source in where) and (name == "ce" or best_by not in (None, "ce")):
            paths = (f"{where[0][0]}.loss.{name}", *(("checkpoint.best_by",) if name == "kd" else ()))
            fix = "add held-out rows with labels that count" if name == "ce" else "use best_by: ce"
            yield paths, f"found {getattr(where[0][1].loss, name):g}, and no held-out rows have a weight above 0 there, but {needed}; {fix}"


def _loss_contradictions(loss: Loss) -> Iterator[tuple[tuple[str, ...], str]]:
    known = DIVERGENCES[loss.divergence]
    for name, value in loss.divergence_options.items():
        paths = (f"loss.divergence_options.{name}", "loss.divergence")
        if name not in known:
            yield paths, f"{loss.divergence} has no such option; it has: {', '.join(known) or 'none'}"
        elif not known[name][0] <= value <= known[name][1]:
            yield paths, f"found {value:g}, expected {known[name][0]:g} to {known[name][1]:g}"
    if loss.divergence == "alpha_beta" and not any(({o: d for o, (_, _, d) in known.items()} | loss.divergence_options).values()):
        yield ("loss.divergence_options", "loss.divergence"), "alpha and beta are both 0; at least one of them must be positive"
