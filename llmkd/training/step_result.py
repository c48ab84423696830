"""The result of an optimizer step: sums that stay on the device until they are read, and the cause of a value that is not finite."""

import math
from collections.abc import Callable, Container
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..batch import Batch
from ..data.batch_source import Step
from ..errors import NonFinite
from ..signals import Signal, Teacher


@dataclass(frozen=True)
class TargetCounts:
    """The targets of an optimizer step, over all micro-batches and ranks.

    targets    their number, at least 1: the loss is divided by it
    weighted   for each part of the loss whose targets are weighted: the sum of the absolute weights, and the number of weights that are not 0
    kept       by the share of each example's targets that is kept: the number of targets that count
    whole      where `targets` are those that are kept, the number of all; else None
    """

    targets: int
    weighted: dict[str, tuple[float, int]] = field(default_factory=dict)
    kept: dict[float, int] = field(default_factory=dict)
    whole: int | None = None

    def of(self, share: float) -> "TargetCounts":
        """The targets that count for a student that keeps this share of each example's; without `weighted`, which is unknown for them."""
        return self if share == 1 else TargetCounts(max(1, self.kept[share]), whole=self.targets)

    @property
    def scale(self) -> dict[str, float]:
        """By part: the factor that turns sum / `targets` into the weighted mean; 1 for a part whose weights are all 0."""
        return {name: self.targets / mass if mass else 1.0 for name, (mass, _) in self.weighted.items()}


@dataclass
class Accumulated:
    """The forward and backward passes of one optimizer step, whose gradients are `scale` times too large. Dictionaries are keyed by the student.

    terms_by_micro_batch    for each micro-batch the terms [N] by name, times their weights
    combine                 from the terms' sums divided by the number of targets to the loss
    weights_by_micro_batch  for each micro-batch `Loss.weights`
    shares                  of each example's targets that count; 1 where it has none
    """

    micro_batches: list[Batch]
    counts: TargetCounts
    scale: float
    terms_by_micro_batch: dict[int, list[dict[str, Tensor]]]
    combine: dict[int, Callable[[dict[str, float]], float]]
    weights_by_micro_batch: dict[int, list[dict[str, Tensor]]] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)

    def counts_of(self, k: int) -> TargetCounts:
        """The targets that count for student k."""
        return self.counts.of(self.shares.get(k, 1.0))

    def unscale(self, k: int) -> float:
        """The factor that turns student k's accumulated gradients into those of the step's loss."""
        counts = self.counts_of(k)
        return 1 / self.scale if counts.whole is None else counts.whole / counts.targets / self.scale  # accumulated over all targets


