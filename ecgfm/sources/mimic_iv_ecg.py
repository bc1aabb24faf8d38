"""MIMIC-IV-ECG, version 1.0: 800,035 records of 161,352 patients.

Layout: `record_list.csv`, `files/p<4>/p<8>/s<study>/<study>.{hea,dat}`, and the machine's statements in
`machine_measurements.csv` (`report_0` to `report_17`), which may be left away. Dates are shifted per patient, as
published.

Age and sex are not in the archive but in MIMIC-IV's own `hosp/patients.csv.gz`. Where that table lies in the raw folder
or in `hosp/` below it, unpacked or not, a record has the sex and the age at the ECG by MIMIC-IV's rule: `anchor_age` +
year of the ECG - `anchor_year`. MIMIC-IV gives everybody over 89 in the anchor year as 91; so every age over 89 is 91
here, and an earlier age of those people is a guess from below.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.ecg import EcgRecord, InputError
from ecgfm.formats import wfdb
from ecgfm.sources.listing import check_once, found, listing, other_source, read_csv

NAME = "mimic_iv_ecg"

MEASUREMENTS = "machine_measurements.csv"
PATIENTS = ("patients.csv.gz", "patients.csv", "hosp/patients.csv.gz", "hosp/patients.csv")
"""Where MIMIC-IV's table of patients may lie below the raw folder; the first that is there is read."""

_SEX = {"M": "male", "F": "female"}
_OLDEST_YEARS, _OVER_YEARS = 89, 91
_STATEMENTS = tuple(f"report_{number}" for number in range(18))


def list_records(raw_dir: Path) -> pl.DataFrame:
    """The records of `record_list.csv`, see data_contracts/listing.yaml; the report is the machine's statements
    joined by "; ", null where there is none. Opens no other file than the tables. What those tables say of other
    studies and patients is left alone; a listed record whose files are missing is turned away when it is read.

    Raises:
        InputError: `record_list.csv` is missing, or a table is damaged or names a study or patient twice.
    """
    path = raw_dir / "record_list.csv"
    if not path.exists():
        raise InputError(
            f"{raw_dir}: expected MIMIC-IV-ECG's record_list.csv and files/, found {found(raw_dir)}"
            f"{other_source(raw_dir, NAME)}"
        )
    records = read_csv(raw_dir, path.name, ("subject_id", "study_id", "ecg_time", "path"))
    if not records.height:
        raise InputError(f"{path}: expected one line per record, found none")
    check_once(records, "study_id", path)
    if (gaps := records.filter(pl.col("path").is_null())).height:
        raise InputError(f"{path}: expected a path for every record, found none for study {gaps['study_id'][0]}")
    try:
        records = records.with_columns(pl.col("ecg_time").str.to_datetime(strict=True, time_unit="us"))
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: column ecg_time: expected dates and times: {str(error).splitlines()[0]}") from error
    if (raw_dir / MEASUREMENTS).exists():
        records = records.join(_reports(raw_dir), on="study_id", how="left")
    if (patients := next((name for name in PATIENTS if (raw_dir / name).exists()), None)) is not None:
        records = records.join(_patients(raw_dir, patients), on="subject_id", how="left").with_columns(_age_at_ecg())
    return listing(
        records.select(
            pl.format(f"{NAME}/{{}}", "study_id").alias("record_id"),
            pl.lit(NAME).alias("source"),
            pl.col("path").str.split("/").list.head(2).list.join("/").alias("slice_id"),
            (pl.col("path") + ".hea").alias("raw_path"),
            pl.format(f"{NAME}/{{}}", "subject_id").alias("patient_id"),
            pl.col("^(report|age_years|sex)$"),
            pl.col("ecg_time").alias("recorded_at"),
        )
    )


def read_record(raw_dir: Path, row: Mapping[str, Any]) -> EcgRecord:
    """The record of one row of the listing.

    Raises:
        Rejected: the record cannot be read.
    """
    return wfdb.read_wfdb(raw_dir, row["raw_path"], row["record_id"])


def _reports(raw_dir: Path) -> pl.DataFrame:
    """(study_id, report)"""
    report = pl.concat_str(_STATEMENTS, separator="; ", ignore_nulls=True)
    reports = read_csv(raw_dir, MEASUREMENTS, ["study_id"], {"report": pl.when(report != "").then(report)})
    check_once(reports, "study_id", raw_dir / MEASUREMENTS)
    return reports


def _age_at_ecg() -> pl.Expr:
    """Years; null before birth, which is a mistake of the table."""
    years = pl.col("anchor_age") + pl.col("ecg_time").dt.year() - pl.col("anchor_year")
    return pl.when(years > _OLDEST_YEARS).then(_OVER_YEARS).when(years >= 0).then(years).alias("age_years")


def _patients(raw_dir: Path, file: str) -> pl.DataFrame:
    """(subject_id, sex, anchor_age, anchor_year)"""
    path = raw_dir / file
    patients = read_csv(raw_dir, file, ("subject_id", "gender", "anchor_age", "anchor_year"))
    check_once(patients, "subject_id", path)
    try:
        return patients.select(
            "subject_id",
            pl.col("gender").replace_strict(_SEX, default=None).alias("sex"),
            pl.col("anchor_age", "anchor_year").cast(pl.Int32),
        )
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: expected whole years: {str(error).splitlines()[0]}") from error
