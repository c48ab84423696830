"""Metrics of a classifier from its answers: accuracy, macro F1 and the confusion matrix. Pure functions of numpy arrays."""

import numpy as np


def confusion(labels: np.ndarray, answers: np.ndarray, classes: int, weights: np.ndarray | None = None) -> np.ndarray:
    """The confusion matrix [classes, classes], float64: row i, column j counts the examples of class i that were answered with j.

    labels, answers   [examples], class numbers from 0
    weights           [examples], how much each counts; 1 without
    """
    of_each = np.bincount(np.asarray(labels) * classes + np.asarray(answers), weights, classes * classes)
    return of_each.reshape(classes, classes).astype(np.float64)


def accuracy(matrix: np.ndarray) -> float:
    """The share of right answers in a confusion matrix; NaN without examples."""
    total = matrix.sum()
    return float(np.trace(matrix) / total) if total else float("nan")


def class_f1(matrix: np.ndarray) -> np.ndarray:
    """F1 of each class [classes], 2 TP / (2 TP + FP + FN); 0 for a class without examples and answers."""
    right, both = np.diag(matrix), matrix.sum(0) + matrix.sum(1)
    return np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0)


def macro_f1(matrix: np.ndarray) -> float:
    """The mean of `class_f1` over all classes, also those without examples: scikit-learn's f1_score with all labels, average="macro" and
    zero_division=0. NaN without examples."""
    return float(class_f1(matrix).mean()) if matrix.sum() else float("nan")
