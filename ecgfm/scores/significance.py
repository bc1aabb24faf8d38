"""Whether one model is better than another: paired tests on the same records, by patient.

The first opinion is the paired bootstrap of `metrics.py`: the differences in the replicates behind the intervals.
`delong` is a second one for a single AUROC, and `permutation_test` a third, which assumes no distribution at all.
`holm` keeps the chance of any false claim in a family of tests below the level that one alone would have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from scipy.stats import norm, rankdata

from ecgfm.scores.metrics import (
    AreaReplicates,
    Estimate,
    check_scores,
    estimate,
    mean_of_defined,
    patient_numbers,
    point_scores,
)

Measure = Literal["auroc", "auprc"]
MEASURES: tuple[Measure, ...] = ("auroc", "auprc")
ALPHA = 0.05  # a corrected p below this is called a difference


@dataclass(frozen=True)
class PairedTest:
    """Whether two models differ in one measure of one label, or of its mean over all labels.

    label: its name; None of the macro mean
    n: records of known label (of the macro mean: of any); positives: those in which it is present (pairs of record and
        label)
    difference: the first model's less the second's, with its interval; None where the label has one class
    p: two-sided, by the bootstrap; None where there is no difference or no replicate
    p_holm: p after Holm's correction over the family
    """

    first: str
    second: str
    measure: Measure
    label: str | None
    n: int
    positives: int
    difference: Estimate | None
    p: float | None
    p_holm: float | None


class DeLong(NamedTuple):
    """Two AUROC of one label on the same records, and whether they differ.

    n, positives: records of known truth, and those in which the label is present; n_patients: of the former
    standard_error: of the difference; p: two-sided, by the normal distribution
    """

    n: int
    positives: int
    n_patients: int
    first: float
    second: float
    difference: float
    standard_error: float
    p: float


class Permutation(NamedTuple):
    """A permutation test. labels: how many have both classes, and are in the mean; p: two-sided"""

    labels: int
    difference: float
    p: float
    n_permutations: int


def bootstrap_p(differences: np.ndarray) -> float | None:
    """Two-sided p of (replicate,) paired differences: how seldom they reach the other side of 0, twice.

    NaN, a replicate that could not be scored, is left out; None where nothing is left. The point itself counts as one
    more replicate on either side, so that p is never 0 but at least 2 / (replicates + 1) (Davison and Hinkley 1997,
    section 4.2), and 1 where all differences are 0.
    """
    valid = differences[~np.isnan(differences)]
    if not len(valid):
        return None
    below, above = int((valid <= 0).sum()), int((valid >= 0).sum())
    return min(1.0, 2 * (1 + min(below, above)) / (1 + len(valid)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """The p of a family of tests, corrected step by step (Holm 1979): reject where it is below the level.

    None, a test that could not be made, stays None and does not count. Equal p stay equal.

    >>> holm([0.01, 0.04, 0.03, None])
    [0.03, 0.06, 0.06, None]
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    greatest = 0.0
    for rank, (p, place) in enumerate(order):
        greatest = max(greatest, min(1.0, p * (len(order) - rank)))
        corrected[place] = greatest
    return corrected


def paired_tests(
    areas: Mapping[str, AreaReplicates],
    pairs: Sequence[tuple[str, str]],
    truth: np.ndarray,
    labels: Sequence[str],
    *,
    confidence: float = 0.95,
) -> tuple[PairedTest, ...]:
    """Paired bootstrap tests of AUROC and AUPRC: the macro means, then every label, for each pair of models.

    There are two families for each measure, and Holm's correction is over each: the macro means of all pairs, and all
    labels of all pairs. A label needs one positive and one negative; with fewer it has no test and is in no mean. A
    replicate's macro mean is over the labels that have both classes in it, as in `metrics.compare`, whose differences
    these are.

    areas: by model, from one call of `metrics.bootstrap_areas`; truth: (record, label) as given to it
    """
    counts = [(int((~np.isnan(column)).sum()), int((column == 1).sum())) for column in truth.T]
    everything = (int((~np.isnan(truth)).any(axis=1).sum()), int((truth == 1).sum()))
    tests: list[PairedTest] = []
    for number, measure in enumerate(MEASURES):
        macro: list[PairedTest] = []
        of_label: list[PairedTest] = []
        for first, second in pairs:
            points = areas[first].points[number] - areas[second].points[number]
            replicates = areas[first].replicates[number] - areas[second].replicates[number]
            scored = ~np.isnan(points)
            rows = [
                (None, everything, mean_of_defined(points[scored]), mean_of_defined(replicates[scored])),
                *((label, counts[k], points[k], replicates[k]) for k, label in enumerate(labels)),
            ]
            for label, (n, positives), point, of_replicate in rows:
                difference = estimate(float(point), of_replicate, confidence)
                p = bootstrap_p(of_replicate) if difference else None
                (macro if label is None else of_label).append(
                    PairedTest(first, second, measure, label, n, positives, difference, p, None)
                )
        for family in (macro, of_label):
            corrected = holm([test.p for test in family])
            tests += [replace(test, p_holm=p) for test, p in zip(family, corrected, strict=True)]
    return tuple(tests)


