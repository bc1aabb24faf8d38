"""What is lost from one published dataset to another: probes that have not seen it, thresholds fitted on it.

The origin of a record is the dataset that it was published in, such as `physionet2021 georgia`: its hospitals, devices
and annotators. Datasets that hold the same ECG are one origin, since what is learnt without the one would still be
learnt from the other: the Challenge's copy of PTB-XL and PTB-XL itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from ecgfm.scores.metrics import (
    Estimate,
    OperatingPoint,
    Scores,
    best_f1_threshold,
    bootstrap_weights,
    compare,
    divide,
    estimate,
    mean_of_defined,
    operating_point,
    patient_numbers,
)
from ecgfm.scores.probe import linear_probe

JOINED = " = "
"""Between the names of datasets that are one origin."""

MIN_RECORDS = 10
"""Of an origin, in the valid or test split: fewer are no estimate, and it is said how many there are."""


class Records(NamedTuple):
    """Records of one split, in one order.

    truth: (record, label) 0, 1, or NaN for unknown; origins: (record,) names; patients: (record,), None where unknown
    """

    truth: np.ndarray
    origins: np.ndarray
    patients: Sequence[str | None]

    def of(self, rows: np.ndarray) -> Records:
        """Some of them. rows: (record,) bool, or numbers"""
        chosen = np.arange(len(self.origins))[rows]
        return Records(self.truth[rows], self.origins[rows], [self.patients[row] for row in chosen])


@dataclass(frozen=True)
class LeftOutOrigin:
    """The linear probe on one origin's test records, fitted without and with its own.

    n_train: its train records that were kept away
    seen, unseen: of the probe that had them, and the one that had not; difference: unseen less seen, paired
    not_learnt: the labels, in none of these scores, that the other origins' train records do not have both classes of
    """

    origin: str
    n_train: int
    seen: Scores
    unseen: Scores
    difference: Scores
    not_learnt: tuple[str, ...]


@dataclass(frozen=True)
class TransferredLabel:
    """One label's decisions. sensitivity, f1: None where there is no positive; specificity: where no negative is."""

    label: str
    point: OperatingPoint
    sensitivity: float | None
    specificity: float | None
    f1: float | None


@dataclass(frozen=True)
class Transfer:
    """The thresholds of one origin's valid records, applied to another's test records (or to its own).

    macro_f1: mean over `labels`; difference: less the mean at the other's own thresholds, paired; None of its own
    labels: those that have a threshold of both origins, and positives among the test records
    """

    fitted_on: str
    applied_to: str
    n_records: int
    n_patients: int
    macro_f1: Estimate | None
    difference: Estimate | None
    labels: tuple[TransferredLabel, ...]


class Untold(NamedTuple):
    """What cannot be told of an origin, or of one's thresholds on another ("one on other"), and why, in words."""

    of: str
    why: str


@dataclass(frozen=True)
class BetweenSources:
    """Two or more origins, and of which of them there is no probe and no threshold."""

    origins: tuple[str, ...]
    left_out: tuple[LeftOutOrigin, ...]
    transfers: tuple[Transfer, ...]
    no_probe: tuple[Untold, ...]
    no_threshold: tuple[Untold, ...]


def origins(records: pl.DataFrame, duplicates: pl.DataFrame) -> dict[str, str]:
    """The origin of each record.

    records: with `record_id`, `source` and `dataset`; duplicates: contract `duplicates`, the groups of equal ECGs
    """
    named = records.select(
        "record_id", origin=pl.concat_str(pl.col("source"), pl.col("dataset"), separator=" ", ignore_nulls=True)
    )
    one_of = {name: {name} for name in named["origin"].unique().sort()}
    groups = duplicates.join(named, on="record_id").group_by("group_id", maintain_order=True)
    for names in groups.agg(pl.col("origin").unique())["origin"]:
        together = set().union(*(one_of[name] for name in names))
        one_of |= dict.fromkeys(together, together)
    return {record_id: JOINED.join(sorted(one_of[name])) for record_id, name in named.iter_rows()}


