"""Terms: the named parts of the loss, each with its weight and, if it has any, its own trainable parameters."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch, Rows
from ..config.schedule import value_at
from ..head import Head
from ..signals import NO_TAPS, AttentionInputs, Divergence, Signal, Teacher
from .fused import default_chunk, fused_parts
from .keep import Keep
from .objective import Objective
from .rows import Divergences, joined
from .target_weights import TargetWeights


@dataclass(frozen=True)
class StudentOutputs:
    """The outputs of a student for a batch.

    hidden_NH           last hidden states at the targets
    layers, attention   the outputs of the terms' `Taps`, by layer: hidden states [N, H], and inputs of attention
    """

    hidden_NH: Tensor
    head: Head
    layers: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)


@dataclass(frozen=True)
class Loss:
    """The loss of one batch.

    total     the sum over the batch's targets, to be back-propagated
    rows      by term, its value times its weight (`Batch.weights`) at each target, [N], detached; 0 where that weight is 0
    weights   for each term that a rule weighs, its weights [N]: the rule's times the batch's own, 0 where a target does not count
    """

    total: Tensor
    rows: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)


class Term(nn.Module):
    """One or several named parts of the loss. Its parameters train with the student's and are saved in checkpoints, but not exported.

    Everything is summed over targets; the training loop divides by their number in the whole optimizer step.
    """

    names: tuple[str, ...]
    needs_teacher = False
    measures_weights = False  # whether its sums are divided by sums of weights that depend on the models' outputs
    share = 1.0  # the share of each example's targets that count, in every term, see `select`
    student_taps = NO_TAPS  # what it reads inside the student, apart from the last hidden states
    teacher_taps = NO_TAPS  # what it reads inside a live teacher, whose signal then holds it
    lr: float | None = None  # the peak learning rate of its parameters; None: the student's

    def start_step(self, step: int, scale: dict[str, float]) -> None:
        """Called before each optimizer step.

        step    its number, from 1
        scale   for each part whose targets are weighted: the number of targets over the sum of the absolute weights
        """

    def combiner(self) -> Callable[[dict[str, float]], float]:
        """`combine` with the weights of this step."""
        return self.combine

    def select(self, student: StudentOutputs, signal: Signal | None, batch: Batch) -> Batch:
        """Called before any term is computed. Returns the batch, with `Batch.kept` if only some targets count."""
        return batch

    def forward(self, student: StudentOutputs, signal: Signal | None, batch: Batch) -> Loss:
        """The sum over the batch's targets, and the rows, by `names`. A micro-batch may have no targets."""
        raise NotImplementedError

    def combine(self, values: dict[str, float]) -> float:
        """This term's contribution to the loss: the weighted sum of its own `values`, such as means over targets."""
        raise NotImplementedError

    def explain_nonfinite(self, name: str, batch: Batch, rows: list[int], teacher: Teacher | None) -> str:
        """Why the part `name` may not be finite at those targets of a batch; "" if the cause is unknown."""
        return ""

    def halve_chunks(self, vocab: int, device: str, least: int) -> str:
        """To save memory, halve the chunks in which the term is computed. Returns a phrase such as "chunks of 512 rows", or "" if it cannot.

        least   the fewest rows in a chunk of the head
        """
        return ""


class SingleTerm(Term):
    """A term with one name, and a weight that may follow a schedule (`follow`).

    factor   of the term's sum over targets in this step: its weight, times the scale of the part `scaled_as` with `normalize: weights`
    """

    def __init__(self, name: str, weight: float):
        super().__init__()
        self.names, self.factor, self.normalize, self.scaled_as = (name,), weight, "targets", name
        self.at_step: Callable[[int], float] = lambda step: weight

    def follow(self, weight: float | dict[str, Any], total_steps: int, normalize: str) -> None:
        """Use the settings of a run: `weight` may be a schedule over its `total_steps`."""
        self.at_step, self.normalize = functools.partial(value_at, weight, total=total_steps), normalize

    def start_step(self, step: int, scale: dict[str, float]) -> None:
        self.factor = self.at_step(step) * (scale.get(self.scaled_as, 1.0) if self.normalize == "weights" else 1.0)

    def combiner(self) -> Callable[[dict[str, float]], float]:
        return functools.partial(self._combine, self.factor)

    def combine(self, values: dict[str, float]) -> float:
        return self._combine(self.factor, values)

    def _combine(self, factor: float, values: dict[str, float]) -> float:
        return factor * values[self.names[0]] if factor else 0.0


class RowTerm(SingleTerm):
    """A term that is differentiated by autograd; a subclass defines `rows`."""

    def rows(self, student: StudentOutputs, signal: Signal | None, batch: Batch, targets: Rows) -> Tensor:
        """The term for n of the batch's targets, [n], differentiable. `targets`: a slice, or ascending indices; none of them are 0."""
        raise NotImplementedError

    def forward(self, student: StudentOutputs, signal: Signal | None, batch: Batch) -> Loss:
        (name,) = self.names
        targets, weight_N = batch.carriers(name), batch.weights.get(name)
        rows_n = self.rows(student, signal, batch, targets)
        if weight_N is not None:
            rows_n = weight_N[targets] * rows_n
        rows_N = joined([(targets, {name: rows_n.detach()})], name, batch.num_targets, rows_n)
        return Loss(self.factor * rows_n.sum(), {name: rows_N})


