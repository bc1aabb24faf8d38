"""Probabilities and decisions: scikit-learn is the judge, of the points and of every replicate."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import sklearn.metrics as judge
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from ecgfm.scores.calibration import (
    MAX_TEMPERATURE,
    MEASURES,
    MIN_TEMPERATURE,
    averages,
    brier,
    calibration,
    decisions,
    ece,
    fit_calibration,
    logits_of,
    reliability,
    scale,
    threshold_at_sensitivity,
    threshold_at_specificity,
)
from ecgfm.scores.metrics import auprc, auroc, bootstrap_areas, bootstrap_weights, patient_numbers

LABELS = ["usual", "rare", "tied", "never", "always", "unknown", "constant"]


def simulated(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    """(record, label) truth and probabilities for each way in which a label can be awkward, and patients."""
    random = np.random.default_rng(seed)
    truth = (random.random((n, 7)) < [0.4, 0.08, 0.3, 0, 1.1, 0.3, 0.3]).astype(np.float64)
    truth[:2, [0, 1, 2, 6]] = [[0], [1]]
    probabilities = expit(random.normal(size=(n, 7)) + 1.5 * truth - 0.7)
    probabilities[:, 2] = probabilities[:, 2].round(1)
    probabilities[:, 6] = 0.3
    truth[random.random((n, 7)) < 0.15] = np.nan
    truth[:2, [0, 1, 2, 6]] = [[0], [1]]
    truth[:, 5] = np.nan
    return truth, probabilities, [None if row % 7 == 0 else f"p{row // 3}" for row in range(n)]


THRESHOLDS = [0.5, 0.4, 0.3, 0.5, 0.5, 0.5, 0.3]


def by_scikit_learn(y: np.ndarray, called: np.ndarray, weight: np.ndarray) -> dict[str, float]:
    """The measures of decisions under sample weights; NaN where our rule leaves them out."""
    given_weight = {"sample_weight": weight, "zero_division": np.nan}
    some, none = weight[y == 1].sum() > 0, weight[y == 0].sum() > 0
    values = {
        "sensitivity": judge.recall_score(y, called, **given_weight),
        "specificity": judge.recall_score(1 - y, ~called, **given_weight),
        "ppv": judge.precision_score(y, called, **given_weight),
        "npv": judge.precision_score(1 - y, ~called, **given_weight),
        "f1": judge.f1_score(y, called, **given_weight) if some else np.nan,
        "accuracy": judge.accuracy_score(y, called, sample_weight=weight),
    }
    return values | {
        "balanced_accuracy": judge.balanced_accuracy_score(y, called, sample_weight=weight) if some and none else np.nan
    }


@pytest.mark.parametrize("seed", range(3))
def test_decisions_equal_scikit_learn(seed: int) -> None:
    truth, probabilities, patients = simulated(120, seed)
    found = decisions(truth, probabilities, LABELS, patients, THRESHOLDS, n_replicates=20)
    for k, one in enumerate(found):
        known = ~np.isnan(truth[:, k])
        assert (one.n, one.positives) == (int(known.sum()), int((truth[:, k] == 1).sum()))
        assert sum(one.point[1:]) == one.n
        if not known.any():
            assert all(getattr(one, name) is None for name in MEASURES)
            continue
        called = probabilities[known, k] >= THRESHOLDS[k]
        expected = by_scikit_learn(truth[known, k].astype(int), called, np.ones(int(known.sum())))
        for name in MEASURES:
            mine = getattr(one, name)
            assert (mine.value if mine else math.nan) == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name
    assert found[3].sensitivity is None
    assert found[3].f1 is None
    assert found[3].specificity is not None
    assert found[4].specificity is None
    assert found[6].npv is None  # called wherever it is known


def test_intervals_of_decisions_are_the_percentiles_of_scikit_learn_on_the_replicates() -> None:
    """Each replicate's whole-number weights go to scikit-learn as sample weights."""
    truth, probabilities, patients = simulated(80, 3)
    found = decisions(truth, probabilities, LABELS, patients, THRESHOLDS, n_replicates=40, confidence=0.8, seed=5)
    weights = np.concatenate(list(bootstrap_weights(patient_numbers(patients), 40, 5)), axis=1)
    for k in (0, 1, 3):
        known = ~np.isnan(truth[:, k])
        called = probabilities[known, k] >= THRESHOLDS[k]
        rows = [by_scikit_learn(truth[known, k].astype(int), called, column) for column in weights[known].T]
        for name in MEASURES:
            mine = getattr(found[k], name)
            values = np.array([row[name] for row in rows])
            if mine is None:
                continue
            defined = values[~np.isnan(values)]
            low, high = np.quantile(defined, [0.1, 0.9])
            assert (mine.low, mine.high) == pytest.approx((min(low, mine.value), max(high, mine.value)), abs=1e-12)
            assert (mine.replicates, mine.left_out) == (len(defined), 40 - len(defined))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(6, 40))
