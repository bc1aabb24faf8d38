"""Predicted numbers: measures as scikit-learn and scipy have them, intervals by patient, and baselines."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.preprocessing import StandardScaler

from ecgfm.ecg import InputError
from ecgfm.scores.metrics import bootstrap_weights, patient_numbers
from ecgfm.scores.regression import (
    MEASURES,
    STRENGTHS,
    compare_values,
    neighbour_means,
    ridge_probe,
    score_value_parts,
    train_mean,
)
from ecgfm.scores.subgroups import Part

LABELS, UNITS = ("age", "LVEF"), ("years", "percent")


def some(n: int = 120, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray], list[str | None]]:
    """(record, label) truth with unknown ones; two models; patients of three records each, some unknown."""
    random = np.random.default_rng(seed)
    truth = np.column_stack([random.normal(60, 15, n), random.normal(50, 10, n)])
    good, bad = truth + random.normal(2, 5, truth.shape), truth + random.normal(-4, 20, truth.shape)
    truth[random.random(truth.shape) < 0.1] = np.nan
    patients = [None if number % 10 == 0 else f"p{number // 3}" for number in range(n)]
    return truth, {"good": good, "bad": bad}, patients


def by_hand(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    error = p - y
    return {
        "mean_absolute_error": mean_absolute_error(y, p),
        "root_mean_squared_error": root_mean_squared_error(y, p),
        "r2": r2_score(y, p),
        "pearson_r": float(pearsonr(y, p).statistic),
        "mean_error": float(error.mean()),
        "lower_limit": float(error.mean() - 1.96 * error.std(ddof=1)),
        "upper_limit": float(error.mean() + 1.96 * error.std(ddof=1)),
    }


def test_every_measure_is_what_other_libraries_say_over_known_records() -> None:
    truth, models, patients = some()
    scores, _ = compare_values(truth, models, LABELS, UNITS, patients, n_replicates=20)
    for name, values in models.items():
        assert (scores[name].n_records, scores[name].n_patients) == (120, patient_numbers(patients).max() + 1)
        for k, one in enumerate(scores[name].labels):
            known = ~np.isnan(truth[:, k])
            assert (one.label, one.unit, one.n) == (LABELS[k], UNITS[k], known.sum())
            assert 90 < one.n < 120
            for measure, expected in by_hand(truth[known, k], values[known, k]).items():
                assert getattr(one, measure).value == pytest.approx(expected, abs=1e-10), measure


def test_the_replicates_are_whole_patients_drawn_and_scored_again() -> None:
    """The judge repeats each drawn record as often as it was drawn."""
    truth, models, patients = some(40)
    found, _ = compare_values(truth, models, LABELS, UNITS, patients, n_replicates=50, confidence=0.9, seed=3)
    (weights,) = bootstrap_weights(patient_numbers(patients), 50, 3)
    known = np.flatnonzero(~np.isnan(truth[:, 0]))
    drawn = []
    for times in weights.T.astype(int):
        rows = np.repeat(known, times[known])
        drawn.append(by_hand(truth[rows, 0], models["good"][rows, 0]))
    for measure in MEASURES:
        estimate = getattr(found["good"].labels[0], measure)
        low, high = np.quantile([one[measure] for one in drawn], [0.05, 0.95])
        assert estimate.low == pytest.approx(min(low, estimate.value), abs=1e-9), measure
        assert estimate.high == pytest.approx(max(high, estimate.value), abs=1e-9), measure
        assert estimate.low < estimate.value < estimate.high


def test_large_offsets_and_units_change_nothing_but_the_unit() -> None:
    truth, models, patients = some(60)
    near, _ = compare_values(truth, models, LABELS, UNITS, patients, n_replicates=30)
    shifted = {name: 1000 * values + 1e7 for name, values in models.items()}
    far, _ = compare_values(1000 * truth + 1e7, shifted, LABELS, UNITS, patients, n_replicates=30)
    for measure in MEASURES:
        factor = 1 if measure in ("r2", "pearson_r") else 1000
        one, other = (getattr(scores["bad"].labels[1], measure) for scores in (near, far))
        for end in ("value", "low", "high"):
            assert getattr(other, end) == pytest.approx(factor * getattr(one, end), rel=1e-6), measure


def test_differences_are_paired_and_clear_ones_have_a_small_p() -> None:
    truth, models, patients = some()
    scores, differences = compare_values(
        truth, {**models, "again": models["good"]}, LABELS, UNITS, patients,
        differences=[("good", "bad"), ("good", "again")], n_replicates=400,
    )  # fmt: skip
    assert [(one.first, one.second, one.label) for one in differences] == [
        ("good", "bad", "age"), ("good", "bad", "LVEF"), ("good", "again", "age"), ("good", "again", "LVEF"),
    ]  # fmt: skip
    clear, same = differences[0], differences[2]
    assert clear.mean_absolute_error is not None
    good, bad = (scores[name].labels[0].mean_absolute_error for name in ("good", "bad"))
    assert good is not None
    assert bad is not None
    assert clear.mean_absolute_error.value == pytest.approx(good.value - bad.value)
    assert clear.mean_absolute_error.high is not None
    assert clear.mean_absolute_error.high < 0
    assert (clear.p, same.p) == (2 / 401, 1.0)
    assert same.mean_absolute_error is not None
    assert (same.mean_absolute_error.low, same.mean_absolute_error.high) == (0, 0)
    assert clear.p_holm == pytest.approx(4 * 2 / 401), "over all four"


def test_what_is_not_defined_is_none_and_not_a_number_from_rounding() -> None:
    truth = np.array([[5.1], [7.3], [6.2], [np.nan]])
    constant = np.full((4, 1), 0.1 + 0.2)
    scores, _ = compare_values(truth, {"constant": constant}, ["x"], [""], [None] * 4, n_replicates=50)
    one = scores["constant"].labels[0]
    assert one.pearson_r is None
    assert one.r2 is not None
    assert one.r2.value < 0
    alike = np.full((4, 1), 61.7)
    scores, _ = compare_values(alike, {"constant": constant}, ["x"], [""], [None] * 4, n_replicates=50)
    assert scores["constant"].labels[0].r2 is None
    single, _ = compare_values(truth[:1], {"m": constant[:1]}, ["x"], [""], [None], n_replicates=5)
    assert single["m"].labels[0].lower_limit is None
    assert single["m"].labels[0].mean_absolute_error is not None
    nothing, _ = compare_values(truth[3:], {"m": constant[3:]}, ["x"], [""], [None], n_replicates=5)
    assert (nothing["m"].labels[0].n, nothing["m"].labels[0].mean_absolute_error) == (0, None)


def test_a_prediction_that_is_no_number_is_refused() -> None:
    truth, models, patients = some(20)
    models["bad"][3, 0] = np.nan
    with pytest.raises(ValueError, match="bad: 1 records without a finite number"):
        compare_values(truth, models, LABELS, UNITS, patients)


def test_a_part_is_scored_as_its_records_alone() -> None:
    truth, models, patients = some()
    rows = np.arange(120) % 3 == 0
    (found,) = score_value_parts(
        [Part("sex", "male", rows)], truth, models["good"], LABELS, UNITS, patients, n_replicates=30
    )
    whose = [patient for patient, chosen in zip(patients, rows, strict=True) if chosen]
    alone, _ = compare_values(truth[rows], {"good": models["good"][rows]}, LABELS, UNITS, whose, n_replicates=30)
    assert (found.by, found.name, found.scores) == ("sex", "male", alone["good"])


# ---- baselines


def embedded(n: int, seed: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings, and two numbers that hang on them linearly; some are unknown."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 6)) * [1, 5, 0.2, 1, 1, 1] + [0, 100, 0, 0, 0, 0]
    y = np.column_stack([3 * x[:, 0] + 10 * x[:, 2] + 60, x[:, 1] - 90]) + random.normal(scale=noise, size=(n, 2))
    y[random.random(y.shape) < 0.1] = np.nan
    return x.astype(np.float32), y


def test_a_ridge_probe_reads_what_is_linear_and_its_alpha_is_that_of_the_least_valid_error() -> None:
    train, valid, test = embedded(60, 0), embedded(40, 1), embedded(50, 2)
    found = ridge_probe(train, valid, test[0], LABELS)
    for k in range(2):
        known = ~np.isnan(train[1][:, k])
        scaler = StandardScaler().fit(train[0][known].astype(np.float64))
        judged = {}
        for alpha in STRENGTHS:
            model = Ridge(alpha=alpha).fit(scaler.transform(train[0][known].astype(np.float64)), train[1][known, k])
            seen = ~np.isnan(valid[1][:, k])
            said = model.predict(scaler.transform(valid[0][seen].astype(np.float64)))
            judged[alpha] = mean_absolute_error(valid[1][seen, k], said)
            if alpha == found.alphas[k]:
                np.testing.assert_allclose(found.values[:, k], model.predict(scaler.transform(test[0].astype(float))))
        assert judged[found.alphas[k]] == min(judged.values()) == pytest.approx(found.valid_errors[k])
        right = ~np.isnan(test[1][:, k])
        assert r2_score(test[1][right, k], found.values[right, k]) > 0.8


def test_neighbours_are_the_mean_of_the_nearest_by_cosine() -> None:
    train, valid, test = embedded(30, 0), embedded(20, 1), embedded(8, 2)
    found = neighbour_means(train, valid, test[0], LABELS, ks=(3,))
    for k in range(2):
        known = ~np.isnan(train[1][:, k])
        x = train[0][known].astype(np.float64)
        scale = x.std(axis=0)
        reference = (x - x.mean(axis=0)) / scale
        for row, asked in enumerate((test[0].astype(np.float64) - x.mean(axis=0)) / scale):
            cosine = reference @ asked / np.linalg.norm(reference, axis=1) / np.linalg.norm(asked)
            expected = train[1][known, k][np.argsort(-cosine)[:3]].mean()
            assert found.values[row, k] == pytest.approx(expected)
    assert found.k == (3, 3)
    assert max(neighbour_means(train, valid, test[0], LABELS).k) <= 28, "no more than there are"


def test_the_floor_is_the_mean_of_known_train_numbers() -> None:
    assert train_mean(np.array([[1.0, np.nan], [3.0, 5.0]]), 2).tolist() == [[2.0, 5.0], [2.0, 5.0]]


def test_embeddings_that_are_not_finite_are_told() -> None:
    train, valid, test = embedded(30, 0), embedded(20, 1), embedded(8, 2)
    test[0][1, 2] = np.inf
    for baseline in (ridge_probe, neighbour_means):
        with pytest.raises(InputError, match="1 of 8 embeddings are not finite"):
            baseline(train, valid, test[0], LABELS)
