"""Sampling settings, and random numbers that are a function of seed, key and position only. No torch."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0: always the most likely token. Otherwise tokens are drawn from softmax(logits / temperature), restricted
    in this order to

    top_k  the k most likely tokens (None: all)
    top_p  of these the fewest, most likely first, that together have at least this share of their probability
    min_p  of these the tokens that are at least min_p times as likely as the most likely one

    Of equally likely tokens those with smaller ids come first. A model's own generation config is ignored.
    """

    temperature: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0


def uniform(seed: int, key: int, position: int) -> float:
    """A number in [0, 1) from a counter-based generator, so that every position of every text has its own. `key`: 0 to 2^64 - 1."""
    bits = np.random.Philox(key=np.array([seed, key], np.uint64), counter=np.array([0, position, 0, 0], np.uint64))
    return float(np.random.Generator(bits).random())
