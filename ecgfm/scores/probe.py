"""The linear probe: how much of the labels one linear layer can read from frozen embeddings.

What an encoder knows without having been told any label. It is the fair comparison of a pretrained encoder with one of
random weights, which is no mean feature extractor itself.

All labels are fitted together, by L-BFGS on the embeddings' principal axes. A rotation changes neither the penalty nor
the optimum, but on these axes it is known beforehand how curved the loss is in each direction, and scaled by that the
problem needs some tens of passes over the records, each of them two matrix products for all labels. scikit-learn's
solver takes a hundred per label; it is the judge in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from ecgfm.ecg import InputError
from ecgfm.scores.metrics import point_scores

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""What C, the inverse of the L2 penalty, is chosen from."""

ROWS = 2**14  # records in a matrix product
GRADIENT = 3e-5  # where a fit ends, in units in which the loss's curvature is about 1: 1e-6 nats above the least


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


@dataclass(frozen=True)
class ProbeByLabel:
    """A probe whose penalty was chosen label by label.

    probabilities: (record, label) float64
    c: (label,) of `STRENGTHS`
    valid_auprc: (label,) by which each was chosen; NaN where the label has one class in valid, and c is that of `Probe`
    """

    probabilities: np.ndarray
    c: np.ndarray
    valid_auprc: np.ndarray


class Path(NamedTuple):
    """Probabilities of the probes of every strength: (strength, record, label) float64."""

    on_valid: np.ndarray
    on_test: np.ndarray


class Linear(NamedTuple):
    """Fitted on a design's axes. weights: (axis, label); intercepts: (label,), both float64"""

    weights: np.ndarray
    intercepts: np.ndarray