def test_every_interval_holds_its_point(seed: int, n: int) -> None:
    truth, probabilities, patients = simulated(n, seed)
    estimates = [
        getattr(one, name)
        for one in decisions(truth, probabilities, LABELS, patients, THRESHOLDS, n_replicates=30)
        for name in MEASURES
    ]
    for one in calibration(truth, probabilities, LABELS, patients, n_bins=5, n_replicates=30):
        estimates += [one.brier, one.ece]
    areas = bootstrap_areas(truth, {"m": probabilities}, patients, n_replicates=30)["m"]
    for average in averages(truth, probabilities, LABELS, patients, THRESHOLDS, areas).values():
        estimates += [average.macro, average.weighted, average.micro]
    held = [one for one in estimates if one is not None and one.low is not None]
    assert len(held) > 20
    for one in held:
        assert 0 <= one.low <= one.value <= one.high <= 1 + 1e-12


def test_the_brier_score_equals_scikit_learn() -> None:
    truth, probabilities, patients = simulated(150, 4)
    found = brier(truth, probabilities)
    of_bootstrap = calibration(truth, probabilities, LABELS, patients, n_replicates=5)
    for k in range(7):
        known = ~np.isnan(truth[:, k])
        if k == 5:
            assert math.isnan(found[k])
            assert of_bootstrap[k].brier is None
            assert of_bootstrap[k].ece is None
            assert of_bootstrap[k].bins == ()
            continue
        expected = judge.brier_score_loss(truth[known, k], probabilities[known, k], pos_label=1)
        mine = of_bootstrap[k].brier
        assert mine is not None
        assert (found[k], mine.value) == pytest.approx((expected, expected), abs=1e-12)


def test_bins_hold_every_known_record_once_and_part_no_tie() -> None:
    truth, probabilities, _ = simulated(200, 5)
    for k in (0, 2, 6):
        known = ~np.isnan(truth[:, k])
        y, p = truth[known, k], probabilities[known, k]
        for binning in ("mass", "width"):
            bins = reliability(truth[:, k], probabilities[:, k], n_bins=8, binning=binning)
            assert sum(one.n for one in bins) == len(y)
            for one in bins:
                mine = (p >= one.low) & ((p < one.high) | ((binning == "mass" or one.high == 1) & (p == one.high)))
                assert mine.sum() == one.n
                assert one.mean_probability == pytest.approx(p[mine].mean())
                assert one.share_present == pytest.approx(y[mine].mean())
            slow = sum(abs(one.mean_probability - one.share_present) * one.n / len(y) for one in bins)
            assert ece(bins) == pytest.approx(slow, abs=1e-12)
    sizes = [one.n for one in reliability(truth[:, 0], probabilities[:, 0], n_bins=8)]
    assert len(sizes) == 8
    assert max(sizes) - min(sizes) <= 1
    assert len(reliability(truth[:, 6], probabilities[:, 6])) == 1  # all alike: one bin
    widths = reliability(np.array([1.0, 0, 1]), np.array([0.0, 0.5, 1.0]), n_bins=2, binning="width")
    assert [(one.low, one.high, one.n) for one in widths] == [(0, 0.5, 1), (0.5, 1, 2)]


