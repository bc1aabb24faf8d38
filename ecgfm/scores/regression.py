"""How good predicted numbers are, with intervals by patient, and what they are to be compared with.

Measures are over the records of known truth, label by label, with n beside them. Intervals are those of
`metrics.py`: patients drawn with replacement, the same replicates for every model, so that differences are paired;
percentiles widened where needed to hold the point. Every measure is a function of weighted sums, so that all replicates
are a few matrix products.

The baselines are of scikit-learn, on embeddings: a ridge regression (Hoerl and Kennard 1970), the mean of the nearest
neighbours, and the mean of the train records, which knows nothing of an ECG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import sklearn
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from ecgfm.ecg import InputError
from ecgfm.scores.metrics import Estimate, bootstrap_weights, divide, estimate, patient_numbers
from ecgfm.scores.significance import bootstrap_p, holm
from ecgfm.scores.subgroups import Part

BOOTSTRAP_RULE = (
    "patients drawn with replacement, without strata; a record of no known patient is a patient of its own; percentile "
    "interval, widened where needed to hold the point estimate; replicates without a defined measure are left out"
)

LIMITS = 1.96
"""Standard deviations of the errors between their mean and either limit of agreement."""

STRENGTHS = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5)
"""What a ridge's alpha, the weight of the squared coefficients, is chosen from; embeddings are standardised."""

NEIGHBOURS = (1, 5, 10, 20, 50, 100)
"""What the number of neighbours is chosen from."""

_SIMILARITIES_MB = 256  # of scikit-learn's working memory
_ROUNDING = 1e-12  # a variance below this share of the mean square is none


@dataclass(frozen=True)
class ValueScores:
    """One label's numbers, or differences of two models' scores. An error is the prediction less the truth.

    n: records of known truth
    mean_absolute_error, root_mean_squared_error, mean_error, lower_limit, upper_limit: in the label's unit
    r2: 1 - squared errors / squared deviations of the truth from its mean: 0 is the mean itself, below 0 is worse; None
        where the truth does not vary
    pearson_r: None where truth or prediction does not vary
    mean_error: systematic: above 0 predictions are too high
    lower_limit, upper_limit: of agreement (Bland and Altman 1986, Lancet 327:307): mean error -+ `LIMITS` standard
        deviations of the errors, within which 95 % of errors lie where they are normal; None of one record
    """

    label: str
    unit: str
    n: int
    mean_absolute_error: Estimate | None
    root_mean_squared_error: Estimate | None
    r2: Estimate | None
    pearson_r: Estimate | None
    mean_error: Estimate | None
    lower_limit: Estimate | None
    upper_limit: Estimate | None


MEASURES = tuple(field.name for field in fields(ValueScores))[3:]


@dataclass(frozen=True)
class ModelScores:
    """One model's scores on the same records as the others', a label each."""

    n_records: int
    n_patients: int
    labels: tuple[ValueScores, ...]


@dataclass(frozen=True)
class ValueDifference:
    """Whether two models' errors differ in size: the first's score less the second's, paired.

    mean_absolute_error: below 0 the first is better; r2: above 0 the first is better
    p: two-sided, by the bootstrap, of the mean absolute error (`significance.bootstrap_p`); p_holm: corrected over all
        pairs and labels
    """

    first: str
    second: str
    label: str
    n: int
    mean_absolute_error: Estimate | None
    r2: Estimate | None
    p: float | None
    p_holm: float | None


@dataclass(frozen=True)
class PartValues:
    """A model's scores on a part of the records (subgroups.py)."""

    by: str
    name: str
    scores: ModelScores


@dataclass(frozen=True)
class Ridges:
    """A ridge regression for each label.

    values: (record, label) float64; alphas: (label,) of `STRENGTHS`; valid_errors: (label,) mean absolute errors on
    valid, by which each was chosen
    """

    values: np.ndarray
    alphas: tuple[float, ...]
    valid_errors: tuple[float, ...]


@dataclass(frozen=True)
class NeighbourMeans:
    """What the nearest train records' numbers are on average. k: how many were asked, by label"""

    values: np.ndarray
    k: tuple[int, ...]


