"""The training loop, and nothing else.

For every step: take the micro-batches of one optimizer step, compute the teacher's signal at each target and the student's
outputs, compare the two at just those targets, and update the student. The loop yields after every step, so that the caller can
log, validate, save or stop.

To avoid a synchronisation with the device, the host reads whether step N was finite while step N + 1 runs. The optimizer checks
the same flag on the device, so a step that is not finite never changes the weights.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import Batch
from ..config.fields import part_of
from ..data.batch_source import BatchSource, Step
from ..errors import NonFinite
from ..models.parts import whole
from ..process import heartbeat
from ..signals import Teacher, for_students
from .distiller import Distiller
from .parallel import REPLICATED, Replicated
from .step_result import Accumulated, StepResult, TargetCounts, diagnose_nonfinite


@dataclass
class StudentState:
    """One student being trained: its module (wrapped or not), its optimizer and its learning rate by step.

    more      further tensors for its checkpoints
    strategy  how it is spread over the processes
    """

    distiller: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: dict[str, nn.Parameter]
    learning_rate: Callable[[int], float]
    max_grad_norm: float | None = None
    more: dict[str, Tensor] = field(default_factory=dict)
    strategy: Replicated = REPLICATED

    @property
    def kept(self) -> dict[str, Tensor]:
        """The tensors of its checkpoints, apart from the optimizer's state."""
        return unwrap(self).kept() | self.more


@dataclass
class Progress:
    """The result of one step. Dictionaries are keyed by the student's index, and leave out students that failed in earlier steps.

    terms       means over the step's targets, {"ce": ..., "kd": ..., ..., "loss": ...}; empty for a step whose metrics were not wanted.
                For weighted targets see `StepResult.read`
    grad_norms  before clipping
    failures    students that met a value that is not finite, in this step or the one before: that step left their weights as they
                were, and they take no further steps
    """

    step: int
    epoch: int
    num_targets: int
    stop: bool = False
    terms: dict[int, dict[str, float]] = field(default_factory=dict)
    grad_norms: dict[int, float] = field(default_factory=dict)
    failures: dict[int, NonFinite] = field(default_factory=dict)


def no_retry(attempt: Callable[[list[Batch]], Accumulated], step: Step, micro_batches: list[Batch]) -> Accumulated:
    return attempt(micro_batches)


@dataclass(frozen=True)
class StepHooks:
    """Callbacks of the loop.

    stop_asked      whether this process was asked to stop
    retry_on_oom    called like `no_retry`; may repeat the attempt with smaller micro-batches when memory runs out
    wants_metrics   whether the caller reads the metrics of a step; the host waits for the device only at those steps and the last
    """

    stop_asked: Callable[[], bool] = lambda: False
    retry_on_oom: Callable = no_retry
    wants_metrics: Callable[[int], bool] = lambda step: True


def train(
    source: BatchSource,
    students: list[StudentState],
    teacher: Teacher | None,
    accelerator,
    done: int = 0,
    hooks: StepHooks = StepHooks(),
) -> Iterator[Progress]:
    """Train from step `done` + 1 to the source's last, or until every student has failed.

    Several students see the same batches and the same teacher signal, which is computed once; each trains exactly as it would alone.
    """
    active, pending, nonfinite = dict(enumerate(students)), None, {}
    with contextlib.closing(source.steps(done)) as steps:
        for step, micro_batches in steps:
            names = {name for student in active.values() for name in unwrap(student).names}
            shares = {unwrap(student).share for student in active.values()} - {1.0}
            counts = count_targets(step, micro_batches, accelerator, sorted(names), sorted(shares))
            for student in active.values():
                unwrap(student).start_step(step.number, counts.scale)
            attempt = functools.partial(accumulate_gradients, source.seed, step, counts, active, teacher, accelerator)
            accumulated = hooks.retry_on_oom(attempt, step, micro_batches)
            norms = {k: unscale_and_norm_(student, accumulated.unscale(k)) for k, student in active.items()}
            stop = hooks.stop_asked()
            result = StepResult(step, accumulated, norms, nonfinite, stop, accelerator)
            nonfinite = result.nonfinite
            for k, student in active.items():
                optimizer_step(student, step.number, norms[k], nonfinite[k])
            progress = Progress(step.number, step.epoch, counts.targets, stop and accelerator.num_processes == 1)
            if pending:  # the step before: whether it was finite is read now, its metrics are not wanted
                read_step_metrics(pending, progress, active, teacher, accelerator)
            if progress.stop or hooks.wants_metrics(step.number) or step.number == source.total_steps:
                progress.terms, progress.grad_norms = read_step_metrics(result, progress, active, teacher, accelerator)
                result = None
            pending = result
            yield progress
            if not active:
                return


