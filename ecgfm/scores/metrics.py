"""How good predictions are: AUROC and AUPRC per label and macro, with intervals from a bootstrap over patients.

The rule of the intervals. Patients are drawn with replacement, as many as there are, without strata, and all records
of a drawn patient come along; a record of no known patient is a patient of its own. Every model and every label is
scored on the same replicates, so differences between models are paired. The interval is that of the percentiles,
widened where needed to hold the point estimate. A replicate in which a label has lost one class is left out of that
label's interval, and counted; the macro mean of such a replicate is that of its other labels.

A replicate is nothing but a whole-number weight per record, so all replicates of a label are scored in one pass over
its records in the order of their scores. Ties count as in scikit-learn, the judge in the tests: half a win for the
AUROC, one threshold for the AUPRC (average precision).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ecgfm.ecg import InputError

CHUNK = 2**18  # weights (records x replicates) held at a time: 2 MB

BOOTSTRAP_RULE = (
    "patients drawn with replacement, without strata; a record of no known patient is a patient of its own; percentile "
    "interval, widened where needed to hold the point estimate; replicates in which a label has one class are left out"
)


@dataclass(frozen=True)
class Estimate:
    """A number and how far it might be off.

    low, high: ends of the interval; None where no replicate could be scored
    replicates: bootstrap replicates behind the interval
    left_out: replicates that could not be scored
    """

    value: float
    low: float | None
    high: float | None
    replicates: int
    left_out: int


@dataclass(frozen=True)
class LabelScores:
    """One label's scores (or differences of scores).

    n: records of known label; positives: those in which it is present
    auroc, auprc: None where the known records are all of one class
    """

    label: str
    n: int
    positives: int
    auroc: Estimate | None
    auprc: Estimate | None


@dataclass(frozen=True)
class Scores:
    """One model's scores (or the differences of two models' scores).

    macro_auroc, macro_auprc: mean over the labels that have both classes; None where none has
    left_out: the labels that have one class only and are not in the macro means
    incomplete_replicates: replicates whose macro mean is over fewer labels, since some lost a class
    """

    n_records: int
    n_patients: int
    labels: tuple[LabelScores, ...]
    macro_auroc: Estimate | None
    macro_auprc: Estimate | None
    left_out: tuple[str, ...]
    incomplete_replicates: int


class PointScores(NamedTuple):
    """auroc, auprc: (label,) float64, NaN where the known records are all of one class"""

    auroc: np.ndarray
    auprc: np.ndarray


class AreaReplicates(NamedTuple):
    """One model's areas on all records and in every replicate; NaN where a label has one class there.

    points: (AUROC and AUPRC, label) float64; replicates: (AUROC and AUPRC, label, replicate) float64
    """

    points: np.ndarray
    replicates: np.ndarray


class OperatingPoint(NamedTuple):
    """Right and wrong decisions at a threshold: present where the score is at least the threshold."""

    threshold: float
    true_positives: int
    false_negatives: int
    false_positives: int
    true_negatives: int


class Ranked(NamedTuple):
    """One label's records of known truth, highest score first.

    rows: (known,) their rows; positive: (known, 1) float64; starts: (group,) first place of each run of equal scores
    """

    rows: np.ndarray
    positive: np.ndarray
    starts: np.ndarray


def auroc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve of one label: (record,) truth 0, 1 or NaN for unknown; NaN where of one class.

    >>> auroc(np.array([0, 0, 1, 1, np.nan]), np.array([0.1, 0.4, 0.35, 0.8, 0.9]))
    0.75
    """
    return float(point_scores(truth[:, None], scores[:, None]).auroc[0])


