"""The training loop, and nothing else.

For every step: take the targets of one optimizer step, ask the teacher what it would have said at each target, ask the
student, compare the two on just those targets, and move the student. The loop yields after every step; what is due
then (logging, validation, saving, stopping) is its caller's business.

The host never waits for the device but where it is asked what a step did. Whether a step failed it hears one step later, when
the device is busy with the next; the optimizer has heard it on the device, and has moved nothing since.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..data.batching import Plan, Step
from ..errors import NonFinite
from ..signals import Teacher
from .distiller import Distiller
from .step_result import Outcome, Taken, blame, is_finite


@dataclass
class Learner:
    """One student being trained: its module (wrapped or not), its optimizer and its learning rate by step."""

    distiller: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    learning_rate: Callable[[int], float]
    max_grad_norm: float | None = None


@dataclass
class Progress:
    """What a step did, by the learners' numbers; those that failed earlier are no longer in it.

    `terms` are means over the step's targets, {"ce": ..., "kd": ..., "loss": ...}; empty where nobody asked. A learner in `failures`
    met a value that is not finite, in this step or the one before: its weights are as they were before that, and it takes no
    further steps.
    """

    step: int
    epoch: int
    targets: int
    stop: bool = False
    terms: dict[int, dict[str, float]] = field(default_factory=dict)
    grad_norms: dict[int, float] = field(default_factory=dict)
    failures: dict[int, NonFinite] = field(default_factory=dict)


def once(attempt: Callable[[list[Batch]], Taken], step: Step, micro_batches: list[Batch]) -> Taken:
    return attempt(micro_batches)


def train(
    plan: Plan,
    batch_of: Callable[[list[int]], Batch],
    learners: list[Learner],
    teacher: Teacher | None,
    accelerator,
    done: int = 0,
    stop_asked: Callable[[], bool] = lambda: False,
    ahead: Callable[[Iterator], Iterator] = iter,
    within_memory: Callable = once,
    asked: Callable[[int], bool] = lambda step: True,
) -> Iterator[Progress]:
    """Train from step `done` + 1 to the end of the plan, or until every learner has failed.

    With several learners each sees the same batches and the same teacher signal, which is computed once; each ends as it would alone.

    ahead           goes over the steps' batches, and may make them in advance
    within_memory   called like `once`; may do the attempt again with other micro-batches, when memory runs out
    asked           of which steps the caller wants to know what they did: those alone are waited for, and the last
    """
    active, late, taint = dict(enumerate(learners)), None, {}
    with contextlib.closing(ahead(batches(plan, batch_of, done, accelerator.device))) as coming:
        for step, micro_batches in coming:
            attempt = functools.partial(gradients, plan.seed, step, active, teacher, accelerator)
            taken = within_memory(attempt, step, micro_batches)
            norms = {k: scaled_norm(learner, 1 / taken.scale) for k, learner in active.items()}
            stop = stop_asked()
            outcome = Outcome(step, taken, norms, taint, stop, accelerator)
            taint = outcome.taint
            for k, learner in active.items():
                move(learner, step.number, norms[k], taint[k])
            progress = Progress(step.number, step.epoch, taken.targets, stop and accelerator.num_processes == 1)
            if late:
                hear(late, progress, active, teacher, accelerator)
            if progress.stop or asked(step.number) or step.number == plan.total_steps:
                progress.terms, progress.grad_norms = hear(outcome, progress, active, teacher, accelerator)
                outcome = None
            late = outcome
            yield progress
            if not active:
                return


def hear(outcome: Outcome, progress: Progress, active: dict[int, Learner], teacher, accelerator) -> tuple[dict, dict]:
    """Read it; learners that failed then are active no longer. Terms and norms."""
    objectives = {k: unwrapped(learner).objective for k, learner in active.items()}
    terms, norms, stop = outcome.read(objectives)
    progress.stop = progress.stop or stop
    for k in terms:
        if not all(map(is_finite, (*terms[k].values(), norms[k]))):
            progress.failures[k] = blame(outcome, k, terms[k], objectives[k].temperature, teacher, accelerator)
            del active[k]
    return terms, norms


def batches(plan: Plan, batch_of: Callable[[list[int]], Batch], done: int, device: torch.device) -> Iterator[tuple[Step, list[Batch]]]:
    """Each step with its micro-batches, in memory that a GPU can copy from while it computes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of the thread that runs this: or pinning would open the first GPU for every process
    for step in plan.steps(done):
        made = map(batch_of, step.micro_batches)
        yield step, [micro.pinned() for micro in made] if device.type == "cuda" else list(made)


def gradients(seed: int, step: Step, active: dict[int, Learner], teacher: Teacher | None, accelerator, micro_batches: list[Batch]) -> Taken:
    """Forward and backward of every micro-batch of an optimizer step."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    targets = max(1, step.targets)
    scale = 2.0 ** round(math.log2(targets))  # taken back later; a power of two is exact, and float16 keeps small gradients on their way
    seen: dict[int, list[dict[str, Tensor]]] = {k: [] for k in active}
    for i, micro in enumerate(micro_batches):
        last = i == len(micro_batches) - 1  # ranks average gradients: times their number, this is a sum again
        rows = learn(micro, active, teacher, derived_seed(seed, step.number, rank, i), scale * ranks / targets, accelerator, last)
        for k in active:
            seen[k].append(rows[k])
    return Taken(micro_batches, targets, scale, seen)


def learn(
    micro: Batch, active: dict[int, Learner], teacher: Teacher | None, seed: int, factor: float, accelerator, sync: bool
) -> dict[int, dict[str, Tensor]]:
    """Add the gradients of one micro-batch, `factor` times; each learner's terms row by row. `sync`: ranks then exchange them."""
    micro = micro.to(accelerator.device)
    signal, rows = teacher(micro) if teacher else None, {}
    for k, learner in active.items():
        torch.manual_seed(seed)
        with contextlib.nullcontext() if sync else accelerator.no_sync(learner.distiller):
            loss = learner.distiller(micro, signal)
            accelerator.backward(loss.total * factor)
        rows[k] = loss.rows
    return rows


def scaled_norm(learner: Learner, factor: float) -> Tensor:
    """Scale the gradients in place, and give their norm."""
    grads = [p.grad for p in learner.parameters.values() if p.grad is not None]
    torch._foreach_mul_(grads, factor)
    return torch.nn.utils.get_total_norm(grads)


def move(learner: Learner, step: int, norm: Tensor, taint: Tensor) -> None:
    """One step of the optimizer along the clipped gradient; none if `taint` is NaN."""
    if learner.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(learner.parameters.values(), learner.max_grad_norm, norm)
    for group in learner.optimizer.param_groups:
        group["lr"] = learner.learning_rate(step)
    if getattr(learner.optimizer, "_step_supports_amp_scaling", False):  # torch's fused ones look at it on the device
        learner.optimizer.found_inf = taint.isnan().float()
        learner.optimizer.step()
    elif not taint.isnan().item():
        learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)


def unwrapped(learner: Learner) -> Distiller:
    return getattr(learner.distiller, "module", learner.distiller)


def derived_seed(*parts: int) -> int:
    """A seed for everything random in one micro-batch, from (seed, step, rank, micro-batch)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