def delong(
    truth: np.ndarray, first: np.ndarray, second: np.ndarray, patients: Sequence[str | None] | None = None
) -> DeLong | None:
    """DeLong's test of two paired AUROC of one label (DeLong et al. 1988, Biometrics 44:837), by patient.

    With several records of a patient the variance is that of Obuchowski 1997 (Biometrics 53:567), who sums DeLong's
    components over each patient; with one of each it is DeLong's. Ties are half a win. Needs two patients with a
    positive and two with a negative; None with fewer, since there is no variance of one.

    truth: (record,) 0, 1, or NaN for unknown; first, second: (record,) scores, higher is more likely; patients:
        (record,), None where unknown; without it every record is a patient

    >>> truth = np.array([0, 0, 0, 1, 1, 1])
    >>> tested = delong(truth, np.array([0.1, 0.2, 0.6, 0.4, 0.7, 0.8]), np.array([0.3, 0.6, 0.2, 0.5, 0.4, 0.7]))
    >>> round(tested.first, 3), round(tested.second, 3), round(tested.p, 2)
    (0.889, 0.778, 0.72)
    """
    check_scores(truth[:, None], first[:, None])
    check_scores(truth[:, None], second[:, None])
    numbers = np.arange(len(truth)) if patients is None else patient_numbers(patients)
    known = ~np.isnan(truth)
    present, of_patient = truth[known] == 1, np.unique(numbers[known], return_inverse=True)[1]
    classes = (present, ~present)
    if any(len(np.unique(of_patient[of_class])) < 2 for of_class in classes):
        return None
    n_patients = int(of_patient.max()) + 1
    wins = [_wins(present, scores[known]) for scores in (first, second)]
    one, other = (float(of_model[present].mean()) for of_model in wins)
    apart = wins[0] - wins[1] - (one - other)
    sums, variance = [], 0.0
    for of_class in classes:
        of_each = np.bincount(of_patient[of_class], apart[of_class], minlength=n_patients) / of_class.sum()
        n_of_class = len(np.unique(of_patient[of_class]))
        variance += n_of_class / (n_of_class - 1) * float((of_each**2).sum())
        sums.append(of_each)
    variance += 2 * n_patients / (n_patients - 1) * float((sums[0] * sums[1]).sum())
    error = float(np.sqrt(max(variance, 0.0)))
    # Components that are equal but for rounding: the models order every pair alike, or differ in every pair alike.
    without_error = 1.0 if abs(one - other) < 1e-12 else 0.0
    p = float(2 * norm.sf(abs(one - other) / error)) if error > 1e-12 else without_error
    return DeLong(len(present), int(present.sum()), n_patients, one, other, one - other, error, p)


def permutation_test(
    truth: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    patients: Sequence[str | None],
    *,
    measure: Measure = "auroc",
    n_permutations: int = 1000,
    seed: int = 0,
) -> Permutation | None:
    """Two-sided permutation test of the macro mean of two models' paired predictions.

    If it does not matter which model a prediction is from, the two of a patient can be exchanged, all records and
    labels of a patient together. Models may score on different scales, so their ranks within each label are exchanged
    (Bandos et al. 2005, Statistics in Medicine 24:2873), whose difference is that of the scores. The data themselves
    count as one more permutation, so that p is at least 1 / (permutations + 1). The mean is over the labels that have
    both classes; None where none has.

    truth: (record, label) 0, 1, or NaN for unknown; first, second: (record, label) scores; patients: (record,), None
        where unknown
    """
    check_scores(truth, first)
    check_scores(truth, second)
    known = ~np.isnan(truth)
    both = ((truth == 1).any(axis=0)) & ((truth == 0).any(axis=0))
    if not both.any():
        return None
    truth, known = truth[:, both], known[:, both]
    ranks = [_ranks_of_known(scores[:, both], known) for scores in (first, second)]
    number = MEASURES.index(measure)

    def difference(one: np.ndarray, other: np.ndarray) -> float:
        return float((point_scores(truth, one)[number] - point_scores(truth, other)[number]).mean())

    observed = difference(*ranks)
    of_patient = patient_numbers(patients)
    random = np.random.default_rng(seed)
    as_far = 1
    for _ in range(n_permutations):
        exchanged = (random.random(int(of_patient.max()) + 1) < 0.5)[of_patient][:, None]
        permuted = difference(np.where(exchanged, ranks[1], ranks[0]), np.where(exchanged, ranks[0], ranks[1]))
        as_far += abs(permuted) >= abs(observed) - 1e-12
    return Permutation(int(both.sum()), observed, as_far / (1 + n_permutations), n_permutations)


def _wins(present: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(record,) the share of the other class that each record is on the right side of, a tie being half."""
    among_all = rankdata(scores)
    wins = np.empty(len(scores))
    for of_class in (present, ~present):
        beaten = (among_all[of_class] - rankdata(scores[of_class])) / (~of_class).sum()
        wins[of_class] = beaten if of_class is present else 1 - beaten
    return wins


def _ranks_of_known(scores: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(record, label) each score's rank within its label, equal ones alike; 0 where the truth is unknown."""
    ranks = np.zeros(scores.shape)
    for k in range(scores.shape[1]):
        ranks[known[:, k], k] = rankdata(scores[known[:, k], k])
    return ranks
