"""A plan: what a recipe's run needs and computes, found by one step of the training loop on fake tensors.

Of a deep model a few layers are run, and what each further one adds: memory and operations grow in proportion to the layers, part by part.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..batch import Batch
from ..config.on_policy import writes
from ..config.recipe import Optim, Recipe, Teacher, distils, divergences_of, used_teachers
from ..data.encoding.tokenizer import shared_vocab
from ..errors import UserError
from ..model_folder.files import loaded_dtype, rows_of
from ..models.quantization import DTYPES
from ..models.shared_weights import copy_sharing_weights
from ..signals import NO_TAPS
from ..teachers.cache.records import HiddenFormat
from ..teachers.live import LiveTeacher
from ..teachers.mixture import combine_teachers
from ..training.auto_batch import chunk_rows
from ..training.build import build_student, longest_row
from .cached import RecordsWithoutValues, format_of
from .devices import CONTEXT
from .fakes import fake_tensors
from .model_configs import ModelConfig, find_models
from .models import Depth, build_students, build_teacher, depth_of, empty_model, full_depth, layer_sizes
from .step import BACKWARD, LOSS, PARTS, TEACHER, OneProcess, Ready, watched_step
from .work import KnownData, Work, known_data, work_of

_KEPT, _RECOMPUTED, _OF_TEACHER = 4, 3, 2  # layers that are run of a deeper model
ROUND_ON_GPU = 512  # bytes: the allocator of CUDA


@dataclass(frozen=True)
class Found:
    """The configurations of a recipe's models. `teachers`: the setting and settings of each; without a configuration a cache alone is known."""

    student: ModelConfig
    teachers: list[tuple[str, Teacher, ModelConfig | None]]
    vocab: int
    data: KnownData

    def with_teachers(self, recipe: Recipe) -> "Found":
        """The same for a recipe whose teachers are the same models, perhaps held otherwise."""
        configs = {setting: config for setting, _, config in self.teachers}
        return dataclasses.replace(self, teachers=[(setting, one, configs.get(setting)) for setting, one in used_teachers(recipe)])


@dataclass(frozen=True)
class Measured:
    """What was in memory in each phase of a step, in bytes by part, and its floating-point operations.

    flops   of the teachers' passes (TEACHER), of the heads and the loss (LOSS), and of the student's body (BACKWARD)
    """

    phases: dict[str, dict[str, float]]
    flops: dict[str, float]

    @property
    def peak(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))


@dataclass(frozen=True)
class Plan:
    """What a run of a recipe on one process needs.

    parts          bytes of allocated memory at the peak, by part
    at             the phase of the step in which the peak is
    flops          of one micro-batch, the largest: see `Measured.flops`
    layer_passes   passes through a layer that one micro-batch takes: each costs time, however small it is
    dtypes         of the matrix products of student and teacher
    notes          what was assumed, and what a formula stands for
    """

    parts: dict[str, float]
    at: str
    flops: dict[str, float]
    layer_passes: int
    dtypes: dict[str, str]
    work: Work
    notes: list[str]

    @property
    def peak(self) -> float:
        return sum(self.parts.values())

    @property
    def weights(self) -> float:
        return sum(self.parts.get(name, 0.0) for name in ("student's weights", "teacher's weights", "trained"))

    @property
    def total_flops(self) -> dict[str, float] | None:
        """Of the whole run, by group; None where the data is not known. Attention is counted as in the longest micro-batch."""
        work = self.work
        if work.tokens is None:
            return None
        by_token, by_target = work.tokens / work.batch_tokens, work.targets / max(1, work.batch.num_targets)
        return {name: count * (by_target if name == LOSS else by_token) for name, count in self.flops.items()}

    def seconds(self, rate: Callable[[str], float], per_layer: float, whole: bool) -> float | None:
        """Time of the whole run, or of a step, at those operations per second. `per_layer`: the least time of a pass through a layer."""
        flops = self.total_flops
        micro_batches = self.work.micro_batches
        if flops is None:
            if whole:
                return None
            flops, micro_batches = self.flops, 1
        computing = sum(count / rate(self.dtypes["teacher" if name == TEACHER else "student"]) for name, count in flops.items())
        seconds = max(computing, per_layer * self.layer_passes * micro_batches)
        return seconds if whole or self.total_flops is None else seconds / self.work.steps


