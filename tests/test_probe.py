"""The linear probe reads what is linear in the embeddings, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from ecgfm.ecg import InputError
from ecgfm.scores import probe as module
from ecgfm.scores.metrics import auroc, point_scores
from ecgfm.scores.probe import STRENGTHS, Design, choose, choose_by_label, fit_path, linear_probe


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


@pytest.mark.parametrize("n", [30, 300])
@pytest.mark.parametrize("c", [1e-3, 1.0])
def test_the_fit_is_scikit_learns(n: int, c: float) -> None:
    """On correlated embeddings of more features than records and of fewer; each label on its known records."""
    random = np.random.default_rng(5)
    x = (random.normal(size=(n, 10)) @ random.normal(size=(10, 60)) + 0.1 * random.normal(size=(n, 60))) * 3 + 50
    y = np.column_stack([x[:, 0] + random.normal(size=n) * 3 > 52, random.random(n) < 0.2]).astype(np.float64)
    y[:2] = [[0], [1]]
    y[2:8, 0] = np.nan
    design = Design(x)
    fitted = design.fit(y, c)
    standard = (x - x.mean(axis=0)) / x.std(axis=0)
    for k in range(2):
        known = ~np.isnan(y[:, k])
        judge = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(standard[known], y[known, k])
        ours = design.probabilities(x, fitted)[:, k]
        assert ours == pytest.approx(judge.predict_proba(standard)[:, 1], abs=5e-3)
        penalties = [(weights**2).sum() / (2 * c * known.sum()) for weights in (fitted.weights[:, k], judge.coef_)]
        losses = [log_loss(y[known, k], p[known]) for p in (ours, judge.predict_proba(standard)[:, 1])]
        assert losses[0] + penalties[0] == pytest.approx(losses[1] + penalties[1], abs=1e-6)


def test_a_fit_on_some_rows_is_a_fit_on_them() -> None:
    x, y = embedded(200, 3)
    rows = np.arange(50, 150)
    hidden = np.full_like(y, np.nan)
    hidden[rows] = y[rows]
    design = Design(x)
    some, masked = design.fit(y[rows], 0.1, rows=rows), design.fit(hidden, 0.1)
    assert some.weights == pytest.approx(masked.weights, abs=1e-4)
    assert some.intercepts == pytest.approx(masked.intercepts, abs=1e-4)


def test_blocks_of_records_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    train, valid, (test, _) = embedded(400, 0), embedded(100, 1), embedded(60, 2)
    whole = fit_path(train, valid[0], test, ["a", "b"])
    monkeypatch.setattr(module, "ROWS", 37)
    parts = fit_path(train, valid[0], test, ["a", "b"])
    assert parts.on_test == pytest.approx(whole.on_test, abs=2e-3)
    assert parts.on_test[:3] == pytest.approx(whole.on_test[:3], abs=2e-4)


def test_a_penalty_of_each_labels_own_is_the_best_of_that_label() -> None:
    train, valid, (test, _) = embedded(120, 0), embedded(90, 1), embedded(60, 2)
    path = fit_path(train, valid[0], test, ["linear", "chance"])
    by_label, together = choose_by_label(path, valid[1]), choose(path, valid[1])
    auprc = np.stack([point_scores(valid[1], probabilities).auprc for probabilities in path.on_valid])
    assert (by_label.valid_auprc == auprc.max(axis=0)).all()
    assert together.valid_macro_auprc == auprc.mean(axis=1).max()
    for k in range(2):
        place = STRENGTHS.index(by_label.c[k])
        assert (by_label.probabilities[:, k] == path.on_test[place, :, k]).all()
    one_class = valid[1].copy()
    one_class[:, 1] = 0
    left = choose_by_label(path, one_class)
    assert np.isnan(left.valid_auprc[1])
    assert left.c[1] == choose(path, one_class).c
    with pytest.raises(InputError, match="no label has both classes in the valid split"):
        choose_by_label(path, np.zeros((90, 2)))
