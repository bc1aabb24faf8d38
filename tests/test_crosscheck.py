"""Every metric against another implementation, on plain and on awkward inputs: `pytest tests/test_crosscheck.py -s`
prints the largest differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import sklearn.metrics as judge
from scipy.special import expit

from ecgfm.scores.calibration import averages, calibration, decisions
from ecgfm.scores.metrics import bootstrap_areas, bootstrap_weights, patient_numbers

N, REPLICATES, SEED = 90, 12, 4
CASES = (
    "plain",
    "rare",
    "ties",
    "constant",
    "certain",
    "all present",
    "all absent",
    "unknown",
    "mostly unknown",
    "two",
)
THRESHOLD = 0.4


def case(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(record,) truth and probabilities that are awkward in one way."""
    random = np.random.default_rng((CASES.index(name), seed))
    truth = (random.random(N) < (0.05 if name == "rare" else 0.4)).astype(np.float64)
    truth[:2] = 0, 1
    scores = expit(random.normal(size=N) + truth - 0.5)
    if name == "ties":
        scores = scores.round(1)
    elif name == "constant":
        scores[:] = 0.4
    elif name == "certain":
        scores = np.where(random.random(N) < 0.8, truth, 1 - truth)
    elif name in {"all present", "all absent"}:
        truth[:] = name == "all present"
    elif name == "unknown":
        truth[:] = np.nan
    elif name == "mostly unknown":
        truth[random.random(N) < 0.8] = np.nan
        truth[:4] = 0, 1, 0, 1
    elif name == "two":
        truth[2:] = np.nan
    return truth, scores


PATIENTS: list[str | None] = [None if row % 5 == 0 else f"p{row // 4}" for row in range(N)]
WEIGHTS = np.concatenate(list(bootstrap_weights(patient_numbers(PATIENTS), REPLICATES, SEED)), axis=1)


def other(score: Callable[..., float], needs: str) -> Callable[[np.ndarray, np.ndarray, np.ndarray], float]:
    """scikit-learn's score under sample weights, NaN where our rule says that there is none.

    needs: `both` classes, `positive`, `negative`, or `any` record, of some weight
    """

    def scored(y: np.ndarray, p: np.ndarray, weight: np.ndarray) -> float:
        n_positive, n = weight[y == 1].sum(), weight.sum()
        enough = {"both": 0 < n_positive < n, "positive": n_positive > 0, "negative": n_positive < n, "any": n > 0}
        return float(score(y, p, weight)) if enough[needs] else math.nan

    return scored


ZERO = {"zero_division": np.nan}
JUDGES = {
    "AUROC": other(lambda y, p, w: judge.roc_auc_score(y, p, sample_weight=w), "both"),
    "AUPRC": other(lambda y, p, w: judge.average_precision_score(y, p, sample_weight=w), "both"),
    "Brier": other(lambda y, p, w: judge.brier_score_loss(y, p, sample_weight=w, pos_label=1), "any"),
    "sensitivity": other(lambda y, p, w: judge.recall_score(y, p >= THRESHOLD, sample_weight=w, **ZERO), "positive"),
    "specificity": other(lambda y, p, w: judge.recall_score(1 - y, p < THRESHOLD, sample_weight=w, **ZERO), "negative"),
    "ppv": other(lambda y, p, w: judge.precision_score(y, p >= THRESHOLD, sample_weight=w, **ZERO), "any"),
    "npv": other(lambda y, p, w: judge.precision_score(1 - y, p < THRESHOLD, sample_weight=w, **ZERO), "any"),
    "f1": other(lambda y, p, w: judge.f1_score(y, p >= THRESHOLD, sample_weight=w, **ZERO), "positive"),
    "accuracy": other(lambda y, p, w: judge.accuracy_score(y, p >= THRESHOLD, sample_weight=w), "any"),
    "balanced_accuracy": other(
        lambda y, p, w: judge.balanced_accuracy_score(y, p >= THRESHOLD, sample_weight=w), "both"
    ),
}
ALMOST_ALL = 1 - 1e-14
"""Of the replicates in the interval: its ends are the least and the greatest."""


