"""The table that every source's `list_records` gives: one row per record, before any signal is read."""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.csv_tables import separator, why
from ecgfm.ecg import InputError, Rejected
from ecgfm.formats import wfdb_header
from ecgfm.formats.raw_files import check_drive, inside

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
        "site": pl.String(),
        "device": pl.String(),
        "recorded_at": pl.Datetime("us"),
        "reading": pl.String(),
    }
)
"""Columns and types of data_contracts/listing.yaml, which says what they mean."""

SEX = {"m": "male", "male": "male", "f": "female", "female": "female"}
MAX_AGE_YEARS = 130.0

_COMMENT = re.compile(r"^[ \t]*#[ \t]*(age|sex|dx|labels|patient id)[ \t]*:(.*)$", re.IGNORECASE | re.MULTILINE)
_BRACKETED = re.compile(r"<(age|sex)>\s*:\s*([^\s<]+)", re.IGNORECASE)  # LUDB, and records of other PhysioNet sets
_NOT_GIVEN = {"", "unknown", "nan"}
_LAYOUTS = (
    ("ptbxl_database.csv", "ptb_xl"),
    ("record_list.csv", "mimic_iv_ecg"),
    ("exams.csv", "code15"),
    ("training", "physionet2021"),
    ("ecgfm.yaml", "own"),
)
_RECORDINGS = (".hea", ".xml", ".dcm", ".edf", ".scp", ".npy", ".h5", ".hdf5")
_MAX_LINE_BYTES = 1 << 20
_MAX_UNPACKED_BYTES = 1 << 28  # of a packed table; MIMIC-IV's patients are 10 MB
_PACKED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"x\x01", b"x\x9c", b"x\xda")  # which polars would unpack
_LOOKED_AT = 2000  # entries of a wrong folder, before we say that we do not know what it is


def listing(rows: pl.DataFrame | Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """The rows as a listing, ordered by record_id; absent columns are null."""
    if not isinstance(rows, pl.DataFrame):
        rows = list(rows)
        columns = {column: [row.get(column) for row in rows] for column in LISTING}
        try:
            return pl.DataFrame(columns, schema=LISTING).sort("record_id")
        except UnicodeEncodeError as error:  # names of files may be any bytes
            raise InputError(f"expected names in UTF-8, found {error.object!r}; rename it") from error
    absent = [pl.lit(None).alias(column) for column in LISTING if column not in rows.columns]
    return rows.with_columns(absent).select(LISTING.names()).cast(LISTING).sort("record_id")


def read_csv(
    raw_dir: Path, file: str, columns: Iterable[str], also: Mapping[str, pl.Expr] | None = None
) -> pl.DataFrame:
    """Some columns of a CSV table of a source, as strings without outer blanks; what is empty is null.

    file: below the raw folder
    also: columns worked out while the file is read, a piece at a time, so that what they are made of is not kept

    Raises:
        InputError: no such file in the raw folder, not a CSV table, or a column is missing.
    """
    path = raw_dir / file
    columns = list(dict.fromkeys(columns))
    worked_out = dict(also or {})
    try:
        inside(raw_dir, file)
    except Rejected as rejected:
        raise InputError(f"{path}: {rejected.detail}") from rejected
    if not path.is_file():  # a pipe would not end
        raise InputError(f"expected {path.name} in {path.parent}, found {found(path.parent)}")
    _check_text(path)
    used = list(dict.fromkeys([*columns, *(n for e in worked_out.values() for n in e.meta.root_names())]))
    stripped = pl.col(used).str.strip_chars()
    try:
        table = pl.scan_csv(path, infer_schema=False, separator=separator(path)).select(
            pl.when(stripped != "").then(stripped)
        )
        return table.select(*columns, **worked_out).collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path}: expected a CSV table with the columns {', '.join(columns)}: {why(error)}") from error