def compare_values(
    truth: np.ndarray,
    by_model: Mapping[str, np.ndarray],
    labels: Sequence[str],
    units: Sequence[str],
    patients: Sequence[str | None],
    *,
    differences: Sequence[tuple[str, str]] = (),
    n_replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[dict[str, ModelScores], tuple[ValueDifference, ...]]:
    """The scores of models on the same records, and the paired differences of some of them.

    truth: (record, label) in the labels' units, NaN for unknown; by_model: (record, label) predictions
    patients: (record,) None where unknown; differences: pairs of models

    Raises:
        ValueError: shapes that do not belong together, or a prediction that is not a finite number.
    """
    shape = (len(patients), len(labels))
    for name, values in {"truth": truth, **by_model}.items():
        if values.shape != shape or len(units) != len(labels):
            raise ValueError(f"{name}: expected shape {shape}, found {values.shape}")
        if name != "truth" and not np.isfinite(values).all():
            raise ValueError(f"{name}: {int((~np.isfinite(values)).any(axis=1).sum())} records without a finite number")
    numbers = patient_numbers(patients)
    once = np.ones((len(patients), 1))
    points = {name: _measures_of(truth, values, once)[..., 0] for name, values in by_model.items()}
    replicates = {name: np.empty((len(labels), len(MEASURES), n_replicates)) for name in by_model}
    done = 0
    for weights in bootstrap_weights(numbers, n_replicates, seed):
        place = slice(done, done + weights.shape[1])
        for name, values in by_model.items():
            replicates[name][..., place] = _measures_of(truth, values, weights)
        done = place.stop
    n_known = (~np.isnan(truth)).sum(axis=0)
    n_patients = int(numbers.max(initial=-1)) + 1
    scores = {
        name: ModelScores(
            len(truth),
            n_patients,
            tuple(
                ValueScores(
                    label,
                    units[k],
                    int(n_known[k]),
                    *(
                        estimate(float(points[name][k, m]), replicates[name][k, m], confidence)
                        for m in range(len(MEASURES))
                    ),
                )
                for k, label in enumerate(labels)
            ),
        )
        for name in by_model
    }
    error, r2 = MEASURES.index("mean_absolute_error"), MEASURES.index("r2")
    found = []
    for first, second in differences:
        for k, label in enumerate(labels):
            point = points[first][k] - points[second][k]
            of_replicate = replicates[first][k] - replicates[second][k]
            of_error, of_r2 = (estimate(float(point[m]), of_replicate[m], confidence) for m in (error, r2))
            p = bootstrap_p(of_replicate[error])
            found.append(ValueDifference(first, second, label, int(n_known[k]), of_error, of_r2, p, None))
    corrected = holm([one.p for one in found])
    return scores, tuple(replace(one, p_holm=p) for one, p in zip(found, corrected, strict=True))


def score_value_parts(
    found: Sequence[Part],
    truth: np.ndarray,
    values: np.ndarray,
    labels: Sequence[str],
    units: Sequence[str],
    patients: Sequence[str | None],
    *,
    n_replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[PartValues, ...]:
    """The scores of one model on each part, with intervals as of `compare_values`."""
    scored = []
    for part in found:
        whose = [patient for patient, chosen in zip(patients, part.rows.tolist(), strict=True) if chosen]
        scores, _ = compare_values(
            truth[part.rows],
            {"model": values[part.rows]},
            labels,
            units,
            whose,
            n_replicates=n_replicates,
            confidence=confidence,
            seed=seed,
        )
        scored.append(PartValues(part.by, part.name, scores["model"]))
    return tuple(scored)


# ---- baselines


def ridge_probe(
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    test: np.ndarray,
    labels: Sequence[str],
) -> Ridges:
    """A ridge regression per label on standardised embeddings; alpha by the valid mean absolute error, the strongest of
    equals.

    train, valid: embeddings (record, feature) and truth (record, label), NaN for unknown, which is left out for that
        label; test: embeddings

    Raises:
        InputError: an embedding that is not finite, or a label without a known train or valid record.
    """
    _check_embeddings(train[0], valid[0], test)
    values = np.empty((len(test), len(labels)))
    alphas, errors = [], []
    for k, label in enumerate(labels):
        (x, y), (x_valid, y_valid) = (_known(*split, k, label) for split in (train, valid))
        scaler = StandardScaler().fit(x)
        standard, standard_valid = scaler.transform(x), scaler.transform(x_valid)
        fitted = [Ridge(alpha=alpha).fit(standard, y) for alpha in STRENGTHS]
        of_alpha = [float(np.abs(one.predict(standard_valid) - y_valid).mean()) for one in fitted]
        best = max(range(len(STRENGTHS)), key=lambda place: (-of_alpha[place], place))
        values[:, k] = fitted[best].predict(scaler.transform(test.astype(np.float64)))
        alphas.append(STRENGTHS[best])
        errors.append(of_alpha[best])
    return Ridges(values, tuple(alphas), tuple(errors))


def neighbour_means(
    train: tuple[np.ndarray, np.ndarray],
    valid: tuple[np.ndarray, np.ndarray],
    test: np.ndarray,
    labels: Sequence[str],
    *,
    ks: Sequence[int] = NEIGHBOURS,
) -> NeighbourMeans:
    """The mean of the k nearest train records by cosine of standardised embeddings; k by the valid mean absolute error,
    the least of equals. Arguments and errors as of `ridge_probe`; of `ks` above the number of train records, that.
    """
    _check_embeddings(train[0], valid[0], test)
    values = np.empty((len(test), len(labels)))
    chosen = []
    for k, label in enumerate(labels):
        (x, y), (x_valid, y_valid) = (_known(*split, k, label) for split in (train, valid))
        scaler = StandardScaler().fit(x)
        numbers = sorted({min(n, len(x)) for n in ks})
        search = NearestNeighbors(n_neighbors=numbers[-1], metric="cosine", algorithm="brute").fit(scaler.transform(x))

        def means(
            embeddings: np.ndarray,
            search: NearestNeighbors = search,
            scaler: StandardScaler = scaler,
            y: np.ndarray = y,
        ) -> np.ndarray:
            """(record, neighbours - 1): the mean of the first neighbours, of so many."""
            with sklearn.config_context(working_memory=_SIMILARITIES_MB):
                nearest = search.kneighbors(scaler.transform(embeddings), return_distance=False)
            return np.asarray(np.cumsum(y[nearest], axis=1) / np.arange(1, nearest.shape[1] + 1))

        on_valid = means(x_valid)
        best = min(numbers, key=lambda n: (float(np.abs(on_valid[:, n - 1] - y_valid).mean()), n))
        values[:, k] = means(test.astype(np.float64))[:, best - 1]
        chosen.append(best)
    return NeighbourMeans(values, tuple(chosen))


def train_mean(truth: np.ndarray, n_records: int) -> np.ndarray:
    """(record, label): for each of `n_records` the mean of the known train numbers (train record, label)."""
    return np.tile(np.nanmean(truth, axis=0), (n_records, 1))


# ---- the parts


def _measures_of(truth: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(label, measure, replicate) under weights (record, replicate); NaN where a measure is not defined."""
    return np.stack(
        [_measures(truth[:, k], values[:, k].astype(np.float64), weights) for k in range(truth.shape[1])], axis=0
    ).reshape(truth.shape[1], len(MEASURES), weights.shape[1])


def _measures(truth: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(measure, replicate) of one label."""
    known = ~np.isnan(truth)
    y, p, weights = truth[known], values[known], weights[known]
    error = p - y
    # About their medians, so that squares of large numbers do not swallow what varies; a constant becomes 0 throughout.
    y, p = (x - np.median(x) if len(x) else x for x in (y, p))
    sums = np.stack([np.ones_like(y), np.abs(error), error, error**2, y, y**2, p, p**2, y * p]) @ weights
    n, absolute, error_sum, squared, y_sum, y_squared, p_sum, p_squared, both = sums
    of_y, of_p = (_deviations(*given, n) for given in ((y_sum, y_squared), (p_sum, p_squared)))
    mean_error = divide(error_sum, n)
    spread = np.sqrt(divide(np.maximum(squared - n * np.nan_to_num(mean_error) ** 2, 0), np.maximum(n - 1, 0)))
    return np.stack(
        [
            divide(absolute, n),
            np.sqrt(divide(squared, n)),
            1 - divide(squared, of_y),
            divide(both - divide(y_sum * p_sum, n), np.sqrt(of_y * of_p)),
            mean_error,
            mean_error - LIMITS * spread,
            mean_error + LIMITS * spread,
        ]
    )


def _deviations(total: np.ndarray, squares: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The sum of squared deviations from the mean; exactly 0 where there is no more than rounding."""
    found = squares - np.nan_to_num(divide(total**2, n))
    return np.where(found > _ROUNDING * squares, found, 0.0)


def _known(x: np.ndarray, truth: np.ndarray, k: int, label: str) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.isnan(truth[:, k])
    if not known.any():
        raise InputError(f"label {label!r} has no known record to fit or choose a baseline on; give more records")
    return x[known].astype(np.float64), truth[known, k]


def _check_embeddings(*embeddings: np.ndarray) -> None:
    for x in embeddings:
        if bad := int((~np.isfinite(x).all(axis=1)).sum()):
            raise InputError(
                f"{bad} of {len(x)} embeddings are not finite; is the checkpoint, or the recordings, sound?"
            )
