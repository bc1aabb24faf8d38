"""Tests of difference: counted by hand, by other formulas, and by how often they cry wolf."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgfm.scores.metrics import auprc, auroc, bootstrap_areas, compare
from ecgfm.scores.significance import MEASURES, Measure, bootstrap_p, delong, holm, paired_tests, permutation_test


def simulated(
    n: int, shifts: tuple[float, float], seed: int, per_patient: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str | None]]:
    """(record,) truth, two models' scores that err together, and patients of so many records."""
    random = np.random.default_rng(seed)
    patients = np.arange(n) // per_patient
    truth = (random.random(n) < 0.35).astype(np.float64)
    truth[[0, per_patient, 2 * per_patient, 3 * per_patient]] = 0, 1, 0, 1
    hard = random.normal(size=n)[patients]
    first, second = (hard + random.normal(size=n)[patients] * 0.7 + shift * truth for shift in shifts)
    return truth, first, second, [f"p{number}" for number in patients]


def test_the_p_of_the_bootstrap_counts_replicates_beyond_zero() -> None:
    assert bootstrap_p(np.array([0.1] * 99)) == 2 / 100
    assert bootstrap_p(np.array([-0.1] * 99)) == 2 / 100
    assert bootstrap_p(np.array([0.1] * 95 + [-0.1] * 4)) == 2 * 5 / 100
    assert bootstrap_p(np.array([0.1] * 95 + [0.0] * 4)) == 2 * 5 / 100
    assert bootstrap_p(np.array([0.1] * 10 + [np.nan] * 80 + [0.2] * 9)) == 2 / 20
    assert bootstrap_p(np.zeros(50)) == 1
    assert bootstrap_p(np.full(3, np.nan)) is None


def test_holm_by_hand() -> None:
    """Holm's own way: the least p times the number of tests, the next times one fewer, never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.02, None, 0.02]) == pytest.approx([0.04, None, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.sampled_from([0.0, 0.001, 0.01, 0.012, 0.02, 0.04, 0.3, 1.0]), min_size=1, max_size=12))
def test_holm_rejects_what_the_stepping_rule_rejects(p_values: list[float]) -> None:
    """Go up the sorted p while each is at most level / (how many are left); stop at the first that is not."""
    corrected = [p for p in holm(p_values) if p is not None]
    assert len(corrected) == len(p_values)
    assert all(after >= before for before, after in zip(p_values, corrected, strict=True))
    for level in (0.0501, 0.1003, 0.0307):  # no product of the values above
        rejected = set()
        for left, place in zip(
            range(len(p_values), 0, -1), sorted(range(len(p_values)), key=p_values.__getitem__), strict=True
        ):
            if p_values[place] > level / left:
                break
            rejected.add(place)
        assert {place for place, p in enumerate(corrected) if p <= level} == rejected


def slow_delong(truth: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The difference and its variance by DeLong's formulas over all pairs, in covariance matrices."""
    placements = []
    for scores in (first, second):
        positive, negative = scores[truth == 1][:, None], scores[truth == 0][None]
        wins = (positive > negative) + 0.5 * (positive == negative)
        placements.append((wins.mean(axis=1), wins.mean(axis=0)))
    variance = 0.0
    for of_class in range(2):
        covariance = np.cov(placements[0][of_class], placements[1][of_class])
        variance += (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) / len(placements[0][of_class])
    return float(placements[0][0].mean() - placements[1][0].mean()), variance


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 3]))
def test_delong_is_its_formula_written_out(seed: int, decimals: int) -> None:
    truth, first, second, _ = simulated(40, (1.0, 0.4), seed)
    first, second = first.round(decimals), second.round(decimals)
    found = delong(np.append(truth, [np.nan] * 3), *(np.append(x, [9.0] * 3) for x in (first, second)))
    assert found is not None
    difference, variance = slow_delong(truth, first, second)
    assert found.difference == pytest.approx(difference, abs=1e-12)
    assert found.standard_error == pytest.approx(np.sqrt(variance), abs=1e-12)
    assert found.first == pytest.approx(auroc(truth, first), abs=1e-12)
    assert (found.n, found.positives, found.n_patients) == (40, int(truth.sum()), 40)