def leave_one_out(
    embeddings: Mapping[str, np.ndarray],
    records: Mapping[str, Records],
    labels: Sequence[str],
    *,
    n_replicates: int,
    confidence: float,
    seed: int,
) -> tuple[list[LeftOutOrigin], list[Untold]]:
    """The linear probe fitted without one origin's train and valid records, scored on its test records, for each one.

    It is compared with the probe fitted on all, which has the same labels and is scored on the same records. What is
    held back are labels: the encoder may have been pretrained on the recordings themselves. A probe without an origin
    has fewer records too, and that is part of the difference.

    embeddings, records: of train, valid and test

    Returns also what could not be told, and why. An origin is left out that has no train record to hold back or fewer
    than `MIN_RECORDS` test records, or whose test records have both classes of no label that the others teach.

    Raises:
        InputError: an embedding that is not finite, or no label with both classes in valid.
    """
    train, valid, test = (records[split] for split in ("train", "valid", "test"))
    taught = _with_both(train.truth)
    seen = np.full(test.truth.shape, np.nan)
    seen[:, taught] = _probe(embeddings, records, labels, taught)
    found, untold = [], []
    for origin in sorted(set(np.concatenate([train.origins, test.origins]).tolist())):
        others = {split: one.origins != origin for split, one in records.items()}
        own = test.of(~others["test"])
        n_train = int((~others["train"]).sum())
        columns = _with_both(train.truth[others["train"]])
        reasons = {
            _counted(len(own.origins), "test record"): len(own.origins) < MIN_RECORDS,
            "no train records": not n_train,
            "no label that the others teach has both classes in its test records": not (
                columns & _with_both(own.truth)
            ).any(),
            "no label has both classes in the others' valid records": not _with_both(
                valid.truth[others["valid"]][:, columns]
            ).any(),
        }
        if why := next((reason for reason, holds in reasons.items() if holds), None):
            untold.append(Untold(origin, why))
            continue
        rest = {split: records[split].of(others[split]) for split in ("train", "valid")} | {"test": own}
        some = {split: embeddings[split][others[split]] for split in ("train", "valid")}
        some["test"] = embeddings["test"][~others["test"]]
        names = [label for label, is_in in zip(labels, columns, strict=True) if is_in]
        scores = compare(
            own.truth[:, columns],
            {"unseen": _probe(some, rest, labels, columns), "seen": seen[~others["test"]][:, columns]},
            names,
            own.patients,
            differences=[("unseen", "seen")],
            n_replicates=n_replicates,
            confidence=confidence,
            seed=seed,
        )
        not_learnt = tuple(label for label in labels if label not in names)
        found.append(
            LeftOutOrigin(origin, n_train, scores["seen"], scores["unseen"], scores["unseen - seen"], not_learnt)
        )
    return found, untold


def transfer_thresholds(
    valid: Records,
    valid_probabilities: np.ndarray,
    test: Records,
    test_probabilities: np.ndarray,
    labels: Sequence[str],
    *,
    n_replicates: int,
    confidence: float,
    seed: int,
) -> tuple[list[Transfer], list[Untold]]:
    """Thresholds of best F1 on one origin's valid records, applied to the test records of every origin.

    A label has a threshold of an origin where its valid records there have both classes. Returns also what could not
    be told, and why: an origin is left out that has fewer than `MIN_RECORDS` valid or test records. Of one origin alone
    nothing is told.

    valid_probabilities, test_probabilities: (record, label) of one model
    """
    names = sorted(set(valid.origins) | set(test.origins))
    thresholds = {}
    for origin in names:
        rows = valid.origins == origin
        truth, said = valid.truth[rows], valid_probabilities[rows]
        thresholds[origin] = np.array(
            [best_f1_threshold(truth[:, k], said[:, k]) if both else np.nan for k, both in enumerate(_with_both(truth))]
        )
    found = []
    untold, fitted = [], []
    for origin in names:
        n_valid, n_test = (int((one.origins == origin).sum()) for one in (valid, test))
        if min(n_valid, n_test) < MIN_RECORDS:
            n_records = f"{_counted(n_valid, 'valid record')} and {_counted(n_test, 'test record')}"
            untold.append(Untold(origin, n_records))
        elif np.isnan(thresholds[origin]).all():
            untold.append(Untold(origin, "no label has both classes in its valid records"))
        else:
            fitted.append(origin)
    for origin in fitted if len(fitted) > 1 else ():
        rows = test.origins == origin
        own, said = test.of(rows), test_probabilities[rows]
        usable = (own.truth == 1).any(axis=0) & ~np.isnan(thresholds[origin])
        for other in fitted:
            columns = np.flatnonzero(usable & ~np.isnan(thresholds[other]))
            if not len(columns):
                untold.append(Untold(f"{other} on {origin}", "no label has thresholds of both and a positive there"))
                continue
            called = {name: said[:, columns] >= thresholds[name][columns] for name in (origin, other)}
            macro_f1, difference = _macro_f1(
                own.truth[:, columns], called[other], called[origin], own.patients, n_replicates, confidence, seed
            )
            found.append(
                Transfer(
                    fitted_on=other,
                    applied_to=origin,
                    n_records=len(own.origins),
                    n_patients=int(patient_numbers(own.patients).max()) + 1,
                    macro_f1=macro_f1,
                    difference=difference if other != origin else None,
                    labels=tuple(
                        _decided(
                            labels[int(k)], operating_point(own.truth[:, k], said[:, k], float(thresholds[other][k]))
                        )
                        for k in columns
                    ),
                )
            )
    return found, untold


