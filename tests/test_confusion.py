"""Confusion: pairs and matrix against a count record by record."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics

from ecgfm.ecg import InputError
from ecgfm.scores.confusion import ConfusedPair, confused_pairs, confusion_matrix

LABELS = ["sinus rhythm", "atrial fibrillation", "atrial flutter", "pacing", "never"]


def decisions(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Truth, a tenth of it unknown, and calls of which a third are wrong; nothing is or is called `never`."""
    random = np.random.default_rng(seed)
    truth = (random.random((n, 5)) < (0.6, 0.3, 0.2, 0.05, 0)).astype(float)
    called = (truth == 1) ^ (random.random(truth.shape) < 0.3)
    called[:, 4] = False
    truth[random.random(truth.shape) < 0.1] = np.nan
    return truth, called


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_those_of_a_count_record_by_record(seed: int) -> None:
    truth, called = decisions(seed=seed)
    slow: dict[tuple[str, str], list[int]] = {}
    for a, missed in enumerate(LABELS):
        for b, taken_for in enumerate(LABELS):
            n = with_missed = falsely_called = 0
            for record, calls in zip(truth, called, strict=True):
                with_missed += record[a] == 1 and record[b] in (0, 1)
                false = record[b] == 0 and bool(calls[b])
                falsely_called += false and record[a] in (0, 1)
                n += false and record[a] == 1 and not calls[a]
            slow[missed, taken_for] = [n, with_missed, falsely_called]
    found = confused_pairs(truth, called, LABELS)
    assert {(p.missed, p.called): [p.n, p.with_missed, p.falsely_called] for p in found} == {
        pair: counts for pair, counts in slow.items() if counts[0]
    }
    assert len(found) >= 9
    assert [pair.n for pair in found] == sorted((pair.n for pair in found), reverse=True)


def test_what_is_right_and_what_is_unknown_confuse_nothing() -> None:
    truth, _ = decisions()
    assert confused_pairs(truth, truth == 1, LABELS) == []
    assert confused_pairs(np.full((3, 5), np.nan), np.ones((3, 5), bool), LABELS) == []


def test_equally_frequent_pairs_are_in_the_order_of_the_labels() -> None:
    truth = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    called = truth[[1, 2, 0]] == 1
    assert confused_pairs(truth, called, LABELS[:3]) == [
        ConfusedPair("sinus rhythm", "atrial fibrillation", 1, 1, 1),
        ConfusedPair("atrial fibrillation", "atrial flutter", 1, 1, 1),
        ConfusedPair("atrial flutter", "sinus rhythm", 1, 1, 1),
    ]


def test_shapes_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match=r"expected truth and calls \(record, 3\)"):
        confused_pairs(np.zeros((4, 2)), np.zeros((4, 2), bool), LABELS[:3])


def test_the_matrix_is_that_of_scikit_learn_and_its_rows_are_shares_of_the_true_class() -> None:
    random = np.random.default_rng(1)
    true = random.integers(0, 4, 300)  # of five classes: none is `never`
    truth = np.eye(5)[true]
    probabilities = random.random((300, 5)) + truth
    truth[:20] = np.nan
    found = confusion_matrix(truth, probabilities, LABELS)
    expected = sklearn.metrics.confusion_matrix(true[20:], probabilities[20:].argmax(axis=1), labels=range(5))
    assert found.counts.tolist() == expected.tolist()
    assert found.counts.sum() == 280
    assert found.shares[:4].sum(axis=1) == pytest.approx(np.ones(4))
    assert found.shares[2, 1] == found.counts[2, 1] / found.counts[2].sum()
    assert np.isnan(found.shares[4]).all()


def test_classes_that_do_not_exclude_each_other_are_refused() -> None:
    truth = np.eye(3)
    truth[1] = [1, 1, 0]
    with pytest.raises(InputError, match="found 1 of 3 with none or several, the first with 2"):
        confusion_matrix(truth, np.eye(3), LABELS[:3])
