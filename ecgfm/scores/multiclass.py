"""Labels that exclude each other: their probabilities, which together are 1, one temperature for all, and how often the
most probable is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from ecgfm.scores.calibration import LARGEST_LOGIT, MAX_TEMPERATURE, MIN_POSITIVES_TO_FIT, MIN_TEMPERATURE
from ecgfm.scores.metrics import Estimate, bootstrap_weights, divide, estimate, mean_of_defined, patient_numbers


@dataclass(frozen=True)
class ClassAccuracy:
    """How often the most probable class is the true one.

    n: records of known class
    balanced_accuracy: the mean over the classes, those that are there, of the share of their records that is right
    """

    n: int
    accuracy: Estimate | None
    balanced_accuracy: Estimate | None


def softmax(logits: np.ndarray) -> np.ndarray:
    """(row, class) float64: the probabilities that logits mean; each row adds up to 1."""
    shifted = logits.astype(np.float64)
    powers = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), dtype=np.float64)


def at_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """(record, class) float64: the probabilities whose logarithms are divided by the temperature, and which add up to 1
    again. The most probable class stays so; but unlike with labels that stand alone, the order of the records by the
    probability of one class may change, since it hangs on the other classes too."""
    return softmax(_logarithms(probabilities) / temperature)


def fit_temperature(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """The one temperature of all classes that minimises the log loss of `at_temperature` (Guo et al. 2017, arXiv
    1706.04599). It is convex in 1 / temperature, so the root of its slope is the one minimum.

    1 where fewer than `MIN_POSITIVES_TO_FIT` records are of known class, and within the bounds of `calibration.py`.

    truth: (record, class), exactly one of a record 1, or NaN throughout where unknown; probabilities: (record, class)
    """
    known = _known(truth)
    if known.sum() < MIN_POSITIVES_TO_FIT:
        return 1.0
    z = _logarithms(probabilities[known])
    of_truth = z[truth[known] == 1]

    def slope(sharpness: float) -> float:
        return float(((softmax(sharpness * z) * z).sum(axis=1) - of_truth).mean())

    flattest, sharpest = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if slope(flattest) >= 0:
        return MAX_TEMPERATURE
    if slope(sharpest) <= 0:
        return MIN_TEMPERATURE
    return float(1 / brentq(slope, flattest, sharpest, xtol=1e-12))


def most_probable(probabilities: np.ndarray) -> np.ndarray:
    """(record, class) bool: the decision, one class of each record, the first of several equally probable ones."""
    return np.asarray(np.arange(probabilities.shape[1]) == probabilities.argmax(axis=1)[:, None])


def class_accuracy(
    truth: np.ndarray,
    probabilities: np.ndarray,
    patients: Sequence[str | None],
    *,
    n_replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ClassAccuracy:
    """Accuracy and balanced accuracy of the most probable class, with intervals by patient as of `metrics.py`.

    truth: (record, class), exactly one of a record 1, or NaN throughout where unknown; probabilities: (record, class)
    patients: (record,), None where unknown

    Raises:
        ValueError: shapes that do not belong together, or a record of no class or of several.
    """
    if truth.shape != probabilities.shape or len(truth) != len(patients):
        raise ValueError(f"expected truth of shape {probabilities.shape} and as many patients, found {truth.shape}")
    known = _known(truth)
    of_class = (truth == 1).astype(np.float64)
    if (of_class[known].sum(axis=1) != 1).any():
        raise ValueError("expected exactly one class in each record of known class")
    right = of_class * most_probable(probabilities)

    def measures(weights: np.ndarray) -> np.ndarray:
        """(accuracy and balanced accuracy, replicate) under weights (record, replicate)."""
        hit, there = right.T @ weights, of_class.T @ weights
        return np.stack([divide(hit.sum(axis=0), there.sum(axis=0)), mean_of_defined(divide(hit, there))])

    points = measures(np.ones((len(truth), 1)))[:, 0]
    drawn = bootstrap_weights(patient_numbers(patients), n_replicates, seed)
    replicates = np.concatenate([measures(weights) for weights in drawn], axis=1)
    both = [estimate(float(points[i]), replicates[i], confidence) for i in range(2)]
    return ClassAccuracy(int(known.sum()), *both)


def _known(truth: np.ndarray) -> np.ndarray:
    return np.asarray(~np.isnan(truth).any(axis=1))


def _logarithms(probabilities: np.ndarray) -> np.ndarray:
    p = probabilities.astype(np.float64)
    return np.log(np.maximum(p, np.exp(-LARGEST_LOGIT)))
