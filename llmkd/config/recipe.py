"""A run as data: every setting, its type, range, default and one sentence about it.

Plain frozen dataclasses; `loader` reads them from YAML and the command line and writes them back.
Nothing here imports torch: a recipe is checked before anything heavy is loaded.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from .data import Data
from .data import Source as Source
from .divergences import DIVERGENCES, with_defaults
from .features import Features
from .fields import Count, OneOrMany, Seed, Temperature, as_tuple, changeable, config_dataclass, fixed, form, with_setting_names
from .on_policy import OnPolicy
from .schedule import Scheduled, middle, value_at
from .sharding import Shard
from .target_weights import KeepOrShare, TargetWeights
from .teacher import Attention, Dtype, Mixture, Quantization, Teacher
from .terms import AttentionLoss

Share = Annotated[float, Field(ge=0, le=1)]


@config_dataclass
class Lora:
    rank: Count = fixed(16, description="Rank of the adapter matrices.")
    alpha: float = fixed(32.0, ge=1e-6, le=1e6, description="Scale: the update is alpha / rank times B A (over sqrt(rank) with rslora).")
    dropout: float = fixed(
        0.0,
        ge=0,
        lt=1,
        description="Dropout on the adapter's input while training. Its masks depend on the example, not on how a step is split into "
        "micro-batches.",
    )
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
        description="block_influence: the layers that change the hidden states most, measured on training rows before the first step (ShortGPT); "
        "even: evenly spaced, including the first and the last.",
    )


Numbers = tuple[Annotated[int, Field(ge=0)], ...]


@config_dataclass
class PartLayers:
    """Layers of an encoder-decoder model that are kept: all, a number of them, evenly spaced with the first and the last, or these."""

    encoder: Literal["all"] | Count | Numbers = fixed(
        "all", description="Of the encoder: all, a number of layers, or a list such as [0, 3]."
    )
    decoder: Literal["all"] | Count | Numbers = fixed(
        "all", description="Of the decoder: all, a number of layers, or a list such as [0, 3]."
    )


def _layer_form(value) -> str:
    names = value if isinstance(value, dict) else ()
    return "parts" if isinstance(value, PartLayers) or "encoder" in names or "decoder" in names else form(value)


#: Numbers of layers, or how they are chosen. The tags make pydantic report the errors of the given form alone.
Layers = Annotated[
    Annotated[LayerChoice, Tag("one")]
    | Annotated[PartLayers, Tag("parts")]
    | Annotated[Numbers, Tag("several")]
    | Annotated[None, Tag("none")],
    Discriminator(_layer_form),
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
        description="Layers of the base to keep, counted from 0. The others are removed before training; the student is an ordinary smaller "
        "model. A list such as [0, 2, 5], or settings that choose the layers; for an encoder-decoder model {encoder: all, decoder: "
        "[0, 3]}; null: all layers.",
    )
    freeze: Literal["encoder"] | None = fixed(
        None, description="For an encoder-decoder model: encoder freezes the encoder, which then gets no adapter; null: nothing is frozen."
    )
    keep_encoded: Count | None = changeable(
        None,
        description="With freeze: encoder and task: speech_recognition: number of clips whose encoder states are kept in the host's memory. The "
        "encoder then computes them once for all epochs, and for a teacher with the same encoder too. null: none.",
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
        description="bf16: compute the matrix products of float32 weights in bfloat16 (autocast), except those of the head and the loss.",
    )
    gradient_checkpointing: bool | Annotated[float, Field(gt=0, lt=1)] | Literal["offload"] = changeable(
        False,
        description="Recompute activations in the backward pass to save memory. true: in every layer but the last; a fraction: in that fraction "
        "of the layers, counted from the first; offload: as true, with each layer's input kept in the host's memory.",
    )

    @property
    def recomputed(self) -> bool | float:
        """The share of the layers that are recomputed; True for all but the last."""
        return True if self.gradient_checkpointing == "offload" else self.gradient_checkpointing


@config_dataclass
class Loss:
    kd_ratio: Scheduled[Share | None] = fixed(
        None,
        description="Weight of the distillation term: the loss is (1 - kd_ratio) CE + kd_ratio T^2 D. Default 0.5 with a teacher, 0 without. With"
        " 0 no teacher is loaded, unless features need it. Or a schedule over the optimizer steps, {from: 1.0, to: 0.3, shape: "
        "cosine}. shape: linear (the default), cosine, or constant (from, and then to). to is reached in the last step, or after "
        "steps, or after a ratio of all steps.",
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
    temperature: Scheduled[Temperature] = fixed(
        1.0,
        description="T: both models' logits are divided by T before the divergence is computed; the divergence is then multiplied by T^2. Or a schedule, as "
        "for kd_ratio.",
    )
    normalize: Literal["targets", "weights"] = fixed(
        "targets",
        description="Divisor of the loss, if sources or rules give weights other than 1. targets: the number of targets of the optimizer step "
        "(with keep, of kept targets). weights: for each term the sum of the absolute values of its weights, so that a term with few "
        "targets keeps its share of the loss; with target_weights or keep, each step then needs one more forward pass.",
    )
    target_weights: TargetWeights | None = fixed(
        None,
        description="Weigh each target by a rule, in addition to the weights of its source. The rule gives a score from 0 to 1, from the models' "
        "distributions or the target's position. null: equal weights.",
    )
    keep: KeepOrShare = fixed(
        1.0,
        description="Share of each example's targets that count, above 0 and up to 1: those with the highest scores. The others are in no term, "
        "and the loss is divided by the number of those that count. Or settings, {share: 0.5, by: position}.",
    )
    features: Features | None = fixed(
        None, description="Feature distillation, a further term: the student's hidden states are trained towards the teacher's; null: none."
    )
    chunk_size: Count | None = changeable(
        None,
        description="Number of targets whose logits are computed at a time. It changes memory and speed, not the result. Default on a GPU: 2048, "
        "or down to 1024 if two tiles of logits would take more than an eighth of the memory that the models leave free. Default on a"
        " CPU: the rows of a float32 tile of 32 MiB, 128 to 4096. With train.micro_batch_tokens: auto, running out of memory halves "
        "it, down to 128.",
    )
    attention: AttentionLoss | None = fixed(None, description="Attention distillation, as a further term; null: none.")


@config_dataclass
class Optim:
    name: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = fixed(
        "adamw",
        description="adamw: torch's AdamW. The others are bitsandbytes' AdamW, with 8-bit state, with state paged to CPU memory, or with both.",
    )
    lr: float = fixed(2e-4, gt=0, le=1000, description="Peak learning rate.")
    weight_decay: float = fixed(0.0, ge=0, le=1000, description="AdamW's decoupled weight decay, on matrices only.")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = fixed(
        (0.9, 0.999), description="AdamW's decay rates."
    )
    eps: float = fixed(1e-8, gt=0, le=1000, description="AdamW's epsilon.")
    max_grad_norm: float | None = fixed(1.0, ge=1e-6, le=1e12, description="Clip the gradient to this norm; null: no clipping.")
    schedule: Literal["cosine", "linear", "constant"] = fixed("cosine", description="Shape of the learning rate after warm-up.")
    warmup_steps: Annotated[int, Field(ge=0)] | None = fixed(None, description="Steps of linear warm-up.")
    warmup_ratio: Share | None = fixed(None, description="Instead of warmup_steps: warm-up as a fraction of all steps.")
    min_lr_ratio: Share = fixed(0.0, description="Learning rate at the end of the schedule, as a fraction of lr.")


MICRO_BATCH_SIZE = 4  # if the recipe gives none


@config_dataclass
class Train:
    batch_size: Count = fixed(
        32, description="Examples per optimizer step over all processes. How they are split into micro-batches does not change the result."
    )
    micro_batch_size: Count | None = changeable(
        None,
        description="Maximum number of examples in one forward pass of one process (4 unless micro_batch_tokens is set). More is faster and takes"
        " more memory.",
    )
    micro_batch_tokens: Count | Literal["auto"] | None = changeable(
        None,
        description="Instead of micro_batch_size: maximum number of tokens in one forward pass of one process, padding included. A longer example"
        " is a micro-batch of its own. auto: as many as fit into memory, measured before the first step; on one process, running out "
        "of memory while training halves it. It changes the result only through a model's own dropout (not LoRA's), whose masks are "
        "drawn for each micro-batch.",
    )
    epochs: Count | None = fixed(None, description="Passes over the data (1 unless max_steps is set).")
    max_steps: Count | None = fixed(None, description="Instead of epochs: number of optimizer steps.")
    group_by_length: Count = fixed(
        1, description="Sort the examples of this many optimizer steps together by length, for less padding. 1: no sorting."
    )
    log_every: Count = changeable(1, description="Optimizer steps between records in metrics.jsonl.")
    shard: Shard = changeable(
        "none",
        description="How several processes hold the student. none: each holds all of it (data parallelism); full: each holds a part of every weight, of "
        "its gradient and of the optimizer's state (FSDP2). An FSDP2 config file of Accelerate sets full. The result is the same.",
    )
    timeout: float = changeable(
        600.0,
        ge=10,  # heartbeats come every second, and a late one is not a missing one
        le=7200,  # the patience of other waits (`heartbeat.PATIENT`)
        description="Seconds for which one of several processes may hang before the run ends with a line that names it. It must exceed the "
        "longest micro-batch, including compilation in the first with train.compile. Work that one process does for the others, such "
        "as loading and checkpoints, may take two hours.",
    )
    compile: bool = changeable(
        False,
        description="Compile the layers of the student and of live teachers with torch.compile: some minutes at the start, then faster steps, with the "
        "same result up to rounding. Needs a C++ compiler, and on a GPU Triton.",
    )


@config_dataclass
class ErrorRates:
    """Word and character error rates of texts that the student writes greedily."""

    normaliser: Literal["none", "basic", "english"] = fixed(
        "basic",
        description="Normalisation of both texts before they are compared. none: nothing; basic: lower case, no punctuation; english: also "
        "contractions and spelled-out numbers. basic and english are Whisper's. Rates of different normalisers are not comparable.",
    )
    limit: Count | None = fixed(None, description="Number of held-out examples, the first ones; null: all.")
    max_tokens: Count = fixed(64, description="Longest of these texts, in tokens.")


@config_dataclass
class Validation:
    every: Count | None = changeable(None, description="Steps between validations; null: only before the first step and after the last.")
    micro_batch_size: Count = changeable(8, description="Examples per forward pass.")
    compare_to_teacher: bool = fixed(
        False,
        description="Measure KL to the recipe's teacher and agreement with it even if loss.kd_ratio is 0; the teacher is then loaded for "
        "validation alone. A sweep sets this.",
    )
    samples: Annotated[int, Field(ge=0)] = changeable(
        0,
        description="Number of held-out prompts that the student answers at every validation, with the most likely tokens, into samples.jsonl of "
        "the run's folder; 0: none. It does not change the training.",
    )
    sample_tokens: Count = changeable(64, description="Longest of these answers, in tokens.")
    error_rates: ErrorRates | None = fixed(
        None,
        description="With task: text_to_text or speech_recognition: let the student write the held-out texts, and measure wer and cer; null: do "
        "not.",
    )
    teacher_check: Annotated[int, Field(ge=0)] = changeable(
        64,
        description="Number of training examples on which the teacher's CE is compared with the student's before the first step; 0: no check.",
    )


@config_dataclass
class Checkpoint:
    every: Count | None = changeable(None, description="Steps between checkpoints; null: only when a signal stops the run.")
    keep: Count = changeable(2, description="Number of checkpoints kept, the newest ones.")
    best_by: Literal["ce", "forward_kl", "reverse_kl", "top1_agreement", "accuracy", "f1", "wer", "cer"] | None = changeable(
        None,
        description="Also keep the best checkpoint by this validation metric, the earlier of equal ones; a checkpoint is then written at every "
        "validation. accuracy and f1 (macro F1) are for task: classification; wer and cer need validation.error_rates.",
    )


OF_THE_STUDENT = ("ce", "accuracy", "f1", "wer", "cer")  # values of best_by that need no teacher
HIGHER_IS_BETTER = ("top1_agreement", "accuracy", "f1")  # for the others lower is


@config_dataclass
class PushToHub:
    repo: str = changeable(description="Hub repository for the finished student: name or owner/name.")
    private: bool = changeable(True, description="Create the repository as a private one.")


@config_dataclass
class Recipe:
    """Every setting of a run, checked and immutable. `llmkd.load_recipe` reads one."""

    output_dir: str = changeable("", path="output", description="Folder for everything the run writes.")
    task: Literal["causal_lm", "classification", "text_to_text", "speech_recognition"] = fixed(
        "causal_lm",
        description="What the models predict. causal_lm: the next token of a text; classification: the class of a text, sound or image; "
        "text_to_text: an answer to a text that an encoder reads (T5, BART); speech_recognition: the transcript of a sound (Whisper).",
    )
    seed: Seed = fixed(0, description="Seed of the data's order, of new weights and of dropout.")
    student: Student = Field(default_factory=Student)
    teacher: OneOrMany[Teacher] = fixed(
        None, description="The model that the student learns from: one teacher, or a list of teachers; null: plain supervised fine-tuning."
    )
    mixture: Mixture = Field(default_factory=Mixture)
    data: Data = Field(default_factory=Data)
    loss: Loss = Field(default_factory=Loss)
    on_policy: OnPolicy | None = fixed(
        None,
        description="On-policy distillation: the student writes answers itself and learns from the teacher's distribution on them; null: it "
        "learns from the data alone.",
    )
    optim: Optim = Field(default_factory=Optim)
    train: Train = Field(default_factory=Train)
    validation: Validation = Field(default_factory=Validation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    report_to: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = changeable(
        (), description="Experiment trackers that also receive the records of metrics.jsonl."
    )
    push_to_hub: PushToHub | None = changeable(None, description="Upload the finished student to the hub; null: no upload.")


#: The settings of the loss that may be schedules.
SCHEDULED = ("kd_ratio", "temperature", "features.weight", "attention.weight")


def schedules(loss: Loss) -> dict[str, Any]:
    """{name: value} of the settings of the loss that may be schedules, without those of terms that the loss does not have."""
    sections = {"": loss, "features": loss.features, "attention": loss.attention}
    named = ((name, *name.rpartition(".")[::2]) for name in SCHEDULED)
    return {name: getattr(sections[section], last) for name, section, last in named if sections[section] is not None}


def scheduled(loss: Loss, step: int, total: int) -> dict[str, float]:
    """{name: value in step `step` of a run of `total` steps} of the settings of the loss that are schedules."""
    return {name: value_at(setting, step, total) for name, setting in schedules(loss).items() if isinstance(setting, dict)}


def at_the_middle(loss: Loss) -> Loss:
    """The loss with each schedule replaced by its value half way."""
    terms = {
        name: one and replace(one, weight=middle(one.weight)) for name, one in (("features", loss.features), ("attention", loss.attention))
    }
    return replace(loss, kd_ratio=middle(loss.kd_ratio), temperature=middle(loss.temperature), **terms)


def divergences_of(loss: Loss, data: Data) -> list[tuple[str, dict[str, float]]]:
    """(divergence, all options) of the loss, and then of each training source; a source without its own has that of the loss."""
    of_loss = loss.divergence, with_defaults(loss.divergence, loss.divergence_options)
    own = [(one.divergence, one.divergence_options) for one in as_tuple(data.train)]
    return [of_loss, *((name, with_defaults(name, options)) if name else of_loss for name, options in own)]


def distils(recipe: Recipe) -> bool:
    """Whether the student learns from a teacher."""
    return bool(as_tuple(recipe.teacher)) and bool(recipe.loss.kd_ratio or recipe.loss.features or recipe.loss.attention)


def uses_teacher(recipe: Recipe) -> bool:
    """Whether the teacher is loaded: the student learns from it, or validation compares the two. Otherwise it is not, even if the recipe names it."""
    compares = recipe.validation.compare_to_teacher and (as_tuple(recipe.data.validation) or recipe.data.validation_fraction)
    return distils(recipe) or bool(as_tuple(recipe.teacher) and compares)


def used_teachers(recipe: Recipe) -> list[tuple[str, Teacher]]:
    """The teachers that are loaded, each with the name of its setting: teacher, or teacher.0, teacher.1, ..."""
    return with_setting_names(recipe.teacher, "teacher") if uses_teacher(recipe) else []
