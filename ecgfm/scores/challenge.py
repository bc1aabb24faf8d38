"""The score of the PhysioNet/CinC Challenge 2021: wrong findings cost less where they lead to similar treatment.

Reyna et al. 2021, "Will Two Do? Varying Dimensions in Electrocardiography" (Computing in Cardiology 48), and the
evaluation published with it (github.com/physionetchallenges/evaluation-2021, `weights.csv`). A record's credit is the
mean weight of every pair of a true and a called class, over the classes that are either; the score is the sum of
credits, scaled so that calling every record normal (sinus rhythm) gives 0 and calling everything right gives 1. It can
be negative. The other numbers here follow that evaluation too, which differs from `metrics.py` where a class is
empty: see `ChallengeClass`.

The published weights lie on a line but for two pairs: the weight of two classes is a half less the distance of their
places. The table below is thus the whole matrix; a test holds it to the published numbers, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ecgfm.scores.metrics import (
    Estimate,
    bootstrap_weights,
    check_scores,
    divide,
    estimate,
    mean_of_defined,
    patient_numbers,
    point_scores,
)

CLASSES: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("atrial fibrillation", ("164889003",), 0),
    ("atrial flutter", ("164890007",), 0),
    ("bundle branch block", ("6374002",), 2),
    ("bradycardia", ("426627000",), 16),
    ("left bundle branch block", ("733534002", "164909002"), 2),
    ("right bundle branch block", ("713427006", "59118001"), 8),
    ("1st degree AV block", ("270492004",), 16),
    ("incomplete right bundle branch block", ("713426002",), 16),
    ("left axis deviation", ("39732003",), 12),
    ("left anterior fascicular block", ("445118002",), 12),
    ("prolonged PR interval", ("164947007",), 16),
    ("low QRS voltages", ("251146004",), 6),
    ("prolonged QT interval", ("111975006",), 4),
    ("nonspecific intraventricular conduction disorder", ("698252002",), 12),
    ("sinus rhythm", ("426783006",), 20),
    ("premature atrial contraction", ("284470004", "63593006"), 13),
    ("pacing rhythm", ("10370003",), 10),
    ("poor R wave progression", ("365413008",), 6),
    ("premature ventricular contraction", ("427172004", "17338001"), 10),
    ("Q wave abnormal", ("164917005",), -8),
    ("right axis deviation", ("47665007",), 12),
    ("sinus arrhythmia", ("427393009",), 16),
    ("sinus bradycardia", ("426177001",), 16),
    ("sinus tachycardia", ("427084000",), 10),
    ("T wave abnormal", ("164934002",), 0),
    ("T wave inversion", ("59931005",), 0),
)
"""Name, equivalent SNOMED CT codes and place (in eightieths) of the 26 scored classes, in the published order."""

APART = (("6374002", "733534002"), ("251146004", "365413008"))
"""The two pairs at one place whose weight is nevertheless 38 and not 40 eightieths."""

NORMAL = "426783006"
"""Sinus rhythm: the one class that the baseline calls in every record."""


class Merged(NamedTuple):
    """The labels of a task as classes of the Challenge.

    classes: (class,) their numbers in `CLASSES`, ascending
    columns: (class,) the labels that make up each
    """

    classes: list[int]
    columns: list[list[int]]


@dataclass(frozen=True)
class ChallengeClass:
    """One class, by the published rules.

    n: records scored; positives: those in which it is present
    auroc: None where the records are all of one class
    auprc: None where none is positive; 1 where all are
    f_measure: None where the class is neither true nor called in any record
    """

    name: str
    codes: tuple[str, ...]
    n: int
    positives: int
    auroc: float | None
    auprc: float | None
    f_measure: float | None


@dataclass(frozen=True)
class ChallengeScores:
    """The score and its companions.

    n_records: records whose truth is known for every class that is scored; unknown_records: the others, left out
    missing: the classes of `CLASSES` that no label stands for. Where there are any, the score is that of the smaller
        task, with its part of the weights, and not to be compared with published ones
    score: the Challenge metric; 0 where right decisions would score no more than the baseline, as published
    accuracy: share of records with every class right
    f_measure, auroc, auprc: mean over the classes that have one; None where none has
    """

    n_records: int
    unknown_records: int
    n_patients: int
    missing: tuple[str, ...]
    score: Estimate
    accuracy: Estimate
    f_measure: Estimate | None
    auroc: float | None
    auprc: float | None
    classes: tuple[ChallengeClass, ...]


def reward_weights() -> np.ndarray:
    """(class, class) float64: the credit for calling the second where the first is true; symmetric, 1 on the diagonal.

    In the order of `CLASSES`.
    """
    place = np.array([place for _, _, place in CLASSES])
    eightieths = 40 - np.abs(place[:, None] - place)
    number = {code: k for k, (_, codes, _) in enumerate(CLASSES) for code in codes}
    for pair in APART:
        one, other = (number[code] for code in pair)
        eightieths[one, other] = eightieths[other, one] = 38
    np.fill_diagonal(eightieths, 80)
    weights: np.ndarray = eightieths / 80
    return weights


def merge_labels(codes: Sequence[Sequence[str]]) -> Merged:
    """Which labels stand for which classes: those all of whose codes are codes of the class.

    codes: (label,) the codes that assert each label. A label whose codes belong to several classes, or to none, stands
        for none; labels of equivalent codes stand for one class together.

    >>> merged = merge_labels([["426783006"], ["59118001"], ["713427006"], ["1"]])  # the last is no class
    >>> [CLASSES[number][0] for number in merged.classes], merged.columns
    (['right bundle branch block', 'sinus rhythm'], [[1, 2], [0]])
    """
    columns = [
        [column for column, of_label in enumerate(codes) if of_label and set(of_label) <= set(equivalent)]
        for _, equivalent, _ in CLASSES
    ]
    present = [k for k, found in enumerate(columns) if found]
    return Merged(present, [columns[k] for k in present])


def challenge_scores(
    truth: np.ndarray,
    probabilities: np.ndarray,
    decisions: np.ndarray,
    codes: Sequence[Sequence[str]],
    patients: Sequence[str | None],
    *,
    n_replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ChallengeScores | None:
    """The Challenge 2021 score of a model's decisions, with intervals by patient on the replicates of `compare`.

    Where labels of equivalent codes are apart, the class is true or called where any of them is, and its probability is
    their mean, as published. A record of which any scored class is unknown is left out. A class counts from its
    first positive on; `ChallengeClass` says what an empty one gives.

    truth: (record, label) 0, 1, or NaN for unknown; probabilities: (record, label); decisions: (record, label) bool,
        such as `probabilities >= thresholds`
    codes: (label,) the SNOMED CT codes that assert each label; patients: (record,), None where unknown

    Returns: None where no label is sinus rhythm, since there is no baseline, or no record is known for all classes.

    Raises:
        ValueError: shapes that do not belong together, a truth that is not 0, 1 or NaN, a probability that is NaN.

    >>> truth = np.array([[1, 0], [0, 1], [1, 0], [0, 1]])  # sinus rhythm, atrial fibrillation
    >>> probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.2], [0.6, 0.3]])
    >>> codes, patients = [["426783006"], ["164889003"]], ["a", "b", "c", "d"]
    >>> found = challenge_scores(truth, probabilities, probabilities >= 0.5, codes, patients, n_replicates=100)
    >>> round(found.score.value, 2), found.accuracy.value
    (0.5, 0.75)
    """
    if truth.shape != (len(patients), len(codes)) or decisions.shape != truth.shape:
        raise ValueError(
            f"expected truth and decisions of shape ({len(patients)}, {len(codes)}), "
            f"found {truth.shape} and {decisions.shape}"
        )
    check_scores(truth, probabilities)
    merged = merge_labels(codes)
    normal = next(k for k, (_, equivalent, _) in enumerate(CLASSES) if NORMAL in equivalent)
    if normal not in merged.classes:
        return None
    of_class = np.stack([_any_present(truth[:, columns]) for columns in merged.columns], axis=1)
    called = np.stack([decisions[:, columns].any(axis=1) for columns in merged.columns], axis=1)
    scores = np.stack([probabilities[:, columns].mean(axis=1) for columns in merged.columns], axis=1)
    known = ~np.isnan(of_class).any(axis=1)
    if not known.any():
        return None
    of_class, called, scores = of_class[known], called[known], scores[known]
    weights = reward_weights()[np.ix_(merged.classes, merged.classes)]
    credit = credits_of(of_class == 1, called, weights, merged.classes.index(normal))
    exact = ((of_class == 1) == called).all(axis=1, keepdims=True)
    hits, misses = (of_class == 1) & called, (of_class == 1) != called
    once = np.ones((int(known.sum()), 1))
    of_patient = patient_numbers([patient for patient, is_known in zip(patients, known, strict=True) if is_known])

    def measures(times: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Score, accuracy and (class, replicate) F-measure under weights (record, replicate)."""
        f_measure = divide(2 * hits.T @ times, 2 * hits.T @ times + misses.T @ times)
        return _scaled(credit.T @ times), (exact.T @ times)[0] / times.sum(axis=0), f_measure

    score, accuracy, f_measure = measures(once)
    replicates = [measures(times) for times in bootstrap_weights(of_patient, n_replicates, seed)]
    score_r, accuracy_r, f_r = (np.concatenate([one[i] for one in replicates], axis=-1) for i in range(3))
    areas = point_scores(of_class, scores)
    positives = (of_class == 1).sum(axis=0)
    auprc = np.where(positives == len(of_class), 1.0, areas.auprc)
    score_estimate = estimate(float(np.nan_to_num(score[0])), score_r, confidence)
    accuracy_estimate = estimate(float(accuracy[0]), accuracy_r, confidence)
    assert score_estimate is not None
    assert accuracy_estimate is not None
    return ChallengeScores(
        n_records=len(of_class),
        unknown_records=int((~known).sum()),
        n_patients=int(of_patient.max()) + 1,
        missing=tuple(name for k, (name, _, _) in enumerate(CLASSES) if k not in merged.classes),
        score=score_estimate,
        accuracy=accuracy_estimate,
        f_measure=estimate(float(mean_of_defined(f_measure)[0]), mean_of_defined(f_r, once[:1]), confidence),
        auroc=_or_none(float(mean_of_defined(areas.auroc))),
        auprc=_or_none(float(mean_of_defined(auprc))),
        classes=tuple(
            ChallengeClass(
                *CLASSES[k][:2],
                len(of_class),
                int(positives[i]),
                _or_none(areas.auroc[i]),
                _or_none(auprc[i]),
                _or_none(f_measure[i, 0]),
            )
            for i, k in enumerate(merged.classes)
        ),
    )


def credits_of(truth: np.ndarray, decisions: np.ndarray, weights: np.ndarray, normal: int) -> np.ndarray:
    """(record, 3) float64: each record's credit for the decisions, for the right ones, and for calling it normal.

    truth, decisions: (record, class) bool; weights: (class, class); normal: the number of the normal class
    """
    baseline = np.zeros_like(decisions)
    baseline[:, normal] = True
    called = (decisions, truth, baseline)
    return np.stack(
        [((truth @ weights) * these).sum(axis=1) / np.maximum((truth | these).sum(axis=1), 1) for these in called],
        axis=1,
    )


def _scaled(sums: np.ndarray) -> np.ndarray:
    """(replicate,) scores of (3, replicate) sums of credits; NaN where right decisions score no more than normal."""
    observed, correct, inactive = sums
    return divide(observed - inactive, correct - inactive)


def _any_present(truth: np.ndarray) -> np.ndarray:
    """(record,) of equivalent labels: present where any is, absent where all are, else unknown."""
    present = (truth == 1).any(axis=1)
    return np.where(present, 1.0, np.where(np.isnan(truth).any(axis=1), np.nan, 0.0))


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