class StepResult:
    """Terms and gradient norms of a step, summed over micro-batches and ranks on the device, and copied to the host without waiting.

    `nonfinite[k]` is a device scalar: 0 until student k's loss or gradient norm is inf or NaN for the first time, NaN from then on.
    """

    def __init__(self, step: Step, accumulated: Accumulated, norms: dict[int, Tensor], nonfinite, stop: bool, accelerator):
        """With several ranks this makes one all-reduce, which also tells every rank that one was asked to stop."""
        self.step, self.accumulated = step, accumulated
        by_micro_batch = accumulated.terms_by_micro_batch
        self.names = [(k, name) for k in norms for name in by_micro_batch[k][0]]
        sums = [sum(rows[name].double().sum() for rows in by_micro_batch[k]) for k, name in self.names]
        self.ruled = [(k, name) for k in norms for name in accumulated.weights_by_micro_batch.get(k, [{}])[0]]
        by_rule = [[w[name].double() for w in accumulated.weights_by_micro_batch[k]] for k, name in self.ruled]
        masses = [sum(value(w_N).sum() for w_N in each) for each in by_rule for value in (Tensor.abs, lambda w_N: (w_N != 0).double())]
        values = torch.stack([*sums, torch.full_like(sums[0], float(stop)), *masses])
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values, "sum")
        values = torch.cat([values, torch.stack(list(norms.values())).double()])
        self.nonfinite = {}
        for n, k in enumerate(norms):
            own = [i for i, (of, _) in enumerate(self.names) if of == k]
            value = values[own[0] : own[-1] + 1].sum() + values[len(sums) + 1 + len(masses) + n]
            self.nonfinite[k] = value - value + nonfinite[k] if k in nonfinite else value - value
        self.copied = None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.values = values

    def read(self, active: Container[int]) -> tuple[dict[int, dict[str, float]], dict[int, float], bool]:
        """Wait for the device. Returns the terms' means and the loss by active student, the gradient norms, and whether any rank was asked to stop.

        The mean of a term x with weights w is sum w x / sum |w|; the term is left out if all weights are 0. If some are 0, NAME_targets is
        the number of the others. NAME_weight is the mean absolute weight of a term that a rule weighs. If only some targets count
        (`loss.keep`), all of this is over them, and `kept` is their share.
        """
        if self.copied:
            self.copied.synchronize()
        values = self.values.tolist()
        every = list(dict.fromkeys(k for k, _ in self.names))
        masses, norms = values[len(self.names) + 1 : -len(every)], dict(zip(every, values[-len(every) :], strict=True))
        by_rule = dict(zip(self.ruled, zip(masses[::2], map(int, masses[1::2]), strict=True), strict=True))
        sums: dict[int, dict[str, float]] = {k: {} for k in every if k in active}
        for (k, name), value in zip(self.names, values, strict=False):
            if k in sums:
                sums[k][name] = value
        means = {k: self._means(k, sums[k], {name: both for (of, name), both in by_rule.items() if of == k}) for k in sums}
        return means, {k: norms[k] for k in sums}, values[len(self.names)] > 0

    def _means(self, k: int, sums: dict[str, float], by_rule: dict[str, tuple[float, int]]) -> dict[str, float]:
        counts, terms = self.accumulated.counts_of(k), {}
        weighted = counts.weighted | by_rule
        for name, value in sums.items():
            mass, carriers = weighted.get(name, (counts.targets, counts.targets))
            if carriers or not math.isfinite(value):
                terms[name] = value / (mass or 1)
            if carriers < counts.targets:
                terms[f"{name}_targets"] = carriers
            if name in by_rule and not (counts.whole and mass == counts.targets):
                terms[f"{name}_weight"] = mass / counts.targets
        if counts.whole is not None:
            terms["kept"] = counts.targets / counts.whole
        return terms | {"loss": self.accumulated.combine[k]({name: value / counts.targets for name, value in sums.items()})}


def diagnose_nonfinite(
    result: StepResult,
    k: int,
    terms: dict[str, float],
    explain: Callable[[str, Batch, list[int], Teacher | None], str],
    teacher,
    accelerator,
) -> NonFinite:
    """The error for student `k`'s value that is not finite: its step, term and examples, over all ranks, and the cause if `explain` finds one."""
    term = next((name for name, value in terms.items() if not math.isfinite(value)), "gradient")
    examples, bad = set(), {}
    for i, (micro, rows) in enumerate(zip(result.accumulated.micro_batches, result.accumulated.terms_by_micro_batch[k], strict=True)):
        bad_N = (~torch.isfinite(rows[term])).nonzero().flatten().tolist() if term in rows else range(micro.num_targets)
        examples |= {int(micro.example_N[n]) for n in bad_N}
        if term in rows and bad_N:
            bad[i] = bad_N
    cause = ""
    for i in sorted(set().union(*_of_all_ranks(set(bad), accelerator))):
        micro = result.accumulated.micro_batches[i].to(accelerator.device)
        asked = Asked(teacher, micro) if teacher else None  # on every process: the teacher may be sharded over them
        cause = cause or (explain(term, micro, bad[i], asked) if i in bad else "")
    everyone = _of_all_ranks((examples, cause), accelerator)
    examples, cause = set().union(*(e for e, _ in everyone)), next((c for _, c in everyone if c), "")
    return NonFinite(result.step.number, cause or term, [result.step.place(i) for i in sorted(examples)])


class Asked:
    """A teacher whose signal for one batch is already computed."""

    def __init__(self, teacher: Teacher, batch: Batch):
        self.metrics, self._signal = teacher.metrics, teacher(batch)

    def __call__(self, batch: Batch) -> Signal:
        return self._signal


def _of_all_ranks(found, accelerator) -> list:
    if accelerator.num_processes == 1:
        return [found]
    from accelerate.utils import gather_object

    return gather_object([found])
