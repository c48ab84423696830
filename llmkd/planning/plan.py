"""A plan: the memory and operations of a recipe's run, found by one step of the training loop on fake tensors."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..config.on_policy import writes
from ..config.recipe import LayerChoice, Recipe, distils
from ..config.sharding import sharded_student
from ..model_folder.files import loaded_dtype
from ..models.quantization import DTYPES
from .find import Found
from .measure import measure
from .model_configs import transformers_config
from .models import depth_of, full_depth
from .step import INPUTS, LOSS, PARTS, TEACHER, WRITING
from .work import Work, work_of
from .writing import Writing, writing_of


@dataclass(frozen=True)
class Plan:
    """The needs of a run, for each process.

    parts          bytes of allocated memory at the peak, by part
    at             the phase of the step with the peak
    flops          operations of the largest micro-batch, see `Measured.flops`
    layer_passes   passes through a layer for one micro-batch: each takes time, however small the micro-batch
    dtypes         of the matrix products of student and teacher
    work           of all processes together; `work.batch` is the largest micro-batch of one
    notes          the assumptions, and the numbers that come from formulas
    ranks          the number of processes
    writing        the answers that are written during training; their time is not in `seconds`
    """

    parts: dict[str, float]
    at: str
    flops: dict[str, float]
    layer_passes: int
    dtypes: dict[str, str]
    work: Work
    notes: list[str]
    ranks: int = 1
    writing: Writing | None = None

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def weights(self) -> float:
        return sum(self.parts.get(name, 0.0) for name in ("student's weights", "teacher's weights", "trained"))

    @property
    def total_flops(self) -> dict[str, float] | None:
        """Operations of the whole run, by group; None if the data is unknown. Attention is counted as in the longest micro-batch."""
        work = self.work
        if work.tokens is None:
            return None
        by_token, by_target = work.tokens / work.cost, work.targets / max(1, work.batch.num_targets)
        return {name: count * (by_target if name == LOSS else by_token) for name, count in self.flops.items()}

    def seconds(self, rate: Callable[[str], float], per_layer: float, whole: bool) -> float | None:
        """Seconds of the whole run (`whole`) or of a step; None for a run on unknown data.

        rate        operations per second of each process, by dtype
        per_layer   the least seconds of a pass through a layer
        """
        if self.total_flops is None:
            return None if whole else self.seconds_of_micro_batch(rate, per_layer)
        seconds = max(self._computing(self.total_flops, rate), per_layer * self.layer_passes * self.work.micro_batches) / self.ranks
        return seconds if whole else seconds / self.work.steps

    def seconds_of_micro_batch(self, rate: Callable[[str], float], per_layer: float) -> float:
        """Seconds of the largest micro-batch, with an optimizer step."""
        return max(self._computing(self.flops, rate), per_layer * self.layer_passes)

    def _computing(self, flops: dict[str, float], rate: Callable[[str], float]) -> float:
        return sum(count / rate(self.dtypes["teacher" if name == TEACHER else "student"]) for name, count in flops.items())


def plan(recipes: Sequence[Recipe], found: Found, memory: float | None, gpu: bool, ranks: int = 1) -> Plan:
    """The plan of a recipe, or of several whose students train side by side with the first one's teacher.

    memory   bytes of the device, on which the head's chunks depend as in a run; None: enough
    gpu      whether the device is a GPU
    ranks    the number of processes, each with such a device; the plan is for the one with the largest micro-batch
    """
    recipe = recipes[0]
    work = work_of(found.data, recipe, ranks)
    measured = [measure(recipes, found, batch, gradients, memory, gpu, ranks) for batch, gradients in work.cases]
    largest = max(measured, key=lambda one: sum(one.phases[one.peak].values()))
    at = largest.peak
    parts = {name: largest.phases[at][name] for name in PARTS if largest.phases[at].get(name, 0) > 0}
    if not gpu and INPUTS in parts:  # with all micro-batches of the step, and those of the next, which is prefetched
        parts[INPUTS] *= 2 * work.in_step
    student = recipe.student
    layers = len(recipes) * (
        depth_of(found.student.config, "student.model") * 3
        + full_depth(found.student.config, student.recomputed, "student.model").recomputed
    )
    teachers = [*((config, f"{name}.model") for name, _, config in found.live), *[(found.student, "student.model")] * len(found.averages)]
    layers += sum(depth_of(config.config, name) for config, name in teachers) if any(map(distils, recipes)) else 0
    dtype = "bfloat16" if student.mixed_precision == "bf16" else loaded_dtype(found.student.config, student.dtype)
    of_teacher = next((loaded_dtype(config.config, one.dtype) for _, one, config in found.teachers if config), dtype)
    notes = list(_notes(recipe, found, gpu, ranks))
    if gpu and student.gradient_checkpointing == "offload":
        notes.append(
            f"student.gradient_checkpointing: {in_host_memory(recipe, found, work.batch_tokens) / 1e9:.2g} GB are kept in the host's memory, by formula"
        )
    if gpu and largest.kept:
        notes.append(f"student.keep_encoded: {largest.kept / 1e9:.2g} GB of states are kept in the host's memory")
    writing = writing_of(recipe.on_policy, recipe.train, found.data.examples, ranks)
    if writing:
        parameters = sum(
            parts.get(name, 0) for name in ("student's weights", "trained", *(["teacher's weights"] if writing.models > 1 else []))
        )
        writing = dataclasses.replace(writing, weights=parameters, layers=depth_of(found.student.config, "student.model"))
        writing = dataclasses.replace(writing, peak=max(sum(one.phases[WRITING].values()) for one in measured))
    return Plan(parts, at, measured[0].flops, layers, {"student": dtype, "teacher": of_teacher}, work, notes, ranks, writing)


def in_host_memory(recipe: Recipe, found: Found, tokens: int) -> int:
    """Bytes of the inputs of recomputed layers, [tokens, width] each, in the dtype of the weights."""
    config = found.student.config
    width = transformers_config(config, "student.model").get_text_config().hidden_size
    layers = full_depth(config, recipe.student.recomputed, "student.model").recomputed
    return layers * tokens * width * DTYPES[loaded_dtype(config, recipe.student.dtype)].itemsize


def _notes(recipe: Recipe, found: Found, gpu: bool, ranks: int) -> Iterator[str]:
    if found.data.assumed:
        yield found.data.assumed
    for name, config in (("student.model", found.student), *((f"{name}.model", config) for name, _, config in found.teachers if config)):
        if config.origin:
            yield f"{name}: from {config.origin}"
    if recipe.train.micro_batch_tokens == "auto":
        yield "train.micro_batch_tokens: auto uses the memory that is left; this plan is for the least, micro-batches of one example"
    if recipe.student.quantization or any(one.loaded_in for _, one, _ in found.teachers):
        yield "by formula: bitsandbytes' memory for quantised matrices and their products"
    if recipe.optim.name != "adamw":
        yield f"by formula: the state of {recipe.optim.name}"
    if writes(recipe.on_policy):
        if recipe.on_policy.engine != "local":
            yield "on_policy.engine: the server's time is not known"
        if recipe.on_policy.long_horizon:
            yield "on_policy.long_horizon: its term, which computes both heads once more, is not in the plan"
    if recipe.train.compile:
        yield "train.compile: this plan is without it, which needs more activations"
    if recipe.loss.features or recipe.loss.attention:
        yield "loss.features, loss.attention: every layer is run; the computation of maps before the first step is not in the plan"
    if isinstance(recipe.student.layers, LayerChoice) and recipe.student.layers.by != "even":
        yield "student.layers: the run measures which ones to keep; the plan has equally many others"
    if any(one.device for _, one, _ in found.teachers):
        yield "teacher.device: its weights are on another device; two layers of an offloaded teacher are on this one, by formula"
    if ranks > 1 and not sharded_student(recipe.train):
        yield "by formula: DDP's buckets, which are as large as the gradients"
    if gpu:
        yield "by formula: the memory of FlashAttention and of the loss's Triton kernel, which are assumed to run on the GPU"
