"""Tables that cross a stage: written and read as Parquet, checked against data_contracts/ both times.

A contract is one YAML file that a person can read: columns with type, unit, nullability, range or allowed
values, whether a number must be finite; the key; references to other tables. All values are checked in one look at a
table.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import yaml

from ecgfm.ecg import InputError

_PACKAGED = Path(__file__).parent / "data_contracts"
CONTRACTS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parent.parent / "data_contracts"

TYPES: dict[str, pl.DataType] = {
    "string": pl.String(),
    "int8": pl.Int8(),
    "int64": pl.Int64(),
    "float32": pl.Float32(),
    "float64": pl.Float64(),
    "datetime": pl.Datetime("us"),
    "list[string]": pl.List(pl.String()),
    "list[int8]": pl.List(pl.Int8()),
    "list[float32]": pl.List(pl.Float32()),
    "list[float64]": pl.List(pl.Float64()),
}


@cache
def contract(name: str) -> dict[str, Any]:
    """The contract `name` as its YAML file says it; what a file that is `like` another does not say, the other does.

    Its `columns` are added to the other's.

    >>> contract("rejects")["key"], list(contract("rejects")["columns"])
    (['record_id'], ['record_id', 'source', 'slice_id', 'raw_path', 'reason', 'detail'])
    """
    loaded: dict[str, Any] = yaml.safe_load((CONTRACTS / f"{name}.yaml").read_text(encoding="utf-8"))
    if "like" not in loaded:
        return loaded
    other = contract(loaded.pop("like"))
    return {**other, **loaded, "columns": {**other["columns"], **loaded.get("columns", {})}}


def empty_table(name: str, other_columns: Iterable[str] = ()) -> pl.DataFrame:
    """A table of no rows with the columns of a contract."""
    rules = contract(name)
    schema = {column: TYPES[rule["type"]] for column, rule in rules["columns"].items()}
    if others := tuple(other_columns):
        schema |= dict.fromkeys(others, TYPES[rules["other_columns"]["type"]])
    return pl.DataFrame(schema=schema)


def table_of(name: str, rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """A table of a contract's columns and types from rows as mappings; absent values are null."""
    return pl.DataFrame(list(rows), schema=empty_table(name).schema, orient="row")


def write_table(
    table: pl.DataFrame, name: str, path: Path, references: Mapping[str, pl.DataFrame] | None = None
) -> None:
    """Check `table` against the contract `name` and write it to `path` as Parquet.

    references: the tables, by contract name, that this one's references are checked against

    Raises:
        InputError: the table breaks its contract; names the table, the column and the first keys.
    """
    check(table, name, references)
    partial = path.with_name(path.name + ".partial")
    content = io.BytesIO()  # of a full disk polars says that the Parquet is out of specification
    table.write_parquet(content, compression="zstd", statistics=True)
    with open(partial, "wb") as file:
        file.write(content.getbuffer())
    os.replace(partial, path)


def read_table(path: Path, name: str) -> pl.DataFrame:
    """The Parquet table at `path`, checked against the contract `name`.

    Raises:
        InputError: no such file, not Parquet, or the table breaks its contract.
    """
    table = _read(path)
    try:
        check(table, name)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return table