def _check_text(path: Path) -> None:
    """Look through a table before it is parsed, a piece at a time: 0.1 s for MIMIC-IV-ECG's 180 MB.

    Raises:
        InputError: it cannot be read, or it is what would take all memory as a table: zero bytes, lines without end, or
            gigabytes packed into little.
    """
    packed = path.suffix == ".gz"
    size = 0
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            while piece := file.read(_MAX_LINE_BYTES):
                if b"\0" in piece or (not size and piece.startswith(_PACKED)):
                    raise InputError(f"{path}: expected the text of a table, found other bytes; is it as published?")
                if len(piece) == _MAX_LINE_BYTES and b"\n" not in piece:
                    raise InputError(
                        f"{path}: expected lines of less than {_MAX_LINE_BYTES:,} bytes, found a longer one"
                    )
                size += len(piece)
                if packed and size > _MAX_UNPACKED_BYTES:
                    raise InputError(f"{path}: expected at most {_MAX_UNPACKED_BYTES:,} bytes unpacked; unpack it")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def check_once(table: pl.DataFrame, column: str, path: Path) -> None:
    """Every line of a source's table has a value in `column`, and no other line has the same.

    Raises:
        InputError: one has none, or two are equal.
    """
    wrong = table.filter(pl.col(column).is_null() | pl.col(column).is_duplicated())
    if wrong.height:
        value = wrong[column][0]
        what = "a line without one" if value is None else f"{value} more than once"
        raise InputError(f"{path}: expected every {column} once, found {what}; is the file as published?")


def header_text(raw_dir: Path, path: str) -> str:
    """The text of a WFDB header below the raw folder; empty where it cannot be read, which reading the record says.

    path: as found by walking, so that no folder in it is a link

    Raises:
        InputError: the drive fails (raw_files.py).
    """
    whole = f"{raw_dir}/{path}"
    try:
        return wfdb_header.decode(wfdb_header.header_bytes(inside(raw_dir, path) if os.path.islink(whole) else whole))
    except (OSError, ValueError, Rejected) as error:
        check_drive(error, whole)
        return ""


def comments_of(header: str) -> dict[str, Any]:
    """What the comments of a WFDB header say in the dialects of the Challenges (2020 to 2025) and of LUDB, as columns
    of the listing: `age_years`, `sex`, `codes` (`Dx` or `Labels`) and `patient_id`, the last as in the file. Null what
    is absent, unknown or implausible.
    """
    fields = {name.lower(): value.strip() for name, value in _BRACKETED.findall(header)}
    fields |= {name.lower(): value.strip() for name, value in _COMMENT.findall(header)}
    stated = fields.get("dx", fields.get("labels", ""))
    codes = tuple(dict.fromkeys(code for part in stated.split(",") if (code := part.strip())))
    return {
        "age_years": plausible_age_years(fields.get("age", "")),
        "sex": SEX.get(fields.get("sex", "").lower()),
        "codes": None if {code.lower() for code in codes} <= _NOT_GIVEN else list(codes),
        "patient_id": None if (patient := fields.get("patient id", "")).lower() in _NOT_GIVEN else patient,
    }


def plausible_age_years(text: str) -> float | None:
    """A number from 0 to 130, else null."""
    try:
        age_years = float(text)
    except ValueError:
        return None
    return age_years if math.isfinite(age_years) and 0 <= age_years <= MAX_AGE_YEARS else None


def other_source(raw_dir: Path, asked: str) -> str:
    """The end of an error about a wrong folder: which source would read it; empty where none would."""
    for name, source in _LAYOUTS:
        if source != asked and (raw_dir / name).exists():
            return f"; it looks like source {source}"
    below = (os.path.join(at, name) for at, _, names in os.walk(raw_dir) for name in sorted(names))
    for path in islice(below, _LOOKED_AT):
        if path.lower().endswith(_RECORDINGS):
            shown = os.path.relpath(path, raw_dir)
            return f"; source own reads a folder with {shown}: start with `ecgfm init-source {raw_dir}`"
    return ""


def found(folder: Path) -> str:
    """What lies in a folder, in short, for an error."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        return f"no such folder ({error.strerror})"
    shown = ", ".join(names[:5]) or "nothing"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
