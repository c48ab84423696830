"""Finds settings of a recipe that are valid by themselves, but not together."""

import itertools
import json
from collections.abc import Iterator

from .data import data_contradictions
from .divergences import option_contradictions
from .engine import engine_contradictions
from .features import feature_contradictions
from .fields import as_tuple, with_setting_names
from .media import media_contradictions, reads_files
from .on_policy import writes
from .on_policy_contradictions import long_horizon_contradictions, on_policy_contradictions
from .prompt_edits import prompt_contradictions
from .recipe import OF_THE_STUDENT, Loss, PartLayers, Recipe, Student, schedules, uses_teacher
from .schedule import schedule_contradictions
from .sharding import sharding_contradictions
from .target_weights import keep_contradictions, target_weight_contradictions
from .tasks import task_contradictions
from .teacher import Mixture, teacher_contradictions
from .terms import attention_contradictions
from .views import view_contradictions


def contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields (settings, problem and fix): the settings involved, of which the message names the first."""
    student, data, optim, train = recipe.student, recipe.data, recipe.optim, recipe.train
    if not recipe.output_dir.strip("\0 "):
        yield ("output_dir",), "not given; name a folder for the run, such as runs/first"
    elif "\0" in recipe.output_dir:
        yield ("output_dir",), "holds a NUL character; name a folder"
    yield from _student_contradictions(student, not reads_files(data))
    if student.layers is not None and student.method == "lora" and recipe.push_to_hub:
        yield (
            ("push_to_hub", "student.layers", "student.method"),
            "set with student.layers and an adapter, whose base would not be on the hub; set student.method: full, or upload what llmkd export writes",
        )
    if optim.name != "adamw" and student.dtype == "float64":
        yield ("optim.name", "student.dtype"), f"found {optim.name}, which has no float64; use adamw, or student.dtype: float32"
    yield from data_contradictions(data, train.max_steps, train.group_by_length)
    yield from teacher_contradictions(recipe.teacher, data)
    yield from _teaching_contradictions(recipe)
    yield from _step_contradictions(recipe)
    yield from _held_out_contradictions(recipe)
    yield from sharding_contradictions(recipe)
    yield from task_contradictions(recipe)
    yield from media_contradictions(recipe)
    yield from prompt_contradictions(recipe)
    yield from view_contradictions(recipe)


def _teaching_contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of teachers, the terms of the loss and their weights."""
    student, data, loss, train = recipe.student, recipe.data, recipe.loss, recipe.train
    if recipe.mixture != Mixture() and len(as_tuple(recipe.teacher)) < 2:
        yield ("mixture", "teacher"), "set, but there are not several teachers to mix; leave it out"
    sampled = [path for path, one in with_setting_names(recipe.teacher, "teacher") if one.cache and one.cache.kind == "sampled"]
    if sampled and loss.divergence != "forward_kl" and loss.kd_ratio:
        yield (
            ("loss.divergence", f"{sampled[0]}.cache.kind"),
            f"found {loss.divergence} with a sampled cache, which is unbiased for forward_kl only; use forward_kl, or a cache of kind topk or hidden",
        )
    for path, source in with_setting_names(data.train, "data.train") if sampled and loss.kd_ratio != 0 else ():
        if source.divergence not in (None, "forward_kl"):
            yield (
                (f"{path}.divergence", f"{sampled[0]}.cache.kind"),
                f"found {source.divergence} with a sampled cache, which is unbiased for forward_kl only; leave it out, or use a cache of kind topk or hidden",
            )
    for path, one in with_setting_names(recipe.teacher, "teacher"):
        if one.ema is not None and student.model is None:
            yield (
                (f"{path}.ema", "student.model"),
                "set for a student of new weights, which has nothing to teach; name student.model, or leave ema out",
            )
        if one.ema is not None and one.model not in (None, student.model):
            yield (
                (f"{path}.model", f"{path}.ema"),
                f"found {one.model} with ema, the average of the student's own weights; leave one of them out",
            )
    if loss.kd_ratio and recipe.teacher is None:
        yield ("loss.kd_ratio", "teacher"), f"found {json.dumps(loss.kd_ratio)} without a teacher; give teacher.model, or set it to 0"
    if sampled and loss.kd_ratio != 0 and isinstance(loss.temperature, dict):
        yield (
            ("loss.temperature", f"{sampled[0]}.cache.kind"),
            "found a schedule with a sampled cache, whose tokens are drawn at one temperature; give a number, or use a cache of kind topk or hidden",
        )
    for name, setting in schedules(loss).items():
        low, high = {"kd_ratio": (0.0, 1.0), "temperature": (1e-3, 1e3)}.get(name, (0.0, 1e6))
        yield from schedule_contradictions(setting, f"loss.{name}", low, high, train.max_steps)
    yield from _loss_contradictions(loss)
    yield from _weight_contradictions(recipe)
    ratio = (0.5 if recipe.teacher else 0.0) if loss.kd_ratio is None else loss.kd_ratio
    if recipe.on_policy:
        inside, every = bool(loss.features or loss.attention), recipe.validation.every
        yield from on_policy_contradictions(recipe.on_policy, ratio, inside, recipe.teacher, recipe.mixture, data, train.max_steps, every)
        yield from long_horizon_contradictions(recipe.on_policy, loss, recipe.teacher, data, recipe.mixture)
        if writes(recipe.on_policy):
            yield from engine_contradictions(recipe.on_policy, student)
    if loss.target_weights:
        yield from target_weight_contradictions(loss.target_weights, ratio, recipe.teacher, data)
    yield from keep_contradictions(loss.keep, loss.target_weights, ratio, recipe.teacher, data)
    if loss.attention:
        yield from attention_contradictions(loss.attention, student.attention, recipe.teacher, data)
    if loss.features:
        yield from feature_contradictions(loss.features, student.architecture is not None, recipe.teacher, data)