def read_tables(paths: Iterable[Path], name: str, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """The Parquet tables at `paths`, one below the other, checked as one: a key in two of them is found.

    columns: read and check only these; of a million records the lists are most of the bytes

    Raises:
        InputError: as `read_table`.
    """
    paths = list(paths)
    empty = empty_table(name) if columns is None else empty_table(name).select(columns)
    try:
        table = pl.concat([empty, *(_read(path, columns) for path in paths)])
    except pl.exceptions.PolarsError:  # one has other columns: say which
        for path in paths:
            read_table(path, name)
        raise
    check(table, name, columns=columns)
    return table


def _read(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, columns=None if columns is None else list(columns))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such table") from error
    except pl.exceptions.ColumnNotFoundError:
        raise  # of another contract, which the caller explains; not a damaged file
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: not a readable Parquet table: {str(error).splitlines()[0]}") from error


def check(
    table: pl.DataFrame,
    name: str,
    references: Mapping[str, pl.DataFrame] | None = None,
    columns: Sequence[str] | None = None,
) -> None:
    """Check a table against the contract `name`, or only some `columns` of it; see `write_table`."""
    rules = contract(name)
    known = set(rules["columns"])
    expected = rules["columns"] if columns is None else columns
    missing = [column for column in expected if column not in table.columns]
    extra = [column for column in table.columns if column not in known] if "other_columns" not in rules else []
    if missing or extra:
        raise InputError(
            f"table {name}: expected the columns {', '.join(expected)}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(extra) or 'none'}"
        )
    for column, kind in table.schema.items():
        if kind != TYPES[_rule(rules, column)["type"]]:
            found = f"expected type {_rule(rules, column)['type']}, found {kind}"
            raise InputError(f"table {name}: column {column}: {found}")
    faults = _faults(rules, table.columns)
    broken = table.select(fault.rows.any().alias(str(number)) for number, fault in enumerate(faults)).row(0)
    for fault, is_there in zip(faults, broken, strict=True):
        if is_there:
            wrong = table.filter(fault.rows)
            found = f", found {wrong[fault.column][0]!r}" if fault.shows_value else ""
            raise InputError(f"table {name}: {fault.expected}{found} {_keys(wrong, rules)}")
    for column, target in rules.get("references", {}).items():
        other, _, other_column = target.partition(".")
        if references and other in references:
            strays = table.join(references[other], left_on=column, right_on=other_column, how="anti")
            if strays.height:
                raise InputError(f"table {name}: column {column}: not in {target} {_keys(strays, rules)}")


def _rule(rules: Mapping[str, Any], column: str) -> Mapping[str, Any]:
    """What a contract says of one column."""
    found: Mapping[str, Any] = rules["columns"].get(column) or rules["other_columns"]
    return found


class _Fault(NamedTuple):
    """A way in which rows can break a contract. rows: the expression that is true for these"""

    rows: pl.Expr
    expected: str
    column: str = ""
    shows_value: bool = False


def _faults(rules: Mapping[str, Any], columns: Sequence[str]) -> list[_Fault]:
    """Every rule on values that can be asked of these columns: one look at a table asks them all."""
    faults = []
    for column in columns:
        rule, value, name = _rule(rules, column), pl.col(column), f"column {column}: "
        if not rule.get("nullable", False):
            faults.append(_Fault(value.is_null(), f"{name}may not be null"))
        if rule.get("finite", False):
            faults.append(_Fault(~value.is_finite(), f"{name}expected a finite number", column, shows_value=True))
        kept = [value.is_in(rule["allowed"])] if "allowed" in rule else []
        kept += [value >= rule["min"]] if "min" in rule else []
        kept += [value <= rule["max"]] if "max" in rule else []
        if kept:
            limits = "; ".join(f"{word} {rule[word]}" for word in ("allowed", "min", "max") if word in rule)
            faults.append(_Fault(~pl.all_horizontal(kept), f"{name}expected {limits}", column, shows_value=True))
    if set(key := rules["key"]) <= set(columns):
        faults.append(_Fault(pl.struct(key).is_duplicated(), f"the key {', '.join(key)} must be unique"))
    if (both := rules.get("exactly_one_of")) and set(both) <= set(columns):
        how_many = pl.sum_horizontal(pl.col(column).is_not_null() for column in both)
        faults.append(_Fault(how_many != 1, f"exactly one of {' and '.join(both)} must be set"))
    return faults


def _keys(rows: pl.DataFrame, rules: Mapping[str, Any]) -> str:
    """The keys of the first rows, for an error."""
    shown = [
        "/".join(str(value) for value in key) if len(key) > 1 else str(key[0])
        for key in rows.select(rules["key"]).head(3).rows()
    ]
    return f"({rows.height} row{'s' if rows.height != 1 else ''}, first: {', '.join(shown)})"
