"""The CSV table of a folder of one's own recordings: joined to what lies in the folder, by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import polars as pl

from ecgfm.ecg import InputError
from ecgfm.sources.listing import LISTING, MAX_AGE_YEARS, SEX, listing, read_csv
from ecgfm.sources.own_config import MetadataConfig

_NOT_GIVEN = ("", "unknown", "nan", "na", "none", "null", "u", "?")
_TRUTH = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "1.0": True, "0.0": False}
_WFDB_SUFFIXES = (".hea", ".dat", ".mat")
_ROW = "row of the listing"


def with_metadata(table: pl.DataFrame, raw_dir: Path, config: MetadataConfig, files: bool) -> pl.DataFrame:
    """The listing with what the table says; what it does not say stays as the files say it.

    files: the recordings are files, which the table may name with or without suffix

    Raises:
        InputError: the table has not the columns of the config, a value that is none, or a recording twice.
    """
    path = raw_dir / config.file
    keys = ("patient", "age", "sex", "codes", "report", "fold", "site", "device", "recorded_at", "dataset")
    named = [config.record, *filter(None, (getattr(config, key) for key in keys)), *config.code_columns]
    lines = read_csv(raw_dir, config.file, named)
    if lines[config.record].null_count():
        line = lines[config.record].is_null().arg_true()[0] + 2
        raise InputError(f"{path}: {config.record}: expected the name of a recording, found none in line {line}")
    row_of = _rows_by_name(table, config, files)
    rows = [_row_of(name, row_of, path, config) for name in lines[config.record]]
    said = pl.DataFrame([pl.Series(_ROW, rows, pl.Int64), *_columns(lines, config, path)])
    twice = lines.filter(said[_ROW].is_not_null() & said[_ROW].is_duplicated() | pl.col(config.record).is_duplicated())
    if twice.height:
        raise InputError(f"{path}: expected every recording once, found {twice[config.record][0]} more than once")
    found = said.filter(pl.col(_ROW).is_not_null())
    both = table.with_row_index(_ROW).cast({_ROW: pl.Int64}).join(found, on=_ROW, how="left", suffix=" said")
    filled = [column for column in LISTING if column in said.columns]
    merged = both.with_columns(pl.coalesce(f"{column} said", column).alias(column) for column in filled)
    if config.unlisted == "reject":
        why = json.dumps({"rejected": ["missing_header", f"{config.file} has no line for it"]})
        unlisted = ~pl.col(_ROW).is_in(found[_ROW].to_list())
        merged = merged.with_columns(pl.when(unlisted).then(pl.lit(why)).otherwise("reading").alias("reading"))
    return listing(pl.concat([listing(merged.select(LISTING.names())), _absent(lines, said, config)]))


def _rows_by_name(table: pl.DataFrame, config: MetadataConfig, files: bool) -> dict[str, list[int]]:
    """Every name by which the table may call a recording -> the rows of the listing."""
    row_of: dict[str, list[int]] = {}
    for row, (record_id, raw_path) in enumerate(table.select("record_id", "raw_path").iter_rows()):
        names = {record_id.partition("/")[2]}
        if files:
            stem, suffix = os.path.splitext(raw_path)
            names |= {stem, *(stem + other for other in (_WFDB_SUFFIXES if suffix == ".hea" else (suffix,)))}
        for name in {name.rpartition("/")[2] for name in names} if config.match == "name" else names:
            row_of.setdefault(name, []).append(row)
    return row_of


def _row_of(name: str, row_of: dict[str, list[int]], path: Path, config: MetadataConfig) -> int | None:
    wanted = name.replace("\\", "/").removeprefix("./")
    rows = row_of.get(wanted.rpartition("/")[2] if config.match == "name" else wanted, [])
    if len(rows) > 1:
        raise InputError(f"{path}: {name} is the name of {len(rows)} recordings; set metadata.match: path")
    return rows[0] if rows else None


def _columns(lines: pl.DataFrame, config: MetadataConfig, path: Path) -> list[pl.Series]:
    """The columns of the listing that the table fills, a value per line."""
    columns: dict[str, pl.Expr] = {}
    if config.patient:
        columns["patient_id"] = pl.format("own/{}", config.patient)
    if config.age:
        age = pl.col(config.age).cast(pl.Float64)
        columns["age_years"] = pl.when(age.is_between(0, MAX_AGE_YEARS)).then(age)
    if config.sex:
        sexes = SEX | dict.fromkeys(_NOT_GIVEN) | dict.fromkeys((v.lower() for v in config.female), "female")
        sexes |= dict.fromkeys((v.lower() for v in config.male), "male")
        columns["sex"] = pl.col(config.sex).str.to_lowercase().replace_strict(sexes, return_dtype=pl.String)
    if config.codes:
        split = pl.col(config.codes).str.split(config.codes_separator).list.eval(pl.element().str.strip_chars())
        columns["codes"] = split.list.eval(pl.element().filter(pl.element() != "")).list.unique(maintain_order=True)
    if config.code_columns:
        true = {
            name: pl.col(name).str.to_lowercase().replace_strict(_TRUTH, return_dtype=pl.Boolean)
            for name in config.code_columns
        }
        codes = pl.concat_list([pl.when(flag).then(pl.lit(name)) for name, flag in true.items()]).list.drop_nulls()
        columns["codes"] = pl.when(pl.all_horizontal(flag.is_not_null() for flag in true.values())).then(codes)
    if config.report:
        columns["report"] = pl.col(config.report)
    if config.fold:
        columns["fold"] = pl.col(config.fold).cast(pl.Float64).cast(pl.Int64)
    if config.recorded_at:
        columns["recorded_at"] = pl.col(config.recorded_at).str.to_datetime(
            config.recorded_at_format or None, time_unit="us"
        )
    columns |= {name: pl.col(column) for name in ("site", "device", "dataset") if (column := getattr(config, name))}
    said = []
    for name, expression in columns.items():
        try:
            said.append(lines.select(expression.alias(name)).to_series())
        except pl.exceptions.PolarsError as error:
            what = f"a value of {name} that ecgfm.yaml explains"
            raise InputError(f"{path}: expected {what}: {str(error).splitlines()[0]}") from error
    return said


def _absent(lines: pl.DataFrame, said: pl.DataFrame, config: MetadataConfig) -> pl.DataFrame:
    """Rows for the recordings that only the table has; they are turned away."""
    why = json.dumps({"rejected": ["missing_signal", f"{config.file} names it, but no such recording is there"]})
    absent = lines.select(pl.col(config.record).alias("name")).hstack(said).filter(pl.col(_ROW).is_null())
    return listing(
        absent.with_columns(
            pl.format("own/{}", "name").alias("record_id"),
            pl.lit("own").alias("source"),
            pl.lit(".").alias("slice_id"),
            pl.col("name").alias("raw_path"),
            pl.lit(why).alias("reading"),
        ).drop("name", _ROW)
    )