class HeadTerm(Term):
    """Cross-entropy ("ce") and with a teacher the divergence ("kd"), both from the fused head.

    chunk_size   rows of the head at a time; None: the default for the device
    normalize    targets: the loss is divided by the number of targets; weights: each of the two parts by the sum of its absolute weights
    at_step      the objective of each step, if it changes; `objective` is then the one that is used outside of steps
    rule         weighs the targets; its weights multiply the batch's own
    keep         chooses the targets that count in all terms
    by_source    by index, the divergences of the data sources that have another one than the objective's
    """

    names = ("ce", "kd")

    def __init__(
        self,
        objective: Objective,
        chunk_size: int | None = None,
        normalize: str = "targets",
        at_step: Callable[[int], Objective] | None = None,
        rule: TargetWeights | None = None,
        keep: Keep | None = None,
        by_source: Mapping[int, Divergence] | None = None,
    ):
        super().__init__()
        self.by_source = dict(by_source or {})
        self.objective, self.chunk_size, self.normalize, self.rule, self.keep = objective, chunk_size, normalize, rule, keep
        self.share, self.measures_weights = keep.share if keep else 1.0, normalize == "weights" and bool(rule or keep)
        self.at_step, self.needs_teacher = at_step or (lambda step: objective), objective.kd_ratio > 0

    def select(self, student: StudentOutputs, signal: Signal | None, batch: Batch) -> Batch:
        return self.keep(student.hidden_NH, student.head, signal, batch, self.chunk_size) if self.keep else batch

    def forward(self, student: StudentOutputs, signal: Signal | None, batch: Batch) -> Loss:
        signal = signal if self.needs_teacher else None  # the signal may be there for another student of the run
        rule, position_N, known = self.rule, None, ()
        if rule and rule.needs_logits:
            position_N = batch.position_N.to(batch.labels_N.device)
        elif rule:
            of_rule_N = rule.weights(rule.scores(batch.labels_N, slice(None), batch.position_N))
            of_rule_N, known, rule = of_rule_N.to(torch.promote_types(student.hidden_NH.dtype, torch.float32)), rule.terms, None
            batch = batch.weighing(dict.fromkeys(known, of_rule_N))
        total, rows, by_rule = fused_parts(
            student.hidden_NH,
            student.head,
            batch.labels_N,
            self.objective,
            signal,
            self.chunk_size,
            batch.weights,
            batch.zeros or {},
            rule,
            position_N,
            batch.kept,
            self._divergences(batch),
        )
        by_rule |= {name: batch.only_kept(batch.weights[name]) for name in known if name in rows}
        return Loss(total, rows, by_rule)

    def _divergences(self, batch: Batch) -> Divergences | None:
        """The divergence of each target; None where all have the objective's."""
        others = {source: kind for kind, source in enumerate(self.by_source, 1)}
        kinds = [others.get(one.source, 0) for one in batch.examples]
        if not any(kinds):
            return None
        counts = torch.tensor([one.num_targets for one in batch.examples])
        return Divergences([None, *self.by_source.values()], torch.tensor(kinds).repeat_interleave(counts))

    def start_step(self, step: int, scale: dict[str, float]) -> None:
        self.objective = self.at_step(step)
        if self.normalize == "weights":
            self.objective = self.objective.normalized(scale)

    def combiner(self) -> Callable[[dict[str, float]], float]:
        return functools.partial(self._combine, self.objective)

    def combine(self, values: dict[str, float]) -> float:
        return self._combine(self.objective, values)

    def _combine(self, objective: Objective, values: dict[str, float]) -> float:
        return objective.combine({name: values[name] for name in self.names if name in values})

    def explain_nonfinite(self, name: str, batch: Batch, rows: list[int], teacher: Teacher | None) -> str:
        if name != "kd" or teacher is None:
            return ""
        log_p_V = teacher(batch).log_probs(slice(rows[0], rows[0] + 1), temperature=self.objective.temperature)[0]
        if torch.isnan(log_p_V).any():
            return "teacher logits"
        if torch.isneginf(log_p_V).any() and "top1_agreement" in teacher.metrics:  # sampled tokens leave most others out by design
            return (
                "kd (the teacher gives tokens probability 0, where this divergence is infinite; forward_kl and generalized_jsd stay finite)"
            )
        return ""

    def halve_chunks(self, vocab: int, device: str, least: int) -> str:
        rows = self.chunk_size or default_chunk(vocab, device)
        if rows <= least:
            return ""
        self.chunk_size = max(least, rows // 2)
        return f"chunks of {self.chunk_size:,} rows"


def by_name(terms: Iterable[Term]) -> nn.ModuleDict:
    """Terms by their first names. ValueError if two share a name, or one is named "loss"."""
    found, taken = nn.ModuleDict(), {"loss"}
    for term in terms:
        if shared := taken & set(term.names):
            raise ValueError(f"two terms are named {', '.join(sorted(shared))}")
        taken |= set(term.names)
        found[term.names[0]] = term
    return found