def _step_contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of steps, micro-batches and their computation."""
    student, data, optim, train = recipe.student, recipe.data, recipe.optim, recipe.train
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


def _held_out_contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of metrics and samples on held-out rows."""
    data, loss = recipe.data, recipe.loss
    if recipe.validation.samples and not (as_tuple(data.validation) or data.validation_fraction):
        fix = "give data.validation or data.validation_fraction, or set it to 0"
        yield ("validation.samples", "data.validation"), f"found {recipe.validation.samples}, and there are no held-out rows; {fix}"
    if recipe.validation.samples and data.train_on_input:
        why = "where prompts are not known from their answers"
        yield (
            ("validation.samples", "data.train_on_input"),
            f"found {recipe.validation.samples} with data.train_on_input, {why}; set one of them to 0 or false",
        )
    no_held_out = ("data.validation", "data.validation_fraction")
    if not as_tuple(data.validation) and not data.validation_fraction:
        for path, given in (("validation.every", recipe.validation.every), ("checkpoint.best_by", recipe.checkpoint.best_by)):
            if given is not None:
                yield (path, *no_held_out), "needs held-out rows, but there are none; set data.validation or data.validation_fraction"
    learns = recipe.teacher and loss.kd_ratio != 0  # null will be resolved to more than 0
    if recipe.checkpoint.best_by not in (None, *OF_THE_STUDENT) and not (learns or uses_teacher(recipe)):
        remedy = "set validation.compare_to_teacher: true" if recipe.teacher else "give teacher.model"
        yield (
            ("checkpoint.best_by", "teacher", "loss.kd_ratio", "validation.compare_to_teacher"),
            f"found {recipe.checkpoint.best_by}, which needs a teacher to compare with; {remedy}, or use ce",
        )


