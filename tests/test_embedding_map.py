"""The map of embeddings: principal components by other means, and every record in its group."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from ecgfm.scores.embedding_map import MOST_GROUPS, NONE, OTHER, embedding_map

LABELS = [f"finding {number}" for number in range(12)]


def records(n: int, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Embeddings by split with two directions that dominate, and findings, commoner by number."""
    random = np.random.default_rng(seed)
    spread = np.diag([5.0, 2.0, 0.5, 0.1, 0.1]) @ np.linalg.qr(random.normal(size=(5, 5)))[0]
    embeddings = {
        split: (random.normal(size=(rows, 5)) @ spread).astype(np.float32)
        for split, rows in (("train", 3 * n), ("valid", n), ("test", n))
    }
    truth = (random.random((n, 12)) < np.arange(1, 13) / 40).astype(float)
    truth[random.random(truth.shape) < 0.05] = np.nan
    return embeddings, truth


def test_the_axes_are_the_directions_of_most_variance() -> None:
    embeddings, truth = records(300)
    found = embedding_map(embeddings, truth, LABELS, {"source": ["a", "b"] * 150}, 1000, 0)
    assert found
    centred = embeddings["test"].astype(float) - embeddings["test"].astype(float).mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(centred.T))
    for axis, column in enumerate((-1, -2)):
        expected = centred @ directions[:, column]
        mine = found.colourings[0].points[:, axis]
        assert np.allclose(mine, expected, atol=1e-5) or np.allclose(mine, -expected, atol=1e-5)
        assert found.explained[axis] == pytest.approx(variances[column] / variances.sum())


def test_a_mirrored_embedding_has_its_map_the_same_way_up() -> None:
    """The sign of a principal component is nobody's: it is fixed by its largest weight."""
    embeddings, truth = records(100)
    once = embedding_map(embeddings, truth, LABELS, {}, 1000, 0)
    again = embedding_map({split: rows[:, ::-1] for split, rows in embeddings.items()}, truth, LABELS, {}, 1000, 0)
    assert once
    assert again
    assert np.allclose(once.colourings[0].points, again.colourings[0].points, atol=1e-9)


def test_a_record_is_coloured_by_its_rarest_finding_and_few_groups_are_told_apart() -> None:
    embeddings, truth = records(300)
    found = embedding_map(embeddings, truth, LABELS, {}, 1000, 0)
    assert found
    by_finding = found.colourings[0]
    how_many = [sum(row[k] == 1 for row in truth) for k in range(12)]
    slow = []
    for row in truth:
        there = [k for k in range(12) if row[k] == 1]
        slow.append(LABELS[min(there, key=lambda k: how_many[k])] if there else NONE)
    kept = [name for name, _ in Counter(name for name in slow if name != NONE).most_common(MOST_GROUPS)]
    assert by_finding.groups == tuple(name if name in kept or name == NONE else OTHER for name in slow)
    assert by_finding.order[-2:] == (OTHER, NONE)
    assert set(by_finding.order) == set(by_finding.groups)
    assert len(by_finding.order) == MOST_GROUPS + 2


def test_the_second_panel_is_of_what_tells_records_apart() -> None:
    embeddings, truth = records(60)
    whole = embedding_map(embeddings, truth, LABELS, {}, 1000, 0)
    assert whole
    same, two = ["ptb_xl"] * 60, ["georgia", "ningbo"] * 30
    for origins, by in (
        ({"source": two, "dataset": two}, "source"),
        ({"source": same, "dataset": two}, "dataset"),
        ({"source": same, "dataset": same}, "split"),
    ):
        found = embedding_map(embeddings, truth, LABELS, origins, 1000, 0)
        assert found
        assert [colouring.by for colouring in found.colourings] == ["finding", by]
    by_split = whole.colourings[1]
    assert Counter(by_split.groups) == {"train": 180, "valid": 60, "test": 60}
    of_test = by_split.points[[group == "test" for group in by_split.groups]]
    assert np.allclose(of_test, whole.colourings[0].points)


def test_of_many_records_a_seeded_share_is_drawn_on_the_axes_of_all() -> None:
    embeddings, truth = records(300)
    whole, some, again, other = (
        embedding_map(embeddings, truth, LABELS, {}, most, seed) for most, seed in ((999, 0), (50, 0), (50, 0), (50, 1))
    )
    assert whole
    assert some
    assert again
    assert other
    assert [len(colouring.groups) for colouring in some.colourings] == [50, 50]
    assert (some.n_records, some.explained) == (300, whole.explained)
    assert np.array_equal(some.colourings[0].points, again.colourings[0].points)
    assert not np.array_equal(some.colourings[0].points, other.colourings[0].points)
    places = {tuple(point) for point in whole.colourings[0].points.round(9)}
    assert {tuple(point) for point in some.colourings[0].points.round(9)} <= places


def test_records_that_do_not_differ_have_no_map() -> None:
    embeddings, truth = records(10)
    assert embedding_map({**embeddings, "test": np.ones((10, 5))}, truth, LABELS, {}, 100, 0) is None
    assert embedding_map({**embeddings, "test": embeddings["test"][:2]}, truth[:2], LABELS, {}, 100, 0) is None
