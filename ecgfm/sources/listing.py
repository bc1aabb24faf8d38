"""The table that every source's `list_records` gives: one row per record, before any signal file is opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.ecg import InputError

LISTING = pl.Schema(
    {
        "record_id": pl.String(),
        "source": pl.String(),
        "dataset": pl.String(),
        "slice_id": pl.String(),
        "raw_path": pl.String(),
        "patient_id": pl.String(),
        "age_years": pl.Float64(),
        "sex": pl.String(),
        "codes": pl.List(pl.String()),
        "report": pl.String(),
        "fold": pl.Int64(),
        "recorded_at": pl.Datetime("us"),
    }
)
"""Columns and types of data_contracts/listing.yaml, which says what they mean."""


def listing(rows: pl.DataFrame | Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """The rows as a listing, ordered by record_id; absent columns are null."""
    if not isinstance(rows, pl.DataFrame):
        rows = list(rows)
        columns = {column: [row.get(column) for row in rows] for column in LISTING}
        return pl.DataFrame(columns, schema=LISTING).sort("record_id")
    absent = [pl.lit(None).alias(column) for column in LISTING if column not in rows.columns]
    return rows.with_columns(absent).select(LISTING.names()).cast(LISTING).sort("record_id")


def read_csv(path: Path, columns: Iterable[str]) -> pl.DataFrame:
    """Some columns of a CSV table of a source, as strings without outer blanks; what is empty is null.

    Raises:
        InputError: no such file, not a CSV table, or a column is missing.
    """
    columns = list(columns)
    try:
        table = pl.read_csv(path, infer_schema=False, columns=columns)
    except FileNotFoundError as error:
        raise InputError(f"expected {path.name} in {path.parent}, found {found(path.parent)}") from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(
            f"{path}: expected a CSV table with the columns {', '.join(columns)}: {str(error).splitlines()[0]}"
        ) from error
    stripped = pl.all().str.strip_chars()
    return table.select(pl.when(stripped != "").then(stripped))


def found(folder: Path) -> str:
    """What lies in a folder, in short, for an error."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"no such folder ({error.strerror})"
    shown = ", ".join(names[:5]) or "nothing"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
