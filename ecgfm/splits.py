"""Who trains, who validates, who tests.

Records that are the same ECG (audit.py) are never apart: they are one unit, and so are, where patients are kept
together, all records of the patients whom they tie. A unit's split depends on its smallest id, not on the order of
anything. With official folds a unit that they would part goes to the later split, test before valid before train, so
that no ECG that tests has trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.cohort import cohort_svg, count_cohort
from ecgfm.config import SplitsConfig
from ecgfm.contracts import empty_table, read_table, read_tables, write_table
from ecgfm.ecg import InputError

SPLITS = ("train", "valid", "test")  # in this order: test is the latest

_READ = (
    *("record_id", "source", "patient_id", "fold", "recorded_at", "n_segments"),
    *("invalid_leads", "constant_leads"),
)


def make_splits(inputs: Mapping[str, Any], config: SplitsConfig, out: Path) -> dict[str, int]:
    """Write `splits.parquet`: every prepared record is in one split or excluded for a reason. Also the cohort from
    the first listed record on: `cohort.json` and its drawing, `cohort.svg`.

    inputs: `slices`, the directories of the prepared slices; `audit`, the directory of `duplicates.parquet`

    Raises:
        InputError: a grouped split of records without patients, an official split of records without folds, a temporal
            one of records without dates, or a split without a record.
    """
    records = read_tables([slice_dir / "records.parquet" for slice_dir in inputs["slices"]], "records", _READ)
    rejects = read_tables(
        [slice_dir / "rejects.parquet" for slice_dir in inputs["slices"]], "rejects", ("source", "reason")
    )
    duplicates = read_table(inputs["audit"] / "duplicates.parquet", "duplicates")
    splits = assign(records, duplicates, config)
    write_table(splits, "splits", out / "splits.parquet", {"records": records})
    cohort = count_cohort(records.select("record_id", "source"), rejects, duplicates, splits)
    (out / "cohort.json").write_text(json.dumps(cohort, indent=1) + "\n", encoding="utf-8")
    (out / "cohort.svg").write_text(cohort_svg(cohort), encoding="utf-8")
    counts = dict(splits["split"].drop_nulls().value_counts().iter_rows())
    excluded = dict(splits["excluded"].drop_nulls().value_counts(sort=True).iter_rows())
    if empty := [split for split in SPLITS if not counts.get(split)]:
        raise InputError(
            f"splits: no record in {' and '.join(empty)}; {splits.height} prepared, {sum(excluded.values())} excluded "
            f"({_listed(excluded) or 'none'}); give more records, another splits.seed or larger shares"
        )
    return {split: counts[split] for split in SPLITS} | {f"excluded: {why}": n for why, n in sorted(excluded.items())}


def assign(records: pl.DataFrame, duplicates: pl.DataFrame, config: SplitsConfig) -> pl.DataFrame:
    """The table `splits` of a table `records` and its `duplicates`.

    By hash, a unit's split depends on nothing but its smallest id and the seed, so that adding data moves no one, but
    those whom a new copy of their ECG ties to others.

    Raises:
        InputError: see `make_splits`.
    """
    united = _united(records, duplicates, config)
    if config.strategy in ("grouped", "random"):
        split = _by_hash(united["unit"], config)
    elif config.strategy == "official":
        split = _by_fold(united, config)
    else:
        split = _by_time(united, config)
    splits = united.with_columns(split=split).with_columns(
        excluded=pl.when(pl.col("n_segments") == 0)
        .then(pl.lit("too_short"))
        .when((pl.col("invalid_leads").list.len() > 0) & config.exclude_invalid)
        .then(pl.lit("invalid_sample"))
        .when((pl.col("constant_leads").list.len() > 0) & config.exclude_constant)
        .then(pl.lit("constant_lead"))
        .otherwise(pl.lit(None, dtype=pl.String))
    )
    if config.duplicates == "drop_copies":
        splits = _without_copies(splits)
    return (
        splits.with_columns(
            patient_id=pl.col("person_id"),
            split=pl.when(pl.col("excluded").is_null()).then(pl.col("split")),
        )
        .select(empty_table("splits").columns)
        .sort("record_id")
    )


def _united(records: pl.DataFrame, duplicates: pl.DataFrame, config: SplitsConfig) -> pl.DataFrame:
    """The records with `group_id` (null: no copy of theirs is known), `person_id` (null: unknown) and `unit`: the id
    of what is not to be parted.
    """
    persons = duplicates.drop_nulls("patient_id").select("patient_id", person="person_id").unique()
    united = (
        records.join(duplicates.select("record_id", "group_id", "person_id"), on="record_id", how="left")
        .join(persons, on="patient_id", how="left")
        .with_columns(person_id=pl.coalesce("person_id", "person", "patient_id"))
    )
    alone = pl.coalesce("group_id", "record_id")
    if config.strategy in ("random", "temporal"):
        return united.with_columns(unit=alone)
    if config.strategy != "official" and config.unknown_patients == "error":
        way_out = "use splits.strategy random or official, or splits.unknown_patients alone"
        _require(united, "person_id", "patient_id", "gives no patient ids", way_out)
    return united.with_columns(unit=pl.coalesce("person_id", alone))


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


def _by_fold(united: pl.DataFrame, config: SplitsConfig) -> pl.Series:
    """The source's own folds; a unit with copies, which they may part, as a whole in the latest of its splits."""
    _require(united, "fold", "fold", "has no official folds", "use splits.strategy grouped or random")
    fold = pl.col("fold")
    place = pl.when(fold.is_in(config.test_folds)).then(2).when(fold.is_in(config.valid_folds)).then(1).otherwise(0)
    has_copies = pl.col("group_id").is_not_null().any().over("unit")
    places = united.with_columns(place=place).select(
        pl.when(has_copies).then(pl.col("place").max().over("unit")).otherwise("place").alias("split")
    )
    return places["split"].replace_strict([0, 1, 2], SPLITS, return_dtype=pl.String)


