"""Probabilities and decisions: whether 0.8 means eight in ten, and what is right and wrong at a threshold.

Everything is over the records of known truth, label by label, with n and positives beside it. Intervals are those of
`metrics.py`: patients drawn with replacement, the same replicates for every label, percentiles widened where needed
to hold the point. A replicate in which a number is not defined (no positive, nothing called) is left out of that
number's interval, and counted. Where every replicate agrees, as of a sensitivity of 1, the interval has no width: the
bootstrap cannot see what it has not drawn, and n and positives say how little that may be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import brentq
from scipy.special import expit

from ecgfm.scores.metrics import (
    AreaReplicates,
    Estimate,
    OperatingPoint,
    areas_of,
    bootstrap_weights,
    check_scores,
    divide,
    estimate,
    mean_of_defined,
    operating_point,
    patient_numbers,
    rank,
)

Binning = Literal["mass", "width"]

N_BINS = 15
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
MIN_POSITIVES_TO_FIT = 10
"""Positives, and negatives, from which on a label's temperature is fitted: one number from fewer is a guess."""

LARGEST_LOGIT = 50.0
"""A probability of exactly 0 or 1 counts as a logit of this size where a temperature is fitted."""


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability curve, by probability.

    low, high: its least and greatest probability (equal mass), or its ends (equal width)
    n: its records; mean_probability, share_present: over them. A curve is share_present over mean_probability
    """

    low: float
    high: float
    n: int
    mean_probability: float
    share_present: float


@dataclass(frozen=True)
class Calibration:
    """One label's probabilities.

    n: records of known truth; positives: those in which the label is present
    brier: mean squared difference of probability and truth; None where nothing is known
    ece: expected calibration error, the mean over the records of their bin's |mean_probability - share_present|; None
        where nothing is known. Drawing noise can only add to it, so replicates lie above the point and the interval
        reaches further up than down
    bins: the reliability curve; no bin is empty
    """

    label: str
    n: int
    positives: int
    brier: Estimate | None
    ece: Estimate | None
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Decisions:
    """One label's decisions at its threshold: present where the probability is at least so high.

    n, positives: as of `Calibration`; point: the four counts
    sensitivity, balanced_accuracy: None where there is no positive (or for the latter, no negative)
    specificity: None where there is no negative
    ppv, npv: None where none is called present, absent
    f1: None where there is no positive: a label without any is left out, not 0
    accuracy: None where nothing is known
    """

    label: str
    n: int
    positives: int
    point: OperatingPoint
    sensitivity: Estimate | None
    specificity: Estimate | None
    ppv: Estimate | None
    npv: Estimate | None
    f1: Estimate | None
    accuracy: Estimate | None
    balanced_accuracy: Estimate | None


MEASURES = tuple(field.name for field in fields(Decisions))[4:]


@dataclass(frozen=True)
class Average:
    """One measure over all labels.

    macro: mean over the labels that have it; weighted: the same, each weighted by its positives; micro: of all known
        pairs of record and label taken together, those of labels left out of the others too
    labels: how many the macro mean is over; left_out: those that are not in it, by name
    """

    macro: Estimate | None
    weighted: Estimate | None
    micro: Estimate | None
    labels: int
    left_out: tuple[str, ...]


def brier(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """(label,) mean squared difference of probability and truth (Brier 1950); NaN where nothing is known.

    truth: (record, label) 0, 1, or NaN for unknown; probabilities: (record, label). No positive is needed: a label
    that is nowhere present has a score too, but only labels of equal prevalence compare.

    >>> brier(np.array([[1], [0], [np.nan]]), np.array([[0.8], [0.4], [0.9]]))
    array([0.1])
    """
    _check_probabilities(truth, probabilities)
    known = ~np.isnan(truth)
    squared = np.where(known, (probabilities - np.where(known, truth, 0.0)) ** 2, 0.0)
    return divide(squared.sum(axis=0), known.sum(axis=0))


def reliability(
    truth: np.ndarray, probabilities: np.ndarray, *, n_bins: int = N_BINS, binning: Binning = "mass"
) -> tuple[Bin, ...]:
    """The reliability curve of one label: (record,) truth 0, 1 or NaN for unknown, (record,) probabilities.

    binning: `mass`, bins of equal numbers of records (Nguyen and O'Connor 2015), or `width`, of equal ranges of
        probability (Naeini et al. 2015). Equal mass is the default: findings are rare, so that of bins of equal width
        the lowest holds nearly every record and the rest a handful. Equal probabilities are never parted, so that
        there may be fewer bins than asked for, and of unequal mass; empty bins are left out.
    """
    _check_probabilities(truth[:, None], probabilities[:, None])
    rows, number = _bin_numbers(truth, probabilities, n_bins, binning)
    bins = []
    for place in np.unique(number):
        mine = rows[number == place]
        p = probabilities[mine].astype(np.float64)
        low, high = (p.min(), p.max()) if binning == "mass" else (place / n_bins, (place + 1) / n_bins)
        bins.append(Bin(float(low), float(high), len(mine), float(p.mean()), float(truth[mine].mean())))
    return tuple(bins)


def ece(bins: Sequence[Bin]) -> float:
    """Expected calibration error of one label's reliability curve; NaN of no bins."""
    n = sum(one.n for one in bins)
    gaps = sum(one.n * abs(one.mean_probability - one.share_present) for one in bins)
    return gaps / n if n else float("nan")


def calibration(
    truth: np.ndarray,
    probabilities: np.ndarray,
    labels: Sequence[str],
    patients: Sequence[str | None],
    *,
    n_bins: int = N_BINS,
    binning: Binning = "mass",
    n_replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Calibration, ...]:
    """Brier score, expected calibration error and reliability curve of every label, with intervals by patient.

    The bins are those of all records and stay in the replicates.

    truth: (record, label) 0, 1, or NaN for unknown; probabilities: (record, label)
    patients: (record,), None where unknown; binning: as of `reliability`

    Raises:
        ValueError: shapes that do not belong together, a truth that is not 0, 1 or NaN, a probability outside 0 to 1.
    """
    _check_shapes(truth, labels, patients)
    _check_probabilities(truth, probabilities)
    n_labels = len(labels)
    known = ~np.isnan(truth)
    gap = np.where(known, probabilities - np.where(known, truth, 0.0), 0.0)
    binned = [_bin_numbers(truth[:, k], probabilities[:, k], n_bins, binning) for k in range(n_labels)]
    # One row for each bin of each label, so that all of them are one product with the weights of the replicates.
    rows = np.concatenate([rows for rows, _ in binned]) if n_labels else np.empty(0, dtype=np.int64)
    of_label = np.repeat(np.arange(n_labels), [len(rows) for rows, _ in binned])
    of_bin = of_label * n_bins + (np.concatenate([number for _, number in binned]) if n_labels else rows)
    gaps = sparse.csr_array((gap[rows, of_label], (of_bin, rows)), shape=(n_labels * n_bins, len(truth)))
    squared, counted = (gap**2).T.copy(), known.T.astype(np.float64)

    def measures(weights: np.ndarray) -> np.ndarray:
        """(Brier and ECE, label, replicate) under weights (record, replicate)."""
        n = counted @ weights
        errors = np.abs(gaps @ weights).reshape(n_labels, n_bins, -1).sum(axis=1)
        return np.stack([divide(squared @ weights, n), divide(errors, n)])

    points, replicates = _bootstrap(measures, patients, n_replicates, seed)
    return tuple(
        Calibration(
            label,
            int(known[:, k].sum()),
            int((truth[:, k] == 1).sum()),
            brier=estimate(float(points[0, k]), replicates[0, k], confidence),
            ece=estimate(float(points[1, k]), replicates[1, k], confidence),
            bins=reliability(truth[:, k], probabilities[:, k], n_bins=n_bins, binning=binning),
        )
        for k, label in enumerate(labels)
    )


class Fitted(NamedTuple):
    """What makes probabilities of logits, label by label: `scale`. temperatures, shifts: (label,) float64"""

    temperatures: np.ndarray
    shifts: np.ndarray


def fit_calibration(truth: np.ndarray, logits: np.ndarray, *, min_positives: int = MIN_POSITIVES_TO_FIT) -> Fitted:
    """The temperature and shift of each label that together minimise the log loss of `scale(logits, ...)`.

    Platt 1999 (Advances in Large Margin Classifiers, pages 61-74), one pair per label, with the temperature of Guo et
    al. 2017 (arXiv 1706.04599) as the inverse of the slope. A temperature alone cannot move probabilities that a
    training with weighted positives has moved. The log loss is convex in 1 / temperature and shift, so the root of its
    slopes is the one minimum: the same data give the same numbers. A label with fewer than `min_positives` positives
    or negatives keeps 1 and 0. Temperatures stay within `MIN_TEMPERATURE` and `MAX_TEMPERATURE`; classes that are
    apart without error go to the former.

    truth: (record, label) 0, 1, or NaN for unknown, of records that no training step has seen; logits: (record, label)

    Raises:
        ValueError: shapes that do not belong together, a truth that is not 0, 1 or NaN, a logit that is not a number.
    """
    check_scores(truth, logits)
    temperatures, shifts = np.ones(truth.shape[1]), np.zeros(truth.shape[1])
    for k in range(truth.shape[1]):
        known = ~np.isnan(truth[:, k])
        y, z = truth[known, k], np.clip(logits[known, k].astype(np.float64), -LARGEST_LOGIT, LARGEST_LOGIT)
        if min(int(y.sum()), int(len(y) - y.sum())) >= max(1, min_positives) and np.ptp(z):
            temperatures[k], shifts[k] = _fit_label(y, z)
    return Fitted(temperatures, shifts)


def _fit_label(y: np.ndarray, z: np.ndarray) -> tuple[float, float]:
    """The temperature and shift of one label with both classes, whose logits are not all equal."""

    def shift_at(sharpness: float) -> float:
        widest = sharpness * LARGEST_LOGIT + 50  # there every probability is on one side
        return float(
            brentq(lambda shift: float((expit(sharpness * z + shift) - y).mean()), -widest, widest, xtol=1e-12)
        )

    def slope(sharpness: float) -> float:
        return float((z * (expit(sharpness * z + shift_at(sharpness)) - y)).mean())

    flattest, sharpest = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if slope(flattest) >= 0:
        sharpness = flattest
    elif slope(sharpest) <= 0:
        sharpness = sharpest
    else:
        sharpness = float(brentq(slope, flattest, sharpest, xtol=1e-12))
    return 1 / sharpness, shift_at(sharpness)


def scale(logits: np.ndarray, temperatures: np.ndarray, shifts: np.ndarray | float = 0.0) -> np.ndarray:
    """(record, label) float64 probabilities of logits divided by their label's temperature, and shifted.

    What is greater stays greater, so that AUROC, AUPRC and every decision at a threshold scaled with it are the same;
    but above a logit of about 37 a float64 probability is 1 and ties. To scale the probability of a record that is
    the mean or maximum of its segments', scale the record's: `scale(logits_of(probabilities), temperatures, shifts)`.
    Scaled before they are averaged, segments would change the order of records.

    >>> scale(np.array([[2.0, 0.0]]), temperatures=np.array([2.0, 1.0]), shifts=np.array([-1.0, 0.0]))
    array([[0.5, 0.5]])
    """
    return np.asarray(expit(logits.astype(np.float64) / temperatures + shifts), dtype=np.float64)


def logits_of(probabilities: np.ndarray) -> np.ndarray:
    """float64 logits of probabilities, at most `LARGEST_LOGIT` in size: what `expit` undoes."""
    p = probabilities.astype(np.float64)
    with np.errstate(divide="ignore"):
        return np.asarray(np.clip(np.log(p) - np.log1p(-p), -LARGEST_LOGIT, LARGEST_LOGIT), dtype=np.float64)


def threshold_at_sensitivity(truth: np.ndarray, scores: np.ndarray, sensitivity: float) -> float:
    """The highest score of one label, among those that occur, at which at least this share of positives is called.

    Raises:
        ValueError: no positive among the records of known truth, or a sensitivity that is not above 0 and at most 1.

    >>> threshold_at_sensitivity(np.array([0, 1, 0, 1]), np.array([0.1, 0.3, 0.4, 0.8]), sensitivity=0.9)
    0.3
    """
    if not 0 < sensitivity <= 1:
        raise ValueError(f"sensitivity must be above 0 and at most 1, found {sensitivity}")
    check_scores(truth, scores)
    positive = np.sort(scores[truth == 1])[::-1]
    if not len(positive):
        raise ValueError(f"expected a positive, found none of {int((~np.isnan(truth)).sum())} known records")
    # The fewest positives whose share is enough, as the same division says that is made when the share is reported.
    shares = np.arange(1, len(positive) + 1) / len(positive)
    return float(positive[int(np.searchsorted(shares, sensitivity))])


def threshold_at_specificity(truth: np.ndarray, scores: np.ndarray, specificity: float) -> float:
    """The lowest score of one label, among those that occur, at which at least this share of negatives is not called.

    Where even the highest calls too many, the next number above it, at which nothing is called.

    Raises:
        ValueError: no negative among the records of known truth, or a specificity that is not between 0 and 1.
    """
    if not 0 <= specificity <= 1:
        raise ValueError(f"specificity must be between 0 and 1, found {specificity}")
    check_scores(truth, scores)
    negative = np.sort(scores[truth == 0])
    if not len(negative):
        raise ValueError(f"expected a negative, found none of {int((~np.isnan(truth)).sum())} known records")
    candidates = np.unique(scores[~np.isnan(truth)])
    shares = np.searchsorted(negative, candidates, side="left") / len(negative)
    enough = np.flatnonzero(shares >= specificity)
    return float(candidates[enough[0]] if len(enough) else np.nextafter(candidates[-1], np.inf))


def decisions(
    truth: np.ndarray,
    probabilities: np.ndarray,
    labels: Sequence[str],
    patients: Sequence[str | None],
    thresholds: Sequence[float],
    *,
    called: np.ndarray | None = None,
    n_replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[Decisions, ...]:
    """What is right and wrong at stored thresholds, label by label, with intervals by patient.

    truth: (record, label) 0, 1, or NaN for unknown; probabilities: (record, label); patients: (record,), None where
        unknown; thresholds: (label,), chosen on other records than these
    called: (record, label) bool, the decisions where they are not made at thresholds, which then are NaN: of labels
        that exclude each other

    Raises:
        ValueError: shapes that do not belong together, a truth that is not 0, 1 or NaN, a probability that is NaN.
    """
    _check_shapes(truth, labels, patients)
    check_scores(truth, probabilities)
    decided = _decided(probabilities, thresholds) if called is None else called
    outcomes = _outcomes(truth, decided)

    def measures(weights: np.ndarray) -> np.ndarray:
        return _of_counts(*(outcome @ weights for outcome in outcomes))

    points, replicates = _bootstrap(measures, patients, n_replicates, seed)
    return tuple(
        Decisions(
            label,
            int((~np.isnan(truth[:, k])).sum()),
            int((truth[:, k] == 1).sum()),
            operating_point(truth[:, k], decided[:, k], True)._replace(threshold=float(thresholds[k])),
            *(estimate(float(points[i, k]), replicates[i, k], confidence) for i in range(len(MEASURES))),
        )
        for k, label in enumerate(labels)
    )


def averages(
    truth: np.ndarray,
    probabilities: np.ndarray,
    labels: Sequence[str],
    patients: Sequence[str | None],
    thresholds: Sequence[float],
    areas: AreaReplicates,
    *,
    called: np.ndarray | None = None,
    min_positives: int = 1,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Average]:
    """`auroc`, `auprc` and `f1` of a model over all labels: macro, weighted by positives, and micro.

    A label counts in macro and weighted if it has at least `min_positives` positives, and for the areas as many
    negatives; the others are named. A replicate's means are over the labels that have the measure in it, weighted by
    the positives in it. These are scikit-learn's averages where every label has both classes.

    areas: of the same model, from `metrics.bootstrap_areas` with this seed; it says how many replicates there are
    called: as of `decisions`

    Raises:
        ValueError: as `decisions`, and a min_positives below 1.
    """
    if min_positives < 1:
        raise ValueError(f"min_positives must be at least 1, found {min_positives}")
    _check_shapes(truth, labels, patients)
    check_scores(truth, probabilities)
    known, positives = (~np.isnan(truth)).sum(axis=0), (truth == 1).sum(axis=0)
    outcomes = _outcomes(truth, _decided(probabilities, thresholds) if called is None else called)
    pooled_rows = np.flatnonzero(~np.isnan(truth).ravel())
    pooled = rank(truth.ravel(), probabilities.ravel())
    record = pooled.rows // max(1, truth.shape[1])  # of each pair of record and label, in the order of their scores
    pooled = pooled._replace(rows=np.arange(len(pooled_rows)))

    def measures(weights: np.ndarray) -> np.ndarray:
        """(micro AUROC, AUPRC, F1; then each label's F1; then its positives) under weights (record, replicate)."""
        counts = [outcome @ weights for outcome in outcomes]
        micro_f1 = _of_counts(*(count.sum(axis=0) for count in counts))[MEASURES.index("f1")]
        # The pairs are labels times as many as the records: a few replicates at a time keep the memory bounded.
        step = max(1, 2**21 // max(1, len(record)))
        parts = [
            np.stack(areas_of(pooled, weights[:, start : start + step][record]))
            for start in range(0, weights.shape[1], step)
        ]
        f1 = _of_counts(*counts)[MEASURES.index("f1")]
        return np.concatenate([np.concatenate(parts, axis=1), micro_f1[None], f1, counts[0] + counts[1]])

    points, replicates = _bootstrap(measures, patients, areas.replicates.shape[2], seed)
    n_labels = len(labels)
    by_label = {
        "auroc": (areas.points[0], areas.replicates[0]),
        "auprc": (areas.points[1], areas.replicates[1]),
        "f1": (points[3 : 3 + n_labels], replicates[3 : 3 + n_labels]),
    }
    result = {}
    for i, (name, (point, of_replicate)) in enumerate(by_label.items()):
        enough = positives >= min_positives
        if name != "f1":
            enough &= known - positives >= min_positives
        means = [
            estimate(
                float(mean_of_defined(point[enough, None], weight)[0]),
                mean_of_defined(of_replicate[enough], weight_r),
                confidence,
            )
            for weight, weight_r in (
                (np.ones((int(enough.sum()), 1)), np.ones((int(enough.sum()), 1))),
                (positives[enough, None].astype(np.float64), replicates[3 + n_labels :][enough]),
            )
        ]
        result[name] = Average(
            macro=means[0],
            weighted=means[1],
            micro=estimate(float(points[i]), replicates[i], confidence),
            labels=int(enough.sum()),
            left_out=tuple(label for label, counts_in in zip(labels, enough, strict=True) if not counts_in),
        )
    return result


def _bootstrap(
    measures: Callable[[np.ndarray], np.ndarray], patients: Sequence[str | None], n_replicates: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """What `measures` says of every record once (...), and of the replicates (..., replicate)."""
    points = measures(np.ones((len(patients), 1)))
    replicates = np.empty((*points.shape[:-1], n_replicates))
    done = 0
    for weights in bootstrap_weights(patient_numbers(patients), n_replicates, seed):
        replicates[..., done : done + weights.shape[1]] = measures(weights)
        done += weights.shape[1]
    return points[..., 0], replicates


def _decided(probabilities: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """(record, label) bool: what is called present."""
    if len(thresholds) != probabilities.shape[1]:
        raise ValueError(f"expected a threshold for each of {probabilities.shape[1]} labels, found {len(thresholds)}")
    return np.asarray(probabilities >= np.asarray(thresholds))


def _outcomes(truth: np.ndarray, called: np.ndarray) -> list[np.ndarray]:
    """Four (label, record) float64 of 0 and 1: true positive, false negative, false positive, true negative."""
    present, absent = (truth == 1).T, (truth == 0).T
    return [
        (of & (called.T if is_called else ~called.T)).astype(np.float64)
        for of, is_called in ((present, True), (present, False), (absent, True), (absent, False))
    ]


def _of_counts(tp: np.ndarray, fn: np.ndarray, fp: np.ndarray, tn: np.ndarray) -> np.ndarray:
    """The `MEASURES` (measure, ...) of counts (...); NaN where one is not defined."""
    positives = tp + fn
    sensitivity, specificity = divide(tp, positives), divide(tn, fp + tn)
    f1 = divide(2 * tp, np.where(positives > 0, 2 * tp + fn + fp, 0))
    return np.stack(
        [
            sensitivity,
            specificity,
            divide(tp, tp + fp),
            divide(tn, tn + fn),
            f1,
            divide(tp + tn, positives + fp + tn),
            (sensitivity + specificity) / 2,
        ]
    )


def _bin_numbers(
    truth: np.ndarray, probabilities: np.ndarray, n_bins: int, binning: Binning
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of known truth of one label, and the bin from 0 of each."""
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, found {n_bins}")
    rows = np.flatnonzero(~np.isnan(truth))
    p = probabilities[rows].astype(np.float64)
    if binning == "width":
        return rows, np.minimum((p * n_bins).astype(np.int64), n_bins - 1)
    # A run of equal probabilities goes where its middle is, twice the place so that it is a whole number.
    _, of_run, sizes = np.unique(p, return_inverse=True, return_counts=True)
    twice_middle = 2 * np.cumsum(sizes) - sizes - 1
    return rows, (twice_middle * n_bins // (2 * max(1, len(rows))))[of_run]


def _check_shapes(truth: np.ndarray, labels: Sequence[str], patients: Sequence[str | None]) -> None:
    if truth.shape != (len(patients), len(labels)):
        raise ValueError(f"expected truth of shape ({len(patients)}, {len(labels)}), found {truth.shape}")


def _check_probabilities(truth: np.ndarray, probabilities: np.ndarray) -> None:
    check_scores(truth, probabilities)
    if len(probabilities) and not (probabilities.min() >= 0 and probabilities.max() <= 1):
        raise ValueError(f"probabilities must be 0 to 1, found {probabilities.min():g} to {probabilities.max():g}")