def ours(truth: np.ndarray, scores: np.ndarray) -> dict[str, tuple[float, float, float]]:
    """Point, and the least and the greatest of the replicates and the point; NaN where there is none."""
    columns = truth[:, None], scores[:, None]
    settings = {"n_replicates": REPLICATES, "seed": SEED, "confidence": ALMOST_ALL}
    areas = bootstrap_areas(columns[0], {"m": columns[1]}, PATIENTS, n_replicates=REPLICATES, seed=SEED)["m"]
    (decided,) = decisions(*columns, ["label"], PATIENTS, [THRESHOLD], **settings)
    (calibrated,) = calibration(*columns, ["label"], PATIENTS, **settings)
    found = {}
    for name in JUDGES:
        if name in {"AUROC", "AUPRC"}:
            number = ("AUROC", "AUPRC").index(name)
            values = np.append(areas.replicates[number, 0], areas.points[number, 0])
            found[name] = (values[-1], *ends(values))
            continue
        one = calibrated.brier if name == "Brier" else getattr(decided, name)
        missing = math.nan
        found[name] = (one.value, one.low, one.high) if one else (missing, missing, missing)
    return found


def ends(values: np.ndarray) -> tuple[float, float]:
    defined = values[~np.isnan(values)]
    return (defined.min(), defined.max()) if len(defined) and not np.isnan(values[-1]) else (math.nan, math.nan)


def difference(mine: tuple[float, float, float], theirs: tuple[float, float, float]) -> float:
    """The largest; infinite where one has a number and the other has none."""
    if any(np.isnan(a) != np.isnan(b) for a, b in zip(mine, theirs, strict=True)):
        return math.inf
    return max((abs(a - b) for a, b in zip(mine, theirs, strict=True) if not np.isnan(a)), default=0.0)


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, tuple[float, int]]]:
    """By metric and case: the largest difference over three inputs, and how many numbers were compared."""
    found: dict[str, dict[str, tuple[float, int]]] = {metric: {} for metric in JUDGES}
    for name in CASES:
        apart: dict[str, list[float]] = {metric: [] for metric in JUDGES}
        numbers = dict.fromkeys(JUDGES, 0)
        for seed in range(3):
            truth, scores = case(name, seed)
            mine = ours(truth, scores)
            known = ~np.isnan(truth)
            for metric, score in JUDGES.items():
                columns = [*WEIGHTS[known].T, np.ones(int(known.sum()))]
                values = np.array([score(truth[known].astype(int), scores[known], weight) for weight in columns])
                apart[metric].append(difference(mine[metric], (values[-1], *ends(values))))
                numbers[metric] += int((~np.isnan(values)).sum())
        for metric in JUDGES:
            found[metric][name] = (max(apart[metric]), numbers[metric])
    return found


def test_every_metric_equals_its_judge(table: dict[str, dict[str, tuple[float, int]]]) -> None:
    width = max(map(len, CASES))
    print(f"\nlargest difference from scikit-learn; points and {REPLICATES} replicates of three inputs a case")
    print(" " * 18 + "".join(f"{name:>{width + 2}}" for name in CASES) + "   numbers")
    for metric, of_case in table.items():
        shown = "".join(f"{apart:{width + 2}.0e}" if n else " " * (width + 1) + "-" for apart, n in of_case.values())
        print(f"{metric:<18}{shown}{sum(n for _, n in of_case.values()):10d}")
    for metric, of_case in table.items():
        assert all(apart < 1e-12 for apart, _ in of_case.values()), (metric, of_case)


def test_the_crosscheck_compares_what_it_should(table: dict[str, dict[str, tuple[float, int]]]) -> None:
    """No judge is silent where there is something to judge, and none speaks where nothing is known."""
    for of_case in table.values():
        assert of_case["plain"][1] == 3 * (REPLICATES + 1)
        assert of_case["unknown"][1] == 0
    assert table["AUROC"]["all present"][1] == table["f1"]["all absent"][1] == 0
    assert table["f1"]["all present"][1] == table["Brier"]["all absent"][1] == 3 * (REPLICATES + 1)


@pytest.mark.parametrize("way", ["macro", "weighted", "micro"])
def test_averages_over_labels_equal_their_judges(way: str) -> None:
    columns = [case(name, 1) for name in ("plain", "rare", "ties", "constant", "certain")]
    truth, scores = (np.stack([column[i] for column in columns], axis=1) for i in range(2))
    areas = bootstrap_areas(truth, {"m": scores}, PATIENTS, n_replicates=3)["m"]
    found = averages(truth, scores, list("abcde"), PATIENTS, [THRESHOLD] * 5, areas)
    for name, score, shown in (
        ("auroc", judge.roc_auc_score, scores),
        ("auprc", judge.average_precision_score, scores),
        ("f1", judge.f1_score, scores >= THRESHOLD),
    ):
        assert getattr(found[name], way).value == pytest.approx(score(truth, shown, average=way), abs=1e-12)