def read_step_metrics(
    result: StepResult, progress: Progress, active: dict[int, StudentState], teacher: Teacher | None, accelerator
) -> tuple[dict[int, dict[str, float]], dict[int, float]]:
    """Wait for a step's terms and gradient norms. A student whose value is not finite goes into `progress.failures` and leaves `active`."""
    terms, norms, stop = result.read(active)
    progress.stop = progress.stop or stop
    for k in terms:
        if not all(map(math.isfinite, (*terms[k].values(), norms[k]))):
            progress.failures[k] = diagnose_nonfinite(result, k, terms[k], unwrap(active[k]).explain_nonfinite, teacher, accelerator)
            del active[k]
    return terms, norms


def count_targets(
    step: Step, micro_batches: list[Batch], accelerator, names: Sequence[str] = ("ce", "kd"), shares: Sequence[float] = ()
) -> TargetCounts:
    """The number of targets of a step, over all micro-batches and ranks.

    A source that knows the numbers beforehand states them; then nothing is counted, and no rank waits for another.

    names    the parts of the loss that may be weighted
    shares   the shares of each example's targets that students keep (`loss.keep`), without 1
    """
    if step.num_targets is not None:
        return TargetCounts(max(1, step.num_targets), step.weighted, {share: step.kept(share) for share in shares})
    counts = [sum(part_of(share, one.num_targets) for micro in micro_batches for one in micro.examples) for share in shares]
    counts.append(sum(micro.num_targets for micro in micro_batches))
    for name in names:
        given = [(micro.weights.get(name), micro.num_targets) for micro in micro_batches]
        counts.append(sum(float(w_N.double().abs().sum()) if w_N is not None else n for w_N, n in given))
        counts.append(sum(int((w_N != 0).sum()) if w_N is not None else n for w_N, n in given))
        counts.append(sum(w_N is not None for w_N, _ in given))
    if accelerator.num_processes > 1:
        counts = accelerator.reduce(torch.tensor(counts, dtype=torch.float64, device=accelerator.device), "sum").tolist()
    kept, targets, counts = counts[: len(shares)], int(counts[len(shares)]), counts[len(shares) + 1 :]
    weighted = {
        name: (mass, int(carriers))
        for name, mass, carriers, given in zip(names, counts[::3], counts[1::3], counts[2::3], strict=True)
        if given
    }
    return TargetCounts(max(1, targets), weighted, dict(zip(shares, map(int, kept), strict=True)))


def accumulate_gradients(
    seed: int,
    step: Step,
    counts: TargetCounts,
    active: dict[int, StudentState],
    teacher: Teacher | None,
    accelerator,
    micro_batches: list[Batch],
) -> Accumulated:
    """Forward and backward of every micro-batch of an optimizer step."""
    for k, of_terms in measured_scales(seed, step, counts, active, teacher, accelerator, micro_batches).items():
        unwrap(active[k]).start_step(step.number, of_terms)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    num_targets = counts.targets
    scale = 2.0 ** round(math.log2(num_targets))  # keeps small float16 gradients in range; divided out later, exactly, as a power of two
    terms: dict[int, list[dict[str, Tensor]]] = {k: [] for k in active}
    weights: dict[int, list[dict[str, Tensor]]] = {k: [] for k in active}
    for i, micro in enumerate(micro_batches):
        heartbeat.at(f"step {step.number}, micro-batch {i + 1} of {len(micro_batches)}")
        last = i == len(micro_batches) - 1
        micro_seed = derived_seed(seed, step.number, rank, i)
        factor = scale * ranks / num_targets  # ranks average their gradients, so `ranks` makes the average a sum again
        found = forward_backward(micro, active, teacher, micro_seed, factor, accelerator, last)
        for k, (rows, by_rule) in found.items():
            terms[k].append(rows)
            weights[k].append(by_rule)
    combine = {k: unwrap(student).combiner() for k, student in active.items()}
    shares = {k: unwrap(student).share for k, student in active.items()}
    return Accumulated(micro_batches, counts, scale, terms, combine, weights, shares)


