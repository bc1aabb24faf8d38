"""A map of records: the first two principal components of their embeddings, and what each point is coloured by.

Two components are the plainest map there is: the same on every run, without a parameter to choose, and distances on it
are of the embedding itself, as far as the two hold its variance. What lies apart on it is apart; what lies together may
still be apart in other directions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA

MAP_RECORDS = 2000  # points that a panel has room for
MOST_GROUPS = 8
OTHER, NONE = "other", "none of them"


@dataclass(frozen=True)
class Colouring:
    """Points with a group each.

    by: what the groups are of; points: (point, 2); groups: (point,) names
    order: the names to tell apart, the most frequent first; then `NONE` and `OTHER`, where there are such points
    """

    by: str
    points: np.ndarray
    groups: tuple[str, ...]
    order: tuple[str, ...]


@dataclass(frozen=True)
class EmbeddingMap:
    """explained: the shares of the variance on the two axes; n_records: that there are, of which the points are some"""

    explained: tuple[float, float]
    n_records: int
    colourings: tuple[Colouring, ...]


def embedding_map(
    embeddings: Mapping[str, np.ndarray],
    truth: np.ndarray,
    labels: Sequence[str],
    origins: Mapping[str, Sequence[str]],
    most_records: int,
    seed: int,
) -> EmbeddingMap | None:
    """Map the test records; None where there are fewer than three, or they do not differ.

    Coloured by finding, and by the first of `origins` that tells records apart; where none does, by split: then records
    of the other splits lie on the same axes, as many in all.

    embeddings: by split (`test` is mapped), (record, width); truth: (test record, label) 0, 1, or NaN for unknown
    origins: what the records come from, in words -> (test record,) name
    most_records: points at most on each panel; which, `seed` says
    """
    test = embeddings["test"].astype(np.float64)
    if len(test) < 3 or np.ptp(test, axis=0).max(initial=0) == 0:
        return None
    pca = PCA(n_components=2, svd_solver="full").fit(test)
    axes = pca.components_ * np.sign(pca.components_[np.arange(2), np.abs(pca.components_).argmax(axis=1)])[:, None]
    shown = _some(len(test), most_records, seed)
    points = (test[shown] - pca.mean_) @ axes.T
    findings = _rarest_findings(truth, labels)
    colourings = [_coloured("finding", points, [findings[row] for row in shown])]
    if by := next((by for by, names in origins.items() if len(set(names)) > 1), None):
        colourings.append(_coloured(by, points, [origins[by][row] for row in shown]))
    else:
        splits = [split for split, rows in embeddings.items() for _ in range(len(rows))]
        everyone = np.concatenate([rows.astype(np.float64) for rows in embeddings.values()])
        some = _some(len(everyone), most_records, seed)
        colourings.append(_coloured("split", (everyone[some] - pca.mean_) @ axes.T, [splits[row] for row in some]))
    first, second = (float(share) for share in pca.explained_variance_ratio_)
    return EmbeddingMap((first, second), len(test), tuple(colourings))


def _rarest_findings(truth: np.ndarray, labels: Sequence[str]) -> list[str]:
    """(record,) of the labels that are present, the one that fewest records have; `NONE` where none is."""
    present = truth == 1
    rarity = np.where(present, present.sum(axis=0), np.inf)
    return [
        labels[int(rarity[row].argmin())] if present[row].any() else NONE for row in range(len(truth))
    ]  # the first label of equally rare ones


def _coloured(by: str, points: np.ndarray, names: Sequence[str]) -> Colouring:
    """The most frequent names keep a group of their own."""
    counts = Counter(name for name in names if name != NONE)
    kept = sorted(counts, key=lambda name: (-counts[name], name))[:MOST_GROUPS]
    groups = tuple(name if name in kept or name == NONE else OTHER for name in names)
    return Colouring(by, points, groups, (*kept, *(rest for rest in (OTHER, NONE) if rest in groups)))


def _some(n: int, most: int, seed: int) -> np.ndarray:
    """Rows of n, at most so many, ascending."""
    return np.arange(n) if n <= most else np.sort(np.random.default_rng(seed).choice(n, most, replace=False))
