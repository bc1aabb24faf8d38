"""What the columns of a CSV table about recordings may mean: guesses from names and values, with their reasons."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from ecgfm.csv_tables import separator
from ecgfm.csv_tables import why as why_not
from ecgfm.sources.listing import SEX

_N_LINES = 2000  # of a table that are looked at
_SEX = re.compile(r"^(sex|gender|geschlecht)|^is_(fe)?male$", re.IGNORECASE)
_CODES = re.compile(r"code|label|^dx|diagnos|snomed|rhythm|finding", re.IGNORECASE)
_NO_FINDING = re.compile(r"death|died|dead|mortality|valid|train|test|quality|noise", re.IGNORECASE)
_FEMALE, _MALE = {"w", "weiblich"}, {"männlich"}  # in German
_TRUTH = {"true", "false", "1", "0", "yes", "no", "1.0", "0.0"}
_SEPARATORS = (";", "|", ",")


def guess_metadata(
    folder: Path, tables: Sequence[str], listed: pl.DataFrame
) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Values of a MetadataConfig for the table that names most recordings, a remark to some, and lines to print.

    listed: the recordings as listed without a table
    """
    names = set(listed["record_id"].str.strip_prefix("own/"))
    names |= set(listed["raw_path"])
    bare = {name.rpartition("/")[2] for name in names}
    stems = {os.path.splitext(name)[0] for name in bare} | bare
    best: tuple[int, str, str, str, pl.DataFrame] | None = None
    lines = []
    for path in tables:
        try:
            table = pl.read_csv(folder / path, infer_schema=False, n_rows=_N_LINES, separator=separator(folder / path))
        except (pl.exceptions.PolarsError, OSError) as error:
            lines.append(f"{path}: not read as a table: {why_not(error)}")
            continue
        lines.append(f"{path}: columns {', '.join(table.columns)}")
        for column in table.columns:
            held = table[column].drop_nulls()
            for match, known in (("path", names), ("name", stems)):
                hits = int(held.is_in(list(known)).sum()) if held.n_unique() == table.height else 0
                if hits and (best is None or hits > best[0]):
                    best = (hits, path, column, match, table)
    if best is None:
        lines.append("no column of a table names the recordings: metadata is left away")
        return {}, {}, lines
    hits, path, column, match, table = best
    values = {"file": path, "record": column}
    remarks = {"record": f"guess: {hits} of its first {table.height} values name a recording"}
    if match == "name":
        values["match"] = match
    guessed, why, said = _columns(table, column)
    lines += [f"{path}: {line}" for line in said]
    if table.height >= _N_LINES or hits < listed.height:
        values["unlisted"] = "keep"
        remarks["unlisted"] = "the table does not name every recording; `reject` leaves those out"
    return values | guessed, remarks | why, lines


def _columns(table: pl.DataFrame, record: str) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """What the other columns may be, and lines to print. A value that the guess cannot be read with rules it out."""
    lines = []
    values: dict[str, Any] = {}
    remarks: dict[str, str] = {}
    flags = []
    for column in table.columns:
        filled = table[column].drop_nulls().str.strip_chars()
        if column == record or filled.is_empty():
            continue
        held = {value.lower() for value in filled.unique()}
        if _SEX.search(column) and "sex" not in values:
            if (told := _sex(column, held)) is not None:
                values |= {"sex": column, **told}
                remarks["sex"] = f"values {', '.join(sorted(held)[:6])}"
            else:
                lines.append(
                    f"{column} has {', '.join(sorted(held)[:6])}: name them with metadata.sex, female and male"
                )
        elif held <= _TRUTH and not _NO_FINDING.search(column):
            flags.append(column)
        elif key := next(
            (k for k, named, fits in _PLAIN if k not in values and named.search(column) and fits(filled)), ""
        ):
            values[key] = column
        elif _CODES.search(column) and "codes" not in values:
            if filled[0][0] in "{[":
                lines.append(f"{column} has codes in a language of its own, such as {filled[0][:40]}: left aside")
                continue
            separator = next((s for s in _SEPARATORS if filled.str.contains(s, literal=True).any()), ";")
            values |= {"codes": column, "codes_separator": separator}
            remarks["codes"] = f"guess: by its name; such as {filled[0]!r}"
    if flags and "codes" not in values:
        values["code_columns"] = flags
        remarks["code_columns"] = "guess: columns of true and false; take out what is no finding"
    return values, remarks, lines


def _sex(column: str, held: set[str]) -> dict[str, list[str]] | None:
    """Values that mean female and male, beside f, female, m, male; None where they cannot be told."""
    unknown = {value for value in held if value not in SEX and value not in ("", "unknown", "nan", "na", "none", "u")}
    if not unknown:
        return {}
    if column.lower() in ("is_male", "is_female") and unknown <= _TRUTH:
        true = [value for value in sorted(unknown) if value in ("true", "1", "yes", "1.0")]
        false = [value for value in sorted(unknown) if value not in true]
        female, male = (true, false) if column.lower() == "is_female" else (false, true)
        return {"female": female, "male": male}
    if unknown <= _FEMALE | _MALE:
        return {"female": sorted(unknown & _FEMALE), "male": sorted(unknown & _MALE)}
    return None


def _is_number(values: pl.Series) -> bool:
    return values.cast(pl.Float64, strict=False).null_count() == 0


def _is_time(values: pl.Series) -> bool:
    try:
        return values.str.to_datetime(strict=False).null_count() == 0
    except pl.exceptions.PolarsError:
        return False


_PLAIN: tuple[tuple[str, re.Pattern[str], Callable[[pl.Series], bool]], ...] = (
    ("age", re.compile(r"^age|_age$|^alter\b", re.IGNORECASE), _is_number),
    ("patient", re.compile(r"patient|subject|person|mrn|\bpid\b", re.IGNORECASE), lambda _: True),
    ("fold", re.compile(r"fold$", re.IGNORECASE), _is_number),
    ("recorded_at", re.compile(r"date|time|recorded|acquired", re.IGNORECASE), _is_time),
    ("report", re.compile(r"report|statement|interpretation|conclusion|comment|befund", re.IGNORECASE), lambda _: True),
)
"""A key of MetadataConfig, how a column for it is called, and whether its values fit; the first that does is taken."""
