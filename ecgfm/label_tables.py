"""Labels from columns: of a table of the user's own, joined by id, or of the records table itself.

What is not given is unknown: an empty cell, one of the words of `NOT_GIVEN`, or a record that has no row.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from ecgfm.config import LabelsConfig
from ecgfm.contracts import contract
from ecgfm.csv_tables import separator, why
from ecgfm.ecg import InputError
from ecgfm.label_space import Label, LabelSpace

logger = logging.getLogger(__name__)

IDS = ("record_id", "patient_id")
"""The columns that a table is joined by; the first that it has."""

NOT_GIVEN = ("", "?", "n/a", "na", "nan", "none", "null", "unknown")
_TRUE, _FALSE = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
_IDENTITY = (*IDS, "slice_id", "raw_path", "report")  # columns of a record that are no property of the person

MAX_CLASSES = 50
"""Distinct values of a column from which on it is taken for numbers or free text rather than classes."""


def columns_of_records(config: LabelsConfig) -> list[str]:
    """The columns of the records table that a config's labels are.

    Raises:
        InputError: one that it has not, or that is no single value.
    """
    rules = contract("records")["columns"]
    offered = [name for name, rule in rules.items() if "list" not in rule["type"] and name not in _IDENTITY]
    for column in config.columns.values():
        _require(column, offered, "labels.columns: a record has no column")
    return list(dict.fromkeys(config.columns.values()))


def read_table_of_labels(
    path: Path, columns: Sequence[str], records: pl.DataFrame
) -> tuple[pl.DataFrame, dict[str, int]]:
    """`columns` of a CSV or Parquet table for each record, by id, and what matched. The order of rows means nothing.

    path: has a column `record_id`, or else `patient_id`, whose values are of all records of that patient
    records: with `record_id` and `patient_id`

    Returns: `record_id` and the columns, ascending by id; counts.

    Raises:
        InputError: no such table or column, an id with two different rows, or no id that is a record's.
    """
    table = _read(path)
    by = _joined_by(path, table.columns, columns)
    ids = pl.col(by).cast(pl.String).str.strip_chars()
    chosen = list(dict.fromkeys(columns))
    rows = table.select(ids, *chosen).filter(pl.col(by).is_not_null()).unique(maintain_order=True)
    twice = rows.filter(pl.col(by).is_duplicated())
    if twice.height:
        raise InputError(f"{path}: expected one row per {by}, found different ones of {twice[by][0]}; keep one")
    known = records[by].drop_nulls().unique(maintain_order=True)
    strays = rows.filter(~pl.col(by).is_in(known.to_list()))[by]
    if len(strays) == rows.height:
        raise InputError(
            f"{path}: none of its {rows.height:,} {by} is that of a record: its own are like {_some(rows[by])}, those "
            f"of the records like {_some(known)}; write them as the records have them"
        )
    if len(strays):
        logger.info(
            "labels: %d of %d %s of %s match no record (%s)", len(strays), rows.height, by, path.name, _some(strays)
        )
    joined = records.select("record_id", *({by} - {"record_id"})).join(rows, on=by, how="left").sort("record_id")
    with_row = joined[by].is_in(rows[by].to_list()).fill_null(value=False)
    counts = {
        "rows that match no record": len(strays),
        "records without a row": int((~with_row).sum()),
    }
    return joined.select("record_id", *chosen), counts


def from_columns(table: pl.DataFrame, config: LabelsConfig) -> tuple[pl.DataFrame, LabelSpace]:
    """The labels that some columns of records mean, and their space.

    table: `record_id` and the columns of `config.columns`

    Raises:
        InputError: a value that is none of the task, or no, one or too many classes.
    """
    ids = table.select("record_id")
    if config.task == "multiclass":
        ((name, column),) = config.columns.items()
        classes, values = _classes(table[column], name, column)
        of_class = [(values == value).cast(pl.Int8).alias(label) for label, value in classes.items()]
        space = LabelSpace(tuple(Label(label, (value,), "mean") for label, value in classes.items()), {}, config.task)
        return ids.hstack(of_class), space
    read = _numbers if config.task == "regression" else _present
    labels = ids.hstack([read(table[column], column).alias(name) for name, column in config.columns.items()])
    space = LabelSpace(
        tuple(
            Label(name, (column,), "max" if name in config.max_labels else "mean", unit=config.units.get(name, ""))
            for name, column in config.columns.items()
        ),
        {},
        config.task,
    )
    return labels, space


# ---- values


def _given(values: pl.Series) -> pl.Series:
    """Text without outer blanks, null where it says nothing; other types as they are, null for NaN."""
    if values.dtype == pl.String:
        stripped = values.str.strip_chars()
        return stripped.set(stripped.str.to_lowercase().is_in(NOT_GIVEN).fill_null(value=False), None)
    return values.fill_nan(None) if values.dtype.is_float() else values


def _numbers(values: pl.Series, column: str) -> pl.Series:
    given = _given(values)
    found = (
        given.cast(pl.Float64, strict=False)
        if given.dtype == pl.String or given.dtype.is_numeric()
        else pl.Series(values.name, [None] * len(values), pl.Float64)
    )
    wrong = given.filter(given.is_not_null() & (found.is_null() | ~found.is_finite().fill_null(value=False)))
    if len(wrong):
        raise InputError(
            f"labels.columns: {column}: expected finite numbers for task 'regression', or nothing, found "
            f"{_shown(wrong[0])} ({len(wrong):,} such)"
        )
    return found


def _present(values: pl.Series, column: str) -> pl.Series:
    given = _given(values)
    text = given.cast(pl.String).str.to_lowercase()
    wrong = given.filter(given.is_not_null() & ~text.is_in((*_TRUE, *_FALSE)).fill_null(value=False))
    if len(wrong):
        raise InputError(
            f"labels.columns: {column}: expected 1, 0 or nothing (or true, false; yes, no) for task 'multilabel', "
            f"found {_shown(wrong[0])} ({len(wrong):,} such); of values that exclude each other labels.task is "
            "multiclass, of numbers regression"
        )
    return text.is_in(_TRUE).cast(pl.Int8)


def _classes(values: pl.Series, name: str, column: str) -> tuple[dict[str, str], pl.Series]:
    """Class -> value in text, in the values' order, and each record's value."""
    given = _given(values)
    if given.dtype.is_float() and (given.drop_nulls() % 1 == 0).all():
        given = given.cast(pl.Int64)
    text = given.cast(pl.String)
    distinct = text.drop_nulls().unique().sort().to_list()
    if not 2 <= len(distinct) <= MAX_CLASSES:
        raise InputError(
            f"labels.columns: {column}: expected 2 to {MAX_CLASSES} different values, each a class, for task "
            f"'multiclass', found {len(distinct):,}" + (f" ({_some(distinct)})" if distinct else "")
        )
    number = pl.Series(distinct).cast(pl.Float64, strict=False)
    if not number.is_null().any():
        distinct.sort(key=float)
    is_word = number.is_null() & ~pl.Series(distinct).str.to_lowercase().is_in((*_TRUE, *_FALSE))
    return {value if is_word.all() else f"{name} {value}": value for value in distinct}, text


def check_table(path: Path, columns: Sequence[str]) -> None:
    """Whether a table has an id and these columns, by its first line: before the recordings are prepared.

    Raises:
        InputError: it has not, or cannot be read.
    """
    _joined_by(path, _read(path, n_rows=1).columns, columns)


# ---- the parts


def _joined_by(path: Path, offered: Sequence[str], columns: Sequence[str]) -> str:
    by = next((name for name in IDS if name in offered), None)
    if by is None:
        raise InputError(
            f"{path}: expected a column record_id or patient_id to join by, found {', '.join(offered[:8])}"
        )
    for column in columns:
        _require(column, [name for name in offered if name not in IDS], f"{path}: no column")
    return by


def _read(path: Path, n_rows: int | None = None) -> pl.DataFrame:
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pl.read_parquet(path, n_rows=n_rows)
        else:
            table = pl.read_csv(path, infer_schema=False, separator=separator(path), n_rows=n_rows)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: expected a CSV table (.csv, .tsv) or Parquet (.parquet): {why(error)}") from error
    return table.rename({name: name.strip().removeprefix("\ufeff") for name in table.columns})


def _require(column: str, offered: Sequence[str], what: str) -> None:
    if column not in offered:
        near = difflib.get_close_matches(column, offered, n=1)
        hint = f"did you mean {near[0]!r}" if near else f"it has {', '.join(offered) or 'none'}"
        raise InputError(f"{what} {column!r}; {hint}")


def _some(values: Sequence[str] | pl.Series) -> str:
    return ", ".join(map(str, values[:3])) + (", ..." if len(values) > 3 else "")


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else str(value)


def counts_of(labels: pl.DataFrame, space: LabelSpace) -> Mapping[str, int]:
    """Of each label, how many records have it, or of a number how many have one."""
    if space.task == "regression":
        return {f"known: {name}": labels.height - labels[name].null_count() for name in space.names}
    return {f"positive: {name}": int(labels[name].sum()) for name in space.names}