def find(recipe: Recipe, recipe_folder: Path) -> Found:
    """The recipe's models and data. UserError for what a plan does not know, with its name."""
    refuse_unplanned(recipe)
    student, teachers = find_models(recipe.student, used_teachers(recipe), recipe_folder)
    rows = {"student.model": rows_of(student.config)} | {f"{name}.model": rows_of(config.config) for name, _, config in teachers if config}
    data = known_data(recipe, student)
    known = [count for count in rows.values() if count]
    if data.tokenizer is not None:
        vocab = shared_vocab(data.tokenizer, rows)
    elif known:
        vocab = min(known)
    else:
        raise UserError("student.architecture: found no vocab_size, and no tokenizer to take it from; give either")
    if student.config.get("vocab_size") is None and "text_config" not in student.config:
        student = dataclasses.replace(student, config={"vocab_size": vocab} | student.config)
    return Found(student, teachers, vocab, data)


def refuse_unplanned(recipe: Recipe) -> None:
    divided = recipe.loss.normalize if recipe.loss.target_weights and recipe.loss.normalize == "weights" else None
    for setting, given, what in (
        ("train.shard", None if recipe.train.shard == "none" else recipe.train.shard, "sharded models"),
        *((f"{setting}.shard", one.shard if one.shard == "full" else None, "sharded models") for setting, one in used_teachers(recipe)),
        ("loss.features", recipe.loss.features, "hidden states inside the models"),
        ("loss.attention", recipe.loss.attention, "attention distillation"),
        ("student.layers", recipe.student.layers, "a student of fewer layers"),
        ("loss.keep", recipe.loss.keep, "a share of the targets"),
        ("loss.normalize", divided, "sums of weights that a rule makes"),
        ("on_policy", recipe.on_policy if writes(recipe.on_policy) else None, "a student that writes"),
        *((f"{setting}.server", one.server, "a teacher on a server") for setting, one in used_teachers(recipe)),
        *((f"{setting}.ema", one.ema, "a teacher that is an average of the student") for setting, one in used_teachers(recipe)),
    ):
        if given not in (None, 1):
            raise UserError(f"{setting}: set, and a plan does not know {what} yet; leave it out for a plan")


def plan(recipe: Recipe, found: Found, memory: float | None, gpu: bool) -> Plan:
    """The plan of a recipe.

    memory   bytes of the device, which choose the head's chunks as a run does; None for plenty
    gpu      as on a GPU, or as on a CPU
    """
    work = work_of(found.data, recipe)
    measured = largest = measure(recipe, found, work.batch, work.later is not None and _alike(work), memory, gpu)
    if work.later is not None and not _alike(work):
        later = measure(recipe, found, work.later, True, memory, gpu)
        largest = max(measured, later, key=lambda one: sum(one.phases[one.peak].values()))
    at = largest.peak
    parts = {name: largest.phases[at][name] for name in PARTS if largest.phases[at].get(name, 0) > 0}
    student, live = recipe.student, [config for _, one, config in found.teachers if one.cache is None]
    layers = (
        depth_of(found.student.config, "student.model") * 3
        + full_depth(found.student.config, student.gradient_checkpointing, "student.model").recomputed
    )
    layers += sum(depth_of(config.config, "teacher.model") for config in live) if distils(recipe) else 0
    dtype = "bfloat16" if student.mixed_precision == "bf16" else loaded_dtype(found.student.config, student.dtype)
    of_teacher = next((loaded_dtype(config.config, one.dtype) for _, one, config in found.teachers if config), dtype)
    return Plan(parts, at, measured.flops, layers, {"student": dtype, "teacher": of_teacher}, work, list(_notes(recipe, found, gpu)))


def _alike(work: Work) -> bool:
    """Whether a micro-batch as large as the largest comes after others in its step."""
    one, other = work.batch, work.later
    same = one.student.inputs["input_ids"].shape == other.student.inputs["input_ids"].shape
    return same and one.num_targets == other.num_targets


