"""Settings that a task cannot be combined with. A part of `contradictions.py`."""

from collections.abc import Iterator

from .fields import with_setting_names
from .formats import FORMATS_OF
from .recipe import PartLayers, Recipe

SEQUENCES = ("text_to_text", "speech_recognition")  # tasks of encoder-decoder models


def task_contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Contradictions of `task`, in the form of `contradictions.contradictions`."""
    task, formats = recipe.task, FORMATS_OF[recipe.task]
    for setting, value in (("data.train", recipe.data.train), ("data.validation", recipe.data.validation)):
        for path, source in with_setting_names(value, setting):
            if source.format not in formats:
                of = next(name for name, known in FORMATS_OF.items() if source.format in known)
                fix = f"give rows of format {' or '.join(formats)}, or set task: {of}"
                yield (f"{path}.format", "task"), f"found {source.format}, which task: {task} does not read; {fix}"
    if task == "classification":
        yield from _classification(recipe)
    if task in SEQUENCES:
        yield from _sequences(recipe)
    else:
        yield from _of_sequences(recipe)
    if task != "classification" and recipe.checkpoint.best_by in ("accuracy", "f1"):
        yield (
            ("checkpoint.best_by", "task"),
            f"found {recipe.checkpoint.best_by}, which is a metric of task: classification; use ce, or set task",
        )


def _classification(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that only decoders have, or that are not implemented for classifiers."""
    student, data, loss, train = recipe.student, recipe.data, recipe.loss, recipe.train
    (first, of_first), *others = [
        (path, source.format)
        for setting, value in (("data.train", data.train), ("data.validation", data.validation))
        for path, source in with_setting_names(value, setting)
    ] or [("data.train", "")]
    for path, found in others:
        if found != of_first:
            yield (
                (f"{path}.format", f"{first}.format"),
                f"found {found} with {first}.format: {of_first}; one classifier reads rows of one format",
            )
    why = {
        "data.packing": (data.packing, "a classifier reads one text a row; set it to false"),
        "data.streaming": (data.streaming, "the classes are known when all rows are read; set it to false"),
        "data.choices": (data.choices, "questions are answered by text; leave it out"),
        "data.teacher_context": (data.teacher_context, "it stands before a text that is continued; leave it out"),
        "data.train_on_input": (data.train_on_input, "a classifier is not trained on its input; set it to false"),
        "on_policy": (recipe.on_policy, "a classifier writes nothing; leave it out"),
        "loss.attention": (
            loss.attention,
            "attention is compared between causal language models alone; use loss.features, or leave it out",
        ),
        "validation.samples": (recipe.validation.samples, "a classifier writes nothing; set it to 0"),
        "student.layers": (
            student.layers,
            "layers are left out of causal language models alone; name a smaller model, or student.architecture",
        ),
        "student.quantization": (student.quantization, "classifiers are not trained on quantised bases; leave it out"),
        "student.gradient_checkpointing": (student.gradient_checkpointing, "layers of classifiers are not recomputed; set it to false"),
        "train.compile": (train.compile, "classifiers are not compiled; set it to false"),
        "train.shard": (train.shard != "none", "classifiers are held whole by every process; set it to none"),
        "loss.keep": (loss.keep != 1.0, "an example has one target, which is kept whole; leave it out"),
    }
    for setting, (given, problem) in why.items():
        if given:
            yield (setting, "task"), f"set with task: classification; {problem}"
    for path, one in with_setting_names(recipe.teacher, "teacher"):
        of_teacher = {
            "server": (one.server, "servers have language models; name the teacher as model"),
            "quantization": (one.quantization, "classifiers are loaded as they are; leave it out"),
            "merge_adapter": (one.merge_adapter, "a classifier's adapter is used as it is; leave it out"),
            "device": (one.device == "offload", "classifiers are not offloaded; leave it out"),
        }
        for name, (given, problem) in of_teacher.items():
            if given:
                yield (f"{path}.{name}", "task"), f"set with task: classification; {problem}"


