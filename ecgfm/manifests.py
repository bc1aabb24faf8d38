"""Manifests: the examples that a training run visits. CMSC pairs, and labelled segments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.config import ManifestsConfig
from ecgfm.contracts import read_table, read_tables, write_table
from ecgfm.ecg import InputError
from ecgfm.label_space import LabelSpace, read_label_space
from ecgfm.splits import SPLITS


def make_manifests(inputs: Mapping[str, Any], config: ManifestsConfig, out: Path) -> dict[str, int]:
    """Write `cmsc_{train,valid}.parquet`, `labelled_{train,valid,test}.parquet` and `label_space.yaml`.

    inputs: `slices`, `splits`, `labels`: directories of those stages

    Raises:
        InputError: no pair, no labelled record in a split, or (rare_labels = error) a label without both classes.
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

    labels = read_table(inputs["labels"] / "labels.parquet", "labels")
    space = with_both_classes(
        read_label_space(inputs["labels"] / "label_space.yaml"), segments, labels, config.rare_labels == "drop"
    )
    space.write(out / "label_space.yaml")
    known = labels.select("record_id", *space.names).filter(
        pl.any_horizontal(pl.col(name).is_not_null() for name in space.names)
    )
    for split in SPLITS:
        labelled = segments.filter(pl.col("split") == split).drop("split", "start_s").join(known, on="record_id")
        labelled = labelled.sort("record_id", "segment_index")
        write_table(labelled, "labelled_segments", out / f"labelled_{split}.parquet", {"splits": splits})
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


def with_both_classes(space: LabelSpace, segments: pl.DataFrame, labels: pl.DataFrame, drop: bool) -> LabelSpace:
    """The label space with its counts per split; labels without both classes in every split are dropped or refused.

    Raises:
        InputError: a label lacks a class and `drop` is false, or no label is left.
    """
    split_of = segments.select("record_id", "split").unique()
    counted = split_of.join(labels, on="record_id").group_by("split")
    sums = {
        str(row["split"]): row
        for row in counted.agg(
            *(pl.col(name).sum().cast(pl.Int64).alias(f"+{name}") for name in space.names),
            *(pl.col(name).is_not_null().sum().cast(pl.Int64).alias(f"?{name}") for name in space.names),
            pl.len().alias("records"),
        ).iter_rows(named=True)
    }
    kept, dropped = [], dict(space.dropped)
    for label in space.labels:
        records = {}
        lacking = []
        for split in SPLITS:
            row = sums.get(split, {})
            positive, known = row.get(f"+{label.name}", 0), row.get(f"?{label.name}", 0)
            records[split] = {
                "positive": positive,
                "negative": known - positive,
                "unknown": row.get("records", 0) - known,
            }
            lacking += [
                f"no {which} record in {split}" for which in ("positive", "negative") if not records[split][which]
            ]
        if lacking:
            dropped[label.name] = ", ".join(lacking)
        else:
            kept.append(replace(label, records=records))
    new = {name: why for name, why in dropped.items() if name not in space.dropped}
    if new and not drop:
        name, why = next(iter(new.items()))
        more = f" (and {len(new) - 1} more labels)" if len(new) > 1 else ""
        raise InputError(
            f"manifests: label {name!r} has {why}{more}; give more records, another splits.seed, "
            "or set manifests.rare_labels=drop to go on without"
        )
    if not kept:
        raise InputError(
            f"manifests: no label has a positive and a negative record in every split ({len(dropped)} labels tried); "
            "give more records"
        )
    return LabelSpace(tuple(kept), dropped)
