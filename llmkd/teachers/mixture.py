"""Teachers that combine teachers: an ensemble for every example, or a teacher for each data source."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch import Batch, Rows
from ..config.teacher import Mixture as MixtureSettings
from ..config.teacher import Teacher as TeacherSettings
from ..data.collate import per_target, select_examples
from ..signals import TEACHER_METRICS, Divergence, Signal, Teacher


def combine_teachers(teachers: Sequence[Teacher], settings: Sequence[TeacherSettings], mixture: MixtureSettings) -> Teacher:
    """One teacher from several: an ensemble, with routing by data source if a teacher has a name."""
    if len(teachers) == 1:
        return teachers[0]
    ensemble = Mixture(teachers, [one.weight for one in settings], mixture.combine, mixture.weights == "confidence")
    return Routed(ensemble, teachers) if any(one.name for one in settings) else ensemble


class Mixture:
    """An ensemble: every teacher's signal at every target, combined as `Mixed` describes.

    weights      relative weights, one for each teacher; they need not sum to one
    combine      probabilities, log_probabilities or divergences
    confidence   weigh each teacher also by the probability that it gives the target
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float], combine: str = "probabilities", confidence: bool = False):
        self.teachers, self.combine, self.confidence = list(teachers), combine, confidence
        self.log_weights = [float(torch.tensor(w, dtype=torch.float64).div(sum(weights)).log()) for w in weights]
        self.metrics = TEACHER_METRICS if all(teacher.metrics == TEACHER_METRICS for teacher in teachers) else ("teacher_ce",)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> "Mixed":
        parts = [teacher(batch) for teacher in self.teachers]
        return Mixed(parts, self.log_weights, batch.labels_N, self.combine, self.confidence)