def _sequences(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that only decoders have, or that are not implemented for encoder-decoder models."""
    student, data, loss, train, task = recipe.student, recipe.data, recipe.loss, recipe.train, recipe.task
    why = {
        "data.packing": (data.packing, "each target has a source of its own; set it to false"),
        "data.streaming": (data.streaming, "all rows are read before training; set it to false"),
        "data.choices": (data.choices, "questions are scored by causal language models; leave it out"),
        "data.teacher_context": (data.teacher_context, "it stands before a text that is continued; leave it out"),
        "data.train_on_input": (data.train_on_input, "the source is not predicted; set it to false"),
        "on_policy": (recipe.on_policy, "answers are written by causal language models; leave it out"),
        "loss.attention": (loss.attention, "attention is compared between causal language models alone; leave it out"),
        "loss.features": (loss.features, "hidden states inside encoder-decoder models are not compared; leave it out"),
        "validation.samples": (recipe.validation.samples, "set validation.error_rates, which writes texts too; set it to 0"),
        "student.layers": (
            student.layers is not None and not isinstance(student.layers, PartLayers),
            "name the layers of each part, such as {encoder: all, decoder: [0, 3]}",
        ),
        "student.quantization": (student.quantization, "encoder-decoder models are not trained on quantised bases; leave it out"),
        "student.gradient_checkpointing": (student.gradient_checkpointing, "their layers are not recomputed; set it to false"),
        "train.compile": (train.compile, "encoder-decoder models are not compiled; set it to false"),
        "train.shard": (train.shard != "none", "encoder-decoder models are held whole by every process; set it to none"),
    }
    for setting, (given, problem) in why.items():
        if given:
            yield (setting, "task"), f"set with task: {task}; {problem}"
    if student.keep_encoded and not (student.freeze and task == "speech_recognition"):
        fix = "set student.freeze: encoder" if task == "speech_recognition" else "leave it out"
        yield ("student.keep_encoded", "student.freeze"), f"set for an encoder that trains, or reads text with padding; {fix}"
    if recipe.checkpoint.best_by in ("wer", "cer") and not recipe.validation.error_rates:
        yield (
            ("checkpoint.best_by", "validation.error_rates"),
            f"found {recipe.checkpoint.best_by}, which is not measured; set validation.error_rates",
        )
    for path, one in with_setting_names(recipe.teacher, "teacher"):
        of_teacher = {
            "server": (one.server, "servers have causal language models; name the teacher as model"),
            "quantization": (one.quantization, "encoder-decoder models are loaded as they are; leave it out"),
            "merge_adapter": (one.merge_adapter, "an adapter is used as it is; leave it out"),
            "device": (one.device == "offload", "encoder-decoder models are not offloaded; leave it out"),
        }
        for name, (given, problem) in of_teacher.items():
            if given:
                yield (f"{path}.{name}", "task"), f"set with task: {task}; {problem}"


def _of_sequences(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that only encoder-decoder models have."""
    if isinstance(recipe.student.layers, PartLayers):
        yield (
            ("student.layers", "task"),
            f"names an encoder or a decoder with task: {recipe.task}, whose models have one stack of layers; give a list",
        )
    for name in ("freeze", "keep_encoded") if recipe.student.freeze or recipe.student.keep_encoded else ():
        if getattr(recipe.student, name):
            yield (f"student.{name}", "task"), f"set with task: {recipe.task}, whose models have no encoder to freeze; leave it out"
    needed = f"set task: {' or '.join(SEQUENCES)}, or leave it out"
    if recipe.data.target_prefix is not None:
        yield ("data.target_prefix", "task"), f"set with task: {recipe.task}, whose models have no targets of their own; {needed}"
    if recipe.validation.error_rates:
        yield ("validation.error_rates", "task"), f"set with task: {recipe.task}; {needed}"
    if recipe.checkpoint.best_by in ("wer", "cer"):
        yield ("checkpoint.best_by", "task"), f"found {recipe.checkpoint.best_by}, which is of encoder-decoder models; use ce, or set task"