@torch.no_grad()
def measured_scales(
    seed: int,
    step: Step,
    counts: TargetCounts,
    active: dict[int, StudentState],
    teacher: Teacher | None,
    accelerator,
    micro_batches: list[Batch],
) -> dict[int, dict[str, float]]:
    """By student and term: the number of targets that count, over the sum of their absolute weights, in the whole step.

    Only of students whose weights depend on the models' outputs (`Distiller.measures_weights`). It costs one more forward pass of the
    teacher and of these students, with the seeds of the pass that follows.
    """
    measured = {k: unwrap(student) for k, student in active.items() if unwrap(student).measures_weights}
    masses: dict[tuple[int, str], Tensor] = {}
    for i, micro in enumerate(micro_batches if measured else ()):
        micro = micro.to(accelerator.device)
        signal = teacher(micro) if teacher else None
        for k, distiller in measured.items():
            reseed(derived_seed(seed, step.number, accelerator.process_index, i))
            for name, w_N in distiller(micro, signal).weights.items():
                masses[k, name] = masses.get((k, name), 0.0) + w_N.double().abs().sum()
    scales = {k: dict(counts.scale) for k in measured}
    for (k, name), mass in read_masses(masses, accelerator).items():
        scales[k][name] = counts.of(measured[k].share).targets / mass if mass else 1.0
    return scales


def read_masses(masses: dict[tuple[int, str], Tensor], accelerator) -> dict[tuple[int, str], float]:
    """The sums over all ranks. Waits for the device."""
    if not masses:
        return {}
    sums = torch.stack(list(masses.values()))
    sums = accelerator.reduce(sums, "sum") if accelerator.num_processes > 1 else sums
    return dict(zip(masses, sums.tolist(), strict=True))


def reseed(seed: int) -> None:
    """Seed torch, and numpy, from which speech models draw SpecAugment's masks."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def forward_backward(
    micro: Batch, active: dict[int, StudentState], teacher: Teacher | None, seed: int, factor: float, accelerator, sync: bool
) -> dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Add the gradients of one micro-batch, times `factor`. Returns each student's terms and the weights that a rule gave them, both [N] by name.

    sync   ranks exchange their gradients in this pass
    """
    micro = micro.to(accelerator.device)
    signal = for_students(teacher(micro), len(active)) if teacher else None
    found = {}
    for k, student in active.items():
        reseed(seed)
        with student.strategy.exchanging(student.distiller, accelerator, now=sync):
            loss = student.distiller(micro, signal)
            accelerator.backward(loss.total * factor)
        found[k] = loss.rows, loss.weights
    return found


def unscale_and_norm_(student: StudentState, factor: float) -> Tensor:
    """Multiply the gradients by `factor` in place, and return their norm."""
    grads = [p.grad for p in student.parameters.values() if p.grad is not None]
    torch._foreach_mul_(grads, factor)
    return whole(torch.nn.utils.get_total_norm(grads))


def optimizer_step(student: StudentState, step: int, norm: Tensor, nonfinite: Tensor) -> None:
    """Clip the gradients and take an optimizer step; skip the step if `nonfinite` is NaN."""
    if student.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(student.parameters.values(), student.max_grad_norm, norm)
    for group in student.optimizer.param_groups:
        group["lr"] = student.learning_rate(step) * group.get("lr_ratio", 1.0)
    # Oddity: private attributes of torch, made for its GradScaler. Its fused optimizers read `found_inf` on the device and skip the step.
    if getattr(student.optimizer, "_step_supports_amp_scaling", False):
        student.optimizer.found_inf = nonfinite.isnan().float()
        student.optimizer.step()
    elif not nonfinite.isnan().item():
        student.optimizer.step()
    student.optimizer.zero_grad(set_to_none=True)


def unwrap(student: StudentState) -> Distiller:
    return getattr(student.distiller, "module", student.distiller)


def derived_seed(*parts: int) -> int:
    """A seed from (seed, step, rank, micro-batch), for the random numbers of one micro-batch, such as a model's own dropout."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
