"""The examples of eval/speed/step.py in peers' formats, and the counts of tokens and targets of their steps."""

from .step_cases import Clock, Measurement
from .step_setup import IGNORE, Setup

MICRO = 4  # examples, or packed rows: torchtune's default


def examples_of(setup: Setup) -> list[dict]:
    """All examples step after step, as both take them: labels stand under their own tokens."""
    found = []
    for ids_L, marks_L in map(setup.data.example, setup.order):
        ids = ids_L.tolist()
        found.append({"tokens": ids, "labels": [y if m else IGNORE for y, m in zip(ids, marks_L.tolist(), strict=True)]})
    return found


def counted(setup: Setup, clock: Clock, steps: list[list[int]], passes: float, slots: int, **terms) -> Measurement:
    """`steps`: the examples of each."""
    tokens, targets = [setup.tokens(one) for one in steps], [sum(map(setup.targets, one)) for one in steps]
    return Measurement(clock.seconds, tokens, targets, passes, slots, steps[0], bytes=clock.gauge.taken, **terms)


def padded(setup: Setup) -> tuple[list[list[int]], list[dict], int]:
    """The examples of each step, all in order, and how many tokens batches of four take with padding."""
    batch = setup.options.batch
    steps = [setup.order[k * batch : (k + 1) * batch] for k in range(setup.options.steps + 1)]
    rows = [{"input_ids": one["tokens"], "labels": one["labels"]} for one in examples_of(setup)[: batch * len(steps)]]
    lengths = setup.data.lengths[setup.order][: len(rows)]
    return steps, rows, int(lengths.reshape(-1, MICRO).max(1).sum()) * MICRO
