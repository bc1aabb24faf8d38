"""What is said of predictions beyond AUROC and AUPRC: decisions, calibration, averages, the Challenge's score, tests
between models, parts of the test split. Arrays in, numbers with intervals out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from ecgfm.scores.calibration import Average, Calibration, Decisions, averages, calibration, decisions
from ecgfm.scores.challenge import ChallengeScores, challenge_scores
from ecgfm.scores.metrics import AreaReplicates, bootstrap_areas
from ecgfm.scores.multiclass import ClassAccuracy, class_accuracy, most_probable
from ecgfm.scores.significance import PairedTest, paired_tests
from ecgfm.scores.subgroups import PartScores, parts, score_parts


@dataclass(frozen=True)
class ScoredRecords:
    """The records that are scored, in one order.

    truth: (record, label) 0, 1, or NaN for unknown; labels: (label,) names; codes: (label,) what asserts each
    patients: (record,) None where unknown
    records, quality: contracts `records` and `quality`, a row per record
    """

    truth: np.ndarray
    labels: Sequence[str]
    codes: Sequence[Sequence[str]]
    patients: Sequence[str | None]
    records: pl.DataFrame
    quality: pl.DataFrame


@dataclass(frozen=True)
class Assessment:
    """What is said. Models by name; `of_model` is the one whose decisions, calibration and parts these are.

    averages: by model that decides, `auroc`, `auprc` and `f1`
    challenge: None where the labels are not those of the Challenge
    classes: how often the most probable label is right, of labels that exclude each other; None of others
    tests: between models, corrected
    parts: of the test split
    """

    of_model: str
    averages: Mapping[str, Average]
    decisions: tuple[Decisions, ...]
    calibration: tuple[Calibration, ...]
    challenge: ChallengeScores | None
    tests: tuple[PairedTest, ...]
    parts: tuple[PartScores, ...]
    classes: ClassAccuracy | None = None


def assess(
    test: ScoredRecords,
    by_model: Mapping[str, np.ndarray],
    of_model: str,
    thresholds: Sequence[float],
    pairs: Sequence[tuple[str, str]],
    *,
    exclusive: bool = False,
    n_replicates: int,
    confidence: float,
    seed: int,
) -> tuple[Assessment, Mapping[str, AreaReplicates]]:
    """Assess the predictions of some models of the same records; also the replicates, for `metrics.compare`.

    by_model: (record, label) probabilities
    of_model: whose decisions at `thresholds` (label,) are assessed, chosen on other records
    pairs: of models to test against each other
    exclusive: the labels exclude each other: the most probable is called, and thresholds are not looked at
    """
    draws = {"n_replicates": n_replicates, "seed": seed}
    rule: dict[str, Any] = {**draws, "confidence": confidence}
    areas = bootstrap_areas(test.truth, by_model, test.patients, n_replicates=n_replicates, seed=seed)
    probabilities = by_model[of_model]
    common = (test.truth, probabilities, test.labels, test.patients)
    called = most_probable(probabilities) if exclusive else probabilities >= np.asarray(thresholds)
    assessed = Assessment(
        of_model,
        averages(*common, thresholds, areas[of_model], called=called, confidence=confidence, seed=seed),
        decisions(*common, thresholds, called=called, **rule),
        calibration(*common, **rule),
        challenge_scores(test.truth, probabilities, called, test.codes, test.patients, **rule),
        paired_tests(areas, pairs, test.truth, test.labels, confidence=confidence),
        tuple(score_parts(parts(test.records, test.quality), *common, **rule)),
        class_accuracy(test.truth, probabilities, test.patients, **rule) if exclusive else None,
    )
    return assessed, areas


def as_json(value: Any) -> Any:
    """An assessment, or a part of it, as plain data: NaN as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return as_json(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): as_json(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [as_json(one) for one in value]
    return None if isinstance(value, float) and np.isnan(value) else value