def _student_contradictions(student: Student, reads_text: bool) -> Iterator[tuple[tuple[str, ...], str]]:
    if student.model is None and student.architecture is None:
        yield (
            ("student.model", "student.architecture"),
            "not given; name the base model's folder or hub id (or give student.architecture for new weights)",
        )
    if student.model is not None and student.architecture is not None:
        yield ("student.architecture", "student.model"), "given together with student.model; keep one of them"
    if student.architecture is not None:
        if student.tokenizer is None and reads_text:
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
    for part in ("encoder", "decoder") if isinstance(student.layers, PartLayers) else ():
        own = getattr(student.layers, part)
        if own == () or isinstance(own, tuple) and any(a >= b for a, b in itertools.pairwise(own)):
            yield (f"student.layers.{part}",), f"found {list(own)}, expected one number or more, each once, in ascending order"
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
    """Weights of sources that leave nothing to train on or to measure, or are 0 in float32."""
    data, ratio = recipe.data, recipe.loss.kd_ratio
    ratio = (0.5 if recipe.teacher else 0.0) if ratio is None else ratio
    train, held_out = (
        with_setting_names(value, setting) for setting, value in (("data.train", data.train), ("data.validation", data.validation))
    )
    train, held_out = list(train), list(held_out)
    for path, source in [*train, *held_out]:
        for name, weight in vars(source.loss).items():
            if 0 < abs(weight) < 1e-6:  # far smaller ones are 0 in float32
                yield (f"{path}.loss.{name}",), f"found {weight:g}, expected 0, or a number of 1e-06 or more, or of -1e-06 or less"
            elif weight != 1 and name in ("features", "attention") and getattr(recipe.loss, name) is None:
                yield (f"{path}.loss.{name}", f"loss.{name}"), f"found {weight:g}, and there is no loss.{name}; leave it out"
            elif weight != 1 and name in ("features", "attention") and (path, source) in held_out:
                yield (f"{path}.loss.{name}",), f"found {weight:g}, but {name} are measured in training alone; leave it out"
    inner = [name for name in ("features", "attention") if getattr(recipe.loss, name)]
    for path, source in [*train, *held_out]:
        names = ["ce", "kd", *(inner if (path, source) in train else ())]
        if not any(getattr(source.loss, name) for name in names):
            found = " and ".join([", ".join(f"{name}: 0" for name in names[:-1]), f"{names[-1]}: 0"])
            yield (f"{path}.loss",), f"found {found}, so these rows count for nothing; leave the source out"
        elif (path, source) in train and not any(getattr(source.loss, name) for name in inner):
            for name, alone in (("ce", 0), ("kd", 1)):  # the kd_ratio with which only that part teaches
                if not getattr(source.loss, name) and ratio == alone:
                    fix = f"set {name} to another number, loss.kd_ratio to one between 0 and 1, or leave the source out"
                    yield (
                        (f"{path}.loss.{name}", "loss.kd_ratio"),
                        f"found 0 with loss.kd_ratio {ratio:g}, so these rows teach nothing; {fix}",
                    )
    where = held_out or (train if data.validation_fraction else [])
    best_by = recipe.checkpoint.best_by
    for name, needed in (("ce", "cross-entropy is measured on them"), ("kd", f"checkpoint.best_by is {best_by}")):
        if (
            where
            and all(getattr(source.loss, name) <= 0 for _, source in where)
            and (name == "ce" or best_by not in (None, *OF_THE_STUDENT))
        ):
            paths = (f"{where[0][0]}.loss.{name}", *(("checkpoint.best_by",) if name == "kd" else ()))
            fix = "add held-out rows with labels that count" if name == "ce" else "use best_by: ce"
            yield paths, f"found {getattr(where[0][1].loss, name):g}, and no held-out rows have a weight above 0 there, but {needed}; {fix}"


def _loss_contradictions(loss: Loss) -> Iterator[tuple[tuple[str, ...], str]]:
    yield from option_contradictions(loss.divergence, loss.divergence_options, "loss")
