"""Who trains, who validates, who tests."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.config import SplitsConfig
from ecgfm.contracts import read_tables, write_table
from ecgfm.ecg import InputError

SPLITS = ("train", "valid", "test")


def make_splits(inputs: Mapping[str, Any], config: SplitsConfig, out: Path) -> dict[str, int]:
    """Write `splits.parquet`: every prepared record is in one split or excluded for a reason.

    inputs: `slices`, the directories of the prepared slices

    Raises:
        InputError: a grouped split of records without patients, an official split of records without folds, or a
            split without a record.
    """
    records = read_tables([slice_dir / "records.parquet" for slice_dir in inputs["slices"]], "records")
    splits = assign(records, config)
    write_table(splits, "splits", out / "splits.parquet", {"records": records})
    counts = dict(splits["split"].drop_nulls().value_counts().iter_rows())
    excluded = dict(splits["excluded"].drop_nulls().value_counts(sort=True).iter_rows())
    if empty := [split for split in SPLITS if not counts.get(split)]:
        raise InputError(
            f"splits: no record in {' and '.join(empty)}; {splits.height} prepared, {sum(excluded.values())} excluded "
            f"({_listed(excluded) or 'none'}); give more records, another splits.seed or larger shares"
        )
    return {split: counts[split] for split in SPLITS} | {f"excluded: {why}": n for why, n in sorted(excluded.items())}


def assign(records: pl.DataFrame, config: SplitsConfig) -> pl.DataFrame:
    """The table `splits` of a table `records`.

    A patient's split (a record's under `random`) depends on nothing but its id and the seed, so that adding data
    never moves anyone.

    Raises:
        InputError: see `make_splits`.
    """
    if config.strategy == "grouped":
        _require(records, "patient_id", "gives no patient ids", "use splits.strategy random or official")
        split = _by_hash(records["patient_id"], config)
    elif config.strategy == "random":
        split = _by_hash(records["record_id"], config)
    else:
        _require(records, "fold", "has no official folds", "use splits.strategy grouped or random")
        fold = pl.col("fold")
        split = records.select(
            pl.when(fold.is_in(config.test_folds))
            .then(pl.lit("test"))
            .when(fold.is_in(config.valid_folds))
            .then(pl.lit("valid"))
            .otherwise(pl.lit("train"))
            .alias("split")
        )["split"]
    excluded = (
        pl.when(pl.col("n_segments") == 0)
        .then(pl.lit("too_short"))
        .when((pl.col("invalid_leads").list.len() > 0) & config.exclude_invalid)
        .then(pl.lit("invalid_sample"))
        .when((pl.col("constant_leads").list.len() > 0) & config.exclude_constant)
        .then(pl.lit("constant_lead"))
        .otherwise(pl.lit(None, dtype=pl.String))
    )
    return (
        records.with_columns(split=split, excluded=excluded)
        .with_columns(split=pl.when(pl.col("excluded").is_null()).then(pl.col("split")))
        .select("record_id", "patient_id", "split", "excluded")
        .sort("record_id")
    )


def _by_hash(ids: pl.Series, config: SplitsConfig) -> pl.Series:
    """A split per id from a salted hash: uniform on [0, 1), cut at the shares."""

    def split_of(identity: str) -> str:
        digest = blake2b(identity.encode(), digest_size=8, salt=config.seed.to_bytes(16, "little", signed=True))
        place = int.from_bytes(digest.digest()) / 2**64
        if place < config.test_share:
            return "test"
        return "valid" if place < config.test_share + config.valid_share else "train"

    unique = ids.unique(maintain_order=True)
    return ids.replace_strict(unique, pl.Series([split_of(identity) for identity in unique], dtype=pl.String))


def _require(records: pl.DataFrame, column: str, fault: str, way_out: str) -> None:
    """Every record has a value in `column`, or a clear error that names the sources without."""
    without = records.filter(pl.col(column).is_null()).group_by("source").len().sort("source")
    for source, count in without.iter_rows():
        raise InputError(
            f"splits: source {source} {fault} ({count} of {records.height} records have no {column}); {way_out}"
        )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())