def _counted(n: int, noun: str) -> str:
    """A number of things in words."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _with_both(truth: np.ndarray) -> np.ndarray:
    """(label,) bool"""
    both: np.ndarray = (truth == 1).any(axis=0) & (truth == 0).any(axis=0)
    return both


def _probe(
    embeddings: Mapping[str, np.ndarray], records: Mapping[str, Records], labels: Sequence[str], columns: np.ndarray
) -> np.ndarray:
    """(record, label) probabilities of the test records, of the labels of `columns` (label,) bool."""
    return linear_probe(
        (embeddings["train"], records["train"].truth[:, columns]),
        (embeddings["valid"], records["valid"].truth[:, columns]),
        embeddings["test"],
        [label for label, is_in in zip(labels, columns, strict=True) if is_in],
    ).probabilities


def _decided(label: str, point: OperatingPoint) -> TransferredLabel:
    def share(part: int, whole: int) -> float | None:
        return part / whole if whole else None

    positives = point.true_positives + point.false_negatives
    wrong = point.false_positives + point.false_negatives
    return TransferredLabel(
        label,
        point,
        sensitivity=share(point.true_positives, positives),
        specificity=share(point.true_negatives, point.true_negatives + point.false_positives),
        f1=share(2 * point.true_positives, 2 * point.true_positives + wrong) if positives else None,
    )


def _macro_f1(
    truth: np.ndarray,
    called: np.ndarray,
    called_by_own: np.ndarray,
    patients: Sequence[str | None],
    n_replicates: int,
    confidence: float,
    seed: int,
) -> tuple[Estimate | None, Estimate | None]:
    """The mean F1 over labels, and what it is less than that of other decisions on the same records.

    truth: (record, label) 0, 1, or NaN for unknown; called, called_by_own: (record, label) bool. A replicate's mean is
    over the labels that have a positive in it.
    """
    present, absent = truth == 1, truth == 0

    def f1(decided: np.ndarray, weights: np.ndarray) -> Any:
        right, wrong = present & decided, (present & ~decided) | (absent & decided)
        positives, twice, errors = (counts.T.astype(np.float64) @ weights for counts in (present, 2 * right, wrong))
        return mean_of_defined(np.where(positives > 0, divide(twice, twice + errors), np.nan))

    def both(weights: np.ndarray) -> np.ndarray:
        mine = f1(called, weights)
        return np.stack([mine, mine - f1(called_by_own, weights)])

    point = both(np.ones((len(truth), 1)))[:, 0]
    drawn = [both(weights) for weights in bootstrap_weights(patient_numbers(patients), n_replicates, seed)]
    replicates = np.concatenate(drawn, axis=1)
    macro_f1, difference = (estimate(float(point[i]), replicates[i], confidence) for i in range(2))
    return macro_f1, difference
