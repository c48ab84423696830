"""A run as data: every setting, its type, range, default and one sentence about it.

Plain frozen dataclasses; `settings.py` reads them from YAML and the command line and writes them back.
Nothing here imports torch: a recipe is checked before anything heavy is loaded.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag
from pydantic.dataclasses import dataclass

settings = dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"]

#: Each divergence with its options: (smallest, largest, default). `losses/divergences.py` holds the functions.
DIVERGENCES: dict[str, dict[str, tuple[float, float, float]]] = {
    "forward_kl": {},
    "reverse_kl": {},
    "symmetric_kl": {"forward_share": (0.0, 1.0, 0.5)},
    "generalized_jsd": {"beta": (0.0, 1.0, 0.5)},
    "skewed_forward_kl": {"alpha": (0.0, 0.99, 0.1)},
    "skewed_reverse_kl": {"alpha": (0.0, 0.99, 0.1)},
    "adaptive_kl": {"head_mass": (0.0, 0.99, 0.5)},
    "total_variation": {},
    "alpha_beta": {"alpha": (0.0, 4.0, 0.2), "beta": (0.0, 4.0, 0.7)},
}

#: The columns of each format, and what a message of a conversation holds; `Source.fields` renames them.
COLUMNS: dict[str, tuple[str, ...]] = {
    "alpaca": ("instruction", "input", "output"),
    "chat": ("messages", "tools", "role", "content"),
    "prompt_completion": ("prompt", "completion", "tools", "role", "content"),
    "text": ("text",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")


@settings
class Quantization:
    """The base's linear layers in 4 or 8 bit, by bitsandbytes; embeddings, norms and the head keep `dtype`."""

    type: Literal["nf4", "fp4", "int8"] = Field("nf4", description="Number format of the base's linear layers.")
    double_quant: bool = Field(True, description="nf4 and fp4: quantise the quantisation constants too.")
    compute_dtype: Dtype = Field("auto", description="nf4 and fp4: type the products are computed in; auto is dtype.")


@settings
class Lora:
    rank: Count = Field(16, description="Rank of the adapter matrices.")
    alpha: float = Field(32.0, gt=0, description="Scale: the update is alpha / rank times B A (over sqrt(rank) with rslora).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    target_modules: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "all-linear",
        description="Modules that get an adapter: all-linear (all but the head), a list of name endings, or a regular expression.",
    )
    modules_to_save: tuple[str, ...] = Field((), description="Modules that train in full beside the adapter, such as lm_head.")
    rslora: bool = Field(False, description="Rank-stabilised scaling, alpha / sqrt(rank).")
    dora: bool = Field(False, description="Weight-decomposed LoRA.")


@settings
class Student:
    model: str | None = Field(None, description="Folder or hub id of a base model, or of a LoRA adapter to go on training.")
    revision: str | None = Field(None, description="Revision of a hub model or adapter.")
    base: str | None = Field(None, description="For an adapter: where its base is now, if not where the adapter says.")
    architecture: dict[str, Any] | None = Field(
        None, description="Instead of model: a transformers configuration (model_type, hidden_size, ...) for new random weights."
    )
    tokenizer: str | None = Field(None, description="Folder or hub id of the tokenizer, or builtin:skills; by default the model's own.")
    method: Literal["lora", "full"] = Field("lora", description="What trains: a LoRA adapter, or every weight.")
    lora: Lora | None = Field(None, description="The adapter; null for its defaults, or for the settings of an adapter given as model.")
    quantization: Quantization | None = Field(None, description="Hold the base in 4 or 8 bit (QLoRA); null for not.")
    dtype: Dtype = Field(
        "auto", description="Type the base is held in; auto is the type it was saved in. Adapters train in at least float32."
    )
    attention: Attention = Field("auto", description="Attention implementation; auto leaves it to transformers.")
    mixed_precision: Literal["no", "bf16"] = Field("no", description="bf16: autocast the body's products of weights held in float32.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass to save memory.")


@settings
class Teacher:
    model: str = Field(description="Folder or hub id of a model, or of a LoRA adapter (its base is read from its own configuration).")
    revision: str | None = Field(None, description="Revision of a hub model or adapter.")
    base: str | None = Field(None, description="For an adapter: where its base is now, if not where the adapter says.")
    quantization: Quantization | None = Field(None, description="Hold the teacher in 4 or 8 bit; null for not.")
    dtype: Dtype = Field("auto", description="Type the teacher's weights are held in.")
    attention: Attention = Field("auto", description="Attention implementation; auto leaves it to transformers.")