def test_the_replicates_of_the_calibration_error_are_those_of_records_written_out() -> None:
    """In the bins of all records: a replicate's records, as often as they were drawn."""
    truth, probabilities, patients = simulated(60, 6)
    found = calibration(truth, probabilities, LABELS, patients, n_bins=4, n_replicates=25, confidence=0.9, seed=2)
    weights = np.concatenate(list(bootstrap_weights(patient_numbers(patients), 25, 2)), axis=1)
    y, p = truth[:, 0], probabilities[:, 0]
    values = []
    for times in weights.T.astype(int):
        drawn = np.repeat(np.arange(60), times)
        drawn = drawn[~np.isnan(y[drawn])]
        gaps = []
        for one in found[0].bins:
            mine = drawn[(p[drawn] >= one.low) & (p[drawn] <= one.high)]
            gaps.append(abs((p[mine] - y[mine]).sum()))
        values.append(sum(gaps) / len(drawn))
    low, high = np.quantile(values, [0.05, 0.95])
    mine = found[0].ece
    assert mine is not None
    assert (mine.low, mine.high) == pytest.approx((min(low, mine.value), max(high, mine.value)), abs=1e-12)


def test_a_calibrated_model_has_a_small_error_and_an_overconfident_one_a_large() -> None:
    random = np.random.default_rng(7)
    logits = random.normal(size=(20_000, 1)) * 1.5 - 2
    truth = (random.random(logits.shape) < expit(logits)).astype(np.float64)
    for binning in ("mass", "width"):
        right, wrong = (
            ece(reliability(truth[:, 0], expit(sharpness * logits[:, 0]), binning=binning)) for sharpness in (1, 3)
        )
        assert right < 0.015
        assert wrong > 0.06
    sharp = fit_calibration(truth, 3 * logits)
    assert (sharp.temperatures[0], sharp.shifts[0]) == pytest.approx((3, 0), abs=0.2)


def test_a_shift_takes_back_what_weighted_positives_do() -> None:
    """A weight of w on positives multiplies the odds by w: a temperature alone cannot mend that."""
    random = np.random.default_rng(5)
    logits = random.normal(size=(50_000, 1)) - 4
    truth = (random.random(logits.shape) < expit(logits)).astype(np.float64)
    weight = (1 - truth.mean()) / truth.mean()
    fitted = fit_calibration(truth, logits + np.log(weight))
    assert fitted.temperatures[0] == pytest.approx(1, abs=0.1)
    assert fitted.shifts[0] == pytest.approx(-np.log(weight), abs=0.3)
    p = scale(logits + np.log(weight), *fitted)
    assert p.mean() == pytest.approx(truth.mean(), rel=1e-6), "the mean probability is the prevalence, at the optimum"
    assert ece(reliability(truth[:, 0], p[:, 0])) < 0.003
    assert ece(reliability(truth[:, 0], expit(logits + 4)[:, 0])) > 0.2


@pytest.mark.parametrize("seed", range(4))
def test_temperature_and_shift_are_of_the_least_log_loss(seed: int) -> None:
    truth, probabilities, _ = simulated(400, seed)
    logits = logits_of(probabilities) * [0.4, 3, 1, 1, 1, 1, 1] + [2, -1, 0, 0, 0, 0, 0]
    found = fit_calibration(truth, logits, min_positives=5)

    def log_loss(parameters: np.ndarray, k: int) -> float:
        known = ~np.isnan(truth[:, k])
        p = scale(logits[known, k], np.array(1 / parameters[0]), parameters[1])
        return float(judge.log_loss(truth[known, k], p, labels=[0, 1]))

    for k in (0, 1, 2):
        mine = np.array([1 / found.temperatures[k], found.shifts[k]])
        bounds = [(1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE), (None, None)]
        best = minimize(log_loss, np.array([1.0, 0.0]), args=(k,), method="L-BFGS-B", bounds=bounds)
        assert log_loss(mine, k) <= best.fun + 1e-9
        assert mine == pytest.approx(best.x, rel=2e-2, abs=2e-2)
    assert found.temperatures[[3, 4, 5]].tolist() == [1, 1, 1]  # of one class, or unknown
    assert found.shifts[[3, 4, 5]].tolist() == [0, 0, 0]
    again = fit_calibration(truth, logits, min_positives=5)
    assert all((one == other).all() for one, other in zip(found, again, strict=True))
    assert (fit_calibration(truth, logits, min_positives=1000).temperatures == 1).all()


