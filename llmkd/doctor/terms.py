"""Checks of loss.features and loss.attention: their values and gradients on the user's own rows against the textbook in float64."""

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..batch import Batch, View
from ..losses.terms import StudentOutputs, Term
from ..signals import AttentionInputs, Signal
from . import plain
from .check import BUG, Check, Result, failed, not_asked, passed, short
from .setup import Setup

_TARGETS = 8  # of each example, up to twice as many; the textbook computes them one by one


def hidden_states(setup: Setup) -> Result:
    """The values at each target, the gradients of the student's states and of the maps, and the measured scales."""
    settings = setup.small.loss.features
    if not settings:
        return not_asked("the recipe has no loss.features")
    term: Term = setup.distiller.terms["features"]
    weights = [(one.weight, one.bias) for one in term.maps or ()]

    def textbook(student: StudentOutputs, signal: Signal, few: Batch) -> Tensor:
        each = []
        for n, (s, t) in enumerate(term.pairs):
            own, of_teacher = student.layers[s].double(), signal.layers[t].double()
            own = own @ weights[n][0].double().T + weights[n][1].double() if weights else own
            each.append(plain.between_states(settings.distance, own, of_teacher) / term.scales[n].double())
        return sum(each) / len(each)

    result = _compared(setup, term, textbook, [p for pair in weights for p in pair])
    if result.status != "passed" or settings.scale == "none":
        return result
    signal, worst = setup.signal(setup.batch()), 0.0
    for n, (_, t) in enumerate(term.pairs):
        states_NE = signal.layers[t].double()
        spread = plain.between_states(settings.distance, states_NE, states_NE.mean(0, keepdim=True).expand_as(states_NE)).mean()
        worst = max(worst, abs(term.scales[n].item() / spread.item() - 1))
    found = f"{result.found}; the teacher's spread by {short(worst)}"
    return passed(found) if worst <= 1e-3 else failed(found, setup.cause)


def attention(setup: Setup) -> Result:
    """The values at each target, and the gradients of the student's queries, keys and values."""
    settings = setup.small.loss.attention
    if not settings:
        return not_asked("the recipe has no loss.attention")
    term: Term = setup.distiller.terms["attention"]

    def textbook(student: StudentOutputs, signal: Signal, few: Batch) -> Tensor:
        each, places = [], few.student.rows_N.tolist()
        for s, t in term.pairs:
            both = student.attention[s], signal.attention[t]
            if settings.what == "relations":
                each.append(plain.relations_apart(*both, places, settings.parts))
            else:
                each.append(plain.maps_apart(*both, places, settings.heads == "mean"))
        return sum(each) / len(each)

    return _compared(setup, term, textbook, [])


def _compared(setup: Setup, term: Term, textbook: Callable[..., Tensor], parameters: list[Tensor]) -> Result:
    """A term and its gradient against `textbook(student, signal, batch)` [N], example by example."""
    (name,), gaps, slopes, targets, dtypes = term.names, [], [], 0, set()
    for batch in _one_by_one(setup):
        with torch.no_grad():
            made = setup.student.outputs(batch.student, setup.distiller.student_taps)
        signal = setup.signal(batch)
        student = StudentOutputs(
            made.hidden_NH,
            setup.student.head,
            {n: x.clone().requires_grad_() for n, x in made.layers.items()},
            {n: x.each(lambda y: y.clone().requires_grad_()) for n, x in made.attention.items()},
        )
        given = [*parameters, *student.layers.values(), *(y for x in student.attention.values() for y in (x.query, x.key, x.value))]
        computed, value_N = term(student, signal, batch), textbook(student, signal, batch)
        gaps.append(((computed.rows[name].double() - value_N).abs() / value_N.abs().clamp_min(1.0)).max().item())
        gaps.append(abs(computed.total.item() - term.factor * value_N.sum().item()) / max(1.0, abs(term.factor * value_N.sum().item())))
        own, want = (torch.autograd.grad(total, given, allow_unused=True) for total in (computed.total, term.factor * value_N.sum()))
        if any((a is None) != (b is None) for a, b in zip(own, want, strict=True)):
            return failed(f"{name} has a gradient where the textbook has none, or none where it has one", BUG)
        apart, size = ([x.double() for x in some if x is not None] for some in (own, want))
        most = sum(x.square().sum() for x in size).sqrt().clamp_min(1e-30)
        slopes.append((sum((a - b).square().sum() for a, b in zip(apart, size, strict=True)).sqrt() / most).item())
        dtypes |= {x.dtype for x in [*given, *_tensors(signal)]}
        targets += batch.num_targets
    found = f"at {targets} targets {name} differs by {short(max(gaps))}, the gradient by {short(max(slopes))} of its size"
    exact = dtypes == {torch.float64}
    near = 1e-8 if exact else 1e-3 if dtypes <= {torch.float32, torch.float64} else 3e-2
    if max(gaps) <= (1e-9 if exact else 1e-4) and max(slopes) <= near:
        return passed(found)
    return failed(found, setup.cause)


def _one_by_one(setup: Setup) -> Iterator[Batch]:
    """A batch for each of the few examples, with a few of its targets."""
    for i in range(len(setup.few)):
        batch = setup.batch([i])
        chosen_n = torch.arange(0, batch.num_targets, max(1, batch.num_targets // _TARGETS), device=setup.device)
        student = View(batch.student.inputs, batch.student.rows_N[chosen_n])
        same = batch.teacher is batch.student
        teacher = student if same else View(batch.teacher.inputs, batch.teacher.rows_N[chosen_n])
        examples = tuple(dataclasses.replace(one, num_targets=len(chosen_n)) for one in batch.examples)
        yield Batch(batch.labels_N[chosen_n], batch.example_N[chosen_n], student, teacher, examples)


def _tensors(signal: Signal) -> list[Tensor]:
    inside: list[AttentionInputs] = list(getattr(signal, "attention", {}).values())
    return [*getattr(signal, "layers", {}).values(), *(y for x in inside for y in (x.query, x.key, x.value))]


CHECKS = (
    Check("hidden states are compared as the formulas say", "Loss", "models", BUG, hidden_states),
    Check("attention is compared as the formulas say", "Loss", "models", BUG, attention),
)