@dataclass(frozen=True)
class Mixed:
    """The signals of several teachers for the same targets, combined with weights w that sum to one at each target.

    probabilities       p = sum w_i p_i, the arithmetic mean of the distributions at the student's temperature (Hinton et al. 2015, section 3)
    log_probabilities   p ~ exp sum w_i log p_i, the geometric mean, normalised (Hinton 2002, products of experts, with weights)
    divergences         sum w_i D(q, p_i); `log_probs` is then that of `probabilities`

    With `confidence`, w_i is proportional to its fixed weight times the probability that teacher i gives the target, at temperature 1.
    """

    parts: list[Signal]
    log_weights: list[float]
    labels_N: Tensor
    combine: str = "probabilities"
    confidence: bool = False

    @property
    def layers(self) -> dict[int, Tensor]:
        """The hidden states [N, H] inside the one teacher that taps them, by layer."""
        return next((part.layers for part in self.parts if getattr(part, "layers", None)), {})

    def at(self, rows: Rows) -> "Mixed":
        """The same signal at some targets only. Each part is restricted here once, so that its head is not computed again for every question."""
        return replace(self, parts=[_at(part, rows) for part in self.parts], labels_N=self.labels_N[rows])

    def divergence(self, divergence: Divergence, rows: Rows, log_q_nV: Tensor, temperature: float = 1.0) -> Tensor:
        if self.combine != "divergences":
            return divergence(log_q_nV, self.log_probs(rows, log_q_nV, temperature))
        shares = self._log_shares(rows)
        each = (part.divergence(divergence, rows, log_q_nV, temperature) for part in self.parts)
        return sum(_exp(share) * value for share, value in zip(shares, each, strict=True))

    @torch.no_grad()
    def log_probs(self, rows: Rows, log_q_nV: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        total_nV: Tensor | None = None
        for share, part in zip(self._log_shares(rows), self.parts, strict=True):
            log_p_nV = part.log_probs(rows, log_q_nV, temperature)
            share = share[:, None] if isinstance(share, Tensor) else share
            if self.combine == "log_probabilities":
                log_p_nV = log_p_nV * _exp(share)
                total_nV = log_p_nV if total_nV is None else total_nV.add_(log_p_nV)
            else:
                log_p_nV = log_p_nV + share
                total_nV = log_p_nV if total_nV is None else torch.logaddexp(total_nV, log_p_nV, out=total_nV)
        return torch.log_softmax(total_nV, dim=-1)  # for a mean of probabilities this only removes rounding

    @torch.no_grad()
    def label_log_probs(self, rows: Rows, labels_n: Tensor) -> Tensor:
        if self.combine == "log_probabilities":
            return self.log_probs(rows).gather(-1, labels_n[:, None])[:, 0]
        each = [part.label_log_probs(rows, labels_n) for part in self.parts]
        shares = self._log_shares(rows, each if self.confidence else None)
        return torch.stack([share + value for share, value in zip(shares, each, strict=True)]).logsumexp(0)

    def exact_metrics(self, rows: Rows, labels_n: Tensor, log_q_nV: Tensor | None) -> dict[str, Tensor]:
        if self.combine == "log_probabilities" or not any(part.exact_metrics(rows, labels_n, log_q_nV) for part in self.parts):
            return {}
        return {"teacher_ce": -self.label_log_probs(rows, labels_n)}

    def _log_shares(self, rows: Rows, label_log_probs: list[Tensor] | None = None) -> list[float] | list[Tensor]:
        """log w_i for each teacher: floats, or [n] with confidence."""
        if not self.confidence:
            return self.log_weights
        labels_n = self.labels_N[rows]
        with torch.no_grad():
            each = label_log_probs or [part.label_log_probs(rows, labels_n) for part in self.parts]
            joint_Pn = torch.stack([weight + value for weight, value in zip(self.log_weights, each, strict=True)])
            return list(joint_Pn.nan_to_num(neginf=-1e4).log_softmax(0))  # equal where no teacher gives the target any probability


def _exp(log: float | Tensor) -> float | Tensor:
    return log.exp() if isinstance(log, Tensor) else float(torch.tensor(log, dtype=torch.float64).exp())


class Routed:
    """A teacher that gives each example to the teacher that its data source names (`Example.teacher`), or else to the ensemble."""

    def __init__(self, ensemble: Teacher, teachers: Sequence[Teacher]):
        self.ensemble, self.teachers = ensemble, list(teachers)
        every = [ensemble, *teachers]
        self.metrics = tuple(name for name in TEACHER_METRICS if all(name in teacher.metrics for teacher in every))

    def __call__(self, batch: Batch) -> Signal:
        wanted = [example.teacher for example in batch.examples]
        groups = {k: [other == k for other in wanted] for k in dict.fromkeys(wanted)}
        if len(groups) < 2:
            return self._of(next(iter(groups), -1))(batch)
        parts = [self._of(k)(select_examples(batch, mine)) for k, mine in groups.items()]
        owner, place = torch.zeros(batch.num_targets, dtype=torch.long), torch.zeros(batch.num_targets, dtype=torch.long)
        for number, mine in enumerate(groups.values()):
            whose = per_target(batch, mine)
            owner[whose], place[whose] = number, torch.arange(int(whose.sum()))
        return RoutedSignal(parts, owner, place)

    def _of(self, number: int) -> Teacher:
        return self.teachers[number] if number >= 0 else self.ensemble


@dataclass(frozen=True)
class RoutedSignal:
    """The signal of a batch whose parts had different teachers: target i is target `place_N[i]` of part `owner_N[i]` (both on the CPU)."""

    parts: list[Signal]
    owner_N: Tensor
    place_N: Tensor

    @property
    def layers(self) -> dict[int, Tensor]:
        """The hidden states inside the teacher that taps them, by layer; it must be in every part."""

        def of(number: int) -> Tensor:
            return self._each(slice(None), lambda part, places, mine: part.layers[number][places.to(part.layers[number].device)])

        return {number: of(number) for number in self.parts[0].layers}

    def at(self, rows: Rows) -> "RoutedSignal":
        """As `Mixed.at`."""
        rows = rows.cpu() if isinstance(rows, Tensor) else rows
        owner_n, place_n = self.owner_N[rows], self.place_N[rows]
        mine = [owner_n == number for number in range(len(self.parts))]
        new_n = torch.stack([own.cumsum(0) - 1 for own in mine]).gather(0, owner_n[None])[0]
        return RoutedSignal([_at(part, place_n[own]) for part, own in zip(self.parts, mine, strict=True)], owner_n, new_n)

    def divergence(self, divergence: Divergence, rows: Rows, log_q_nV: Tensor, temperature: float = 1.0) -> Tensor:
        return self._each(rows, lambda part, places, mine: part.divergence(divergence, places, log_q_nV[mine], temperature))

    def log_probs(self, rows: Rows, log_q_nV: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        return self._each(
            rows, lambda part, places, mine: part.log_probs(places, None if log_q_nV is None else log_q_nV[mine], temperature)
        )

    def label_log_probs(self, rows: Rows, labels_n: Tensor) -> Tensor:
        return self._each(rows, lambda part, places, mine: part.label_log_probs(places, labels_n[mine]))

    def exact_metrics(self, rows: Rows, labels_n: Tensor, log_q_nV: Tensor | None) -> dict[str, Tensor]:
        none_nV = None if log_q_nV is None else log_q_nV[:0]
        if not any(part.exact_metrics(slice(0, 0), labels_n[:0], none_nV) for part in self.parts):
            return {}
        return {"teacher_ce": -self.label_log_probs(rows, labels_n)}

    def _each(self, rows: Rows, compute: Callable[[Signal, Tensor, Tensor], Tensor]) -> Tensor:
        """`compute(part, the part's own target indices, their indices in `rows`)` for every part, joined in the order of `rows`."""
        rows = rows.cpu() if isinstance(rows, Tensor) else rows
        owner_n, place_n, found, order = self.owner_N[rows], self.place_N[rows], [], []
        for number, part in enumerate(self.parts):
            mine = (owner_n == number).nonzero().flatten()
            if len(mine):
                found.append(compute(part, place_n[mine], mine))
                order.append(mine)
        back = torch.cat(order).argsort()
        return torch.cat(found)[back.to(found[0].device)]


@dataclass(frozen=True)
class Some:
    """A signal restricted to some of its targets: `rows` are their indices in `whole`."""

    whole: Signal
    rows: Rows

    def divergence(self, divergence: Divergence, rows: Rows, log_q_nV: Tensor, temperature: float = 1.0) -> Tensor:
        return self.whole.divergence(divergence, self._of(rows), log_q_nV, temperature)

    def log_probs(self, rows: Rows, log_q_nV: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        return self.whole.log_probs(self._of(rows), log_q_nV, temperature)

    def label_log_probs(self, rows: Rows, labels_n: Tensor) -> Tensor:
        return self.whole.label_log_probs(self._of(rows), labels_n)

    def exact_metrics(self, rows: Rows, labels_n: Tensor, log_q_nV: Tensor | None) -> dict[str, Tensor]:
        return self.whole.exact_metrics(self._of(rows), labels_n, log_q_nV)

    def _of(self, rows: Rows) -> Rows:
        if isinstance(self.rows, Tensor):
            return self.rows[rows]
        first = self.rows.start or 0
        return slice(first + (rows.start or 0), first + rows.stop) if isinstance(rows, slice) else rows + first


def _at(signal: Signal, rows: Rows) -> Signal:
    return signal.at(rows) if hasattr(signal, "at") else Some(signal, rows)