def test_temperatures_stay_within_bounds() -> None:
    y = np.repeat([0.0, 1.0], 20)[:, None]
    apart, reversed_, constant = (fit_calibration(y, z) for z in (2 * y - 1, 1 - 2 * y, 0 * y))
    assert apart.temperatures.tolist() == [pytest.approx(MIN_TEMPERATURE)]
    assert reversed_.temperatures.tolist() == [pytest.approx(MAX_TEMPERATURE)]
    assert (constant.temperatures.tolist(), constant.shifts.tolist()) == ([1], [0])
    assert np.abs([apart.shifts[0], reversed_.shifts[0]]).max() < 1e-6, "both classes are as frequent"
    sure = logits_of(np.where(y == 1, 1.0, 0.0))
    assert np.isfinite(sure).all()
    assert all(np.isfinite(of_label).all() for of_label in fit_calibration(y, sure))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(-16, 16, width=32), min_size=4, max_size=40),
    st.floats(MIN_TEMPERATURE, MAX_TEMPERATURE),
    st.integers(0, 1000),
)
def test_a_temperature_never_changes_the_areas(values: list[float], temperature: float, seed: int) -> None:
    """The order of logits is kept, ties and all: equal exactly, on logits of any temperature."""
    logits = np.array(values, dtype=np.float32)
    truth = np.random.default_rng(seed).integers(0, 2, len(values)).astype(np.float64)
    truth[:2] = 0, 1
    divided = logits.astype(np.float64) / temperature
    assert auroc(truth, divided) == auroc(truth, logits)
    assert auprc(truth, divided) == auprc(truth, logits)
    scaled = scale(logits[:, None], np.array([temperature]))[:, 0]
    order = np.argsort(logits, kind="stable")
    assert (np.diff(scaled[order]) >= 0).all()
    if np.abs(divided).max() < 20 and np.diff(np.unique(divided)).min(initial=1) > 1e-6:
        assert auroc(truth, scaled) == auroc(truth, logits)
        assert auprc(truth, scaled) == auprc(truth, logits)


def test_what_is_fitted_changes_no_area_and_no_decision() -> None:
    truth, probabilities, _ = simulated(300, 8)
    logits = logits_of(probabilities).astype(np.float32)
    fitted = fit_calibration(truth, logits)
    assert (fitted.temperatures[[0, 2]] != 1).all()
    scaled, thresholds = scale(logits, *fitted), scale(np.float32(0.3), *fitted)
    for k in (0, 1, 2):
        assert auroc(truth[:, k], scaled[:, k]) == auroc(truth[:, k], logits[:, k])
        assert auprc(truth[:, k], scaled[:, k]) == auprc(truth[:, k], logits[:, k])
        assert ((scaled[:, k] >= thresholds[k]) == (logits[:, k] >= np.float32(0.3))).all()
    assert logits_of(expit(np.array([-20.0, 0, 3]))) == pytest.approx([-20.0, 0, 3])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.5, 0.8, 0.9, 0.95, 1.0]), st.sampled_from([1, 2, 16]))
def test_a_threshold_is_the_best_that_keeps_its_promise(seed: int, target: float, decimals: int) -> None:
    random = np.random.default_rng(seed)
    truth = np.append(random.integers(0, 2, 30).astype(np.float64), [0, 1, np.nan])
    scores = random.random(33).round(decimals)
    known = ~np.isnan(truth)
    positive, negative = scores[truth == 1], scores[truth == 0]
    candidates = np.unique(scores[known])
    at = threshold_at_specificity(truth, scores, target)
    assert (negative < at).sum() / len(negative) >= target
    assert all((negative < lower).sum() / len(negative) < target for lower in candidates[candidates < at])
    if target:
        at = threshold_at_sensitivity(truth, scores, target)
        assert at in candidates
        assert (positive >= at).sum() / len(positive) >= target
        assert all((positive >= higher).sum() / len(positive) < target for higher in candidates[candidates > at])