def test_delong_of_many_copies_of_a_record_by_patient_is_that_of_the_record() -> None:
    """To a factor that comes of counting patients instead of records: none, since the copies are one patient's."""
    truth, first, second, _ = simulated(60, (1.0, 0.3), 3)
    once = delong(truth, first, second)
    copied = [np.repeat(x, 7) for x in (truth, first, second)]
    by_patient = delong(*copied, [str(row // 7) for row in range(420)])
    by_record = delong(*copied)
    assert once is not None
    assert by_patient is not None
    assert by_record is not None
    assert by_patient.standard_error == pytest.approx(once.standard_error, rel=1e-9)
    assert by_record.standard_error < 0.5 * once.standard_error
    assert by_patient.n_patients == 60


def test_delong_and_the_bootstrap_agree_on_the_error_of_a_difference() -> None:
    truth, first, second, patients = simulated(900, (0.8, 0.5), 4, per_patient=3)
    found = delong(truth, first, second, patients)
    areas = bootstrap_areas(
        truth[:, None], {"a": first[:, None], "b": second[:, None]}, patients, n_replicates=2000, seed=1
    )
    replicates = (areas["a"].replicates - areas["b"].replicates)[0, 0]
    assert found is not None
    assert found.standard_error == pytest.approx(replicates.std(), rel=0.08)


def test_delong_of_twins_and_of_opposites() -> None:
    truth = np.array([0.0, 0, 0, 1, 1, 1])
    scores = np.arange(6.0)
    same, apart = delong(truth, scores, 3 * scores + 1), delong(truth, scores, -scores)
    assert same is not None
    assert apart is not None
    assert (same.difference, same.standard_error, same.p) == (0, 0, 1)
    assert (apart.difference, apart.standard_error, apart.p) == (1, 0, 0)
    assert delong(np.array([0.0, 0, 1]), np.arange(3.0), np.arange(3.0)) is None
    assert delong(truth, scores, scores, ["a", "a", "a", "b", "c", "d"]) is None


@pytest.mark.parametrize("measure", MEASURES)
def test_the_permutation_test_is_the_share_of_all_exchanges(measure: Measure) -> None:
    """Of eight patients every one of the 256 exchanges is written out."""
    area = {"auroc": auroc, "auprc": auprc}[measure]
    random = np.random.default_rng(2)
    truth = np.tile([0.0, 1, 0], 8)
    patients: list[str | None] = [f"p{row // 3}" for row in range(24)]
    first, second = truth * 1.5 + random.normal(size=24), truth * 0.2 + random.normal(size=24)
    ranks = [np.argsort(np.argsort(scores)) + 1.0 for scores in (first, second)]
    differences = []
    for exchange in itertools.product([False, True], repeat=8):
        exchanged = np.repeat(exchange, 3)
        one, other = np.where(exchanged, ranks[1], ranks[0]), np.where(exchanged, ranks[0], ranks[1])
        differences.append(area(truth, one) - area(truth, other))
    exact = np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12)
    found = permutation_test(
        truth[:, None], np.exp(first)[:, None], second[:, None], patients, measure=measure, n_permutations=4000
    )
    assert found is not None
    assert 0.01 < exact < 0.5
    assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 4000))
    assert found.difference == pytest.approx(area(truth, first) - area(truth, second), abs=1e-12)


def test_a_permutation_test_of_twins_is_sure_of_nothing_and_of_one_class_is_none() -> None:
    truth, first, second, patients = simulated(60, (2.0, 0.0), 5)
    both = np.stack([truth, np.zeros(60)], axis=1)
    twins = permutation_test(both, np.stack([first] * 2, axis=1), np.stack([first] * 2, axis=1), patients)
    better = permutation_test(both, np.stack([first] * 2, axis=1), np.stack([second] * 2, axis=1), patients)
    assert twins is not None
    assert better is not None
    assert (twins.p, twins.labels, twins.difference) == (1, 1, 0)
    assert better.p < 0.05
    assert permutation_test(both[:, 1:], first[:, None], second[:, None], patients) is None


def test_tests_are_of_the_differences_that_compare_reports() -> None:
    truth, first, second, patients = simulated(200, (1.2, 0.3), 6, per_patient=2)
    both = np.stack([truth, np.zeros(200), 1 - truth], axis=1)
    both[:20, 2] = np.nan
    predictions = {
        "good": np.stack([first, first, -second], axis=1),
        "bad": np.stack([second, second, -second], axis=1),
        "twin": np.stack([first, first, -second], axis=1) * 2,
    }
    labels, pairs = ["a", "never", "c"], [("good", "bad"), ("good", "twin")]
    areas = bootstrap_areas(both, predictions, patients, n_replicates=300, seed=7)
    tests = paired_tests(areas, pairs, both, labels)
    reported = compare(both, predictions, labels, patients, differences=pairs, n_replicates=300, seed=7)
    assert reported == compare(both, predictions, labels, patients, differences=pairs, areas=areas)
    assert len(tests) == len(MEASURES) * len(pairs) * 4
    by_name = {(test.first, test.second, test.measure, test.label): test for test in tests}
    assert len(by_name) == len(tests)
    for one, other in pairs:
        scores = reported[f"{one} - {other}"]
        for measure in MEASURES:
            assert by_name[one, other, measure, None].difference == getattr(scores, f"macro_{measure}")
            for k, label in enumerate(labels):
                test = by_name[one, other, measure, label]
                assert test.difference == getattr(scores.labels[k], measure)
                assert (test.n, test.positives) == (scores.labels[k].n, scores.labels[k].positives)
    never = by_name["good", "bad", "auroc", "never"]
    assert (never.difference, never.p, never.p_holm) == (None, None, None)
    assert by_name["good", "twin", "auroc", None].p == 1
    better = by_name["good", "bad", "auroc", None]
    assert better.p == 2 / 301
    assert better.p_holm == 4 / 301  # two macro means are the family
    assert by_name["good", "bad", "auroc", "a"].p_holm == pytest.approx(4 * 2 / 301)  # two labels, two pairs


def test_no_test_cries_wolf_more_often_than_it_says() -> None:
    """Two models of equal worth, 150 times: at a level of 0.1 some 15 are rejected."""
    rejected = {"bootstrap": 0, "delong": 0, "permutation": 0}
    trials = 150
    for seed in range(trials):
        truth, first, second, patients = simulated(120, (0.8, 0.8), seed, per_patient=2)
        areas = bootstrap_areas(
            truth[:, None], {"a": first[:, None], "b": second[:, None]}, patients, n_replicates=200, seed=seed
        )
        p = bootstrap_p((areas["a"].replicates - areas["b"].replicates)[0, 0])
        second_opinion = delong(truth, first, second, patients)
        third = permutation_test(truth[:, None], first[:, None], second[:, None], patients, n_permutations=60)
        assert p is not None
        assert second_opinion is not None
        assert third is not None
        rejected["bootstrap"] += p <= 0.1
        rejected["delong"] += second_opinion.p <= 0.1
        rejected["permutation"] += third.p <= 0.1
    assert all(3 <= count <= 30 for count in rejected.values()), rejected
