"""What is taken for what: of labels that stand side by side, which is called where another is missed; of classes that
exclude each other, the matrix of truth and decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecgfm.ecg import InputError


@dataclass(frozen=True)
class ConfusedPair:
    """Two labels of which one was called where the other is.

    missed, called: the labels
    n: records in which `missed` is present and not called, and `called` is absent and called
    with_missed: records in which `missed` is present and `called` known; falsely_called: those in which `called` is
        absent and called, and `missed` known. `n` is of both
    """

    missed: str
    called: str
    n: int
    with_missed: int
    falsely_called: int


@dataclass(frozen=True)
class ConfusionMatrix:
    """Of classes of which every record has exactly one.

    counts: (true class, called class) records
    """

    classes: tuple[str, ...]
    counts: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """(true class, called class): of the records of the true class; NaN where there are none."""
        whole = self.counts.sum(axis=1, keepdims=True)
        shares = np.full(self.counts.shape, np.nan)
        np.divide(self.counts, whole, out=shares, where=whole > 0)
        return shares


def confused_pairs(truth: np.ndarray, called: np.ndarray, labels: Sequence[str]) -> list[ConfusedPair]:
    """Every pair of labels that was confused in some record, the most frequent first; in the order of the labels where
    equally frequent.

    A record with two labels missed and one called in error counts for two pairs: nobody can say which was taken for it.

    truth: (record, label) 0, 1, or NaN for unknown; called: (record, label) bool; labels: (label,) names
    """
    if truth.shape != called.shape or truth.shape[1] != len(labels):
        raise ValueError(f"expected truth and calls (record, {len(labels)}), found {truth.shape} and {called.shape}")
    present, absent = truth == 1, truth == 0
    known = (present | absent).astype(np.int64)
    missed, in_error = (present & ~called).astype(np.int64), (absent & called).astype(np.int64)
    n = missed.T @ in_error
    with_missed, falsely_called = present.astype(np.int64).T @ known, known.T @ in_error
    rows, columns = np.nonzero(n)
    order = np.lexsort((columns, rows, -n[rows, columns]))
    return [
        ConfusedPair(labels[a], labels[b], int(n[a, b]), int(with_missed[a, b]), int(falsely_called[a, b]))
        for a, b in zip(rows[order], columns[order], strict=True)
    ]


def confusion_matrix(truth: np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> ConfusionMatrix:
    """How often each class was called for each true one: the most probable is called, the first of equal ones.

    truth: (record, class), exactly one of a record 1 and the others 0, or NaN throughout where unknown, which is left
        out; probabilities: (record, class)

    Raises:
        InputError: a record of no class, or of several.
    """
    known = ~np.isnan(truth).any(axis=1)
    n_classes = (truth[known] == 1).sum(axis=1)
    if wrong := n_classes[n_classes != 1].tolist():
        raise InputError(
            f"classes exclude each other: expected exactly one of {', '.join(classes)} in a record, found "
            f"{len(wrong):,} of {len(n_classes):,} with none or several, the first with {wrong[0]}"
        )
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(counts, (truth[known].argmax(axis=1), probabilities[known].argmax(axis=1)), 1)
    return ConfusionMatrix(tuple(classes), counts)
