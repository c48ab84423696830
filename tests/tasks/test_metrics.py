"""Metrics of classifiers against scikit-learn, and by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from llmkd.tasks.metrics.classification import accuracy, class_f1, confusion, macro_f1


@pytest.mark.parametrize(("classes", "used", "seed"), [(2, 2, 0), (5, 5, 1), (7, 4, 2), (3, 1, 3)])
def test_they_are_those_of_scikit_learn_also_where_classes_are_absent(classes, used, seed):
    rng = np.random.default_rng(seed)
    labels, answers = rng.integers(0, used, 60), rng.integers(0, classes, 60)
    weights, every = rng.random(60), list(range(classes))
    for w in (None, weights):
        matrix = confusion(labels, answers, classes, w)
        how = {"sample_weight": w}
        assert np.allclose(matrix, confusion_matrix(labels, answers, labels=every, **how), rtol=1e-12)
        assert accuracy(matrix) == pytest.approx(accuracy_score(labels, answers, **how), rel=1e-12)
        of_each = f1_score(labels, answers, labels=every, average=None, zero_division=0, **how)
        assert np.allclose(class_f1(matrix), of_each, rtol=1e-12)
        assert macro_f1(matrix) == pytest.approx(of_each.mean(), rel=1e-12)


def test_a_case_by_hand():
    """Three classes, the last absent: F1 2/3 and 4/5 and 0, and three of four answers are right."""
    matrix = confusion(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), 3)
    assert matrix.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]
    assert accuracy(matrix) == 0.75 and macro_f1(matrix) == pytest.approx((2 / 3 + 4 / 5) / 3, rel=1e-15)
    none = confusion(np.zeros(0, int), np.zeros(0, int), 3)
    assert math.isnan(accuracy(none)) and math.isnan(macro_f1(none))
