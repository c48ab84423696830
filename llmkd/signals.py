"""`Signal`, a teacher's output for the N targets of a batch, and `Teacher`, which computes it.

`Taps` name what a loss term reads inside a model, apart from its last hidden states.

Shape letters: B examples, T positions, N targets (supervised positions), n targets of one chunk, V entries of the
real vocabulary, H hidden width, K entries that a sparse signal keeps, E events over which two models are compared
(V, or fewer for a sparse signal).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from .batch import Batch, Rows
from .head import Head

#: A function of the log-probabilities of student and teacher over the same events, both [n, E]; returns their divergence [n], in nats.
Divergence = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Taps:
    """The intermediate tensors that a model's forward pass is to return, apart from its last hidden states. Layers are counted from 1.

    layers      hidden states at the targets after these layers; 0 are the embeddings. Those of the last layer are before the final norm
    attention   queries, keys and values of the attention in these layers (`AttentionInputs`)
    queries     whether queries are needed at all positions; otherwise those of the last layer are valid at the targets only
    """

    layers: frozenset[int] = frozenset()
    attention: frozenset[int] = frozenset()
    queries: bool = False

    def __or__(self, other: "Taps") -> "Taps":
        return Taps(self.layers | other.layers, self.attention | other.attention, self.queries or other.queries)


NO_TAPS = Taps()


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys and values of one layer's attention, at all positions of the model's inputs, after rotary position embedding if it has one.

    query, key, value   [B, heads, T, D]; keys and values may have fewer heads, each shared by an equal number of query heads
    scaling             factor of the products of queries and keys before the softmax
    window              how many positions a position sees, including itself; None: all before it
    softcap             scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118, section 2); None: no soft cap
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None
    softcap: float | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "AttentionInputs":
        return AttentionInputs(change(self.query), change(self.key), change(self.value), self.scaling, self.window, self.softcap)


class Signal(Protocol):
    """A teacher's output for the N targets of one batch.

    `rows` selects n of the N targets: a slice, or their indices. `log_q_nV` are the student's log-probabilities
    for those targets at `temperature`. All log-probabilities are natural logarithms over the real vocabulary.

    A signal may also have `at(rows)`, which returns the signal for those targets alone, with everything computed that several calls would
    otherwise compute again, such as the products with heads.
    """

    #: Whether `log_probs` returns the teacher's exact distribution; then the loss may use a gradient in closed form.
    full_distribution: ClassVar[bool]

    def divergence(self, divergence: Divergence, rows: Rows, log_q_nV: Tensor, temperature: float = 1.0) -> Tensor:
        """The divergence between student and teacher at those targets, [n], differentiable in `log_q_nV`."""

    def log_probs(self, rows: Rows, log_q_nV: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """The teacher's log-probabilities at `temperature` for those targets, [n, V].

        Where the signal knows only the total mass of some tokens (the tail of a top-k record), that mass is
        distributed over them in proportion to the student's probabilities, or evenly without `log_q_nV`.
        """

    def label_log_probs(self, rows: Rows, labels_n: Tensor) -> Tensor:
        """The teacher's log-probability of each target's own token, at temperature 1, [n]."""

    def exact_metrics(self, rows: Rows, labels_n: Tensor, log_q_nV: Tensor | None) -> dict[str, Tensor]:
        """The `TEACHER_METRICS`, [n] each, that this signal has exactly although its `log_probs` are approximate.

        An example is the teacher's entropy, which a top-k record stores. Without `log_q_nV`, metrics that need it are left out.
        """


#: Validation metrics that need a teacher. A teacher known only from sampled tokens supports a subset.
TEACHER_METRICS = ("forward_kl", "reverse_kl", "top1_agreement", "teacher_ce", "teacher_entropy")


class Teacher(Protocol):
    """A callable from a batch to a signal. It never trains, and it keeps no gradient."""

    metrics: tuple[str, ...]  # the TEACHER_METRICS that its signals support

    def __call__(self, batch: Batch) -> Signal: ...


class FullDistribution:
    """Base class of signals whose `log_probs` returns the teacher's exact distribution; a subclass defines `log_probs`.

    A subclass that overrides `divergence` gets `full_distribution = False`, unless it sets that itself.
    """

    full_distribution: ClassVar[bool] = True

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "divergence" in cls.__dict__ and "full_distribution" not in cls.__dict__:
            cls.full_distribution = False

    def log_probs(self, rows: Rows, log_q_nV: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        raise NotImplementedError

    def divergence(self, divergence: Divergence, rows: Rows, log_q_nV: Tensor, temperature: float = 1.0) -> Tensor:
        return divergence(log_q_nV, self.log_probs(rows, log_q_nV, temperature))

    def label_log_probs(self, rows: Rows, labels_n: Tensor) -> Tensor:
        return self.log_probs(rows).gather(-1, labels_n[:, None])[:, 0]

    def exact_metrics(self, rows: Rows, labels_n: Tensor, log_q_nV: Tensor | None) -> dict[str, Tensor]:
        return {}


class KeptLogits:
    """A teacher's logits at chunks of targets: computed for the first student of a micro-batch, and kept for the others.

    students   their number; a chunk is dropped after the last one has read it
    """

    def __init__(self, students: int):
        self.students, self._held = students, {}

    def __call__(self, rows: Rows, compute: Callable[[], Tensor]) -> Tensor | None:
        """The logits [n, V] at a slice of targets, which must not be changed; None for rows that are no slice, or if the memory limit is reached."""
        if not isinstance(rows, slice):
            return None
        logits_nV, left = self._held.pop((rows.start, rows.stop), (None, self.students))
        if logits_nV is None:
            if sum(kept_nV.nbytes for kept_nV, _ in self._held.values()) >= MOST_KEPT:
                return None
            logits_nV = compute()
        if left > 1:
            self._held[rows.start, rows.stop] = logits_nV, left - 1
        return logits_nV


#: The limit in bytes on a teacher's logits that are kept at a time, apart from the chunk that was just computed.
MOST_KEPT = 256 << 20


def for_students(signal: Signal, students: int) -> Signal:
    """The same signal for several students that read it one after the other, so that the teacher's head is computed once for all of them."""
    return replace(signal, kept=KeptLogits(students)) if students > 1 and type(signal) is Dense else signal


@dataclass(frozen=True)
class Dense(FullDistribution):
    """The teacher's last hidden states [N, H] and its head: its exact distribution, computed one chunk at a time.

    layers, attention   the outputs of `Taps`, by layer: hidden states [N, H], and inputs of attention
    kept                see `for_students`
    """

    hidden_NH: Tensor
    head: Head
    layers: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    kept: KeptLogits | None = None

    def at(self, rows: Rows) -> "Dense":
        """The signal at these targets alone, with their logits in place of hidden states, so that the head is computed once."""
        with torch.no_grad():
            logits_nV = self.head.logits(self.hidden_NH[rows])
        return replace(self, hidden_NH=logits_nV, head=Head(nn.Identity(), self.head.vocab), layers={}, attention={}, kept=None)

    def log_probs(self, rows: Rows, log_q_nV: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        with torch.no_grad():
            logits_nV = self.head.logits(self.hidden_NH[rows])
            return torch.log_softmax(logits_nV if temperature == 1 else logits_nV / temperature, dim=-1)
