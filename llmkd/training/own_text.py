"""Validation of an on-policy run: what the student writes to held-out prompts, and how far it is from the teacher there."""

import random
from dataclasses import dataclass

import numpy as np

from ..data.examples import TokenExamples
from ..data.written import Prompts, answered
from ..rollouts.sampling import Sampling
from ..rollouts.writer import Writer, text_key, write_on_all_ranks

#: What is measured of the text itself, by the names of `Evaluator.validate`.
MEASURED = ("reverse_kl", "forward_kl", "entropy")


@dataclass(frozen=True)
class OwnText:
    """The student's answers to held-out prompts, drawn by the same numbers at every validation."""

    examples: TokenExamples
    prompts: Prompts
    chosen: tuple[int, ...]
    writer: Writer
    sampling: Sampling

    @classmethod
    def of(cls, examples: TokenExamples, prompts: Prompts, count: int, writer: Writer, sampling: Sampling) -> "OwnText":
        """`count` of the examples that may be answered, the same ones every time."""
        may = np.flatnonzero(prompts.may).tolist()
        chosen = sorted(random.Random("own text").sample(may, min(count, len(may))))
        return cls(examples, prompts, tuple(chosen), writer, sampling)

    def write(self, rank: int, ranks: int) -> tuple[TokenExamples, dict[str, float]]:
        """The answers as examples without weights, and their mean length and the share that ended by itself."""
        asked = self.prompts.ids(self.examples, self.chosen)
        keys = [text_key("held out", self.examples.content_hash(i)) for i in self.chosen]
        found = write_on_all_ranks(self.writer, asked, keys, self.sampling, rank, ranks)
        whole = [(i, one.ids) for i, one in zip(self.chosen, found, strict=True) if one.ids]
        data = (
            answered(self.examples, self.prompts, *map(list, zip(*whole, strict=True))).unweighted()
            if whole
            else self.examples.take(np.zeros(0, np.int64))
        )
        return data, {
            "own_length": sum(len(one.ids) for one in found) / len(found),
            "own_finished": sum(one.finished for one in found) / len(found),
        }


def own_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Of the metrics on such examples those that say something there."""
    return {f"own_{name}": metrics[name] for name in MEASURED if name in metrics}
