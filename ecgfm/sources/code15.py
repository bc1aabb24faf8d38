"""CODE-15%, version 1.0.0 (Ribeiro et al., Zenodo 4916206): 345,779 exams of 233,770 patients at 400 Hz.

Layout: `exams.csv`, and `exams_part{0..17}.hdf5` with `exam_id` (exam,) and `tracings` (exam, 4096, 12) float32, the
leads DI, DII, DIII, AVR, AVL, AVF, V1 to V6. The parts are not in the order of the table and end with a row of zeros
under the id 0: exams are found by their id. A recording of 7 or 10 s stands in the middle of zeros, which are taken
off. The values are millivolts: QRS complexes of about 1, and the Challenge of 2025 publishes the same exams as mV.

The codes of an exam are those of the columns 1dAVb, RBBB, LBBB, SB, ST, AF, normal_ecg and is_male that are true; null
where one of them is not filled in. A part may be absent: its exams are listed, and turned away as `missing_signal`. An
exam of a part that the table does not name is listed too, and turned away as `missing_header`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ecgfm.ecg import LEADS, EcgRecord, InputError, Rejected
from ecgfm.formats.raw_files import inside
from ecgfm.sources.arrays import kept_open, open_array, without_padding
from ecgfm.sources.listing import check_once, found, listing, other_source, read_csv

NAME = "code15"

SAMPLING_RATE_HZ = 400.0
CODES = ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF", "normal_ecg", "is_male")

_DUMMY = "0"  # the id of the row that ends every part
_NOT_IN_TABLE = "exams.csv has no line for it"
_TRUTH = {"true": True, "false": False, "1": True, "0": False}


def list_records(raw_dir: Path) -> pl.DataFrame:
    """The exams of `exams.csv`, see data_contracts/listing.yaml, then those that only the parts have. Of the parts that
    are there, the ids are read.

    Raises:
        InputError: `exams.csv` is missing or damaged, or names an exam twice.
    """
    path = raw_dir / "exams.csv"
    if not path.exists():
        raise InputError(
            f"{raw_dir}: expected CODE-15%'s exams.csv and exams_part0.hdf5 ... exams_part17.hdf5, found "
            f"{found(raw_dir)}{other_source(raw_dir, NAME)}"
        )
    exams = read_csv(raw_dir, path.name, ("exam_id", "age", "patient_id", "trace_file", *CODES))
    if not exams.height:
        raise InputError(f"{path}: expected one line per exam, found none")
    check_once(exams, "exam_id", path)
    wrong = exams.filter(pl.col("trace_file").is_null() | pl.col("trace_file").str.contains("/", literal=True))
    if wrong.height:
        line = wrong.row(0, named=True)
        raise InputError(f"{path}: exam {line['exam_id']}: expected a trace_file, found {line['trace_file']!r}")
    try:
        exams = exams.with_columns(
            pl.col("age").cast(pl.Float64),
            pl.col(CODES).str.to_lowercase().replace_strict(_TRUTH, return_dtype=pl.Boolean),
        )
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: expected ages, and true or false: {str(error).splitlines()[0]}") from error
    codes = pl.concat_list([pl.when(pl.col(code)).then(pl.lit(code)) for code in CODES]).list.drop_nulls()
    known = pl.all_horizontal(pl.col(code).is_not_null() for code in CODES)
    listed = exams.select(
        pl.format(f"{NAME}/{{}}", "exam_id").alias("record_id"),
        pl.lit(NAME).alias("source"),
        pl.col("trace_file").alias("slice_id"),
        pl.col("trace_file").alias("raw_path"),
        pl.format(f"{NAME}/{{}}", "patient_id").alias("patient_id"),
        pl.when(pl.col("age").is_between(0, 130)).then("age").alias("age_years"),
        pl.when("is_male").then(pl.lit("male")).when(~pl.col("is_male")).then(pl.lit("female")).alias("sex"),
        pl.when(known).then(codes).alias("codes"),
    )
    return listing(pl.concat([listing(listed), listing(_not_in_table(raw_dir, set(exams["exam_id"])))]))


def read_record(raw_dir: Path, row: Mapping[str, Any]) -> EcgRecord:
    """The exam of one row of the listing, without the zeros around it.

    Raises:
        Rejected: the exam cannot be read.
    """
    exam_id = row["record_id"].removeprefix(f"{NAME}/")
    if row["reading"] is not None:
        raise Rejected("missing_header", f"exam {exam_id} of {row['raw_path']}: {row['reading']}")
    part = kept_open(inside(raw_dir, row["raw_path"]))
    rows = part.rows_of("exam_id").get(exam_id, [])
    if not rows:
        raise Rejected("missing_signal", f"exam {exam_id}: {row['raw_path']} has no such exam_id")
    if len(rows) > 1:
        raise Rejected("unreadable_signal", f"exam {exam_id}: expected once in {row['raw_path']}, found rows {rows}")
    tracing = part.read("tracings", rows[0])
    if tracing.ndim != 2 or tracing.shape[1] != len(LEADS):
        raise Rejected("unreadable_signal", f"{row['raw_path']}: expected (exam, time, 12), found {tracing.shape}")
    return EcgRecord(row["record_id"], LEADS, SAMPLING_RATE_HZ, without_padding(tracing.T.astype(np.float64)))


def _not_in_table(raw_dir: Path, exam_ids: set[str]) -> Iterator[dict[str, Any]]:
    """Rows of the exams that only the parts have."""
    seen: set[str] = set()
    for path in sorted(raw_dir.glob("exams_part*.hdf5")):
        try:
            part = open_array(inside(raw_dir, path.name))
        except Rejected:
            continue  # its exams are turned away with that reason when they are read
        try:
            only_here = set(part.ids("exam_id")) - exam_ids - {_DUMMY} - seen
        except Rejected:
            continue
        finally:
            part.close()
        seen |= only_here
        for exam_id in sorted(only_here):
            yield {
                "record_id": f"{NAME}/{exam_id}",
                "source": NAME,
                "slice_id": path.name,
                "raw_path": path.name,
                "reading": _NOT_IN_TABLE,
            }
