"""How tokens are drawn, and the numbers by which they are: a function of seed, key and position alone. No torch."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """temperature 0: always the most likely token; else tokens are drawn from softmax(logits / temperature), of which is kept in this order

    top_k  the k most likely tokens (None: all)
    top_p  of those the fewest, most likely first, that have this share of their probability or more
    min_p  of those the ones that are at least min_p times as likely as the most likely one

    Of equally likely tokens those with the smaller ids come first. What a model's own generation config says counts for nothing.
    """

    temperature: float = 0.0
    max_new_tokens: int = 128
    seed: int = 0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0


def uniform(seed: int, key: int, position: int) -> float:
    """A number of [0, 1) by a counter-based generator, so that every place of every text has its own. `key`: 0 to 2^64 - 1."""
    bits = np.random.Philox(key=np.array([seed, key], np.uint64), counter=np.array([0, position, 0, 0], np.uint64))
    return float(np.random.Generator(bits).random())
