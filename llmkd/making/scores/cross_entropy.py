"""Cross-entropies of answers in context and alone, and the scores that are computed from them."""

from collections.abc import Sequence

import numpy as np

from ...data.examples import TokenExamples
from ...errors import UserError
from ...signals import Teacher
from ...training.validate import Evaluator
from .views import alone


def mean_per_target(evaluator: Evaluator, model, examples: TokenExamples, teacher: Teacher | None = None) -> dict[str, np.ndarray]:
    """Means over each example's targets, float64 [examples], in nats: ce of the model, and with a teacher of the same tokens also teacher_ce
    and forward_kl, KL(teacher || model)."""
    held_out = evaluator.validate([model], teacher, examples)[0]
    return {name: sums / held_out.targets for name, sums in held_out.sums.items()}


def instruction_following_difficulty(evaluator: Evaluator, model, examples: TokenExamples, start: int) -> dict[str, np.ndarray]:
    """ifd = exp(ce - ce_alone), with ce and ce_alone: the perplexity of the targets in their context over that of the same targets alone
    (Selective Reflection-Tuning, arXiv:2402.10110, equation 2). Above 1 the context does not help the model; each is float64 [examples].

    start  the token before the targets alone
    """
    ce = mean_per_target(evaluator, model, examples)["ce"]
    ce_alone = mean_per_target(evaluator, model, alone(examples, start))["ce"]
    return {"ce": ce, "ce_alone": ce_alone, "ifd": np.exp(ce - ce_alone)}


def refuse_unknown(scores: dict[str, np.ndarray], names: Sequence[str]) -> None:
    """UserError where a score is no finite number. names: of the rows, for the message."""
    for name, values in scores.items():
        wrong = np.flatnonzero(~np.isfinite(values))
        if len(wrong):
            raise UserError(
                f"score: {name} of {names[wrong[0]]} is {values[wrong[0]]} ({len(wrong)} rows have such a score); load the model in another dtype, such as float32"
            )
