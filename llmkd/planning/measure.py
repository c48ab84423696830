"""Measures a step of a recipe on fake tensors: memory by phase and part, and operations.

For a deep model only a few layers are run, and one more, to see what each layer adds: memory and operations grow linearly with the number of
layers, part by part.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from ..batch import Batch
from ..config.recipe import Optim, Recipe
from ..errors import UserError
from ..model_folder.files import loaded_dtype
from ..models.quantization import DTYPES
from .build import build
from .fakes import fake_tensors
from .find import Found
from .live_memory import Phase
from .models import Depth, depth_of, full_depth, layer_sizes
from .ranks import fake_ranks
from .step import BACKWARD, BUCKETS, LOSS, STATES, TEACHER, WRITING, Ready, watched_step
from .work import KnownData
from .writing import watched_writing, writing_of

_KEPT, _RECOMPUTED, _OF_TEACHER = 4, 3, 2  # layers that are run, of a deeper model
ROUND_ON_GPU = 512  # bytes: the allocator of CUDA


@dataclass(frozen=True)
class Measured:
    """The peak memory of each phase of a step, in bytes by part, and the step's floating-point operations.

    flops   of the teachers' passes (TEACHER), the heads and the loss (LOSS), and the student's body (BACKWARD)
    kept    bytes of encoder states in the host's memory, of examples that are not in the micro-batch
    """

    phases: dict[str, dict[str, float]]
    flops: dict[str, float]
    kept: int = 0

    @property
    def peak(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))


def measure(
    recipes: Sequence[Recipe], found: Found, batch: Batch, gradients: bool, memory: float | None, gpu: bool, ranks: int = 1
) -> Measured:
    """A step of one micro-batch at the models' full depth; it is extrapolated from few layers if a model is deep and its layers are alike.

    gradients   whether gradients of earlier micro-batches are in memory
    memory      bytes of the device, for the head's chunks; None: enough
    ranks       the number of processes, which hold the models as the recipe says; the memory of the first is measured
    """
    recipe = recipes[0]
    if found.whole:
        return _measure(recipes, found, batch, gradients, None, memory, gpu, ranks)
    whole = full_depth(found.student.config, recipe.student.recomputed, "student.model")
    live = [(f"{name}.model", config) for name, _, config in found.live]
    full = (whole.layers - whole.recomputed, whole.recomputed, *(depth_of(config.config, name) for name, config in live))
    few = tuple(min(have, most) for have, most in zip(full, (_KEPT, _RECOMPUTED, *[_OF_TEACHER] * len(live)), strict=True))
    configs = [("student.model", found.student), *live]
    alike = [len(set(layer_sizes(config.config, name))) == 1 for name, config in configs]
    few = tuple(n if same else have for n, have, same in zip(few, full, [alike[0], *alike], strict=True))

    def once(counts: Sequence[int]) -> Measured:
        return _measure(recipes, found, batch, gradients, counts, memory, gpu, ranks)

    if sum(full) <= sum(few) + 1 or any(one.loss.features or one.loss.attention for one in recipes):  # these name layers
        return once(full)
    return extended(few, full, once)


def extended(few: Sequence[int], full: Sequence[int], measured: Callable[[Sequence[int]], Measured]) -> Measured:
    """The result of `measured` at the counts `full`, extrapolated from its results at `few` and with one more of each count that differs."""
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
    recipes: Sequence[Recipe],
    found: Found,
    batch: Batch,
    gradients: bool,
    counts: Sequence[int] | None,
    memory: float | None,
    gpu: bool,
    ranks: int,
) -> Measured:
    depth, of_teachers = (Depth(counts[0] + counts[1], counts[1]), list(counts[2:])) if counts else (Depth(None), [None] * len(found.live))
    recipe = recipes[0]
    with fake_ranks(ranks) as accelerator, fake_tensors(gpu):
        ready = build(recipes, found, depth, of_teachers, memory, gpu, accelerator)
        inputs = []
        if found.whole:
            batch = _without_values(batch)
            inputs = [x for view in (batch.student, batch.teacher, *batch.of_teachers.values()) for x in view.inputs.values()]
        try:
            phases = watched_step(ready, batch, gradients, accelerator, ROUND_ON_GPU if gpu else 1, inputs=inputs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UserError(
                f"student.model: a step with {found.student.config.get('model_type')} reads values ({error}), which a plan does not have; "
                "llmkd train --train.max_steps 2 shows speed and memory"
            ) from error
        if ranks > 1:
            _add_buckets(phases, ready)
        if writing := writing_of(recipe.on_policy, recipe.train, found.data.examples, ranks):
            phases[WRITING] = watched_writing(ready, writing, recipe.on_policy, ROUND_ON_GPU if gpu else 1)
        less, kept = _less_than_adamw(ready, recipe.optim, gpu), _kept_states(ready, recipe, found.data)
    found_phases: dict[str, dict[str, float]] = {}
    flops: Counter = Counter()
    for name, phase in phases.items():
        flops[name if name in (TEACHER, LOSS) else BACKWARD] += phase.flops
        corner = _corner(name, depth)
        if corner and (corner not in found_phases or sum(found_phases[corner].values()) < phase.peak):
            found_phases[corner] = dict(phase.parts)
    for parts in found_phases.values() if kept and not gpu else ():
        parts[STATES] = kept
    for parts in found_phases.values() if less else ():
        parts["optimizer"] = parts.get("optimizer", 0) - less
    if TEACHER in found_phases:
        _add_offloaded(found_phases[TEACHER], found, recipe)
    return Measured(found_phases, dict(flops), kept)


def _without_values(batch: Batch) -> Batch:
    """The batch with fake tensors, each made once, so that the models' inputs are counted as such."""
    made: dict[int, torch.Tensor] = {}
    return batch.each(lambda x: made.setdefault(id(x), torch.empty_like(x)))