class Design:
    """Embeddings, standardised and turned to their principal axes: what logistic regressions are fitted on.

    mean, std: (feature,) float64, std 1 where a feature never changes
    axes: (feature, axis) float64, orthonormal; variances: (axis,) float64
    turned: (record, axis) float32
    """

    def __init__(self, x: np.ndarray) -> None:
        """x: (record, feature)

        Raises:
            InputError: an embedding that is not finite.
        """
        if bad := int((~np.isfinite(x).all(axis=1)).sum()):
            raise InputError(
                f"{bad} of {len(x)} embeddings are not finite; is the checkpoint, or the recordings, sound?"
            )
        self.mean = x.mean(axis=0, dtype=np.float64)
        self.std = x.std(axis=0, dtype=np.float64)
        self.std[self.std == 0] = 1.0
        together = np.zeros((x.shape[1], x.shape[1]))
        self.turned: np.ndarray = np.empty(x.shape, dtype=np.float32)
        for rows in _blocks(len(x)):
            self.turned[rows] = (x[rows] - self.mean) / self.std
            together += self.turned[rows].T @ self.turned[rows]
        variances, self.axes = np.linalg.eigh(together / max(1, len(x)))
        self.variances = np.maximum(variances, 0.0)
        turn = self.axes.astype(np.float32)
        for rows in _blocks(len(x)):
            self.turned[rows] = self.turned[rows] @ turn

    def fit(self, y: np.ndarray, c: float, start: Linear | None = None, rows: np.ndarray | None = None) -> Linear:
        """Logistic regressions, one per label: the least of |weights|^2 / 2 + c times the known records' log losses.

        The intercept has no penalty.

        y: (record, label) 0, 1, or NaN for unknown, with both classes in each label
        start: where to begin, such as the fit of a stronger penalty: the same optimum, sooner
        rows: the records to fit on, all where None; y has their truth alone
        """
        x = self.turned if rows is None else self.turned[rows]
        known = ~np.isnan(y)
        n = known.sum(axis=0)
        prevalence = np.nansum(y, axis=0) / n
        penalty = 1 / (c * n)
        curvature = prevalence * (1 - prevalence)
        # In units of these, the loss's second derivative is about 1 in every direction.
        units: np.ndarray = np.vstack([np.outer(self.variances, curvature) + penalty, curvature]) ** -0.5
        if start is None:
            start = Linear(np.zeros((x.shape[1], y.shape[1])), np.log(prevalence / (1 - prevalence)))

        def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
            """The labels' mean log losses and penalties, summed, and the gradient."""
            values = flat.reshape(units.shape) * units
            weights = values[:-1].astype(np.float32)
            total, gradient = 0.0, np.zeros(units.shape)
            for block in _blocks(len(x)):
                logits = x[block] @ weights + values[-1]
                mine = known[block]
                truth = np.where(mine, y[block], 0.0)
                share = np.where(mine, 1 / n, 0.0)
                total += float(((np.logaddexp(0, logits) - truth * logits) * share).sum())
                error = (expit(logits) - truth) * share
                gradient[:-1] += x[block].T @ error.astype(np.float32)
                gradient[-1] += error.sum(axis=0)
            total += float((penalty * values[:-1] ** 2).sum()) / 2
            gradient[:-1] += penalty * values[:-1]
            return total, (gradient * units).ravel()

        begin = (np.vstack([start.weights, start.intercepts]) / units).ravel()
        options = {"maxiter": 500, "maxcor": 20, "gtol": GRADIENT, "ftol": 0.0}
        found = minimize(loss, begin, jac=True, method="L-BFGS-B", options=options)
        # The rounding of float32 sums may end the search sooner, at twice this gradient; never seen was ten times.
        assert np.abs(found.jac).max() < 30 * GRADIENT, found.message
        values = found.x.reshape(units.shape) * units
        return Linear(values[:-1], values[-1])

    def probabilities(self, x: np.ndarray, fitted: Linear) -> np.ndarray:
        """(record, label) float64 of embeddings (record, feature) as they are, not standardised."""
        weights = self.axes @ fitted.weights / self.std[:, None]
        found = np.empty((len(x), weights.shape[1]))
        for rows in _blocks(len(x)):
            found[rows] = expit((x[rows] - self.mean) @ weights + fitted.intercepts)
        return found


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
        InputError: a label without both classes in train, no label with both in valid, an embedding that is not finite.
    """
    return choose(fit_path(train, valid[0], test, labels), valid[1])


def fit_path(train: tuple[np.ndarray, np.ndarray], valid: np.ndarray, test: np.ndarray, labels: Sequence[str]) -> Path:
    """What the probes of every one of `STRENGTHS` say: the arguments are those of `linear_probe`.

    Raises:
        InputError: a label without both classes in train, an embedding that is not finite.
    """
    x, y = train
    for k, label in enumerate(labels):
        known, positives = int((~np.isnan(y[:, k])).sum()), int((y[:, k] == 1).sum())
        if not 0 < positives < known:
            raise InputError(
                f"linear probe: label {label!r} has {positives} positive of {known} known train records; "
                "it needs both classes; leave the label out or give more records"
            )
    design = Design(x)
    on_valid = np.empty((len(STRENGTHS), len(valid), len(labels)))
    on_test = np.empty((len(STRENGTHS), len(test), len(labels)))
    fitted = None
    for place, c in enumerate(STRENGTHS):
        fitted = design.fit(y, c, fitted)
        on_valid[place] = design.probabilities(valid, fitted)
        on_test[place] = design.probabilities(test, fitted)
    return Path(on_valid, on_test)


def choose(path: Path, truth: np.ndarray) -> Probe:
    """The probe of the one C, for all labels, of the highest valid macro AUPRC; of several, the strongest penalty.

    truth: (record, label) of the valid records

    Raises:
        InputError: no label has both classes in valid.
    """
    macro = np.nanmean(_valid_auprc(path, truth), axis=1)
    best = int(np.argmax(macro))
    return Probe(path.on_test[best], STRENGTHS[best], float(macro[best]))


def choose_by_label(path: Path, truth: np.ndarray) -> ProbeByLabel:
    """The probe of each label's own C, of its highest valid AUPRC: arguments and errors as of `choose`.

    A label of few valid positives takes what suits these few by chance: of little use below some tens of them.
    """
    auprc = _valid_auprc(path, truth)
    scored = ~np.isnan(auprc).any(axis=0)
    best = np.full(auprc.shape[1], int(np.argmax(np.nanmean(auprc, axis=1))))
    best[scored] = np.argmax(auprc[:, scored], axis=0)
    columns = np.arange(len(best))
    return ProbeByLabel(path.on_test[best, :, columns].T.copy(), np.array(STRENGTHS)[best], auprc[best, columns])


def _valid_auprc(path: Path, truth: np.ndarray) -> np.ndarray:
    """(strength, label)"""
    auprc = np.stack([point_scores(truth, probabilities).auprc for probabilities in path.on_valid])
    if np.isnan(auprc).all():
        raise InputError("linear probe: no label has both classes in the valid split; give more records")
    return auprc


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS))