def test_averages_equal_scikit_learn_where_every_label_has_both_classes() -> None:
    random = np.random.default_rng(9)
    truth = (random.random((200, 5)) < [0.5, 0.2, 0.1, 0.4, 0.3]).astype(np.float64)
    truth[:2] = [[0], [1]]
    probabilities = expit(random.normal(size=(200, 5)) + truth).round(2)
    patients: list[str | None] = [f"p{row // 2}" for row in range(200)]
    areas = bootstrap_areas(truth, {"m": probabilities}, patients, n_replicates=12, seed=3)["m"]
    found = averages(truth, probabilities, list("abcde"), patients, [0.5] * 5, areas, confidence=0.999999, seed=3)
    weights = np.concatenate(list(bootstrap_weights(patient_numbers(patients), 12, 3)), axis=1)
    for way in ("macro", "weighted", "micro"):
        for name, score, shown in (
            ("auroc", judge.roc_auc_score, probabilities),
            ("auprc", judge.average_precision_score, probabilities),
            ("f1", judge.f1_score, probabilities >= 0.5),
        ):
            mine = getattr(found[name], way)
            point = score(truth, shown, average=way)
            replicates = [score(truth, shown, average=way, sample_weight=times) for times in weights.T]
            assert mine.value == pytest.approx(point, abs=1e-12), (way, name)
            assert (mine.low, mine.high) == pytest.approx(
                (min(*replicates, point), max(*replicates, point)), abs=1e-6
            ), (way, name)
    assert found["auroc"].left_out == ()


def test_averages_name_the_labels_they_leave_out() -> None:
    truth, probabilities, patients = simulated(120, 10)
    areas = bootstrap_areas(truth, {"m": probabilities}, patients, n_replicates=10)["m"]
    found = averages(truth, probabilities, LABELS, patients, THRESHOLDS, areas)
    assert found["auroc"].left_out == ("never", "always", "unknown")
    assert found["f1"].left_out == ("never", "unknown")
    assert (found["auroc"].labels, found["f1"].labels) == (4, 5)
    assert found["auprc"].macro is not None
    assert found["auprc"].macro.value == pytest.approx(np.nanmean(areas.points[1]))
    n_rare = int((truth[:, 1] == 1).sum())
    strict = averages(truth, probabilities, LABELS, patients, THRESHOLDS, areas, min_positives=n_rare + 1)
    assert strict["auroc"].left_out == ("rare", "never", "always", "unknown")
    none = averages(truth, probabilities, LABELS, patients, THRESHOLDS, areas, min_positives=10_000)
    assert none["auroc"].macro is None
    assert none["auroc"].weighted is None
    with pytest.raises(ValueError, match="at least 1"):
        averages(truth, probabilities, LABELS, patients, THRESHOLDS, areas, min_positives=0)


def test_nothing_known_gives_nothing() -> None:
    truth, probabilities = np.full((6, 2), np.nan), np.full((6, 2), 0.5)
    areas = bootstrap_areas(truth, {"m": probabilities}, [None] * 6, n_replicates=5)["m"]
    for average in averages(truth, probabilities, ["a", "b"], [None] * 6, [0.5] * 2, areas).values():
        assert asdict(average) | {"left_out": ()} == {
            "macro": None, "weighted": None, "micro": None, "labels": 0, "left_out": (),
        }  # fmt: skip
    (one, _) = calibration(truth, probabilities, ["a", "b"], [None] * 6, n_replicates=5)
    assert (one.n, one.brier, one.ece, one.bins) == (0, None, None, ())


def test_what_cannot_be_judged_is_refused() -> None:
    truth, probabilities, patients = simulated(20, 11)
    with pytest.raises(ValueError, match="0 to 1"):
        brier(truth, probabilities + 1)
    with pytest.raises(ValueError, match="threshold for each of 7"):
        decisions(truth, probabilities, LABELS, patients, [0.5])
    with pytest.raises(ValueError, match="expected truth of shape"):
        calibration(truth, probabilities, LABELS[:2], patients)
    with pytest.raises(ValueError, match="expected a positive"):
        threshold_at_sensitivity(np.array([0.0, np.nan]), np.array([0.1, 0.2]), 0.9)
    with pytest.raises(ValueError, match="expected a negative"):
        threshold_at_specificity(np.array([1.0, np.nan]), np.array([0.1, 0.2]), 0.9)
    with pytest.raises(ValueError, match="n_bins"):
        reliability(truth[:, 0], probabilities[:, 0], n_bins=0)
