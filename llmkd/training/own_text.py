"""Validation of an on-policy run on the student's own answers to held-out prompts: their divergence from the teacher, length and end."""

import random
from dataclasses import dataclass

import numpy as np

from ..data.examples import TokenExamples
from ..data.written import Prompts, answered
from ..rollouts.sampling import Sampling
from ..rollouts.writer import Writer, text_key, write_on_all_ranks

#: The metrics of `Evaluator.validate` that are reported for the student's own text.
MEASURED = ("reverse_kl", "forward_kl", "entropy")


@dataclass(frozen=True)
class OwnText:
    """Writes the student's answers to held-out prompts, with the same random numbers at every validation."""

    examples: TokenExamples
    prompts: Prompts
    chosen: tuple[int, ...]
    writer: Writer
    sampling: Sampling

    @classmethod
    def of(cls, examples: TokenExamples, prompts: Prompts, count: int, writer: Writer, sampling: Sampling) -> "OwnText":
        """With up to `count` of the examples that have a prompt, always the same ones."""
        may = np.flatnonzero(prompts.may).tolist()
        chosen = sorted(random.Random("own text").sample(may, min(count, len(may))))
        return cls(examples, prompts, tuple(chosen), writer, sampling)

    def write(self, rank: int, ranks: int) -> tuple[TokenExamples, dict[str, float]]:
        """The answers as unweighted examples; and their mean length in tokens (`own_length`) and the share that ended by itself (`own_finished`)."""
        asked = self.prompts.ids(self.examples, self.chosen)
        keys = [text_key("held out", self.examples.content_hash(i)) for i in self.chosen]
        found = write_on_all_ranks(self.writer, asked, keys, self.sampling, rank, ranks)
        whole = [(i, one.ids) for i, one in zip(self.chosen, found, strict=True) if one.ids]
        if whole:
            answers = map(list, zip(*whole, strict=True))
            data = answered(self.examples, self.prompts, *answers).unweighted()
        else:
            data = self.examples.take(np.zeros(0, np.int64))
        return data, {
            "own_length": sum(len(one.ids) for one in found) / len(found),
            "own_finished": sum(one.finished for one in found) / len(found),
        }


def own_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that are reported for the student's own text, named own_NAME."""
    return {f"own_{name}": metrics[name] for name in MEASURED if name in metrics}
