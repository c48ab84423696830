"""Student and loss terms in one module: what DDP wraps, so that it sees a single forward call."""

import functools
import operator
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from ..batch import Batch
from ..losses.terms import Loss, StudentOutputs, Term, by_name
from ..models.model import Model
from ..signals import Signal, Taps, Teacher


class Distiller(nn.Module):
    """A student and the terms of its loss."""

    def __init__(self, student: Model, terms: Iterable[Term]):
        super().__init__()
        self.student, self.terms = student, by_name(terms)

    def forward(self, batch: Batch, signal: Signal | None) -> Loss:
        """All terms at the batch's targets that count: their weighted sum, and each term row by row."""
        outputs = self.student.outputs(batch.student, self.student_taps)
        student = StudentOutputs(outputs.hidden_NH, self.student.head, outputs.layers, outputs.attention)
        for term in self.terms.values():
            batch = term.select(student, signal, batch)
        parts = [term(student, signal, batch) for term in self.terms.values()]
        rows = {name: rows_N for part in parts for name, rows_N in part.rows.items()}
        weights = {name: batch.counting(name) for name in rows} if self.share < 1 else {}  # of the same names in every micro-batch
        weights |= {name: w_N for part in parts for name, w_N in part.weights.items()}
        return Loss(functools.reduce(operator.add, (part.total for part in parts)), rows, weights)

    @property
    def names(self) -> set[str]:
        """The names of all parts of the loss."""
        return {name for term in self.terms.values() for name in term.names}

    @property
    def needs_teacher(self) -> bool:
        return any(term.needs_teacher for term in self.terms.values())

    @property
    def measures_weights(self) -> bool:
        """Whether terms are divided by sums of weights that depend on the models' outputs."""
        return any(term.measures_weights for term in self.terms.values())

    @property
    def share(self) -> float:
        """The share of each example's targets that count."""
        return min(term.share for term in self.terms.values())

    @property
    def student_taps(self) -> Taps:
        """What the terms read inside the student."""
        return functools.reduce(operator.or_, (term.student_taps for term in self.terms.values()))

    @property
    def teacher_taps(self) -> Taps:
        """What the terms read inside the teacher."""
        return functools.reduce(operator.or_, (term.teacher_taps for term in self.terms.values()))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Everything that trains: the student's parameters, and those of the terms as terms.TERM.PARAMETER."""
        return self.student.trainable() | {f"terms.{name}": p for name, p in self.terms.named_parameters() if p.requires_grad}

    def kept(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint: everything that trains, and the buffers that terms measured before the first step."""
        return self.trainable() | {f"terms.{name}": measured for name, measured in self.terms.named_buffers()}

    def own_rates(self) -> dict[str, float | None]:
        """The own peak learning rate of each of the terms' parameters, by its name in `trainable`; None for the student's rate."""
        return {
            f"terms.{name}.{own}": term.lr for name, term in self.terms.items() for own, p in term.named_parameters() if p.requires_grad
        }

    def combine(self, values: dict[str, float]) -> float:
        """The loss from the values of its parts by name, such as their means over targets."""
        return _total([term.combine for term in self.terms.values()], values)

    def start_step(self, step: int, scale: dict[str, float]) -> None:
        """Called before each optimizer step; see `Term.start_step`."""
        for term in self.terms.values():
            term.start_step(step, scale)

    def combiner(self) -> Callable[[dict[str, float]], float]:
        """`combine` with the weights of this step, for its metrics: they are read after the next step has begun."""
        return functools.partial(_total, [term.combiner() for term in self.terms.values()])

    def explain_nonfinite(self, name: str, batch: Batch, rows: list[int], teacher: Teacher | None) -> str:
        """Why the term `name` may not be finite at those targets of a batch; "" if the cause is unknown."""
        found = (term.explain_nonfinite(name, batch, rows, teacher) for term in self.terms.values() if name in term.names)
        return next(found, "")

    def halve_chunks(self, device: str, least: int) -> list[str]:
        """To save memory, halve the chunks of the terms that work in chunks. Returns a phrase for each that did, such as "chunks of 512 rows"."""
        return [said for term in self.terms.values() if (said := term.halve_chunks(self.student.head.vocab, device, least))]


def _total(parts: list[Callable[[dict[str, float]], float]], values: dict[str, float]) -> float:
    return functools.reduce(operator.add, (part(values) for part in parts))
