"""Replay: answers that the student wrote in earlier steps are drawn again instead of being written anew.

DistiLLM (Ko et al. 2024, arXiv 2402.03898, section 3.2): on-policy distillation spends most of its time on writing, and an answer from a few
steps ago is nearly as good as a new one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..config.on_policy import Replay
from ..config.schedule import value_at
from ..data.examples import TokenExamples
from .sampling import uniform

#: The share of fresh answers with the setting "decreasing".
DECREASING = {"from": 1.0, "to": 0.0}


@dataclass(frozen=True)
class Answer:
    """An answer that the student wrote in a step after an example's prompt: one or more token ids.

    weights   see `Completion`; None for an answer from the buffer
    """

    step: int
    example: int
    ids: tuple[int, ...]
    weights: tuple[float, ...] | None = None


class ReplayBuffer:
    """The newest `capacity` answers, first in, first out. It depends only on the answers and their steps, and is equal on all ranks.

    Until it is full, every answer is fresh. From then on an answer is fresh with a probability that may depend on the step, and enters the
    buffer after its step; otherwise it is drawn uniformly from the buffer. The draws depend only on seed and key.

    settings   None: no buffer, and every answer is fresh
    """

    def __init__(self, settings: Replay | None, seed: int, total_steps: int):
        self.capacity, self.seed, self.total_steps = settings.capacity if settings else 0, seed, total_steps
        ratio = settings.ratio if settings else 1.0
        self.ratio = DECREASING if ratio == "decreasing" else ratio
        self.answers: list[Answer] = []  # may exceed the capacity by the newest step's: a checkpoint may need the state before that step

    def draw(self, step: int, keys: Sequence[int]) -> list[Answer | None]:
        """For each key an earlier answer to use in this step, or None for one that is to be written."""
        self.answers = self._newest(self.answers)
        if len(self.answers) < self.capacity:
            return [None] * len(keys)
        fresh = value_at(self.ratio, step, self.total_steps)
        return [
            None if uniform(self.seed, key, 0) < fresh else self.answers[int(uniform(self.seed, key, 1) * len(self.answers))]
            for key in keys
        ]

    def add(self, answers: Sequence[Answer]) -> None:
        """Add the answers that were written in the step of the last `draw`, in the order of their keys."""
        self.answers += answers if self.capacity else []

    def _newest(self, answers: list[Answer]) -> list[Answer]:
        return answers[max(0, len(answers) - self.capacity) :]

    def state(self, step: int, examples: TokenExamples) -> dict[str, np.ndarray]:
        """The buffer after the newest step or the one before, as arrays for a checkpoint: all ids, and for each answer its offset, its step, and its
        example by index and by content. {} without a buffer."""
        kept = self._newest([one for one in self.answers if one.step <= step])
        found = {
            "ids": np.array([token for one in kept for token in one.ids], np.int32),
            "offsets": np.cumsum([0, *(len(one.ids) for one in kept)], dtype=np.int64),
            "steps": np.array([one.step for one in kept], np.int64),
            "examples": np.array([one.example for one in kept], np.int64),
            "hashes": np.array([examples.content_hash(one.example) for one in kept], "S16"),
        }
        return {f"replay.{name}": array for name, array in found.items()} if self.capacity else {}

    def restore(self, state: dict, examples: TokenExamples, vocab: int, longest: int) -> None:
        """Restore what `state` returned, from a checkpoint that also has its `step`. ValueError if it does not fit this run: the examples, ids below
        `vocab`, and answers of up to `longest` tokens."""
        if not self.capacity:
            return
        kinds = {"ids": "int32", "offsets": "int64", "steps": "int64", "examples": "int64", "hashes": "|S16"}
        arrays = [state.get(f"replay.{name}") for name in kinds]
        if any(one is None for one in arrays):
            raise ValueError("it has no replay buffer")
        if [(str(one.dtype), one.ndim) for one in arrays] != [(kind, 1) for kind in kinds.values()]:
            raise ValueError("its replay buffer has other arrays")
        ids, offsets, steps, chosen, hashes = arrays
        lengths, count = np.diff(offsets), len(steps)
        if not (len(lengths) == count == len(chosen) == len(hashes) and offsets[0] == 0 and offsets[-1] == len(ids)):
            raise ValueError("the arrays of its replay buffer have inconsistent lengths")
        if count > self.capacity:
            raise ValueError(f"its replay buffer holds {count} answers, but on_policy.replay.capacity is {self.capacity}")
        if count and (lengths.min() < 1 or lengths.max() > longest or ids.min() < 0 or ids.max() >= vocab):
            raise ValueError(f"its replay buffer holds an answer that is not of 1 to {longest} tokens of the vocabulary")
        if count and ((np.diff(steps) < 0).any() or steps[0] < 1 or steps[-1] > state["step"]):
            raise ValueError("its replay buffer holds answers of later steps, or in another order")
        for example, known in zip(chosen.tolist(), hashes.tolist(), strict=True):
            if not 0 <= example < len(examples) or examples.content_hash(example).encode() != known:
                raise ValueError(f"its replay buffer holds an answer to example {example}, which is a different one in this data")
        parts = [tuple(ids[start:end].tolist()) for start, end in zip(offsets[:-1], offsets[1:], strict=True)]
        self.answers = [Answer(*of) for of in zip(steps.tolist(), chosen.tolist(), parts, strict=True)]