@settings
class Source:
    path: str = Field(
        description="A .json, .jsonl, .parquet, .arrow or .csv file, a folder of them, a hub data set, or builtin:skills (the generated corpus)."
    )
    format: Literal["alpaca", "chat", "prompt_completion", "text"] = Field(
        "alpaca",
        description="alpaca: instruction, input, output; chat: messages of role and content; prompt_completion: prompt, completion; text: text.",
    )
    fields: dict[str, str] = Field(
        default_factory=dict,
        description="What the file calls the format's columns, where it has other names: {messages: conversations, role: from, content: value}.",
    )
    roles: dict[str, str] = Field(
        default_factory=dict,
        description="What the file calls the roles of a chat, where it has other names: {user: human, assistant: gpt}.",
    )
    chat_template: bool = Field(
        False, description="alpaca and prompt_completion: pass the prompt and the answer through the tokenizer's chat template."
    )
    name: str | None = Field(
        None, description="Configuration of a hub data set; for builtin:skills, questions (conversations) or prose (plain text)."
    )
    split: str = Field("train", description="Split of a hub data set, of a folder whose files are named by split, or of builtin:skills.")
    revision: str | None = Field(None, description="Revision of a hub data set.")
    limit: Count | None = Field(None, description="Use only so many rows: the first ones, or with seed a random sample.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(None, description="Draw the limit's rows by this seed.")
    weight: float = Field(1.0, gt=0, description="Passes over this source in one epoch: 2 is twice, 0.5 a half, drawn anew each epoch.")


#: One source or a list of them; the tag keeps pydantic from explaining what is wrong with the form that was not meant.
Sources = Annotated[
    Annotated[Source, Tag("one")] | Annotated[tuple[Source, ...], Tag("several")] | Annotated[None, Tag("none")],
    Discriminator(lambda value: "none" if value is None else "several" if isinstance(value, list | tuple) else "one"),
]


def sources(setting: Source | tuple[Source, ...] | None) -> tuple[Source, ...]:
    """The sources behind `data.train` or `data.validation`."""
    return setting if isinstance(setting, tuple) else (setting,) if setting else ()


@settings
class Data:
    train: Sources = Field(None, description="What the student trains on: a source, or a list of them.")
    validation: Sources = Field(None, description="Held-out rows; or set validation_share.")
    validation_share: float = Field(0.0, ge=0, lt=1, description="Share of the training rows, drawn by seed, held out for validation.")
    choices: Source | None = Field(
        None,
        description="Multiple-choice questions in the same format, scored at the end: rows have choices (texts) and answer (an index).",
    )
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="Longest example in tokens.")
    too_long: Literal["drop", "truncate", "split", "refuse"] = Field(
        "drop", description="What becomes of a longer one: drop it, cut its end off, split it into several (text only), or refuse the run."
    )
    train_on_input: bool = Field(False, description="Supervise the prompt's tokens too, not only the answer's.")
    packing: bool = Field(
        False,
        description="Concatenate a micro-batch's examples into one row without padding; they stay isolated, and the result is the same.",
    )
    streaming: bool = Field(
        False, description="Read and tokenise the training rows while training instead of before; needs train.max_steps."
    )
    shuffle_buffer: Count = Field(10_000, description="Streaming: rows that are shuffled together.")
    cache_dir: str | None = Field(None, description="Where tokenised data is kept; by default ~/.cache/llmkd, or LLMKD_CACHE.")


@settings
class Loss:
    kd_ratio: Share | None = Field(
        None,
        description="Weight of distillation: (1 - kd_ratio) CE + kd_ratio T^2 D. By default 0.5 with a teacher, 0 without; at 0 no teacher is loaded.",
    )
    divergence: Literal[tuple(DIVERGENCES)] = Field("forward_kl", description="How student and teacher are compared.")
    divergence_options: dict[str, float] = Field(
        default_factory=dict,
        description="Options of the divergence: "
        + "; ".join(
            f"{name}: " + ", ".join(f"{o} ({d:g})" for o, (_, _, d) in options.items()) for name, options in DIVERGENCES.items() if options
        )
        + ".",
    )
    temperature: float = Field(
        1.0, gt=0, description="T: both models' logits are divided by it in the divergence, which is then scaled by T^2."
    )
    chunk_rows: Count | None = Field(
        None,
        description="Supervised tokens per chunk of the head; by default as many as keep one float32 tile under 256 MiB on a GPU, 4 MiB on a CPU.",
    )


@settings
class Optim:
    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw", description="AdamW of torch, or of bitsandbytes with 8-bit state, with state that may move to CPU memory, or with both."
    )
    lr: float = Field(2e-4, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay, on matrices only.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's decay rates."
    )
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the gradient to this norm; null for never.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Shape of the learning rate after warm-up.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = Field(None, description="Steps of linear warm-up.")
    warmup_share: Share | None = Field(None, description="Instead: warm-up as a share of all steps.")
    min_lr_share: Share = Field(0.0, description="Where the schedule ends, as a share of lr.")


