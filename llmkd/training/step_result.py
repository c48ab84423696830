"""What a step did: gathered on the device, read where somebody waits for it; and where a value is not finite, what is to blame."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch import Batch
from ..data.batching import Step
from ..errors import NonFinite
from ..losses.objective import Objective


@dataclass
class Taken:
    """What one optimizer step's forward and backward passes left, beside gradients that are `scale` times too large."""

    micro_batches: list[Batch]
    targets: int
    scale: float
    seen: dict[int, list[dict[str, Tensor]]]  # of each learner, by micro-batch: each term row by row


class Outcome:
    """What a step did, on its way from the device: sums over micro-batches and ranks, read when somebody waits for them.

    `taint[k]`, on the device, is 0, and NaN from the first step on in which a value of learner k is not finite.
    """

    def __init__(self, step: Step, taken: Taken, norms: dict[int, Tensor], taint, stop: bool, accelerator):
        """One all-reduce where there are several ranks, all of which so hear of a stop."""
        self.step, self.taken = step, taken
        self.names = [(k, name) for k in norms for name in taken.seen[k][0]]
        sums = [sum(rows[name].double().sum() for rows in taken.seen[k]) for k, name in self.names]
        values = torch.stack([*sums, torch.full_like(sums[0], float(stop))])
        if accelerator.num_processes > 1:
            values = accelerator.reduce(values, "sum")
        values = torch.cat([values, torch.stack(list(norms.values())).double()])
        self.taint = {}
        for n, k in enumerate(norms):
            own = [i for i, (of, _) in enumerate(self.names) if of == k]
            value = values[own[0] : own[-1] + 1].sum() + values[len(sums) + 1 + n]
            self.taint[k] = value - value + taint[k] if k in taint else value - value
        self.arrived = None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        else:
            self.values = values

    def read(self, objectives: dict[int, Objective]) -> tuple[dict[int, dict[str, float]], dict[int, float], bool]:
        """Of the learners with these objectives each term's mean, and the gradient's norm; whether any rank was asked to stop."""
        if self.arrived:
            self.arrived.synchronize()
        values = self.values.tolist()
        every = list(dict.fromkeys(k for k, _ in self.names))
        norms = dict(zip(every, values[len(self.names) + 1 :], strict=True))
        terms: dict[int, dict[str, float]] = {k: {} for k in every if k in objectives}
        for (k, name), value in zip(self.names, values, strict=False):
            if k in terms:
                terms[k][name] = value / self.taken.targets
        for k in terms:
            terms[k]["loss"] = objectives[k].combine(terms[k])
        return terms, {k: norms[k] for k in terms}, values[len(self.names)] > 0


def is_finite(value: float) -> bool:
    return value - value == 0


def blame(outcome: Outcome, k: int, terms: dict[str, float], temperature: float, teacher, accelerator) -> NonFinite:
    """Which step, which term and which examples, from all ranks; of learner `k`, which compares at that temperature."""
    term = next((name for name, value in terms.items() if not is_finite(value)), "gradient")
    examples, cause = set(), ""
    for micro, rows in zip(outcome.taken.micro_batches, outcome.taken.seen[k], strict=True):
        bad_N = (~torch.isfinite(rows[term])).nonzero().flatten().tolist() if term in rows else range(micro.num_targets)
        examples |= {int(micro.example_N[n]) for n in bad_N}
        if term == "kd" and bad_N and not cause:
            log_p_V = teacher(micro.to(accelerator.device)).log_probs(slice(bad_N[0], bad_N[0] + 1), temperature=temperature)[0]
            if torch.isnan(log_p_V).any():
                cause = "teacher logits"
            elif (
                torch.isneginf(log_p_V).any() and "top1_agreement" in teacher.metrics
            ):  # samples leave most tokens out, and mean nothing by it
                cause = "kd (the teacher rules tokens out, where this divergence is infinite; forward_kl and generalized_jsd stay finite)"
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        everyone = gather_object([(examples, cause)])
        examples, cause = set().union(*(e for e, _ in everyone)), next((c for _, c in everyone if c), "")
    return NonFinite(outcome.step.number, cause or term, sorted(examples))
