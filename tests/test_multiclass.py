"""Labels that exclude each other: their temperature, judged by a search; their accuracy, judged by scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

from ecgfm.scores.calibration import MAX_TEMPERATURE, MIN_TEMPERATURE
from ecgfm.scores.multiclass import at_temperature, class_accuracy, fit_temperature, most_probable, softmax


def some(n: int = 400, classes: int = 4, seed: int = 0, sharpness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(record, class) truth, some of it unknown, drawn from probabilities; and those, sharpened."""
    random = np.random.default_rng(seed)
    logits = random.normal(scale=1.5, size=(n, classes))
    drawn = np.array([random.choice(classes, p=p) for p in softmax(logits)])
    truth = np.eye(classes)[drawn]
    truth[random.random(n) < 0.1] = np.nan
    return truth, softmax(sharpness * logits)


def test_probabilities_of_logits_of_any_size_add_up_to_one() -> None:
    logits = np.array([[1e4, 0, -1e4], [3.0, 3.0, 3.0], [-800.0, -801.0, -900.0]], dtype=np.float32)
    found = softmax(logits)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert found[2, 0] / found[2, 1] == pytest.approx(np.e)
    np.testing.assert_allclose(softmax(logits + 7), found)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_temperature_leaves_the_order_within_a_record_and_flattens(temperature: float) -> None:
    _, p = some()
    found = at_temperature(p, temperature)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert (np.argsort(found, axis=1) == np.argsort(p, axis=1)).all()
    np.testing.assert_allclose(at_temperature(found, 1 / temperature), p, atol=1e-9)
    entropy = [float(-(x * np.log(x)).sum(axis=1).mean()) for x in (p, found)]
    assert (entropy[1] > entropy[0]) == (temperature > 1)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_no_other_temperature_has_a_smaller_log_loss(sharpness: float) -> None:
    truth, p = some(sharpness=sharpness)
    temperature = fit_temperature(truth, p)
    known = ~np.isnan(truth).any(axis=1)

    def loss(at: float) -> float:
        return float(log_loss(truth[known].argmax(axis=1), at_temperature(p[known], at)))

    assert loss(temperature) == min(loss(factor * temperature) for factor in (0.97, 0.99, 1, 1.01, 1.03))
    assert temperature == pytest.approx(sharpness, rel=0.2), "what was sharpened is flattened again"


def test_few_records_keep_their_probabilities_and_extremes_are_bounded() -> None:
    truth, p = some(9)
    assert fit_temperature(truth, p) == 1
    truth = np.eye(2)[np.arange(40) % 2]
    right = 0.5 + 0.3 * (truth - 0.5)
    assert fit_temperature(truth, right) == MIN_TEMPERATURE
    assert fit_temperature(truth, 1 - right) == MAX_TEMPERATURE


def test_exactly_one_class_is_called_even_of_equals() -> None:
    called = most_probable(np.array([[0.2, 0.4, 0.4], [1.0, 0.0, 0.0]]))
    assert called.tolist() == [[False, True, False], [True, False, False]]


def test_accuracies_are_scikit_learns_and_intervals_hold_them() -> None:
    truth, p = some(200)
    patients = [f"p{number // 3}" for number in range(200)]
    found = class_accuracy(truth, p, patients, n_replicates=300)
    known = ~np.isnan(truth).any(axis=1)
    is_so, said = truth[known].argmax(axis=1), p[known].argmax(axis=1)
    assert found.n == known.sum() < 200
    for estimate, expected in (
        (found.accuracy, accuracy_score(is_so, said)),
        (found.balanced_accuracy, balanced_accuracy_score(is_so, said)),
    ):
        assert estimate is not None
        assert estimate.value == pytest.approx(expected, abs=1e-12)
        assert estimate.low is not None
        assert estimate.high is not None
        assert estimate.low < estimate.value < estimate.high
    assert class_accuracy(truth, p, patients, n_replicates=300) == found


def test_a_record_of_two_classes_is_refused() -> None:
    truth, p = some(20)
    truth[0] = [1, 1, 0, 0]
    with pytest.raises(ValueError, match="exactly one class"):
        class_accuracy(truth, p, [None] * 20)