@settings
class Train:
    batch_size: Count = Field(
        32, description="Examples per optimizer step, over all processes: the result does not depend on how they are split."
    )
    micro_batch_size: Count = Field(
        4, description="Examples per forward pass of one process, at most; more is faster and takes more memory."
    )
    epochs: Count | None = Field(None, description="Passes over the data (1 unless max_steps is set).")
    max_steps: Count | None = Field(None, description="Instead of epochs: optimizer steps.")
    length_group: Count = Field(
        1, description="Optimizer steps whose examples are sorted by length together: less padding. 1 leaves the batches as drawn."
    )
    log_every: Count = Field(1, description="Steps between records in metrics.jsonl.")


@settings
class Validation:
    every: Count | None = Field(None, description="Steps between validations; null for only before the first step and after the last.")
    micro_batch_size: Count = Field(8, description="Examples per forward pass.")


@settings
class Checkpoint:
    every: Count | None = Field(None, description="Steps between checkpoints; null for only when stopped by a signal.")
    keep: Count = Field(2, description="How many of the newest are kept.")
    best_by: Literal["ce", "forward_kl", "reverse_kl", "agreement"] | None = Field(
        None, description="Also keep the best by this validation figure; checkpoints are then written at every validation."
    )


@settings
class PushToHub:
    repo: str = Field(description="Hub repository that the finished student is uploaded to: name or owner/name.")
    private: bool = Field(True, description="Create the repository as a private one.")


