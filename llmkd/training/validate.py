"""Validation: cross-entropy, KL both ways, top-1 agreement and entropies on held-out rows; accuracy on multiple choice."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..data.batching import make_micro_batches
from ..data.dataset import Questions
from ..data.examples import Examples
from ..errors import Stopped
from ..losses.divergences import forward_kl, reverse_kl
from ..losses.fused import default_chunk
from ..models.model import Model
from ..output.metrics import WEIGHED_BY
from ..process import heartbeat
from ..signals import TEACHER_METRICS, Signal, Teacher
from ..tasks.causal_lm import TokenMeasures
from ..tasks.task import Measures
from .shutdown import ShutdownRequest


@dataclass(frozen=True)
class HeldOut:
    """Metrics of E held-out examples.

    targets    [E], the number of each example's targets
    sums       by metric, [E]: the sum over each example's targets, in nats
    weights    by part of the loss, [E]: the weight of each example in the metrics of that part (`WEIGHED_BY`). A source's negative weight
               counts as 0; a part without an entry has weight 1
    own_text   metrics of an on-policy student's own answers at the same step
    measures   the metrics of the task
    """

    targets: np.ndarray
    sums: dict[str, np.ndarray]
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    own_text: dict[str, float] = field(default_factory=dict)
    measures: Measures = TokenMeasures()

    def counting(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Of the examples whose weight in a metric is above 0: their sums and their numbers of targets, both times that weight."""
        w_E = self.weights.get(WEIGHED_BY.get(metric, ""), np.ones(len(self.targets)))
        counts = w_E > 0
        return (self.sums[metric] * w_E)[counts], (self.targets * w_E)[counts]

    def metrics(self) -> dict[str, float]:
        """Means over targets, the task's own metrics, and `targets`, the number of all of them.

        PART_targets is the number of targets that count in the metrics of a part of the loss, if not all do. A metric to which no target
        counts is left out.
        """
        means = {}
        for name in (name for name in self.sums if name not in self.measures.kept):
            sums, targets = self.counting(name)
            if len(targets):
                means[name] = float(sums.sum()) / float(targets.sum())
        weights = self.weights.get("ce", np.ones(len(self.targets)))
        means = {"ce": means["ce"], **self.measures.metrics(means, self.sums, weights)} | means
        fewer = {f"{part}_targets": int(self.targets[w_E > 0].sum()) for part, w_E in self.weights.items() if (w_E <= 0).any()}
        return means | {"targets": int(self.targets.sum())} | fewer | self.own_text


