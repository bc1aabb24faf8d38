"""Manifests: the examples that a training run visits. CMSC pairs, and labelled segments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.config import ManifestsConfig, Task
from ecgfm.contracts import read_table, read_tables, write_table
from ecgfm.ecg import InputError
from ecgfm.label_space import Label, LabelSpace, read_label_space
from ecgfm.splits import SPLITS

_CLASSES = {"positive": 1, "negative": 0}


def make_manifests(inputs: Mapping[str, Any], config: ManifestsConfig, out: Path) -> dict[str, int]:
    """Write `cmsc_{train,valid}.parquet`, `labelled_{train,valid,test}.parquet` and `label_space.yaml`.

    inputs: `slices`, `splits`, `labels`: directories of those stages

    Raises:
        InputError: no pair, no labelled record in a split, or (rare_labels = error) a label without both classes (of
            numbers: without two different ones) in every split.
    """
    splits = read_table(inputs["splits"] / "splits.parquet", "splits")
    segments = split_segments(
        read_tables([slice_dir / "segments.parquet" for slice_dir in inputs["slices"]], "segments"),
        read_tables(
            [slice_dir / "records.parquet" for slice_dir in inputs["slices"]],
            "records",
            ("record_id", "source", "slice_id"),
        ),
        splits,
    )
    counts = {}
    for split in ("train", "valid"):
        pairs = cmsc_pairs(segments.filter(pl.col("split") == split))
        if pairs.is_empty():
            raise InputError(
                f"manifests: cmsc_{split} would be empty: no record has two adjacent segments; "
                "is prepare.segment_seconds more than half the records?"
            )
        write_table(pairs, "pairs", out / f"cmsc_{split}.parquet", {"splits": splits})
        counts[f"pairs: {split}"] = pairs.height

    found = read_label_space(inputs["labels"] / "label_space.yaml")
    labels = read_table(inputs["labels"] / "labels.parquet", found.contract("labels"))
    space = that_vary(found, segments, labels, config.rare_labels == "drop")
    space.write(out / "label_space.yaml")
    known = known_labels(labels, space).filter(pl.any_horizontal(pl.col(name).is_not_null() for name in space.names))
    for split in SPLITS:
        labelled = segments.filter(pl.col("split") == split).drop("split", "start_s").join(known, on="record_id")
        labelled = labelled.sort("record_id", "segment_index")
        write_table(
            labelled, space.contract("labelled_segments"), out / f"labelled_{split}.parquet", {"splits": splits}
        )
        counts[f"labelled records: {split}"] = labelled["record_id"].n_unique()
        counts[f"labelled segments: {split}"] = labelled.height
    return counts | {"labels": len(space.labels), "labels dropped": len(space.dropped)}


def split_segments(segments: pl.DataFrame, records: pl.DataFrame, splits: pl.DataFrame) -> pl.DataFrame:
    """The segments of the records that are in a split, with patient, source, slice and split."""
    place = records.select("record_id", "source", "slice_id")
    kept = splits.filter(pl.col("split").is_not_null()).select("record_id", "patient_id", "split")
    return (
        segments.join(kept, on="record_id")
        .join(place, on="record_id")
        .select("record_id", "patient_id", "source", "slice_id", "segment_index", "shard_row", "start_s", "split")
        .sort("record_id", "segment_index")
    )


def cmsc_pairs(segments: pl.DataFrame) -> pl.DataFrame:
    """Pairs of adjacent segments of one record, (0, 1), (2, 3), ...: each segment is in one pair at most.

    Source: contrastive multi-segment coding (Kiyasseh et al. 2021, CLOCS).
    """
    first = segments.filter(pl.col("segment_index") % 2 == 0)
    second = segments.select(
        "record_id",
        segment_index=pl.col("segment_index") - 1,
        second_segment=pl.col("segment_index"),
        second_row=pl.col("shard_row"),
    )
    return (
        first.join(second, on=["record_id", "segment_index"])
        .rename({"segment_index": "first_segment", "shard_row": "first_row"})
        .select(
            "record_id",
            "patient_id",
            "source",
            "slice_id",
            "first_segment",
            "second_segment",
            "first_row",
            "second_row",
        )
        .sort("record_id", "first_segment")
    )


def known_labels(labels: pl.DataFrame, space: LabelSpace) -> pl.DataFrame:
    """The labels of a space. Of a record whose class was dropped, all are unknown."""
    kept = labels.select("record_id", *space.names)
    if space.task != "multiclass":
        return kept
    is_of_one = pl.any_horizontal(pl.col(name) == 1 for name in space.names)
    return kept.with_columns(pl.when(is_of_one).then(pl.col(name)).alias(name) for name in space.names)


def that_vary(space: LabelSpace, segments: pl.DataFrame, labels: pl.DataFrame, drop: bool) -> LabelSpace:
    """The label space with its counts per split, without the labels of which a split has nothing to tell.

    Each label needs a positive and a negative record in every split, each class a record, each number two different
    values; what lacks them is dropped or refused.

    Raises:
        InputError: a label lacks them and `drop` is false, or no label is left (of classes: fewer than two).
    """
    split_of = segments.select("record_id", "split").unique()
    lacking = {}
    for label, of_split in _by_split(space, split_of, labels):
        if lacks := [what for split, values in of_split.items() for what in _lacks(values, split, space.task)]:
            lacking[label.name] = ", ".join(lacks)
    if lacking and not drop:
        name, why = next(iter(lacking.items()))
        more = f" (and {len(lacking) - 1} more labels)" if len(lacking) > 1 else ""
        raise InputError(
            f"manifests: label {name!r} has {why}{more}; give more records, another splits.seed, "
            "or set manifests.rare_labels=drop to go on without"
        )
    dropped = {**space.dropped, **lacking}
    kept = replace(space, labels=tuple(one for one in space.labels if one.name not in lacking), dropped=dropped)
    if len(kept.labels) < (2 if space.task == "multiclass" else 1):
        expected = {
            "multilabel": "no label has a positive and a negative record",
            "multiclass": "fewer than two classes have a record",
            "regression": "no label has two different values",
        }[space.task]
        raise InputError(f"manifests: {expected} in every split ({len(space.labels)} labels tried); give more records")
    counted = [
        replace(label, records={split: _counts(values, space.task) for split, values in of_split.items()})
        for label, of_split in _by_split(kept, split_of, known_labels(labels, kept))
    ]
    return replace(kept, labels=tuple(counted))


def _by_split(
    space: LabelSpace, split_of: pl.DataFrame, labels: pl.DataFrame
) -> Iterator[tuple[Label, dict[str, pl.Series]]]:
    """Each label with its values in each split, in one order."""
    joined = split_of.join(labels, on="record_id").sort("record_id")
    of_split = {split: joined.filter(pl.col("split") == split) for split in SPLITS}
    for label in space.labels:
        yield label, {split: rows[label.name] for split, rows in of_split.items()}


def _lacks(values: pl.Series, split: str, task: Task) -> list[str]:
    """What a split lacks for a label to be trained and judged."""
    if task == "regression":
        return [] if values.drop_nulls().n_unique() > 1 else [f"no two different values in {split}"]
    lacking = [f"no {which} record in {split}" for which, value in _CLASSES.items() if not (values == value).any()]
    return [what for what in lacking if task == "multilabel" or "positive" in what]


def _counts(values: pl.Series, task: Task) -> Mapping[str, float]:
    unknown = values.null_count()
    if task != "regression":
        return {which: int((values == value).sum()) for which, value in _CLASSES.items()} | {"unknown": unknown}
    known = values.drop_nulls().to_numpy()
    return {
        "known": len(known),
        "unknown": unknown,
        "mean": float(known.mean()),
        "standard_deviation": float(known.std()),
    }
