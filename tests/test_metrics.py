"""Metrics: scikit-learn is the judge, and the intervals do what intervals promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgfm.ecg import InputError
from ecgfm.scores import metrics


def simulated(
    n: int, prevalence: float, shift: float, seed: int, decimals: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One label: (record,) truth with both classes, (record,) scores; `decimals` makes ties."""
    random = np.random.default_rng(seed)
    truth = (random.random(n) < prevalence).astype(np.float64)
    truth[:2] = 0, 1
    scores = random.normal(size=n) + shift * truth
    return truth, scores if decimals is None else scores.round(decimals)


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("prevalence", [0.02, 0.5, 0.9])
def test_areas_equal_scikit_learn_with_and_without_ties(prevalence: float, decimals: int | None) -> None:
    truth, scores = simulated(300, prevalence, 0.7, seed=1, decimals=decimals)
    assert decimals is None or len(np.unique(scores)) < 200
    assert metrics.auroc(truth, scores) == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores), abs=1e-12)
    assert metrics.auprc(truth, scores) == pytest.approx(
        sklearn.metrics.average_precision_score(truth, scores), abs=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=30).filter(
        lambda rows: len({y for y, _, weight in rows if weight}) == 2
    )
)
def test_weights_count_a_record_as_often_as_they_say(rows: list[tuple[bool, int, int]]) -> None:
    """The engine of the bootstrap against scikit-learn on records written out as often as they weigh."""
    truth = np.array([y for y, _, _ in rows], dtype=np.float64)
    scores = np.array([s for _, s, _ in rows], dtype=np.float64)
    times = np.array([weight for _, _, weight in rows])
    roc, pr = metrics.areas_of(metrics.rank(truth, scores), times[:, None].astype(np.float64))
    written_out = np.repeat(truth, times), np.repeat(scores, times)
    assert roc[0] == pytest.approx(sklearn.metrics.roc_auc_score(*written_out), abs=1e-12)
    assert pr[0] == pytest.approx(sklearn.metrics.average_precision_score(*written_out), abs=1e-12)


def test_curves_enclose_the_areas() -> None:
    truth, scores = simulated(200, 0.2, 1.0, seed=2, decimals=1)
    false_positive_rate, true_positive_rate = metrics.roc_curve(truth, scores)
    assert np.trapezoid(true_positive_rate, false_positive_rate) == pytest.approx(metrics.auroc(truth, scores))
    recall, precision = metrics.pr_curve(truth, scores)
    assert (np.diff(recall) * precision[1:]).sum() == pytest.approx(metrics.auprc(truth, scores))
    assert (false_positive_rate[[0, -1]].tolist(), true_positive_rate[[0, -1]].tolist()) == ([0, 1], [0, 1])
    assert recall[[0, -1]].tolist() == [0, 1]


def test_unknown_truth_is_as_if_the_record_were_not_there() -> None:
    truth, scores = simulated(100, 0.3, 1.0, seed=3)
    with_unknown = np.append(truth, [np.nan] * 20)
    assert metrics.auroc(with_unknown, np.append(scores, [99.0] * 20)) == metrics.auroc(truth, scores)
    result = metrics.compare(with_unknown[:, None], {"m": np.append(scores, [99.0] * 20)[:, None]}, ["a"], [None] * 120)
    (label,) = result["m"].labels
    assert (label.n, label.positives) == (100, int(truth.sum()))


def test_a_label_of_one_class_is_named_and_left_out_of_the_macro_mean() -> None:
    truth, scores = simulated(80, 0.4, 1.0, seed=4)
    both = np.stack([truth, np.zeros(80), truth], axis=1)
    result = metrics.compare(
        both, {"m": np.stack([scores, scores, -scores], axis=1)}, ["one", "never", "turned"], [None] * 80
    )["m"]
    assert result.left_out == ("never",)
    assert result.labels[1].auroc is None
    assert result.labels[1].auprc is None
    assert result.macro_auroc is not None
    assert result.macro_auroc.value == pytest.approx(0.5)  # a model and its reverse
    none = metrics.compare(np.zeros((5, 1)), {"m": np.arange(5.0)[:, None]}, ["never"], [None] * 5)["m"]
    assert none.macro_auroc is None
    assert none.left_out == ("never",)


def test_records_of_one_patient_are_drawn_together() -> None:
    patients = np.repeat(np.arange(12), 3)
    weights = np.concatenate(list(metrics.bootstrap_weights(patients, 50, seed=0)), axis=1)
    by_patient = weights.reshape(12, 3, 50)
    assert weights.shape == (36, 50)
    assert (by_patient == by_patient[:, :1]).all()
    assert (by_patient[:, 0].sum(axis=0) == 12).all()
    assert len(np.unique(by_patient[:, 0], axis=1).T) > 45  # the replicates differ


def test_a_record_of_no_known_patient_is_its_own_patient() -> None:
    assert metrics.patient_numbers(["a", None, "b", None, "a"]).tolist() == [0, 1, 2, 3, 0]


def test_replicates_do_not_depend_on_how_many_come_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    patients = np.arange(40) // 2
    together = np.concatenate(list(metrics.bootstrap_weights(patients, 30, seed=5)), axis=1)
    monkeypatch.setattr(metrics, "CHUNK", 7 * 40)
    chunks = list(metrics.bootstrap_weights(patients, 30, seed=5))
    assert len(chunks) == 5
    assert (np.concatenate(chunks, axis=1) == together).all()