@dataclass(frozen=True)
class Evaluator:
    """Measures students on held-out examples, spread over all processes; it changes neither weights nor training mode.

    stop       where given, a signal that arrives meanwhile raises Stopped
    measures   further metrics of the task
    """

    accelerator: Any
    micro_batch_size: int
    stop: ShutdownRequest | None = None
    measures: Measures = TokenMeasures()

    @torch.no_grad()
    def validate(self, students: list[Model], teacher: Teacher | None, data: Examples, progress=iter) -> list[HeldOut]:
        """Measure every student on all targets of `data`, at temperature 1; the teacher is computed once for all of them.

        ce and entropy of the student; with a teacher also forward_kl KL(p || q), reverse_kl KL(q || p), top1_agreement (1 where both
        have the same most likely token), teacher_ce and teacher_entropy, as far as its signals support them; and the task's own metrics.
        """
        names = ["ce", "entropy", *self.measures.rows] + [name for name in TEACHER_METRICS if teacher and name in teacher.metrics]
        sums_FE = [torch.zeros(len(names), len(data), dtype=torch.float64, device=self.accelerator.device) for _ in students]
        for batch in self._batches(students, data, progress):
            signal = teacher(batch) if teacher else None
            for student, sums in zip(students, sums_FE, strict=True):
                hidden_NH = student.hidden(batch.student)
                for rows in _chunks(batch, student.head.vocab):
                    metrics = _metrics(student, hidden_NH[rows], batch.labels_N[rows], signal, rows, names, self.measures)
                    sums.index_add_(1, batch.example_N[rows], torch.stack([metrics[name].double() for name in names]))
        sums_FE = [self._over_ranks(sums) for sums in sums_FE]
        weights = {part: np.maximum(w_E.astype(np.float64), 0) for part, w_E in data.weights.items() if part in WEIGHED_BY.values()}
        by_name = [dict(zip(names, sums.cpu().numpy(), strict=True)) for sums in sums_FE]
        return [HeldOut(data.num_targets, sums, weights, measures=self.measures) for sums in by_name]

    @torch.no_grad()
    def accuracy(self, student: Model, questions: Questions, progress=iter) -> dict[str, float]:
        """Multiple choice: the choice with the least cross-entropy, summed over its tokens, is the model's answer.

        The standard error is binomial, sqrt(a (1 - a) / (n - 1)).
        """
        data = questions.examples
        totals = torch.zeros(len(data), dtype=torch.float64, device=self.accelerator.device)
        for batch in self._batches([student], data, progress):
            hidden_NH = student.hidden(batch.student)
            for rows in _chunks(batch, student.head.vocab):
                log_q_nV = torch.log_softmax(student.head.logits(hidden_NH[rows]), dim=-1)
                ce_n = -log_q_nV.gather(-1, batch.labels_N[rows, None])[:, 0]
                totals.index_add_(0, batch.example_N[rows], ce_n.double())
        totals = self._over_ranks(totals)
        ends = np.cumsum(questions.counts)
        per_question = zip(ends, questions.counts, questions.answers, strict=True)
        right = [int(totals[end - n : end].argmin()) == answer for end, n, answer in per_question]
        share, n = sum(right) / len(right), len(right)
        return {"accuracy": share, "accuracy_stderr": math.sqrt(share * (1 - share) / max(1, n - 1)), "questions": n}

    def _over_ranks(self, sums: Tensor) -> Tensor:
        return self.accelerator.reduce(sums, "sum") if self.accelerator.num_processes > 1 else sums

    def _batches(self, students: list[Model], data: Examples, progress) -> Iterator[Batch]:
        """Every example once, spread over the ranks, with the students in eval mode."""
        modes, here = [student.training for student in students], self.accelerator
        for student in students:
            student.eval()
        try:
            every = list(range(len(data)))
            for examples in progress(
                make_micro_batches(every, data.lengths, self.micro_batch_size, here.process_index, here.num_processes)
            ):
                heartbeat.at("a batch of validation")
                if self.stop and self.stop.any_rank(here):
                    raise Stopped("stopped by a signal while validating")
                yield data.batch(examples).to(here.device)
        finally:
            for student, mode in zip(students, modes, strict=True):
                student.train(mode)


def _chunks(batch: Batch, vocab: int) -> Iterator[slice]:
    chunk = default_chunk(vocab, batch.labels_N.device.type) // 4  # the metrics hold about eight tiles [chunk, V] at a time
    return (slice(start, start + chunk) for start in range(0, batch.num_targets, chunk))


def _metrics(
    student: Model, hidden_nH: Tensor, labels_n: Tensor, signal: Signal | None, rows: slice, names: list[str], measures: Measures
) -> dict[str, Tensor]:
    log_q_nV = torch.log_softmax(student.head.logits(hidden_nH), dim=-1)
    out = {"ce": -log_q_nV.gather(-1, labels_n[:, None])[:, 0], "entropy": _entropy(log_q_nV), **measures.of_rows(log_q_nV, labels_n)}
    if signal is None:
        return out
    if "top1_agreement" not in names:  # a teacher known only from sampled tokens
        own = {"forward_kl": signal.divergence(forward_kl, rows, log_q_nV)} if "forward_kl" in names else {}
        return out | {"teacher_ce": -signal.label_log_probs(rows, labels_n)} | own | signal.exact_metrics(rows, labels_n, log_q_nV)
    log_p_nV = signal.log_probs(rows, log_q_nV)
    out |= {
        "forward_kl": forward_kl(log_q_nV, log_p_nV),
        "reverse_kl": reverse_kl(log_q_nV, log_p_nV),
        "top1_agreement": (log_q_nV.argmax(-1) == log_p_nV.argmax(-1)).float(),
        "teacher_ce": -log_p_nV.gather(-1, labels_n[:, None])[:, 0],
        "teacher_entropy": _entropy(log_p_nV),
    }
    return out | signal.exact_metrics(rows, labels_n, log_q_nV)


def _entropy(log_p_nV: Tensor) -> Tensor:
    return -torch.where(log_p_nV == -math.inf, 0.0, log_p_nV.exp() * log_p_nV).sum(-1)