def auprc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Average precision of one label: (record,) truth 0, 1 or NaN for unknown; NaN where of one class.

    >>> round(auprc(np.array([0, 1, 0, 1]), np.array([0.1, 0.3, 0.4, 0.8])), 3)
    0.833
    """
    return float(point_scores(truth[:, None], scores[:, None]).auprc[0])


def point_scores(truth: np.ndarray, scores: np.ndarray) -> PointScores:
    """Both areas of every label, without intervals.

    truth: (record, label) 0, 1, or NaN for unknown; scores: (record, label), higher is more likely
    """
    check_scores(truth, scores)
    once = np.ones((len(truth), 1))
    areas = [areas_of(rank(truth[:, k], scores[:, k]), once) for k in range(truth.shape[1])]
    return PointScores(
        np.array([roc[0] for roc, _ in areas], dtype=np.float64), np.array([pr[0] for _, pr in areas], dtype=np.float64)
    )


def compare(
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    labels: Sequence[str],
    patients: Sequence[str | None],
    *,
    differences: Sequence[tuple[str, str]] = (),
    n_replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    areas: Mapping[str, AreaReplicates] | None = None,
) -> dict[str, Scores]:
    """The scores of models on the same records, and the paired differences of some of them.

    truth: (record, label) 0, 1, or NaN for unknown
    predictions: by model, (record, label)
    patients: (record,) the patient of each record, None where unknown
    differences: pairs of models; ("a", "b") gives an entry "a - b"
    areas: what `bootstrap_areas` gave for the same records and models, where it is at hand; n_replicates and seed are
        those it was called with

    Raises:
        ValueError: shapes that do not belong together, a truth that is not 0, 1 or NaN, a score that is not a number.

    >>> truth = np.array([[0], [0], [1], [1], [0], [1]])
    >>> ours, theirs = np.array([[0.1, 0.3, 0.4, 0.8, 0.2, 0.9], [0.3, 0.2, 0.1, 0.7, 0.6, 0.4]])[:, :, None]
    >>> patients = ["a", "a", "b", "c", "d", None]
    >>> models = {"ours": ours, "theirs": theirs}
    >>> scores = compare(truth, models, ["AF"], patients, differences=[("ours", "theirs")], n_replicates=200)
    >>> list(scores)
    ['ours', 'theirs', 'ours - theirs']
    >>> scores["ours"].n_patients, scores["ours"].macro_auroc.value
    (5, 1.0)
    """
    if truth.shape != (len(patients), len(labels)):
        raise ValueError(f"expected truth of shape ({len(patients)}, {len(labels)}), found {truth.shape}")
    if areas is None:
        areas = bootstrap_areas(truth, predictions, patients, n_replicates=n_replicates, seed=seed)
    points = {name: areas[name].points for name in predictions}
    replicates = {name: areas[name].replicates for name in predictions}
    for first, second in differences:
        name = f"{first} - {second}"
        points[name] = points[first] - points[second]
        replicates[name] = replicates[first] - replicates[second]
    return {
        name: _summarise(
            points[name],
            replicates[name],
            truth,
            labels,
            int(patient_numbers(patients).max(initial=-1)) + 1,
            confidence=confidence,
        )
        for name in points
    }


def bootstrap_areas(
    truth: np.ndarray,
    predictions: Mapping[str, np.ndarray],
    patients: Sequence[str | None],
    *,
    n_replicates: int = 1000,
    seed: int = 0,
) -> dict[str, AreaReplicates]:
    """The areas of models on the same records, in the same replicates: what `compare` and `significance` tell from.

    truth, predictions, patients: as of `compare`

    Raises:
        ValueError: as `compare`.
    """
    for scores in predictions.values():
        check_scores(truth, scores)
    n_labels = truth.shape[1]
    replicates = {name: np.empty((2, n_labels, n_replicates)) for name in predictions}
    ranked = {name: [rank(truth[:, k], scores[:, k]) for k in range(n_labels)] for name, scores in predictions.items()}
    done = 0
    for weights in bootstrap_weights(patient_numbers(patients), n_replicates, seed):
        place = slice(done, done + weights.shape[1])
        for name, of_label in ranked.items():
            for k, one in enumerate(of_label):
                replicates[name][:, k, place] = areas_of(one, weights)
        done = place.stop
    return {
        name: AreaReplicates(np.stack(point_scores(truth, scores)), replicates[name])
        for name, scores in predictions.items()
    }


def bootstrap_weights(of_patient: np.ndarray, n_replicates: int, seed: int) -> Iterator[np.ndarray]:
    """How often each record is in each replicate, some replicates at a time: (record, replicate) float64.

    of_patient: (record,) the number of each record's patient, from 0. The replicates do not depend on how many come
    at a time.
    """
    random = np.random.default_rng(seed)
    n_patients = int(of_patient.max(initial=-1)) + 1
    at_a_time = max(1, CHUNK // max(1, len(of_patient)))
    for start in range(0, n_replicates, at_a_time):
        n = min(at_a_time, n_replicates - start)
        drawn = random.integers(n_patients, size=(n, n_patients)) + n_patients * np.arange(n)[:, None]
        times = np.bincount(drawn.ravel(), minlength=n * n_patients).reshape(n, n_patients)
        yield times.T.astype(np.float64)[of_patient]


def roc_curve(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rate at every threshold of one label, from (0, 0) to (1, 1)."""
    true_positives, false_positives = _counts_at_thresholds(truth, scores)
    return _from_zero(false_positives / false_positives[-1]), _from_zero(true_positives / true_positives[-1])


