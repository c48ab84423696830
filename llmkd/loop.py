"""The training loop, and nothing else.

For every step: take the targets of one optimizer step, ask the teacher what it would have said at each target, ask the
student, compare the two on just those targets, and move the student. The loop yields after every step; what is due
then (logging, validation, saving, stopping) is its caller's business.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .distiller import Distiller
from .errors import NonFinite
from .order import Plan, Step, derived_seed
from .signals import Batch, Teacher


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

    `terms` are means over the step's targets, {"ce": ..., "kd": ..., "loss": ...}. A learner in `failures` met a value that is not
    finite: its weights are as they were before the step, and it takes no further ones.
    """

    step: int
    epoch: int
    targets: int
    stop: bool
    terms: dict[int, dict[str, float]] = field(default_factory=dict)
    grad_norms: dict[int, float] = field(default_factory=dict)
    failures: dict[int, NonFinite] = field(default_factory=dict)


@dataclass
class Taken:
    """What one optimizer step's forward and backward passes left, beside gradients that are `scale` times too large."""

    micro_batches: list[Batch]
    targets: int
    scale: float
    seen: dict[int, list[dict[str, Tensor]]]  # of each learner, by micro-batch: each term row by row


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
) -> Iterator[Progress]:
    """Train from step `done` + 1 to the end of the plan, or until every learner has failed.

    With several learners each sees the same batches and the same teacher signal, which is computed once; each ends as it would alone.

    ahead           goes over the steps' batches, and may make them in advance
    within_memory   called like `once`; may do the attempt again with other micro-batches, when memory runs out
    """
    active = dict(enumerate(learners))
    with contextlib.closing(ahead(batches(plan, batch_of, done, accelerator.device))) as coming:
        for step, micro_batches in coming:
            attempt = functools.partial(gradients, plan.seed, step.number, active, teacher, accelerator)
            taken = within_memory(attempt, step, micro_batches)
            norms = {k: scaled_norm(learner, 1 / taken.scale) for k, learner in active.items()}
            progress = reduce(step.number, step.epoch, taken.targets, active, taken.seen, norms, stop_asked(), accelerator)
            for k, learner in list(active.items()):
                if all(map(is_finite, (*progress.terms[k].values(), progress.grad_norms[k]))):
                    move(learner, step.number, norms[k])
                else:
                    temperature = unwrapped(learner).objective.temperature
                    progress.failures[k] = blame(progress, k, temperature, taken.micro_batches, taken.seen[k], teacher, accelerator)
                    del active[k]
            yield progress
            if not active:
                return


def batches(plan: Plan, batch_of: Callable[[list[int]], Batch], done: int, device: torch.device) -> Iterator[tuple[Step, list[Batch]]]:
    """Each step with its micro-batches, in memory that a GPU can copy from while it computes."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of the thread that runs this: or pinning would open the first GPU for every process
    for step in plan.steps(done):
        made = map(batch_of, step.micro_batches)
        yield step, [micro.pinned() for micro in made] if device.type == "cuda" else list(made)


def gradients(seed: int, step: int, active: dict[int, Learner], teacher: Teacher | None, accelerator, micro_batches: list[Batch]) -> Taken:
    """Forward and backward of every micro-batch of an optimizer step."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    targets = count_targets(micro_batches, accelerator)
    scale = 2.0 ** round(math.log2(targets))  # taken back later; a power of two is exact, and float16 keeps small gradients on their way
    seen: dict[int, list[dict[str, Tensor]]] = {k: [] for k in active}
    for i, micro in enumerate(micro_batches):
        last = i == len(micro_batches) - 1  # ranks average gradients: times their number, this is a sum again
        rows = learn(micro, active, teacher, derived_seed(seed, step, rank, i), scale * ranks / targets, accelerator, last)
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


def move(learner: Learner, step: int, norm: Tensor) -> None:
    """One step of the optimizer along the clipped gradient."""
    if learner.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(learner.parameters.values(), learner.max_grad_norm, norm)
    for group in learner.optimizer.param_groups:
        group["lr"] = learner.learning_rate(step)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)


def count_targets(micro_batches: list[Batch], accelerator) -> int:
    """The targets of the whole optimizer step: every micro-batch, every rank. At least 1."""
    count = sum(micro.targets for micro in micro_batches)
    if accelerator.num_processes > 1:
        count = int(accelerator.reduce(torch.tensor(count, device=accelerator.device), "sum"))
    return max(1, count)


def reduce(step, epoch, targets, active, seen, norms, stop: bool, accelerator) -> Progress:
    """Sum every term over micro-batches and ranks, and let all ranks hear of a stop: one all-reduce, one read from the device."""
    names = [(k, name) for k in active for name in seen[k][0]]
    sums = [sum(rows[name].double().sum() for rows in seen[k]) for k, name in names]
    packed = torch.stack([*sums, torch.tensor(float(stop), dtype=torch.float64, device=sums[0].device)])
    if accelerator.num_processes > 1:
        packed = accelerator.reduce(packed, "sum")
    values = torch.cat([packed, torch.stack(list(norms.values())).double()]).tolist()
    terms: dict[int, dict[str, float]] = {k: {} for k in active}
    for k, name in names:
        terms[k][name] = values.pop(0) / targets
    for k, learner in active.items():
        terms[k]["loss"] = unwrapped(learner).objective.mix(terms[k])
    return Progress(step, epoch, targets, values[0] > 0, terms, dict(zip(norms, values[1:], strict=True)))


def unwrapped(learner: Learner) -> Distiller:
    return getattr(learner.distiller, "module", learner.distiller)


def is_finite(value: float) -> bool:
    return value - value == 0


def blame(
    progress: Progress, k: int, temperature: float, micro_batches: list[Batch], seen: list[dict[str, Tensor]], teacher, accelerator
) -> NonFinite:
    """Which step, which term and which examples, from all ranks; of learner `k`, which compares at that temperature."""
    term = next((name for name, value in progress.terms[k].items() if not is_finite(value)), "gradient")
    examples, cause = set(), ""
    for micro, rows in zip(micro_batches, seen, strict=True):
        bad_N = (~torch.isfinite(rows[term])).nonzero().flatten().tolist() if term in rows else range(micro.targets)
        examples |= {int(micro.example_N[n]) for n in bad_N}
        if term == "kd" and bad_N and not cause:
            log_p_V = teacher(micro.to(accelerator.device)).log_probs(slice(bad_N[0], bad_N[0] + 1), temperature=temperature)[0]
            if torch.isnan(log_p_V).any():
                cause = "teacher logits"
            elif torch.isneginf(log_p_V).any() and "agreement" in teacher.figures:  # samples leave most tokens out, and mean nothing by it
                cause = "kd (the teacher rules tokens out, where this divergence is infinite; forward_kl and generalized_jsd stay finite)"
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        everyone = gather_object([(examples, cause)])
        examples, cause = set().union(*(e for e, _ in everyone)), next((c for _, c in everyone if c), "")
    return NonFinite(progress.step, cause or term, sorted(examples))
