"""Neighbours and few shots: a slow reading, scikit-learn, and embeddings whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

from ecgfm.ecg import InputError
from ecgfm.scores import baselines
from ecgfm.scores.baselines import few_shot, few_shot_rows, knn
from ecgfm.scores.metrics import auroc, point_scores

Data = tuple[np.ndarray, np.ndarray]


def embedded(n: int, seed: int, width: int = 12) -> Data:
    """Embeddings with a large common part, and three labels: in their direction, rarely so, and of chance."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, width))
    y = np.column_stack([x[:, 0] + x[:, 1] > 0.3, x[:, 2] > 1.3, random.random(n) < 0.3]).astype(np.float64)
    y[:2] = [[0], [1]]
    return (x * np.linspace(0.5, 2, width) + 100).astype(np.float32), y


def test_neighbours_are_those_of_scikit_learn() -> None:
    (x, y), valid, (test, _) = embedded(300, 0), embedded(80, 1), embedded(50, 2)
    found = knn((x, y), valid, test, ks=[7])
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    judge = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit((x - mean) / std)
    distance, rows = judge.kneighbors((test - mean) / std)
    weight = 1 - distance[:, :, None] / 2
    assert found.k == 7
    assert found.probabilities == pytest.approx((weight * y[rows]).sum(axis=1) / weight.sum(axis=1), abs=1e-5)


def test_the_number_of_neighbours_is_the_best_on_valid() -> None:
    train, valid, (test, truth) = embedded(400, 0), embedded(150, 1), embedded(200, 2)
    found = knn(train, valid, test)
    assert list(found.valid_macro_auprc) == [1, 5, 10, 20, 50, 100, 200]
    assert found.valid_macro_auprc[found.k] == max(found.valid_macro_auprc.values())
    for k in (1, 20):
        on_valid = knn(train, valid, valid[0], ks=[k])
        macro = np.nanmean(point_scores(valid[1], on_valid.probabilities).auprc)
        assert found.valid_macro_auprc[k] == pytest.approx(macro, abs=1e-9)
    assert auroc(truth[:, 0], found.probabilities[:, 0]) > 0.9
    assert 0.35 < auroc(truth[:, 2], found.probabilities[:, 2]) < 0.65
    assert knn(embedded(30, 0), valid, test).valid_macro_auprc.keys() == {1, 5, 10, 20, 30}