def pr_curve(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at every threshold of one label, recall ascending; a step function, as the AUPRC sums it.

    At recall 0, where nothing is called present, the precision of the highest threshold stands.
    """
    true_positives, false_positives = _counts_at_thresholds(truth, scores)
    precision = true_positives / (true_positives + false_positives)
    return _from_zero(true_positives / true_positives[-1]), np.concatenate([precision[:1], precision])


def best_f1_threshold(truth: np.ndarray, scores: np.ndarray) -> float:
    """The score of one label, among those that occur, at which F1 is greatest; the highest of several.

    >>> best_f1_threshold(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8]))
    0.35
    """
    true_positives, false_positives = _counts_at_thresholds(truth, scores)
    f1 = 2 * true_positives / (true_positives + false_positives + true_positives[-1])
    one = rank(truth, scores)
    return float(scores[one.rows[one.starts[int(np.argmax(f1))]]])


def operating_point(truth: np.ndarray, scores: np.ndarray, threshold: float) -> OperatingPoint:
    """The decisions of one label at a threshold, over the records of known truth.

    >>> operating_point(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8]), threshold=0.35)
    OperatingPoint(threshold=0.35, true_positives=2, false_negatives=0, false_positives=1, true_negatives=1)
    """
    present, called = truth == 1, scores >= threshold
    absent = truth == 0
    return OperatingPoint(
        threshold,
        int((present & called).sum()),
        int((present & ~called).sum()),
        int((absent & called).sum()),
        int((absent & ~called).sum()),
    )


def aggregate(
    record_ids: Sequence[str], probabilities: np.ndarray, aggregations: Sequence[str]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Probabilities of segments to those of their records.

    record_ids: (segment,) the record of each segment, in any order
    probabilities: (segment, label)
    aggregations: (label,) `mean` or `max` over a record's segments

    Returns: the records in the order of their first segments, (record, label) float64, (record,) segments of each.

    Raises:
        InputError: an aggregation that is neither.
        ValueError: shapes that do not belong together.

    >>> probabilities = np.array([[0.2, 0.2], [0.5, 0.5], [0.6, 0.6]])
    >>> aggregate(["b", "a", "b"], probabilities, ["mean", "max"])
    (['b', 'a'], array([[0.4, 0.6],
           [0.5, 0.5]]), array([2, 1]))
    """
    if unknown := set(aggregations) - {"mean", "max"}:
        raise InputError(f"label space: aggregation must be mean or max, found {', '.join(sorted(unknown))}")
    if probabilities.shape != (len(record_ids), len(aggregations)):
        raise ValueError(f"expected ({len(record_ids)}, {len(aggregations)}), found {probabilities.shape}")
    number = {record_id: place for place, record_id in enumerate(dict.fromkeys(record_ids))}
    of_record = np.array([number[record_id] for record_id in record_ids], dtype=np.int64)
    n_segments = np.bincount(of_record, minlength=len(number))
    aggregated = np.empty((len(number), len(aggregations)))
    is_max = np.array(aggregations) == "max"
    if is_max.any():
        greatest = np.full((len(number), int(is_max.sum())), -np.inf)
        np.maximum.at(greatest, of_record, probabilities[:, is_max].astype(np.float64))
        aggregated[:, is_max] = greatest
    if not is_max.all():
        together = np.zeros((len(number), int((~is_max).sum())))
        np.add.at(together, of_record, probabilities[:, ~is_max].astype(np.float64))
        aggregated[:, ~is_max] = together / n_segments[:, None]
    return list(number), aggregated, n_segments


def check_scores(truth: np.ndarray, scores: np.ndarray) -> None:
    """Raise ValueError unless the scores are numbers, and the truth of their shape is 0, 1 or NaN."""
    if truth.shape != scores.shape:
        raise ValueError(f"truth has shape {truth.shape}, scores {scores.shape}")
    if not np.isin(truth[~np.isnan(truth)], (0, 1)).all():
        raise ValueError("truth must be 0, 1 or NaN")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).any(axis=-1).sum())} records have a score that is not a number")


def patient_numbers(patients: Sequence[str | None]) -> np.ndarray:
    """(record,) each record's patient as a number from 0; a record without one is a patient of its own."""
    number: dict[str | tuple[None, int], int] = {}
    whose = [patient if patient is not None else (None, row) for row, patient in enumerate(patients)]
    return np.array([number.setdefault(patient, len(number)) for patient in whose], dtype=np.int64)


