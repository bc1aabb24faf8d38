"""Table contracts: every broken rule is found at every write and read, and told in one line."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import polars as pl
import pytest
import yaml
from polars.testing import assert_frame_equal

from ecgfm.contracts import (
    CONTRACTS,
    TYPES,
    check,
    contract,
    empty_table,
    read_table,
    read_tables,
    table_of,
    write_table,
)
from ecgfm.ecg import LEADS, REJECT_REASONS, InputError
from ecgfm.sources.listing import LISTING

NAMES = sorted(path.stem for path in CONTRACTS.glob("*.yaml"))


def records(*names: str) -> pl.DataFrame:
    return table_of(
        "records",
        [
            {
                "record_id": f"toy/{name}",
                "source": "toy",
                "slice_id": "a",
                "raw_path": f"a/{name}.hea",
                "age_years": 60,
                "sex": "female",
                "codes": ["1", "2"],
                "recorded_at": datetime(1984, 11, 9, 9, 17),
                "sampling_rate_hz": 500.0,
                "n_samples": 5000,
                "n_segments": 2,
                "leads": list(LEADS),
                "invalid_leads": [],
                "constant_leads": ["V1"],
                "lead_mean_mv": [0.5] * 12,
                "lead_std_mv": [float("nan")] * 12,
            }
            for name in names
        ],
    )


def segments(*rows: tuple[str, int]) -> pl.DataFrame:
    return table_of(
        "segments",
        [
            {"record_id": f"toy/{name}", "segment_index": index, "shard_row": row, "start_s": 5.0 * index}
            for row, (name, index) in enumerate(rows)
        ],
    )


def labels(**columns: list[int | None]) -> pl.DataFrame:
    ids = pl.Series("record_id", [f"toy/{row}" for row in range(len(next(iter(columns.values()))))])
    return pl.DataFrame([ids, *(pl.Series(name, values, pl.Int8) for name, values in columns.items())])


# ---- the contracts themselves


@pytest.mark.parametrize("name", NAMES)
def test_a_contract_says_what_a_person_needs(name: str) -> None:
    said = yaml.safe_load((CONTRACTS / f"{name}.yaml").read_text())
    assert said["table"] == name
    assert said["description"].endswith(".")
    assert said.get("like", "") in {"", *NAMES}
    rules = contract(name)
    assert set(rules) <= {"table", "description", "key", "columns", "other_columns", "references", "exactly_one_of"}
    assert set(rules["key"]) <= set(rules["columns"])
    for column, rule in rules["columns"].items():
        assert set(rule) <= {"type", "unit", "nullable", "min", "max", "allowed", "finite", "description"}, column
        assert rule["type"] in TYPES
        assert rule.get("unit") == unit_in(column)
    for target in rules.get("references", {}).values():
        table, _, column = target.partition(".")
        assert column in contract(table)["columns"]
    assert empty_table(name).columns == list(rules["columns"])
    check(empty_table(name), name)


def unit_in(column: str) -> str | None:
    """Units ride in names."""
    units = {"hz": "Hz", "mv": "mV", "uv": "uV", "s": "s", "years": "years"}
    return units.get(column.rpartition("_")[2])


def test_a_contract_that_is_like_another_says_only_what_differs() -> None:
    mine, other = contract("labels_values"), contract("labels")
    assert (mine["key"], mine["columns"], mine["references"]) == (other["key"], other["columns"], other["references"])
    assert (mine["other_columns"]["type"], other["other_columns"]["type"]) == ("float64", "int8")
    more = contract("record_predictions_classes")["columns"].keys() - contract("record_predictions")["columns"].keys()
    assert more == {"most_probable"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_must_be_finite_is(value: float) -> None:
    table = pl.DataFrame({"record_id": ["a", "b", "c"], "LVEF": [55.0, None, value]})
    with pytest.raises(InputError) as raised:
        check(table, "labels_values")
    assert "column LVEF: expected a finite number, found" in str(raised.value)
    check(table.head(2), "labels_values")


def test_lists_that_stand_in_code_and_in_a_contract_agree() -> None:
    assert contract("rejects")["columns"]["reason"]["allowed"] == list(REJECT_REASONS)
    assert dict(empty_table("listing").schema) == dict(LISTING)
    assert list(contract("records")["columns"])[: len(LISTING)] == [*LISTING]
    for column, rule in contract("listing")["columns"].items():
        described = {"description"}
        found = contract("records")["columns"][column]
        assert {k: v for k, v in found.items() if k not in described} == {
            k: v for k, v in rule.items() if k not in described
        }


def test_every_column_says_what_it_is() -> None:
    assert len(NAMES) > 15
    silent = [
        f"{name}.{column}"
        for name in NAMES
        for column, rule in contract(name)["columns"].items()
        if not rule.get("description")
    ]
    assert silent == []


# ---- writing and reading


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("records", records("1", "2")),
        ("segments", segments(("1", 0), ("1", 1))),
        ("labels", labels(AF=[1, 0, None], normal=[0, 0, 1])),
        ("labels", empty_table("labels", ["AF"])),
        ("rejects", empty_table("rejects")),
    ],
)
def test_a_table_comes_back_as_it_was_written(tmp_path: Path, name: str, table: pl.DataFrame) -> None:
    write_table(table, name, tmp_path / "t.parquet")
    assert_frame_equal(read_table(tmp_path / "t.parquet", name), table)
    write_table(table, name, tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == (tmp_path / "t.parquet").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"t.parquet", "again.parquet"}


Break = Callable[[pl.DataFrame], pl.DataFrame]
FAULTS: dict[str, tuple[str, pl.DataFrame, Break, str]] = {
    "null": (
        "records",
        records("1", "2", "3"),
        lambda t: t.with_columns(source=pl.when(pl.col("record_id") != "toy/2").then("source")),
        "table records: column source: may not be null (1 row, first: toy/2)",
    ),
    "type": (
        "records",
        records("1"),
        lambda t: t.cast({"n_samples": pl.Float64}),
        "table records: column n_samples: expected type int64, found Float64",
    ),
    "too small": (
        "segments",
        segments(("1", 0), ("2", 0), ("2", 1)),
        lambda t: t.with_columns(shard_row=-pl.col("shard_row")),
        "table segments: column shard_row: expected min 0, found -1 (2 rows, first: toy/2/0, toy/2/1)",
    ),
    "too large": (
        "records",
        records("1", "2"),
        lambda t: t.with_columns(age_years=pl.lit(150.0)),
        "table records: column age_years: expected min 0; max 130, found 150.0 (2 rows, first: toy/1, toy/2)",
    ),
    "not a number": (
        "records",
        records("1"),
        lambda t: t.with_columns(age_years=pl.lit(float("nan"))),
        "table records: column age_years: expected min 0; max 130, found nan (1 row, first: toy/1)",
    ),
    "not allowed": (
        "records",
        records("1", "2"),
        lambda t: t.with_columns(sex=pl.when(pl.col("record_id") == "toy/2").then(pl.lit("F"))),
        "table records: column sex: expected allowed ['female', 'male'], found 'F' (1 row, first: toy/2)",
    ),
    "key twice": (
        "segments",
        segments(("1", 0), ("2", 0), ("2", 0), ("3", 0)),
        lambda t: t,
        "table segments: the key record_id, segment_index must be unique (2 rows, first: toy/2/0, toy/2/0)",
    ),
    "column missing and unknown": (
        "segments",
        segments(("1", 0)),
        lambda t: t.rename({"shard_row": "row"}),
        "table segments: expected the columns record_id, segment_index, shard_row, start_s; "
        "missing: shard_row; unknown: row",
    ),
    "other column of another type": (
        "labels",
        labels(AF=[1]),
        lambda t: t.cast({"AF": pl.Int64}),
        "table labels: column AF: expected type int8, found Int64",
    ),
    "other column out of range": (
        "labels",
        labels(AF=[1, 2, None]),
        lambda t: t,
        "table labels: column AF: expected allowed [0, 1], found 2 (1 row, first: toy/1)",
    ),
    "none of two": (
        "splits",
        table_of("splits", [{"record_id": "toy/1"}, {"record_id": "toy/2", "split": "train"}]),
        lambda t: t,
        "table splits: exactly one of split and excluded must be set (1 row, first: toy/1)",
    ),
    "both of two": (
        "splits",
        table_of("splits", [{"record_id": "toy/1", "split": "test", "excluded": "too_short"}]),
        lambda t: t,
        "table splits: exactly one of split and excluded must be set (1 row, first: toy/1)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_rule_is_one_line_at_writing_and_at_reading(tmp_path: Path, fault: str) -> None:
    name, table, harm, message = FAULTS[fault]
    path = tmp_path / "t.parquet"
    broken = harm(table)
    with pytest.raises(InputError) as refused:
        write_table(broken, name, path)
    assert str(refused.value) == message
    assert list(tmp_path.iterdir()) == [], "nothing is written"
    broken.write_parquet(path)
    with pytest.raises(InputError) as refused:
        read_table(path, name)
    assert str(refused.value) == f"{path}: {message}"


def test_only_the_first_keys_are_shown() -> None:
    with pytest.raises(InputError, match=r"\(9 rows, first: toy/0, toy/1, toy/2\)$"):
        check(labels(AF=[2] * 9), "labels")


def test_a_reference_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    table = segments(("1", 0), ("3", 0))
    path = tmp_path / "t.parquet"
    write_table(table, "segments", path, {"records": records("1", "3")})
    with pytest.raises(InputError) as refused:
        write_table(table, "segments", path, {"records": records("1", "2")})
    assert str(refused.value) == ("table segments: column record_id: not in records.record_id (1 row, first: toy/3/0)")


# ---- several tables


def test_a_key_in_two_tables_is_found(tmp_path: Path) -> None:
    for name, rows in (("a", ("1", "2")), ("b", ("3",)), ("c", ("4", "2"))):
        write_table(records(*rows), "records", tmp_path / name)
    assert read_tables([tmp_path / "a", tmp_path / "b"], "records").height == 3
    with pytest.raises(InputError, match=r"record_id must be unique \(2 rows, first: toy/2, toy/2\)"):
        read_tables([tmp_path / name for name in "abc"], "records")


def test_of_several_tables_the_one_with_other_columns_is_named(tmp_path: Path) -> None:
    write_table(records("1"), "records", tmp_path / "a")
    records("2").drop("sex").write_parquet(tmp_path / "b")
    with pytest.raises(InputError, match=r"/b: table records: .*missing: sex; unknown: none"):
        read_tables(iter([tmp_path / "a", tmp_path / "b"]), "records")
    records("2").cast({"n_samples": pl.Float64}).write_parquet(tmp_path / "b")
    with pytest.raises(InputError, match="/b: table records: column n_samples: expected type int64"):
        read_tables(iter([tmp_path / "a", tmp_path / "b"]), "records")


def test_no_table_at_all_is_an_empty_one() -> None:
    assert_frame_equal(read_tables([], "records"), empty_table("records"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such table"),
        (b"", "not a readable Parquet table"),
        (b"record_id\n1\n", "not a readable Parquet table"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "t.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"t.parquet: {message}") as refused:
        read_table(path, "records")
    assert "\n" not in str(refused.value)


# ---- some columns of a table


def write_two(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "a.parquet", tmp_path / "b.parquet"]
    for path, names in zip(paths, (("1", "2"), ("3",)), strict=True):
        write_table(records(*names), "records", path)
    return paths


def test_some_columns_are_read_as_they_stand_in_the_whole(tmp_path: Path) -> None:
    paths = write_two(tmp_path)
    some = read_tables(paths, "records", ("sex", "record_id", "n_segments"))
    assert_frame_equal(some, read_tables(paths, "records").select("sex", "record_id", "n_segments"))
    assert read_tables(paths, "records", ("source",)).shape == (3, 1), "without the key it is not asked to be unique"
    assert read_tables([], "records", ("source", "codes")).columns == ["source", "codes"]


def test_what_is_read_is_checked_and_what_is_not_read_is_not(tmp_path: Path) -> None:
    (path, _) = write_two(tmp_path)
    pl.read_parquet(path).with_columns(sex=pl.lit("f"), age_years=pl.lit(200.0)).write_parquet(path)
    assert read_tables([path], "records", ("record_id", "source")).height == 2
    with pytest.raises(InputError, match=r"column sex: expected allowed .* found 'f'"):
        read_tables([path], "records", ("record_id", "sex"))
    with pytest.raises(InputError, match=r"column age_years: expected .* found 200"):
        read_tables([path], "records", ("age_years", "record_id"))


def test_a_key_twice_is_found_among_some_columns(tmp_path: Path) -> None:
    paths = write_two(tmp_path)
    with pytest.raises(InputError, match=r"the key record_id must be unique \(4 rows, first: toy/1, toy/2, toy/1\)"):
        read_tables([paths[0], paths[0]], "records", ("record_id",))


def test_a_column_that_a_table_lacks_is_named_with_its_file(tmp_path: Path) -> None:
    paths = write_two(tmp_path)
    pl.read_parquet(paths[1]).drop("codes").write_parquet(paths[1])
    with pytest.raises(InputError, match=r"b\.parquet: table records: expected .*missing: codes; unknown: none"):
        read_tables(paths, "records", ("record_id", "codes"))
