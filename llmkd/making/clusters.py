"""Clusters of texts: k-means (scikit-learn, the extra `make`) on TF-IDF, or on a model's mean hidden states."""

import importlib.util
from collections.abc import Sequence

import numpy as np

from ..errors import UserError


def refuse_without_clusters(setting: str) -> None:
    """UserError where scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise UserError(f"{setting}: needs scikit-learn; pip install llmkd[make]")


def by_words(texts: Sequence[str], clusters: int, seed: int) -> list[int]:
    """The cluster of each text by its TF-IDF (words and pairs of words, log counts, length 1)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    from .filters.words import words

    vectors = TfidfVectorizer(analyzer=_one_and_two(words), sublinear_tf=True, dtype=np.float32)
    return k_means(vectors.fit_transform([text or " " for text in texts]), clusters, seed)


def _one_and_two(words):
    def of(text: str) -> list[str]:
        every = words(text) or [""]
        return [*every, *(f"{a} {b}" for a, b in zip(every, every[1:], strict=False))]

    return of


def k_means(vectors_ND, clusters: int, seed: int) -> list[int]:
    """The cluster of each row of a matrix [N, D], dense or sparse; clusters are numbered by the first row that they have."""
    from sklearn.cluster import KMeans

    clusters = min(clusters, vectors_ND.shape[0])
    found = KMeans(clusters, n_init=1, random_state=seed).fit(vectors_ND).labels_.tolist()
    number: dict[int, int] = {}
    return [number.setdefault(label, len(number)) for label in found]
