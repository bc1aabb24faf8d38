"""What embeddings are good for without a trained head: their nearest neighbours, and a probe on few examples.

Both are on embeddings standardised by the train records' means and standard deviations, as in `probe.py`: the raw
embeddings of a transformer share a large common part, and the cosine of any two of them is near 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ecgfm.ecg import InputError
from ecgfm.scores.metrics import mean_of_defined, point_scores
from ecgfm.scores.probe import Design, Linear

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
"""What the number of neighbours is chosen from."""

SHOTS = (1, 5, 10, 50, 100, None)
"""Positives per label that a few-shot probe is given; None: all."""

FEW_SHOT_C = 0.01
SIMILARITIES = 2**24  # held at a time: 64 MB, and as much again four times over while they are put in order
STEPS = 10**6  # cosines equal to a millionth are a tie, whatever order a matrix product sums in


@dataclass(frozen=True)
class Neighbours:
    """What the nearest train records say of the test records.

    probabilities: (record, label) float64; k: how many were asked, of `NEIGHBOURS`, one for all labels
    valid_macro_auprc: of each number tried, by which it was chosen
    """

    probabilities: np.ndarray
    k: int
    valid_macro_auprc: dict[int, float]


@dataclass(frozen=True)
class Shot:
    """A probe fitted on so many positives per label, several times.

    positives: per label; None: all
    auroc, auprc: (seed, label) float64 on the test records, NaN where the label has fewer positives in train or one
        class in test. Of all positives there is one seed
    labels: how many labels have these; a mean over other labels than another shot's is no step of a curve
    macro_auroc, macro_auprc: mean, least and greatest over the seeds of the mean over these labels; None of no label
    """

    positives: int | None
    auroc: np.ndarray
    auprc: np.ndarray
    labels: int
    macro_auroc: tuple[float, float, float] | None
    macro_auprc: tuple[float, float, float] | None


def knn(
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    test: np.ndarray,
    *,
    ks: Sequence[int] = NEIGHBOURS,
) -> Neighbours:
    """How many of the k nearest train records by cosine are positive; k by the valid macro AUPRC, the least of equals.

    A neighbour weighs by its cosine above that of opposites, (1 + cosine) / 2, so that equal votes still differ. Of
    neighbours at the same cosine the first in train comes first. A neighbour of unknown label has no vote on it; where
    none has one, the probability is the label's share in train (0 where nothing is known).

    train, valid: embeddings (record, feature) and truth (record, label) 0, 1 or NaN for unknown; test: embeddings
    ks: the numbers to choose from; of those above the number of train records, the train records' own number

    Every pair of a valid or test record and a train record costs about 60 ns of one core at 768 features.

    Raises:
        InputError: no train record, no label with both classes in valid, an embedding that is not finite.
    """
    x, y = train
    if not len(x):
        raise InputError("nearest neighbours: expected train records with embeddings, found none")
    ks = sorted({min(k, len(x)) for k in ks})
    mean, std = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    std[std == 0] = 1.0
    reference = _directions(x, mean, std)
    on_valid = _votes(reference, y, _directions(valid[0], mean, std), ks)
    auprc = np.stack([point_scores(valid[1], probabilities).auprc for probabilities in on_valid])
    if np.isnan(auprc).all():
        raise InputError("nearest neighbours: no label has both classes in the valid split; give more records")
    macro = np.nanmean(auprc, axis=1)
    best = int(np.argmax(macro))
    (on_test,) = _votes(reference, y, _directions(test, mean, std), [ks[best]])
    return Neighbours(on_test, ks[best], dict(zip(ks, macro.tolist(), strict=True)))


def few_shot(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    shots: Sequence[int | None] = SHOTS,
    seeds: Sequence[int] = range(5),
    c: float = FEW_SHOT_C,
) -> tuple[Shot, ...]:
    """The linear probe on 1, 5, 10, ... positives per label: how soon the embeddings are of use.

    With n positives of P come n / P of the label's negatives, rounded up: each shot has train's own prevalence, and all
    of them are all of train's known records. Each seed draws one order of the positives and one of the negatives per
    label and takes the first ones, so that a seed's smaller sets are parts of its larger ones. Embeddings are
    standardised by all train records, which needs no label. The penalty is one for all shots, since there is nothing to
    choose it by. A label with fewer positives in train than asked for is left out of that shot.

    train, test: embeddings (record, feature) and truth (record, label) 0, 1 or NaN for unknown
    c: inverse L2 penalty, such as `Probe.c`

    Raises:
        InputError: no label has both classes in train, an embedding that is not finite.
    """
    x, y = train
    positives, negatives = (y == 1).sum(axis=0), (y == 0).sum(axis=0)
    usable = (positives > 0) & (negatives > 0)
    if not usable.any():
        raise InputError("few-shot probe: no label has both classes in the train split; give more records")
    design = Design(x)
    curve = []
    for shot in shots:
        own_seeds = seeds if shot is not None else seeds[:1]
        areas = np.full((2, len(own_seeds), y.shape[1]), np.nan)
        enough = usable & (positives >= (1 if shot is None else shot))
        for place, seed in enumerate(own_seeds):
            if not enough.any():
                continue
            columns = np.flatnonzero(enough)
            if shot is None:
                fitted = design.fit(y[:, columns], c)
            else:
                fits = []
                for k in columns:
                    rows = few_shot_rows(y[:, k], shot, seed, int(k))
                    fits.append(design.fit(y[rows, k][:, None], c, rows=rows))
                fitted = Linear(*(np.concatenate(parts, axis=-1) for parts in zip(*fits, strict=True)))
            said = design.probabilities(test[0], fitted)
            areas[:, place, columns] = np.stack(point_scores(test[1][:, columns], said))
        scored = ~np.isnan(areas[0]).all(axis=0)
        spread = []
        for area in areas:
            macro = mean_of_defined(area.T)
            spread.append((float(macro.mean()), float(macro.min()), float(macro.max())) if scored.any() else None)
        curve.append(Shot(shot, areas[0], areas[1], int(scored.sum()), spread[0], spread[1]))
    return tuple(curve)


def few_shot_rows(y: np.ndarray, positives: int, seed: int, label: int) -> np.ndarray:
    """The records of one label's shot, ascending: its first `positives` and their share of negatives, of one order.

    y: (record,) 0, 1, or NaN for unknown, with at least so many positives; label: its number, which is drawn with
    """
    random = np.random.default_rng((seed, label))
    present, absent = (random.permutation(np.flatnonzero(y == value)) for value in (1, 0))
    n_absent = -(-positives * len(absent) // len(present))
    return np.sort(np.concatenate([present[:positives], absent[:n_absent]]))


def _directions(x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """(record, feature) float32 of length 1, standardised; 0 where a record is at the mean itself."""
    if bad := int((~np.isfinite(x).all(axis=1)).sum()):
        raise InputError(f"{bad} of {len(x)} embeddings are not finite; is the checkpoint, or the recordings, sound?")
    directions = np.empty(x.shape, dtype=np.float32)
    for start in range(0, len(x), 2**14):
        block = (x[start : start + 2**14] - mean) / std
        length = np.linalg.norm(block, axis=1, keepdims=True)
        directions[start : start + 2**14] = block / np.where(length == 0, 1.0, length)
    return directions


def _votes(reference: np.ndarray, y: np.ndarray, queries: np.ndarray, ks: Sequence[int]) -> list[np.ndarray]:
    """(record, label) float64 for each of ascending `ks`: what the nearest of the reference say."""
    known = ~np.isnan(y)
    present = np.where(known, y, 0.0)
    share = np.where(known.any(axis=0), present.sum(axis=0) / np.maximum(known.sum(axis=0), 1), 0.0)
    found = [np.empty((len(queries), y.shape[1])) for _ in ks]
    n, most = len(reference), ks[-1]
    at_a_time = max(1, min(SIMILARITIES // n, SIMILARITIES // (4 * most * max(1, y.shape[1]))))
    for start in range(0, len(queries), at_a_time):
        rows = slice(start, start + at_a_time)
        steps = np.rint((queries[rows] @ reference.T) * STEPS).astype(np.int64)
        # One whole number holds the cosine and, below it, the place in train: no two are equal.
        order = (-steps) * n + np.arange(n)
        if most < n:
            order = np.partition(order, most - 1, axis=1)[:, :most]
        order.sort(axis=1)
        nearest = order % n
        weight = (1 + np.clip(-(order // n) / STEPS, -1, 1))[:, :, None] / 2
        votes, for_it = weight * known[nearest], weight * present[nearest]
        for place, k in enumerate(ks):
            cast = votes[:, :k].sum(axis=1)
            found[place][rows] = np.where(cast > 0, for_it[:, :k].sum(axis=1) / np.where(cast > 0, cast, 1), share)
    return found