def _kept_states(ready: Ready, recipe: Recipe, data: KnownData) -> int:
    """Bytes of the states that `student.keep_encoded` keeps after an epoch, without those of this micro-batch, which are counted already."""
    states = recipe.student.keep_encoded and ready.student_models[0].states
    if not states:
        return 0
    have, size = list(states.kept.values()), recipe.student.keep_encoded
    return have[0].nbytes * max(0, (min(size, len(data.examples)) if data.complete else size) - len(have))


def _add_buckets(phases: dict[str, Phase], ready: Ready) -> None:
    """Add DDP's buckets, which hold a copy of all gradients."""
    whole = [state for state in ready.students if state.strategy.alone]
    size = sum(p.nbytes for state in whole for p in state.parameters.values())
    for phase in phases.values() if size else ():
        phase.peak += size
        phase.parts[BUCKETS] = size


def _corner(name: str, depth: Depth) -> str | None:
    """A name of a phase with the same meaning at any depth; None for a layer in the middle. Memory rises or falls steadily through the recomputed
    layers, and through the others, so that the peak is at an end of one of these groups."""
    if not name.startswith(f"{BACKWARD} "):
        return name
    layer = int(name.removeprefix(f"{BACKWARD} "))
    if layer < 2:
        return f"{BACKWARD}, layer {layer}"
    ends = {depth.layers - 2: "last but one", depth.recomputed: "last kept", depth.recomputed - 1: "first recomputed"}
    return f"{BACKWARD}, {ends[layer]}" if layer in ends else None


def _less_than_adamw(ready: Ready, optim: Optim, gpu: bool) -> float:
    """Bytes by which the optimizer's state is smaller than that of AdamW, which a plan runs in place of every optimizer."""
    if optim.name == "adamw":
        return 0.0
    parameters = [p for one in ready.students for p in one.parameters.values()]
    state = [x for one in ready.students for held in one.optimizer.state.values() for x in held.values()]
    return sum(x.nbytes for x in state if isinstance(x, torch.Tensor)) - state_bytes(optim, parameters, gpu)


def state_bytes(optim: Optim, parameters: Sequence[nn.Parameter], gpu: bool) -> float:
    """Bytes of an optimizer's state: two moments of every parameter. bitsandbytes' 8-bit ones have a byte each and a float32 for every 256, but
    float32 for tensors below 4,096 elements; on a GPU, paged state counts as 0, since it can move to CPU memory."""
    if optim.name.startswith("paged") and gpu:
        return 0.0
    eight = optim.name.endswith("8bit")
    return float(sum(2 * (p.numel() + 4 * -(-p.numel() // 256) if eight and p.numel() >= 4096 else 4 * p.numel()) for p in parameters))


def _add_offloaded(parts: dict[str, float], found: Found, recipe: Recipe) -> None:
    """Add two layers of an offloaded teacher: they are copied to the device one by one, and the next copy begins before the last one is freed."""
    for name, one, config in found.live:
        if one.device == "offload":
            size = max(layer_sizes(config.config, f"{name}.model"), default=0) * DTYPES[loaded_dtype(config.config, one.dtype)].itemsize
            parts[TEACHER] = parts.get(TEACHER, 0) + 2 * size
