"""The result of an optimizer step: sums gathered on the device and read when the host waits for them; the cause of a value that is not finite."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch
from ..data.batch_source import Step
from ..errors import NonFinite
from ..signals import Teacher


@dataclass
class Accumulated:
    """The forward and backward passes of one optimizer step; the gradients they left are `scale` times too large."""

    micro_batches: list[Batch]
    num_targets: int
    scale: float
    terms_by_micro_batch: dict[int, list[dict[str, Tensor]]]  # of each student, by micro-batch: each term row by row


class StepResult:
    """Terms and gradient norms of a step, on their way from the device: sums over micro-batches and ranks.

    `nonfinite[k]`: a device scalar, 0 until student k's loss or gradient norm is first inf or NaN, and NaN from then on (sticky).
    """

    def __init__(self, step: Step, accumulated: Accumulated, norms: dict[int, Tensor], nonfinite, stop: bool, accelerator):
        """One all-reduce where there are several ranks; it also passes a request to stop from one rank to all."""
        self.step, self.accumulated = step, accumulated
        by_micro_batch = accumulated.terms_by_micro_batch
        self.names = [(k, name) for k in norms for name in by_micro_batch[k][0]]
        sums = [sum(rows[name].double().sum() for rows in by_micro_batch[k]) for k, name in self.names]
        values = torch.stack([*sums, torch.full_like(sums[0], float(stop))])
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values, "sum")
        values = torch.cat([values, torch.stack(list(norms.values())).double()])
        self.nonfinite = {}
        for n, k in enumerate(norms):
            own = [i for i, (of, _) in enumerate(self.names) if of == k]
            value = values[own[0] : own[-1] + 1].sum() + values[len(sums) + 1 + n]
            self.nonfinite[k] = value - value + nonfinite[k] if k in nonfinite else value - value
        self.copied = None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()
        else:
            self.values = values

    def read(self, combine: dict[int, Callable[[dict[str, float]], float]]) -> tuple[dict[int, dict[str, float]], dict[int, float], bool]:
        """For the students in `combine` each term's mean, the loss that `combine[k]` makes of them, and the gradient's norm; whether any rank
        was asked to stop."""
        if self.copied:
            self.copied.synchronize()
        values = self.values.tolist()
        every = list(dict.fromkeys(k for k, _ in self.names))
        norms = dict(zip(every, values[len(self.names) + 1 :], strict=True))
        terms: dict[int, dict[str, float]] = {k: {} for k in every if k in combine}
        for (k, name), value in zip(self.names, values, strict=False):
            if k in terms:
                terms[k][name] = value / self.accumulated.num_targets
        for k in terms:
            terms[k]["loss"] = combine[k](terms[k])
        return terms, {k: norms[k] for k in terms}, values[len(self.names)] > 0


def diagnose_nonfinite(
    result: StepResult,
    k: int,
    terms: dict[str, float],
    explain: Callable[[str, Batch, list[int], Teacher | None], str],
    teacher,
    accelerator,
) -> NonFinite:
    """The step, the term and the examples of a value that is not finite, over all ranks, for student `k`; `explain` looks for a cause."""
    term = next((name for name, value in terms.items() if not math.isfinite(value)), "gradient")
    examples, cause = set(), ""
    for micro, rows in zip(result.accumulated.micro_batches, result.accumulated.terms_by_micro_batch[k], strict=True):
        bad_N = (~torch.isfinite(rows[term])).nonzero().flatten().tolist() if term in rows else range(micro.num_targets)
        examples |= {int(micro.example_N[n]) for n in bad_N}
        if term in rows and bad_N and not cause:
            cause = explain(term, micro.to(accelerator.device), bad_N, teacher)
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        everyone = gather_object([(examples, cause)])
        examples, cause = set().union(*(e for e, _ in everyone)), next((c for _, c in everyone if c), "")
    return NonFinite(result.step.number, cause or term, [result.step.place(i) for i in sorted(examples)])
