"""The linear probe reads what is linear in the embeddings, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from ecgfm.ecg import InputError
from ecgfm.metrics import auroc
from ecgfm.probe import STRENGTHS, linear_probe


def embedded(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of very different scales, and two labels: one linear in them, one of pure chance."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, 8)) * np.logspace(-3, 3, 8) + 5
    linear = (x[:, 0] - 5) / 1e-3 + random.normal(size=n) * 0.3 > 0
    x = np.column_stack([x, np.full(n, 7.0)])  # and a feature that never changes
    return x.astype(np.float32), np.column_stack([linear, random.random(n) < 0.5]).astype(np.float64)


def test_a_linear_label_is_read_and_a_random_one_is_not() -> None:
    test_x, test_y = embedded(300, 2)
    probe = linear_probe(embedded(400, 0), embedded(200, 1), test_x, ["linear", "chance"])
    assert probe.probabilities.shape == (300, 2)
    assert ((probe.probabilities > 0) & (probe.probabilities < 1)).all()
    assert auroc(test_y[:, 0], probe.probabilities[:, 0]) > 0.97
    assert 0.4 < auroc(test_y[:, 1], probe.probabilities[:, 1]) < 0.6
    assert probe.c in STRENGTHS


def test_the_same_data_give_the_same_bytes() -> None:
    test_x, _ = embedded(50, 2)
    once, again = (linear_probe(embedded(100, 0), embedded(80, 1), test_x, ["a", "b"]) for _ in range(2))
    assert once.probabilities.tobytes() == again.probabilities.tobytes()


def test_unknown_labels_do_not_teach() -> None:
    """Records of unknown label with absurd embeddings change nothing but the standardisation they share."""
    x, y = embedded(200, 0)
    valid, (test_x, _) = embedded(80, 1), embedded(50, 2)
    hidden = y.copy()
    hidden[:100, 0] = np.nan
    shown = linear_probe((x, hidden), valid, test_x, ["a", "b"])
    flipped = y.copy()
    flipped[:100, 0] = 1 - flipped[:100, 0]
    misled = linear_probe((x, flipped), valid, test_x, ["a", "b"])
    truth = embedded(50, 2)[1][:, 0]
    assert auroc(truth, shown.probabilities[:, 0]) > 0.95
    assert auroc(truth, misled.probabilities[:, 0]) < 0.8


def test_a_label_of_one_class_is_refused_by_name() -> None:
    x, y = embedded(40, 0)
    y[:, 1] = 0
    with pytest.raises(InputError, match=r"'never' has 0 positive of 40"):
        linear_probe((x, y), embedded(40, 1), x, ["linear", "never"])
