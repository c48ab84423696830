"""How the examples of eval/speed/step.py reach peers, and what is counted of their steps."""

from .step_cases import Clock, Round
from .step_world import IGNORE, World

MICRO = 4  # examples, or packed rows: torchtune's default


def examples_of(world: World) -> list[dict]:
    """All examples step after step, as both take them: labels stand under their own tokens."""
    found = []
    for ids_L, marks_L in map(world.data.example, world.order):
        ids = ids_L.tolist()
        found.append({"tokens": ids, "labels": [y if m else IGNORE for y, m in zip(ids, marks_L.tolist(), strict=True)]})
    return found


def counted(world: World, clock: Clock, steps: list[list[int]], passes: float, slots: int, **terms) -> Round:
    """`steps`: the examples of each."""
    tokens, targets = [world.tokens(one) for one in steps], [sum(map(world.targets, one)) for one in steps]
    return Round(clock.seconds, tokens, targets, passes, slots, steps[0], bytes=clock.gauge.taken, **terms)


def padded(world: World) -> tuple[list[list[int]], list[dict], int]:
    """The examples of each step, all in order, and how many tokens batches of four take with padding."""
    batch = world.options.batch
    steps = [world.order[k * batch : (k + 1) * batch] for k in range(world.options.steps + 1)]
    rows = [{"input_ids": one["tokens"], "labels": one["labels"]} for one in examples_of(world)[: batch * len(steps)]]
    lengths = world.data.lengths[world.order][: len(rows)]
    return steps, rows, int(lengths.reshape(-1, MICRO).max(1).sum()) * MICRO
