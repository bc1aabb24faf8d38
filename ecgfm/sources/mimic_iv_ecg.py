"""MIMIC-IV-ECG, version 1.0: 800,035 records of 161,352 patients.

Layout: `record_list.csv`, `files/p<4>/p<8>/s<study>/<study>.{hea,dat}`, and the machine's statements in
`machine_measurements.csv` (`report_0` to `report_17`), which may be left away. Ages and sex are in MIMIC-IV's own
tables, not here; dates are shifted per patient, as published.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.ecg import EcgRecord, InputError
from ecgfm.formats import wfdb
from ecgfm.sources.listing import listing, read_csv

NAME = "mimic_iv_ecg"

_STATEMENTS = tuple(f"report_{number}" for number in range(18))


def list_records(raw_dir: Path) -> pl.DataFrame:
    """The records of `record_list.csv`, see data_contracts/listing.yaml; the report is the machine's statements
    joined by "; ", null where there is none. Opens no other file than the tables.

    Raises:
        InputError: `record_list.csv` is missing or damaged, or names a study twice.
    """
    path = raw_dir / "record_list.csv"
    records = read_csv(path, ("subject_id", "study_id", "ecg_time", "path"))
    if not records.height:
        raise InputError(f"{path}: expected one line per record, found none")
    _check_studies(records, path)
    if (gaps := records.filter(pl.col("path").is_null())).height:
        raise InputError(f"{path}: expected a path for every record, found none for study {gaps['study_id'][0]}")
    if (measurements := raw_dir / "machine_measurements.csv").exists():
        records = records.join(_reports(measurements), on="study_id", how="left")
    try:
        recorded_at = records["ecg_time"].str.to_datetime(strict=True, time_unit="us")
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: column ecg_time: expected dates and times: {str(error).splitlines()[0]}") from error
    return listing(
        records.select(
            pl.format(f"{NAME}/{{}}", "study_id").alias("record_id"),
            pl.lit(NAME).alias("source"),
            pl.col("path").str.split("/").list.head(2).list.join("/").alias("slice_id"),
            (pl.col("path") + ".hea").alias("raw_path"),
            pl.format(f"{NAME}/{{}}", "subject_id").alias("patient_id"),
            pl.col("^report$"),
            recorded_at.alias("recorded_at"),
        )
    )


def read_record(raw_dir: Path, row: Mapping[str, Any]) -> EcgRecord:
    """The record of one row of the listing.

    Raises:
        Rejected: the record cannot be read.
    """
    return wfdb.read_wfdb(raw_dir, row["raw_path"], row["record_id"])


def _reports(path: Path) -> pl.DataFrame:
    """(study_id, report)"""
    statements = read_csv(path, ("study_id", *_STATEMENTS))
    _check_studies(statements, path)
    report = pl.concat_str(_STATEMENTS, separator="; ", ignore_nulls=True)
    return statements.select("study_id", pl.when(report != "").then(report).alias("report"))


def _check_studies(table: pl.DataFrame, path: Path) -> None:
    """Every line names its study, and no other line does."""
    wrong = table.filter(pl.col("study_id").is_null() | pl.col("study_id").is_duplicated())
    if wrong.height:
        study = wrong["study_id"][0]
        what = "a line without one" if study is None else f"{study} more than once"
        raise InputError(f"{path}: expected every study_id once, found {what}; is the file as published?")