def _notes(recipe: Recipe, found: Found, gpu: bool) -> Iterator[str]:
    if found.data.assumed:
        yield found.data.assumed
    for name, config in (("student.model", found.student), *((f"{name}.model", config) for name, _, config in found.teachers if config)):
        if config.origin:
            yield f"{name}: from {config.origin}"
    if recipe.train.micro_batch_tokens == "auto":
        yield "train.micro_batch_tokens: auto takes the memory that is left; planned is the least, micro-batches of one example"
    if recipe.student.quantization or any(one.loaded_in for _, one, _ in found.teachers):
        yield "by formula: what bitsandbytes holds of a quantised matrix, and makes for a product with it"
    if recipe.optim.name != "adamw":
        yield f"by formula: the state of {recipe.optim.name}"
    if recipe.train.compile:
        yield "train.compile: planned as not compiled, which holds more activations"
    if any(one.device for _, one, _ in found.teachers):
        yield "teacher.device: its weights are on another device; of an offloaded teacher two layers are here, by formula"
    if gpu:
        yield "by formula: what FlashAttention and the Triton kernel of the loss hold; both are taken to run on the GPU"


def measure(recipe: Recipe, found: Found, batch: Batch, gradients: bool, memory: float | None, gpu: bool) -> Measured:
    """A step of one micro-batch at the models' full depth, extended from fewer layers where they are deep and all alike.

    gradients   whether those of micro-batches before it are there
    """
    whole = full_depth(found.student.config, recipe.student.gradient_checkpointing, "student.model")
    live = [(f"{name}.model", config) for name, one, config in found.teachers if one.cache is None]
    full = (whole.layers - whole.recomputed, whole.recomputed, *(depth_of(config.config, name) for name, config in live))
    few = tuple(min(have, most) for have, most in zip(full, (_KEPT, _RECOMPUTED, *[_OF_TEACHER] * len(live)), strict=True))
    configs = [("student.model", found.student), *live]
    alike = [len(set(layer_sizes(config.config, name))) == 1 for name, config in configs]
    few = tuple(n if same else have for n, have, same in zip(few, full, [alike[0], *alike], strict=True))
    once = lambda counts: _measure(recipe, found, batch, gradients, counts, memory, gpu)  # noqa: E731
    if sum(full) <= sum(few) + 1:
        return once(full)
    return extended(few, full, once)


def extended(few: Sequence[int], full: Sequence[int], measured: Callable[[Sequence[int]], Measured]) -> Measured:
    """What `measured` would find at the counts `full`, from its values at `few` and at one more of each count that differs."""
    base = measured(few)
    phases = {name: Counter(parts) for name, parts in base.phases.items()}
    flops = Counter(base.flops)
    for n, (have, wanted) in enumerate(zip(few, full, strict=True)):
        if have == wanted:
            continue
        more = measured([count + (i == n) for i, count in enumerate(few)])
        for name, parts in phases.items():
            if name in more.phases:
                for part in base.phases[name].keys() | more.phases[name].keys():
                    parts[part] += (wanted - have) * (more.phases[name].get(part, 0) - base.phases[name].get(part, 0))
        for name in base.flops:
            flops[name] += (wanted - have) * (more.flops[name] - base.flops[name])
    return Measured({name: dict(parts) for name, parts in phases.items()}, dict(flops))


def _measure(
    recipe: Recipe, found: Found, batch: Batch, gradients: bool, counts: Sequence[int], memory: float | None, gpu: bool
) -> Measured:
    depth, of_teachers = Depth(counts[0] + counts[1], counts[1]), list(counts[2:])
    with fake_tensors(gpu):
        ready = build(recipe, found, depth, of_teachers, memory, gpu)
        phases = watched_step(ready, batch, gradients, round_to=ROUND_ON_GPU if gpu else 1)
        parameters = [p for state in ready.students for p in state.parameters.values()]
        state = [x for one in ready.students for held in one.optimizer.state.values() for x in held.values()]
        less = sum(x.nbytes for x in state if isinstance(x, torch.Tensor)) - state_bytes(recipe.optim, parameters, gpu)
    found_phases: dict[str, dict[str, float]] = {}
    flops: Counter = Counter()
    for name, phase in phases.items():
        flops[name if name in (TEACHER, LOSS) else BACKWARD] += phase.flops
        corner = _corner(name, depth)
        if corner and (corner not in found_phases or sum(found_phases[corner].values()) < phase.peak):
            found_phases[corner] = dict(phase.parts)
    if recipe.optim.name != "adamw":
        for parts in found_phases.values():
            parts["optimizer"] = parts.get("optimizer", 0) - less
    if TEACHER in found_phases:
        _add_offloaded(found_phases[TEACHER], found, recipe)
    return Measured(found_phases, dict(flops))


