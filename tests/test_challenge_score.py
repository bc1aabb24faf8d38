"""The Challenge's score: the published numbers, and a slow reading of the published rules as judge."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgfm.labels import CHALLENGE_2021
from ecgfm.scores.challenge import CLASSES, NORMAL, challenge_scores, merge_labels, reward_weights

CODES = [codes for _, codes, _ in CLASSES]
SINUS = next(k for k, codes in enumerate(CODES) if NORMAL in codes)


def simulated(n: int, seed: int, n_classes: int = 26) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(record, class) truth of uneven prevalence, tied probabilities, and decisions that are not quite theirs."""
    random = np.random.default_rng(seed)
    truth = (random.random((n, n_classes)) < random.uniform(0, 0.3, n_classes)).astype(np.float64)
    probabilities = np.clip(truth * 0.3 + random.random(truth.shape) * 0.7, 0, 1).round(1)
    decisions = (probabilities >= 0.5) ^ (random.random(truth.shape) < 0.05)
    return truth, probabilities, decisions


def slow_score(truth: np.ndarray, decisions: np.ndarray, weights: np.ndarray, normal: int) -> float:
    """The metric as the Challenge's page words it, record by record and pair by pair."""

    def total(called: np.ndarray) -> float:
        points = []
        for true_of_record, called_of_record in zip(truth, called, strict=True):
            either = sum(bool(t) or bool(c) for t, c in zip(true_of_record, called_of_record, strict=True))
            points += [
                weights[j, k] / max(either, 1)
                for j in np.flatnonzero(true_of_record)
                for k in np.flatnonzero(called_of_record)
            ]
        return math.fsum(points)

    always_normal = np.zeros_like(decisions)
    always_normal[:, normal] = True
    inactive, correct = total(always_normal), total(truth == 1)
    return (total(decisions) - inactive) / (correct - inactive) if correct != inactive else 0.0


@pytest.mark.parametrize("seed", range(5))
def test_the_score_is_the_one_the_rules_word(seed: int) -> None:
    truth, probabilities, decisions = simulated(60, seed)
    truth[7], decisions[7] = 0, False
    truth[:, 3], truth[:, 5], decisions[:, [5, 6]] = 0, 1, False  # nowhere, everywhere; never called
    truth[:, 6] = 0  # neither true nor called
    found = challenge_scores(truth, probabilities, decisions, CODES, [None] * 60, n_replicates=20)
    assert found is not None
    assert found.score.value == pytest.approx(slow_score(truth, decisions, reward_weights(), SINUS), abs=1e-12)
    assert found.accuracy.value == sklearn.metrics.accuracy_score(truth, decisions)
    of_class = sklearn.metrics.f1_score(truth, decisions, average=None, zero_division=np.nan)
    assert found.classes[6].f_measure is None
    assert found.classes[5].f_measure == 0
    kept = [one.f_measure for one in found.classes if one.f_measure is not None]
    assert kept == pytest.approx(of_class[~np.isnan(of_class)], abs=1e-12)
    assert found.f_measure is not None
    assert found.f_measure.value == pytest.approx(np.nanmean(of_class), abs=1e-12)
    empty = [(one.auroc, one.auprc) for one in (found.classes[3], found.classes[5])]
    assert empty == [(None, None), (None, 1.0)]
    assert found.classes[0].auroc == pytest.approx(
        sklearn.metrics.roc_auc_score(truth[:, 0], probabilities[:, 0]), abs=1e-12
    )
    assert found.auprc == pytest.approx(np.mean([one.auprc for one in found.classes if one.auprc is not None]))


def test_right_decisions_score_one_and_calling_all_normal_scores_nothing() -> None:
    truth, probabilities, _ = simulated(50, 1)
    normal = np.zeros(truth.shape, dtype=bool)
    normal[:, SINUS] = True
    never = np.zeros(truth.shape, dtype=bool)
    scores = []
    for decisions in (truth == 1, normal, never):
        found = challenge_scores(truth, probabilities, decisions, CODES, [None] * 50, n_replicates=30)
        assert found is not None
        scores.append(found.score)
    right, inactive, silent = scores
    assert (right.value, right.low, right.high) == pytest.approx((1, 1, 1), abs=1e-12)
    assert (inactive.value, inactive.low, inactive.high) == pytest.approx((0, 0, 0), abs=1e-12)
    assert silent.value < 0
    assert silent.low is not None
    assert silent.high is not None
    assert silent.low < silent.value < silent.high


def test_where_all_is_normal_the_score_is_zero_as_published_and_has_no_interval() -> None:
    truth = np.zeros((10, 26))
    truth[:, SINUS] = 1
    found = challenge_scores(truth, truth, truth == 1, CODES, [None] * 10, n_replicates=10)
    assert found is not None
    assert (found.score.value, found.score.low, found.score.left_out) == (0, None, 10)
    assert found.accuracy.value == 1


def test_similar_findings_are_confused_at_less_cost() -> None:
    """Flutter for fibrillation keeps half a credit; a Q wave for bradycardia hardly any."""
    weights = reward_weights()
    number = {code: k for k, codes in enumerate(CODES) for code in codes}
    assert weights[number["164889003"], number["164890007"]] == 0.5
    assert weights[number["164917005"], number["426627000"]] == 0.2
    assert (weights == weights.T).all()
    assert (np.diag(weights) == 1).all()
    assert weights.min() == 0.15
    assert np.sort(weights[~np.eye(26, dtype=bool)])[-1] == 0.5


def test_the_classes_are_those_of_the_label_scheme() -> None:
    assert {name: frozenset(codes) for name, codes, _ in CLASSES} == {
        name: frozenset(codes) for name, codes in CHALLENGE_2021
    }