def test_repeated_records_widen_the_interval_unless_the_patient_is_drawn() -> None:
    """Ten copies of every record hold no more knowledge than one: drawn by patient, the interval stays."""
    truth, scores = simulated(60, 0.4, 0.8, seed=6)

    def width(truth: np.ndarray, scores: np.ndarray, patients: list[str | None]) -> float:
        estimate = metrics.compare(truth[:, None], {"m": scores[:, None]}, ["a"], patients)["m"].labels[0].auroc
        assert estimate is not None
        assert estimate.low is not None
        assert estimate.high is not None
        return estimate.high - estimate.low

    once = width(truth, scores, [None] * 60)
    ten_times = np.repeat(truth, 10), np.repeat(scores, 10)
    by_patient = width(*ten_times, [str(row // 10) for row in range(600)])
    by_record = width(*ten_times, [None] * 600)
    assert by_patient == pytest.approx(once, rel=0.15)
    assert by_record < 0.5 * once


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.3, 0.5]), st.sampled_from([0.0, 1.0, 6.0]))
def test_intervals_hold_the_point_estimate(seed: int, prevalence: float, shift: float) -> None:
    truth, scores = simulated(25, prevalence, shift, seed)
    result = metrics.compare(truth[:, None], {"m": scores[:, None]}, ["a"], [None] * 25, n_replicates=60)["m"]
    label = result.labels[0]
    for estimate in (label.auroc, label.auprc, result.macro_auroc, result.macro_auprc):
        assert estimate is not None
        assert estimate.low is not None
        assert estimate.high is not None
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
        assert estimate.replicates + estimate.left_out == 60


def test_replicates_that_lose_a_class_are_counted() -> None:
    truth, scores = np.zeros(20), np.arange(20.0)
    truth[[7]] = 1
    label = metrics.compare(truth[:, None], {"m": scores[:, None]}, ["a"], [None] * 20, n_replicates=400)["m"].labels[0]
    assert label.auroc is not None
    assert label.auroc.left_out / 400 == pytest.approx((1 - 1 / 20) ** 20, abs=0.08)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Scores normal(0, 1) and normal(1, 1): the true AUROC is Phi(1 / sqrt(2))."""
    true_auroc = 0.5 * (1 + math.erf(0.5))
    trials, covered = 200, 0
    for seed in range(trials):
        truth, scores = simulated(120, 0.4, 1.0, seed)
        estimate = (
            metrics.compare(
                truth[:, None], {"m": scores[:, None]}, ["a"], [None] * 120, n_replicates=300, confidence=0.9
            )["m"]
            .labels[0]
            .auroc
        )
        assert estimate is not None
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= true_auroc <= estimate.high
    assert 0.83 <= covered / trials <= 0.96


def test_differences_are_paired() -> None:
    """A model that is another one's twin differs from it by exactly 0 in every replicate, whatever the data."""
    truth, scores = simulated(60, 0.3, 1.2, seed=8)
    result = metrics.compare(
        truth[:, None],
        {"m": scores[:, None], "twin": 2 * scores[:, None], "bad": -scores[:, None]},
        ["a"],
        [None] * 60,
        differences=[("m", "twin"), ("m", "bad")],
    )
    same, better = result["m - twin"].macro_auroc, result["m - bad"].macro_auroc
    assert same is not None
    assert better is not None
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert better.value == pytest.approx(metrics.auroc(truth, scores) - metrics.auroc(truth, -scores))
    assert better.low is not None
    assert better.low > 0
    assert result["m"].labels[0].auroc is not None


def test_the_best_f1_threshold_beats_every_other() -> None:
    truth, scores = simulated(150, 0.2, 1.0, seed=9, decimals=1)
    best = metrics.best_f1_threshold(truth, scores)
    f1 = {at: sklearn.metrics.f1_score(truth, scores >= at) for at in np.unique(scores)}
    assert f1[best] == max(f1.values())
    point = metrics.operating_point(np.append(truth, np.nan), np.append(scores, 100.0), best)
    matrix = sklearn.metrics.confusion_matrix(truth, scores >= best)
    assert [[point.true_negatives, point.false_positives], [point.false_negatives, point.true_positives]] == (
        matrix.tolist()
    )


def test_aggregation_equals_a_loop_over_records() -> None:
    random = np.random.default_rng(10)
    record_ids = ["b", "a", "b", "c", "a", "b"]
    probabilities = random.random((6, 2)).astype(np.float32)
    names, of_record, n_segments = metrics.aggregate(record_ids, probabilities, ["mean", "max"])
    assert names == ["b", "a", "c"]
    assert n_segments.tolist() == [3, 2, 1]
    for row, name in enumerate(names):
        mine = probabilities[[i for i, record_id in enumerate(record_ids) if record_id == name]]
        assert of_record[row] == pytest.approx([mine[:, 0].mean(), mine[:, 1].max()])


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(InputError, match="median"):
        metrics.aggregate(["a"], np.zeros((1, 1)), ["median"])
    with pytest.raises(ValueError, match="not a number"):
        metrics.point_scores(np.array([[0.0], [1.0]]), np.array([[np.nan], [0.5]]))
    with pytest.raises(ValueError, match="0, 1 or NaN"):
        metrics.point_scores(np.array([[0.0], [2.0]]), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="both classes"):
        metrics.roc_curve(np.zeros(3), np.arange(3.0))