def rank(truth: np.ndarray, scores: np.ndarray) -> Ranked:
    """The records of known truth of one label in the order of their (record,) scores."""
    known = np.flatnonzero(~np.isnan(truth))
    rows = known[np.argsort(-scores[known], kind="stable")]
    ordered = scores[rows]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(rows) else rows
    return Ranked(rows, (truth[rows] == 1).astype(np.float64)[:, None], starts)


def areas_of(ranked: Ranked, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUROC and AUPRC of one label under each column of weights (record, replicate); NaN where of one class."""
    if not len(ranked.rows):
        return np.full(weights.shape[1], np.nan), np.full(weights.shape[1], np.nan)
    weight = weights[ranked.rows]
    positive = weight * ranked.positive
    if len(ranked.starts) < len(weight):
        weight, positive = (np.add.reduceat(values, ranked.starts, axis=0) for values in (weight, positive))
    true_positives, called = np.cumsum(positive, axis=0), np.cumsum(weight, axis=0)
    n_positive, n = true_positives[-1], called[-1]
    n_negative = n - n_positive
    negative = weight - positive
    # A positive wins against the negatives of lower score, and half against those of equal score.
    wins = (positive * (n_negative - (called - true_positives) + negative / 2)).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Before the first record of weight 0 nothing is called: 0/0, but then no positive stands there either.
        precision = np.divide(true_positives, called, out=np.zeros_like(called), where=called > 0)
        roc, pr = wins / (n_positive * n_negative), (positive * precision).sum(axis=0) / n_positive
    return roc, np.where(n_negative > 0, pr, np.nan)


def _summarise(
    points: np.ndarray,
    replicates: np.ndarray,
    truth: np.ndarray,
    labels: Sequence[str],
    n_patients: int,
    *,
    confidence: float,
) -> Scores:
    """points: (AUROC and AUPRC, label); replicates: (AUROC and AUPRC, label, replicate), NaN where of one class."""
    scored = ~np.isnan(points[0])
    per_label = tuple(
        LabelScores(
            label,
            int((~np.isnan(truth[:, k])).sum()),
            int((truth[:, k] == 1).sum()),
            *(estimate(points[area, k], replicates[area, k], confidence) for area in range(2)),
        )
        for k, label in enumerate(labels)
    )
    kept = replicates[:, scored]
    some = ~np.isnan(kept)
    with np.errstate(invalid="ignore"):
        means = np.where(some, kept, 0).sum(axis=1) / some.sum(axis=1)
    macro = [
        estimate(points[area, scored].mean(), means[area], confidence) if scored.any() else None for area in (0, 1)
    ]
    return Scores(
        n_records=len(truth),
        n_patients=n_patients,
        labels=per_label,
        macro_auroc=macro[0],
        macro_auprc=macro[1],
        left_out=tuple(label for label, is_scored in zip(labels, scored, strict=True) if not is_scored),
        incomplete_replicates=int((~some[0]).any(axis=0).sum()),
    )


def estimate(point: float, replicates: np.ndarray, confidence: float) -> Estimate | None:
    """The percentile interval of (replicate,) values, widened to hold the point; None where the point is NaN."""
    if np.isnan(point):
        return None
    valid = replicates[~np.isnan(replicates)]
    left_out = len(replicates) - len(valid)
    if not len(valid):
        return Estimate(float(point), None, None, 0, left_out)
    low, high = np.quantile(valid, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(point), float(min(low, point)), float(max(high, point)), len(valid), left_out)


def _counts_at_thresholds(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives of one label at each score that occurs, highest first."""
    one = rank(truth, scores)
    n_positive = int(one.positive.sum())
    if not 0 < n_positive < len(one.rows):
        raise ValueError(f"expected both classes, found {n_positive} positive of {len(one.rows)} records")
    last = np.append(one.starts[1:], len(one.rows)) - 1
    true_positives = np.cumsum(one.positive[:, 0])[last]
    return true_positives, last + 1 - true_positives


def _from_zero(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], values])


def divide(dividend: np.ndarray, divisor: np.ndarray) -> np.ndarray:
    """float64, NaN where the divisor is 0."""
    quotient = np.full(np.broadcast_shapes(np.shape(dividend), np.shape(divisor)), np.nan)
    np.divide(dividend, divisor, out=quotient, where=np.asarray(divisor) != 0)
    return quotient


def mean_of_defined(values: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """The weighted mean over the first axis of what is not NaN; NaN where nothing of any weight is.

    values: (label, ...); weights: of a shape that broadcasts to it
    """
    weights = np.where(np.isnan(values), 0.0, weights)
    return divide((np.nan_to_num(values) * weights).sum(axis=0), weights.sum(axis=0))
