"""The linear probe: how much of the labels one linear layer can read from frozen embeddings.

What an encoder knows without having been told any label. It is the fair comparison of a pretrained encoder with one of
random weights, which is no mean feature extractor itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from ecgfm.ecg import InputError
from ecgfm.metrics import point_scores

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""What C, the inverse of the L2 penalty, is chosen from."""


@dataclass(frozen=True)
class Probe:
    """A probe's predictions on the test records.

    probabilities: (record, label) float64
    c: the inverse L2 penalty, of `STRENGTHS`, one for all labels
    valid_macro_auprc: by which it was chosen
    """

    probabilities: np.ndarray
    c: float
    valid_macro_auprc: float


def linear_probe(
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    test: np.ndarray,
    labels: Sequence[str],
) -> Probe:
    """Fit a logistic regression per label on standardised embeddings; choose C by the valid macro AUPRC.

    train, valid: embeddings (record, feature) and truth (record, label) 0, 1 or NaN for unknown, which is left out
        for that label
    test: embeddings (record, feature)

    Raises:
        InputError: a label without both classes in train, or no label with both in valid.
    """
    x_train, y_train = train
    mean, std = x_train.mean(axis=0, dtype=np.float64), x_train.std(axis=0, dtype=np.float64)
    std[std == 0] = 1.0
    x_train, x_valid, x_test = ((x - mean) / std for x in (x_train, valid[0], test))
    on_valid = np.empty((len(STRENGTHS), len(x_valid), len(labels)))
    on_test = np.empty((len(STRENGTHS), len(x_test), len(labels)))
    for k, label in enumerate(labels):
        known = ~np.isnan(y_train[:, k])
        x, y = x_train[known], y_train[known, k].astype(np.int64)
        if len(np.unique(y)) < 2:
            raise InputError(
                f"linear probe: label {label!r} has {int(y.sum())} positive of {len(y)} known train records; "
                "it needs both classes; leave the label out or give more records"
            )
        # From strong to weak penalty, each fit starts where the last one ended: the same optimum, sooner.
        model = LogisticRegression(max_iter=2000, warm_start=True)
        for place, c in enumerate(STRENGTHS):
            model.set_params(C=c).fit(x, y)
            on_valid[place, :, k] = model.predict_proba(x_valid)[:, 1]
            on_test[place, :, k] = model.predict_proba(x_test)[:, 1]
    scores = [point_scores(valid[1], probabilities).auprc for probabilities in on_valid]
    if np.isnan(scores).all():
        raise InputError("linear probe: no label has both classes in the valid split; give more records")
    macro = np.nanmean(scores, axis=1)
    best = int(np.argmax(macro))
    return Probe(on_test[best], STRENGTHS[best], float(macro[best]))
