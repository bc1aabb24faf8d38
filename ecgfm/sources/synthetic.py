"""The embedded source: what `ecgfm.synthesize` wrote, read by the readers of the archives whose layouts it has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.ecg import EcgRecord
from ecgfm.sources import mimic_iv_ecg, physionet2021
from ecgfm.sources.listing import listing, read_csv

NAME = "synthetic"


def list_records(raw_dir: Path) -> pl.DataFrame:
    """The records of both sets, see data_contracts/listing.yaml; `dataset` is the set's folder.

    Patients of the Challenge's layout come from `patients.csv`. The MIMIC-IV-ECG set, which has every fourth patient,
    may be absent.

    Raises:
        InputError: `raw_dir` is not as `ecgfm.synthesize` writes it.
    """
    patients = read_csv(raw_dir, "patients.csv", ("record", "patient"))
    sets = [
        _of_set("challenge-2021", physionet2021.list_records(raw_dir / "challenge-2021"))
        .join(patients, left_on=_name("record_id"), right_on="record", how="left")
        .with_columns(patient_id=pl.format(f"{NAME}/{{}}", "patient"))
    ]
    if (raw_dir / "mimic-iv-ecg").is_dir():
        mimic = _of_set("mimic-iv-ecg", mimic_iv_ecg.list_records(raw_dir / "mimic-iv-ecg"))
        sets.append(mimic.with_columns(patient_id=pl.format(f"{NAME}/{{}}", _name("patient_id"))))
    return listing(pl.concat([listing(records) for records in sets]))


def read_record(raw_dir: Path, row: Mapping[str, Any]) -> EcgRecord:
    """The record of one row of the listing.

    Raises:
        Rejected: the record cannot be read.
    """
    dataset, _, raw_path = row["raw_path"].partition("/")
    read = {"challenge-2021": physionet2021.read_record, "mimic-iv-ecg": mimic_iv_ecg.read_record}[dataset]
    return read(raw_dir / dataset, {**row, "raw_path": raw_path})


def _of_set(dataset: str, records: pl.DataFrame) -> pl.DataFrame:
    """An archive's listing as this source's: its names, and paths below this source's raw folder."""
    return records.with_columns(
        pl.format(f"{NAME}/{{}}", _name("record_id")).alias("record_id"),
        pl.lit(NAME).alias("source"),
        pl.lit(dataset).alias("dataset"),
        pl.format(f"{dataset}/{{}}", "slice_id").alias("slice_id"),
        pl.format(f"{dataset}/{{}}", "raw_path").alias("raw_path"),
    )


def _name(column: str) -> pl.Expr:
    """An id without the source before it."""
    return pl.col(column).str.split("/").list.last()