def _corner(name: str, depth: Depth) -> str | None:
    """The name of a phase that has the same meaning at any depth. None for a layer in the middle of many: memory rises or falls from one layer
    to the next throughout the recomputed ones, and throughout the others, so that its peak is at an end of either."""
    if not name.startswith(f"{BACKWARD} "):
        return name
    layer = int(name.removeprefix(f"{BACKWARD} "))
    if layer < 2:
        return f"{BACKWARD}, layer {layer}"
    ends = {depth.layers - 2: "last but one", depth.recomputed: "last kept", depth.recomputed - 1: "first recomputed"}
    return f"{BACKWARD}, {ends[layer]}" if layer in ends else None


def state_bytes(optim: Optim, parameters: Sequence[nn.Parameter], gpu: bool) -> float:
    """Two moments of every parameter. bitsandbytes: a byte each and a float32 for 256 of them, but float32 below 4,096 elements; paged state is
    in CPU memory, where a GPU's is wanting."""
    if optim.name.startswith("paged") and gpu:
        return 0.0
    eight = optim.name.endswith("8bit")
    return float(sum(2 * (p.numel() + 4 * -(-p.numel() // 256) if eight and p.numel() >= 4096 else 4 * p.numel()) for p in parameters))


def _add_offloaded(parts: dict[str, float], found: Found, recipe: Recipe) -> None:
    """An offloaded teacher's layers come to the device one after the other; the next one's copy begins before the last one's memory is free."""
    for name, one, config in found.teachers:
        if one.cache is None and one.device == "offload":
            size = max(layer_sizes(config.config, f"{name}.model"), default=0) * DTYPES[loaded_dtype(config.config, one.dtype)].itemsize
            parts[TEACHER] = parts.get(TEACHER, 0) + 2 * size


def build(recipe: Recipe, found: Found, depth: Depth, of_teachers: list[int], memory: float | None, gpu: bool) -> Ready:
    """Students and teacher without values, in a fake mode: as `training.build.build_setup` makes them."""
    packing = recipe.data.packing * longest_row(recipe.train, recipe.data)
    teachers, models, elsewhere, base = [], [], set(), None
    learn = distils(recipe)
    for setting, one, config in found.teachers:
        if one.cache is not None:
            format = format_of(one, setting, found.vocab, config)
            if isinstance(format, HiddenFormat):
                models.append(format.head.on("cpu").project)
            teachers.append(RecordsWithoutValues(format, "cpu"))
            continue
        layers, shared = of_teachers.pop(0), None
        if base is None and _shares(recipe, found.student, one, config) and layers == depth.layers:
            base = empty_model(found.student.config, "student.model", one.dtype, one.attention, layers)
            shared = copy_sharing_weights(base)
        model = build_teacher(one, config, setting, found.vocab, layers, packing, shared)
        if one.device:
            elsewhere.add(id(model))
        models.append(model)
        teachers.append(LiveTeacher(model, NO_TAPS))
    students = build_students([recipe.student], [found.student], found.vocab, depth, packing, base)
    chunk = None
    if gpu:
        held = sum(p.nbytes for model in (*students, *models) if id(model) not in elsewhere for p in model.parameters())
        chunk = chunk_rows(found.vocab, 0.9 * (memory - CONTEXT - held) if memory else 1e15)
    optim = dataclasses.replace(recipe.optim, name="adamw")
    given = work_steps(recipe), OneProcess("cpu"), chunk, (), divergences_of(recipe.loss, recipe.data)
    states = [build_student(recipe.loss, optim, one, *given) for one in students]
    settings = [one for _, one, _ in found.teachers]
    teacher = combine_teachers(teachers, settings, recipe.mixture) if teachers and learn else None
    return Ready(states, teacher, students, models, frozenset(elsewhere))


def work_steps(recipe: Recipe) -> int:
    """Steps enough for every schedule: which step it is changes no shape."""
    return recipe.train.max_steps or 1_000_000


def _shares(recipe: Recipe, student: ModelConfig, teacher: Teacher, config: ModelConfig) -> bool:
    """Whether teacher and student hold one base in memory once: in the same form. Of two forms a run also shares the tensors that are equal."""
    mine, same = recipe.student, student.base == config.base
    form = (loaded_dtype(student.config, mine.dtype), mine.attention, mine.quantization)
    theirs = (loaded_dtype(config.config, teacher.dtype), teacher.attention, teacher.quantization)
    return same and form == theirs and mine.method == "lora" and teacher.share_base and not teacher.device and not teacher.is_transformed
