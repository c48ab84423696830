"""What a student is worth on held-out rows: cross-entropy, true KL both ways, agreement, entropies; multiple choice."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch
from ..data.batching import make_micro_batches
from ..data.collate import collate
from ..data.examples import Examples
from ..errors import Stopped
from ..losses.divergences import forward_kl, reverse_kl
from ..losses.fused import default_chunk
from ..models.language_model import LanguageModel
from ..signals import TEACHER_METRICS, Signal, Teacher


@dataclass(frozen=True)
class HeldOut:
    """What was measured on held-out examples, one by one: `sums[name]` [examples] over each example's `targets`, in nats."""

    targets: np.ndarray
    sums: dict[str, np.ndarray]

    def metrics(self) -> dict[str, float]:
        """Means over all targets, with the perplexity and the number of targets."""
        count = int(self.targets.sum())
        means = {name: float(values.sum()) / count for name, values in self.sums.items()}
        return {"ce": means.pop("ce"), "perplexity": math.exp(min(self.sums["ce"].sum() / count, 700))} | means | {"targets": count}


@torch.no_grad()
def validate(
    students: list[LanguageModel],
    teacher: Teacher | None,
    data: Examples,
    pad: int,
    micro_batch_size: int,
    accelerator,
    stop=None,
    progress=iter,
) -> list[HeldOut]:
    """Every student on all targets of `data`, at temperature 1 and over all processes; the teacher speaks once for all of them.

    ce and entropy of the student; with a teacher also forward_kl KL(p || q), reverse_kl KL(q || p), agreement (1 where both find
    the same token likeliest), teacher_ce and teacher_entropy, as far as they can be told of it. Changes neither weights nor training mode. Raises Stopped when a
    signal came meanwhile.
    """
    names = ["ce", "entropy"] + [name for name in TEACHER_METRICS if teacher and name in teacher.metrics]
    sums_FE = [torch.zeros(len(names), len(data), dtype=torch.float64, device=accelerator.device) for _ in students]
    for batch in _batches(students, data, pad, micro_batch_size, accelerator, stop, progress):
        signal = teacher(batch) if teacher else None
        for student, sums in zip(students, sums_FE, strict=True):
            hidden_NH = student.hidden(batch.student)
            for rows in _chunks(batch, student.head.vocab):
                metrics = _metrics(student, hidden_NH[rows], batch.labels_N[rows], signal, rows, names)
                sums.index_add_(1, batch.example_N[rows], torch.stack([metrics[name].double() for name in names]))
    if accelerator.num_processes > 1:
        sums_FE = [accelerator.reduce(sums, "sum") for sums in sums_FE]
    return [HeldOut(data.num_targets, dict(zip(names, sums.cpu().numpy(), strict=True))) for sums in sums_FE]


@torch.no_grad()
def accuracy(
    student: LanguageModel,
    data: Examples,
    answers: list[int],
    choices: list[int],
    pad: int,
    micro_batch_size: int,
    accelerator,
    progress=iter,
) -> dict[str, float]:
    """Multiple choice: the choice with the least cross-entropy, summed over its tokens, is the model's answer.

    `data` holds, question by question, one example for each choice; `choices[i]` is question i's number of them.
    The standard error is binomial, sqrt(a (1 - a) / (n - 1)).
    """
    totals = torch.zeros(len(data), dtype=torch.float64, device=accelerator.device)
    for batch in _batches([student], data, pad, micro_batch_size, accelerator, None, progress):
        hidden_NH = student.hidden(batch.student)
        for rows in _chunks(batch, student.head.vocab):
            log_q_nV = torch.log_softmax(student.head.logits(hidden_NH[rows]), dim=-1)
            ce_n = -log_q_nV.gather(-1, batch.labels_N[rows, None])[:, 0]
            totals.index_add_(0, batch.example_N[rows], ce_n.double())
    if accelerator.num_processes > 1:
        totals = accelerator.reduce(totals, "sum")
    ends = np.cumsum(choices)
    right = [int(totals[end - n : end].argmin()) == answer for end, n, answer in zip(ends, choices, answers, strict=True)]
    share, n = sum(right) / len(right), len(right)
    return {"accuracy": share, "accuracy_stderr": math.sqrt(share * (1 - share) / max(1, n - 1)), "questions": n}


def _batches(students, data: Examples, pad: int, micro_batch_size: int, accelerator, stop, progress) -> Iterator[Batch]:
    """Every example once, spread over the ranks, with the students in eval mode."""
    modes = [student.training for student in students]
    for student in students:
        student.eval()
    try:
        mine = make_micro_batches(
            list(range(len(data))), data.lengths, micro_batch_size, accelerator.process_index, accelerator.num_processes
        )
        for examples in progress(mine):
            if stop and stop.any_rank(accelerator):
                raise Stopped("stopped by a signal while validating")
            yield collate(data, examples, pad).to(accelerator.device)
    finally:
        for student, mode in zip(students, modes, strict=True):
            student.train(mode)


def _chunks(batch: Batch, vocab: int) -> Iterator[slice]:
    chunk = default_chunk(vocab, batch.labels_N.device.type) // 4  # of the tiles that several metrics take, some eight live at a time
    return (slice(start, start + chunk) for start in range(0, batch.num_targets, chunk))


def _metrics(
    student: LanguageModel, hidden_nH: Tensor, labels_n: Tensor, signal: Signal | None, rows: slice, names: list[str]
) -> dict[str, Tensor]:
    log_q_nV = torch.log_softmax(student.head.logits(hidden_nH), dim=-1)
    out = {"ce": -log_q_nV.gather(-1, labels_n[:, None])[:, 0], "entropy": _entropy(log_q_nV)}
    if signal is None:
        return out
    if "top1_agreement" not in names:  # a teacher known by samples
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