def test_equal_neighbours_come_in_the_order_of_train_however_many_are_asked_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every record stands five times in train, with other truths: the first ones count."""
    x, _ = embedded(40, 3)
    copies = np.tile(x, (5, 1))
    y = np.repeat(np.arange(5) < 2, 40).astype(np.float64)[:, None]  # the first two copies are positive
    y_valid = (np.arange(40) % 2).astype(np.float64)[:, None]
    found = {k: knn((copies, y), (x, y_valid), x, ks=[k]).probabilities for k in (1, 2, 3, 4)}
    for k, expected in ((1, 1), (2, 1), (3, 2 / 3), (4, 1 / 2)):
        assert found[k][:, 0] == pytest.approx(np.full(40, expected), abs=1e-6)
    monkeypatch.setattr(baselines, "SIMILARITIES", 3 * 200)
    in_parts = knn((copies, y), (x, y_valid), x, ks=[3]).probabilities
    assert in_parts.tobytes() == found[3].tobytes()


def test_a_neighbour_of_unknown_label_has_no_vote() -> None:
    (x, y), valid, (test, _) = embedded(200, 4), embedded(80, 5), embedded(60, 6)
    hidden = y.copy()
    hidden[::2, 0] = np.nan
    shown = knn((x, hidden), valid, test, ks=[5]).probabilities[:, 0]
    hidden[np.arange(200) % 2 == 1, 0] = np.nan
    hidden[1, 0] = 1
    hidden[3, 0] = 0
    share = knn((x, hidden), valid, test, ks=[5]).probabilities[:, 0]
    assert ((shown >= 0) & (shown <= 1)).all()
    assert (share == 0.5).sum() > 40  # of two known records few are anyone's neighbour: the share in train
    hidden[:, 0] = np.nan
    assert (knn((x, hidden), valid, test, ks=[5]).probabilities[:, 0] == 0).all()


def test_few_shots_are_nested_and_of_trains_own_prevalence() -> None:
    _, y = embedded(500, 7)
    y[::9, 1] = np.nan
    positives, negatives = int((y[:, 1] == 1).sum()), int((y[:, 1] == 0).sum())
    before: set[int] = set()
    for shot in (1, 5, 10, positives):
        rows = few_shot_rows(y[:, 1], shot, seed=3, label=1)
        assert (y[rows, 1] == 1).sum() == shot
        assert (y[rows, 1] == 0).sum() == int(np.ceil(shot * negatives / positives))
        assert (np.diff(rows) > 0).all()
        assert before < set(rows.tolist())
        before = set(rows.tolist())
    assert before == set(np.flatnonzero(~np.isnan(y[:, 1])).tolist())
    assert set(few_shot_rows(y[:, 1], 5, 4, 1)) != set(few_shot_rows(y[:, 1], 5, 3, 1))
    assert (few_shot_rows(y[:, 1], 5, 3, 1) == few_shot_rows(y[:, 1], 5, 3, 1)).all()


def test_a_shot_is_scikit_learns_regression_on_its_records() -> None:
    (x, y), (test, truth) = embedded(400, 8), embedded(300, 9)
    one, everything = few_shot((x, y), (test, truth), shots=[10, None], seeds=[3, 4], c=0.1)
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    for place, seed in enumerate([3, 4]):
        for k in range(3):
            rows = few_shot_rows(y[:, k], 10, seed, k)
            judge = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit((x[rows] - mean) / std, y[rows, k])
            expected = auroc(truth[:, k], judge.decision_function((test - mean) / std))
            assert one.auroc[place, k] == pytest.approx(expected, abs=2e-3)
    assert one.macro_auroc is not None
    assert one.macro_auroc == pytest.approx(
        (one.auroc.mean(), one.auroc.mean(axis=1).min(), one.auroc.mean(axis=1).max()), abs=1e-12
    )
    assert everything.auroc.shape == (1, 3)
    assert everything.positives is None


def test_more_examples_are_more() -> None:
    curve = few_shot(embedded(1500, 10), embedded(1000, 11), seeds=range(4))
    assert [shot.positives for shot in curve] == [1, 5, 10, 50, 100, None]
    linear = [shot.auroc[:, 0].mean() for shot in curve]
    assert linear == sorted(linear)
    assert linear[0] < 0.85
    assert linear[-1] > 0.98
    assert all(abs(shot.auroc[:, 2].mean() - 0.5) < 0.08 for shot in curve)


def test_a_label_of_too_few_positives_is_left_out_of_a_shot_alone() -> None:
    (x, y), test = embedded(200, 12), embedded(100, 13)
    n_rare = int(y[:, 1].sum())
    y = np.column_stack([y, np.zeros(200)])
    truth = np.column_stack([test[1], np.ones(100)])
    few, many, everything = few_shot((x, y), (test[0], truth), shots=[n_rare, n_rare + 1, None], seeds=[0, 1])
    assert [shot.labels for shot in (few, many, everything)] == [3, 2, 3]
    assert np.isnan(many.auroc[:, 1]).all()
    assert np.isnan(few.auroc[:, 3]).all()
    (none,) = few_shot((x, y), (test[0], truth), shots=[199])
    assert (none.labels, none.macro_auroc, none.macro_auprc) == (0, None, None)


def test_the_same_data_give_the_same_bytes() -> None:
    train, valid, (test, truth) = embedded(150, 14), embedded(60, 15), embedded(60, 16)
    once, again = (knn(train, valid, test).probabilities.tobytes() for _ in range(2))
    assert once == again
    shots = [few_shot(train, (test, truth), shots=[5], seeds=[0])[0].auroc.tobytes() for _ in range(2)]
    assert shots[0] == shots[1]


def test_what_cannot_be_learnt_from_is_refused() -> None:
    (x, y), valid = embedded(50, 17), embedded(30, 18)
    with pytest.raises(InputError, match="found none"):
        knn((x[:0], y[:0]), valid, x)
    with pytest.raises(InputError, match="no label has both classes in the valid split"):
        knn((x, y), (valid[0], np.zeros((30, 3))), x)
    with pytest.raises(InputError, match="no label has both classes in the train split"):
        few_shot((x, np.zeros((50, 3))), valid)
    x[3, 2] = np.nan
    with pytest.raises(InputError, match="1 of 50 embeddings are not finite"):
        knn((x, y), valid, valid[0])
    with pytest.raises(InputError, match="1 of 50 embeddings are not finite"):
        few_shot((x, y), valid)