@settings
class Recipe:
    output_dir: str = Field("", description="Where the run leaves everything.")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Order of the data, new weights and dropout follow from it.")
    student: Student = Field(default_factory=Student)
    teacher: Teacher | None = Field(None, description="null for plain supervised fine-tuning.")
    data: Data = Field(default_factory=Data)
    loss: Loss = Field(default_factory=Loss)
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    validation: Validation = Field(default_factory=Validation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = Field(
        (), description="Accelerate's trackers that also get the figures of metrics.jsonl."
    )
    push_to_hub: PushToHub | None = Field(None, description="Upload the finished student to the hub; null for not.")


def contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that are each right and together wrong: (the settings read, the one to blame first; what is wrong and how to mend it)."""
    student, data, loss, optim, train = recipe.student, recipe.data, recipe.loss, recipe.optim, recipe.train
    if not recipe.output_dir.strip("\0 "):
        yield ("output_dir",), "not given; name the folder the run shall write, such as runs/first"
    elif "\0" in recipe.output_dir:
        yield ("output_dir",), "holds a NUL character; name a folder"
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
    if student.method == "full" and student.dtype == "float16":
        yield (
            ("student.dtype", "student.method"),
            "found float16, in which all weights cannot be trained; use float32 with mixed_precision: bf16",
        )
    yield from _data_contradictions(data, train)
    if loss.kd_ratio and recipe.teacher is None:
        yield ("loss.kd_ratio", "teacher"), f"found {loss.kd_ratio:g} without a teacher; give teacher.model, or set it to 0"
    known = DIVERGENCES[loss.divergence]
    for name, value in loss.divergence_options.items():
        paths = (f"loss.divergence_options.{name}", "loss.divergence")
        if name not in known:
            yield paths, f"{loss.divergence} has no such option; it has: {', '.join(known) or 'none'}"
        elif not known[name][0] <= value <= known[name][1]:
            yield paths, f"found {value:g}, expected {known[name][0]:g} to {known[name][1]:g}"
    if loss.divergence == "alpha_beta" and not any(({o: d for o, (_, _, d) in known.items()} | loss.divergence_options).values()):
        yield ("loss.divergence_options", "loss.divergence"), "alpha and beta are both 0; at least one of them must be positive"
    if optim.warmup_steps is not None and optim.warmup_share is not None:
        yield ("optim.warmup_share", "optim.warmup_steps"), "given together with optim.warmup_steps; keep one of them"
    if train.epochs is not None and train.max_steps is not None:
        yield ("train.max_steps", "train.epochs"), "given together with train.epochs; keep one of them"
    if train.max_steps and optim.warmup_steps and optim.warmup_steps > train.max_steps:
        yield ("optim.warmup_steps", "train.max_steps"), f"found {optim.warmup_steps}, more than train.max_steps ({train.max_steps})"
    no_held_out = ("data.validation", "data.validation_share")
    if not sources(data.validation) and not data.validation_share:
        for path, given in (("validation.every", recipe.validation.every), ("checkpoint.best_by", recipe.checkpoint.best_by)):
            if given is not None:
                yield (path, *no_held_out), "given without held-out rows; set data.validation or data.validation_share"
    if recipe.checkpoint.best_by not in (None, "ce") and not (recipe.teacher and loss.kd_ratio != 0):
        yield (
            ("checkpoint.best_by", "teacher", "loss.kd_ratio"),
            f"found {recipe.checkpoint.best_by}, which needs a teacher and loss.kd_ratio above 0; use ce",
        )


def _data_contradictions(data: Data, train: Train) -> Iterator[tuple[tuple[str, ...], str]]:
    if not sources(data.train):
        yield ("data.train",), "not given; name what to train on, such as {path: train.jsonl, format: alpaca}"
    if data.validation == ():
        yield ("data.validation",), "found an empty list; name a source, or leave it out"
    if sources(data.validation) and data.validation_share:
        yield ("data.validation_share", "data.validation"), "given together with data.validation; keep one of them"
    every = (*sources(data.train), *sources(data.validation))
    if data.too_long == "split" and any(s.format != "text" for s in every):
        yield ("data.too_long", "data.train", "data.validation"), "found split, which only format: text can be; use drop or truncate"
    for setting, value in (("data.train", data.train), ("data.validation", data.validation), ("data.choices", data.choices)):
        for i, source in enumerate(sources(value)):
            for name, problem in _source_contradictions(source, setting):
                path = f"{setting}.{i}" if isinstance(value, tuple) else setting
                yield (f"{path}.{name}",), problem
    if data.streaming:
        yield from _streaming_contradictions(data, train)


def _source_contradictions(source: Source, setting: str) -> Iterator[tuple[str, str]]:
    choices = setting == "data.choices"
    if source.path.startswith("builtin:") and source.path != "builtin:skills":
        yield "path", f"found {source.path!r}; the only built-in corpus is builtin:skills"
    if choices and source.format == "text":
        yield "format", "found text, which has no answer to choose; use alpaca, chat or prompt_completion"
    if source.weight != 1 and setting != "data.train":
        yield "weight", f"found {source.weight:g}, and only training sources have weights; leave it out"
    if source.seed is not None and source.limit is None:
        yield "seed", "given without limit, whose rows it draws; give a limit, or leave it out"
    if source.chat_template and source.format in ("chat", "text"):
        why = "is always rendered by it" if source.format == "chat" else "has no turns to render"
        yield "chat_template", f"found true with format: {source.format}, which {why}; leave it out"
    known = COLUMNS[source.format] + (("choices", "answer") if choices else ())
    for column in source.fields:
        if column not in known:
            yield f"fields.{column}", f"format {source.format} has no such column; it has {', '.join(known)}"
    if source.roles and source.format not in ("chat", "prompt_completion"):
        yield "roles", f"given with format: {source.format}, which has no roles; leave it out"
    for role, name in source.roles.items():
        if role not in ROLES:
            yield f"roles.{role}", f"no such role; the roles are {', '.join(ROLES)}"
        elif name in {source.roles.get(other, other) for other in ROLES if other != role}:
            yield f"roles.{role}", f"found {name!r}, which also stands for another role; give each role its own name"


def _streaming_contradictions(data: Data, train: Train) -> Iterator[tuple[tuple[str, ...], str]]:
    if not train.max_steps:
        yield ("data.streaming", "train.max_steps"), "found true without train.max_steps; the length of a stream is not known, so give it"
    if data.validation_share:
        yield (
            ("data.validation_share", "data.streaming"),
            "given with data.streaming, which reads no rows beforehand to part; use data.validation",
        )
    if isinstance(data.train, tuple) and len(data.train) > 1:
        yield (
            ("data.train", "data.streaming"),
            "several sources with data.streaming, which reads one; write them to one folder, or set it to false",
        )
    for source in sources(data.train):
        if source.weight != 1:
            yield ("data.train", "data.streaming"), "a weight with data.streaming, which reads a source again and again; leave it out"
        if source.seed is not None:
            yield (
                ("data.train", "data.streaming"),
                "limit with seed and data.streaming, which cannot draw from rows it has not read; use the first",
            )
    if train.length_group > 1:
        yield (
            ("train.length_group", "data.streaming"),
            f"found {train.length_group} with data.streaming, where lengths are not known; use 1",
        )


@settings
class Stage:
    recipe: str = Field(description="Recipe of this stage, relative to the study's file.")
    set: dict[str, Any] = Field(default_factory=dict, description="Settings changed in it, by dotted path.")


@settings
class Study:
    """Several recipes run in order, then their students compared with one teacher on the same held-out rows."""

    output_dir: str = Field(min_length=1, description="Where the study is written: each stage in a folder of its name.")
    stages: dict[str, Stage] = Field(min_length=1, description="Name of each stage and what it runs, in order.")
    teacher: str = Field(description="Stage whose result is the teacher of the comparison.")
    students: tuple[str, ...] = Field(min_length=1, description="Stages whose results are compared with it.")
