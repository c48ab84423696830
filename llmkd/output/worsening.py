"""Warnings if a run ended worse than it began, with the likely reasons."""

from collections.abc import Iterator, Sequence

from ..config.recipe import Loss, Optim
from ..console import count

#: Held-out metrics that training should lower, and their names in sentences.
LOWER_IS_BETTER = {"ce": "CE", "forward_kl": "KL to the teacher"}
_FEW = 10  # fewer steps do not show a reason


def worsened(before: dict, after: dict, loss: Loss) -> list[str]:
    """The held-out metrics that are higher after the run than before. KL is considered only if the student distils."""
    names = [name for name in LOWER_IS_BETTER if name == "ce" or loss.kd_ratio]
    return [name for name in names if name in before and name in after and not after[name] <= before[name]]


def sentences(records: Sequence[dict], loss: Loss, optim: Optim) -> Iterator[str]:
    """One line for each metric that became worse. `records`: those of metrics.jsonl."""
    held_out = [(record["step"], record["validation"]) for record in records if "validation" in record]
    if len(held_out) < 2 or held_out[0][0] != 0:  # the record of step 0 may be lost
        return
    before, after = held_out[0][1], held_out[-1][1]
    for name in worsened(before, after, loss):
        reasons = "; ".join(_reasons(name, held_out, [record["loss"] for record in records if "loss" in record], loss, optim))
        yield f"worse than before training: {LOWER_IS_BETTER[name]} on the held-out rows rose from {before[name]:.4f} to {after[name]:.4f}: {reasons}"


def _reasons(name: str, held_out: list[tuple[int, dict]], losses: list[float], loss: Loss, optim: Optim) -> Iterator[str]:
    (_, before), (_, after) = held_out[0], held_out[-1]
    step, best = min(((step, values[name]) for step, values in held_out if name in values), key=lambda one: one[1])
    if (last := held_out[-1][0]) < _FEW:
        yield f"{count(last, 'step')} are too few to tell why; train for more, and if it still rises, lower the learning rate ({optim.lr:g})"
        return
    tenth = -(-len(losses) // 10)
    rose = sum(losses[-tenth:]) >= sum(losses[:tenth])
    if rose:
        yield f"the training loss did not fall either: the learning rate ({optim.lr:g}) is likely too high"
    elif step > held_out[0][0]:
        yield f"it was {best:.4f} at step {step}, so the run was too long for this data; checkpoint.best_by: {name} keeps such a step, and llmkd export RUN --checkpoint best writes it"
    else:
        yield f"the training loss fell: the held-out rows are unlike the training rows, or the learning rate ({optim.lr:g}) is too high"
    if loss.kd_ratio and before.get("teacher_ce", -1) >= before["ce"]:
        yield f"the teacher's CE there ({before['teacher_ce']:.4f}) is no better than the student's was, so it has little to teach"
    elif name == "ce" and loss.kd_ratio and after.get("forward_kl", 0) < before.get("forward_kl", 0):
        yield f"the student did come closer to the teacher, whose CE is {before['teacher_ce']:.4f}"