def test_equivalent_labels_are_one_class() -> None:
    """Labels of single codes, in another order, score as the classes they make up; a label of two classes does not."""
    truth, probabilities, decisions = simulated(80, 3)
    together = challenge_scores(truth, probabilities, decisions, CODES, [None] * 80, n_replicates=15)
    apart = [(k, code) for k, codes in enumerate(CODES) for code in codes][::-1]
    columns = [k for k, _ in apart]
    split = [truth[:, columns].copy(), probabilities[:, columns], decisions[:, columns].copy()]
    seen: set[int] = set()
    for place, k in enumerate(columns):
        if k in seen:  # the second code of a pair: nowhere asserted, nowhere called
            split[0][:, place], split[2][:, place] = 0, False
        seen.add(k)
    found = challenge_scores(split[0], split[1], split[2], [(code,) for _, code in apart], [None] * 80, n_replicates=15)
    assert found == together
    merged = merge_labels([("164889003",), ("6374002", "164909002"), (), ("59118001", "713427006"), ("59118001",)])
    assert merged.classes == [0, 5]
    assert merged.columns == [[0], [3, 4]]


def test_a_record_of_unknown_class_is_left_out_and_counted() -> None:
    truth, probabilities, decisions = simulated(60, 4)
    hidden = truth.copy()
    hidden[::6, 2] = np.nan
    known = ~np.isnan(hidden[:, 2])
    found = challenge_scores(hidden, probabilities, decisions, CODES, [None] * 60, n_replicates=10)
    alone = challenge_scores(
        truth[known], probabilities[known], decisions[known], CODES, [None] * int(known.sum()), n_replicates=10
    )
    assert found is not None
    assert alone is not None
    assert (found.n_records, found.unknown_records) == (50, 10)
    assert found.score == alone.score


def test_what_the_labels_lack_is_named_and_without_sinus_rhythm_there_is_no_score() -> None:
    truth, probabilities, decisions = simulated(40, 5)
    some = [0, 4, SINUS]
    arrays = [values[:, some] for values in (truth, probabilities, decisions)]
    found = challenge_scores(arrays[0], arrays[1], arrays[2], [CODES[k] for k in some], [None] * 40, n_replicates=5)
    assert found is not None
    assert len(found.missing) == 23
    assert "sinus rhythm" not in found.missing
    weights = reward_weights()[np.ix_(some, some)]
    assert found.score.value == pytest.approx(slow_score(arrays[0], arrays[2], weights, 2), abs=1e-12)
    assert challenge_scores(arrays[0], arrays[1], arrays[2], [("NORM",), CODES[4], CODES[0]], [None] * 40) is None
    assert challenge_scores(np.full((40, 26), np.nan), probabilities, decisions, CODES, [None] * 40) is None
    with pytest.raises(ValueError, match="not a number"):
        challenge_scores(truth, probabilities * np.nan, decisions, CODES, [None] * 40)
    with pytest.raises(ValueError, match="expected truth and decisions"):
        challenge_scores(truth, probabilities, decisions[:, :3], CODES, [None] * 40)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 15))
def test_intervals_hold_the_point_estimate(seed: int, n: int) -> None:
    truth, probabilities, decisions = simulated(n, seed)
    patients = [str(row // 2) for row in range(n)]
    found = challenge_scores(truth, probabilities, decisions, CODES, patients, n_replicates=20)
    assert found is not None
    assert found.n_patients == math.ceil(n / 2)
    for one in (found.score, found.accuracy, found.f_measure):
        if one is not None and one.low is not None and one.high is not None:
            assert one.low <= one.value <= one.high


def test_a_replicate_is_the_score_of_the_patients_drawn() -> None:
    """One patient alone: every replicate is the whole, so the interval has no width."""
    truth, probabilities, decisions = simulated(30, 6)
    found = challenge_scores(truth, probabilities, decisions, CODES, ["p"] * 30, n_replicates=20)
    assert found is not None
    assert found.score.low == pytest.approx(found.score.high, abs=1e-12)
    assert found.f_measure is not None
    assert found.f_measure.low == pytest.approx(found.f_measure.high, abs=1e-12)


def test_the_weights_are_the_published_ones(shared: Path) -> None:
    with (shared / "data/metrics/evaluation-2021/weights.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert [frozenset(name.split("|")) for name in head[1:]] == [frozenset(codes) for codes in CODES]
    assert (reward_weights() == np.array([[float(value) for value in row[1:]] for row in rows])).all()


def test_the_published_evaluation_is_reproduced(shared: Path) -> None:
    folder = shared / "golden/challenge-2021-metric"
    given_arrays, expected = np.load(folder / "inputs.npz"), json.loads((folder / "expected.json").read_text())
    codes = [name.split("|") for name in given_arrays["classes"]]
    found = challenge_scores(
        given_arrays["labels"].astype(np.float64),
        given_arrays["scores"],
        given_arrays["decisions"],
        codes,
        [None] * len(given_arrays["labels"]),
        n_replicates=20,
    )
    assert found is not None
    assert found.f_measure is not None
    assert found.score.value == pytest.approx(expected["challenge_metric"], abs=1e-12)
    assert found.accuracy.value == pytest.approx(expected["accuracy"], abs=1e-12)
    assert found.f_measure.value == pytest.approx(expected["f_measure"], abs=1e-12)
    assert (found.auroc, found.auprc) == pytest.approx((expected["auroc"], expected["auprc"]), abs=1e-12)
    for name in ("auroc", "auprc", "f_measure"):
        assert [getattr(one, name) for one in found.classes] == pytest.approx(expected[f"{name}_per_class"], abs=1e-12)