def _by_time(united: pl.DataFrame, config: SplitsConfig) -> pl.Series:
    """The units in the order of their latest records, cut where the shares of records are reached.

    Units of one time, to the microsecond, stay together, so a split may take some records more than its share.
    """
    _require(united, "recorded_at", "recorded_at", "gives no dates", "use splits.strategy grouped or random")
    latest = united.select(time=pl.col("recorded_at").max().over("unit"))
    earlier = latest.with_row_index("place").sort("time").with_columns(before=pl.col("time").rank("min") - 1)
    share = pl.col("before") / max(united.height, 1)
    train_share = 1 - config.valid_share - config.test_share
    return earlier.with_columns(
        split=pl.when(share < train_share)
        .then(pl.lit("train"))
        .when((share < 1 - config.test_share) & (config.valid_share > 0))
        .then(pl.lit("valid"))
        .otherwise(pl.lit("test"))
    ).sort("place")["split"]


def _without_copies(splits: pl.DataFrame) -> pl.DataFrame:
    """Of records that are the same ECG, and that nothing else excludes, the first by id stays."""
    candidate = pl.col("excluded").is_null() & pl.col("group_id").is_not_null()
    first = pl.col("record_id").filter(candidate).min().over("group_id")
    copy = candidate & (pl.col("record_id") != first)
    return splits.with_columns(excluded=pl.when(copy).then(pl.lit("duplicate")).otherwise(pl.col("excluded")))


def _require(records: pl.DataFrame, column: str, name: str, fault: str, way_out: str) -> None:
    """Every record has a value in `column`, or a clear error that names the sources without."""
    without = records.filter(pl.col(column).is_null()).group_by("source").len().sort("source")
    for source, count in without.iter_rows():
        raise InputError(
            f"splits: source {source} {fault} ({count} of {records.height} records have no {name}); {way_out}"
        )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count}" for name, count in counts.items())
