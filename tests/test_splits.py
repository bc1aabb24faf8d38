"""Who trains, who validates, who tests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from conftest import record_row
from polars.testing import assert_frame_equal

from ecgfm.config import SplitsConfig
from ecgfm.contracts import check, read_table, table_of, write_table
from ecgfm.ecg import InputError
from ecgfm.splits import SPLITS, assign, make_splits


def record(number: int, patient: int | None = None, source: str = "toy", **values: Any) -> dict[str, Any]:
    return record_row(f"{source}/{number}", patient_id=None if patient is None else f"{source}/p{patient}", **values)


@cache
def cohort(n_records: int, per_patient: int = 1, **values: Any) -> pl.DataFrame:
    return table_of("records", [record(number, number // per_patient, **values) for number in range(n_records)])


def split_of(splits: pl.DataFrame, column: str = "record_id") -> dict[str, str]:
    return dict(splits.select(column, "split").iter_rows())


def shares(splits: pl.DataFrame) -> dict[str, float]:
    return {split: (splits["split"] == split).mean() for split in SPLITS}


def make(tmp_path: Path, tables: Sequence[pl.DataFrame], config: SplitsConfig) -> tuple[dict[str, int], pl.DataFrame]:
    """The stage itself, on prepared slices."""
    directories = []
    for number, table in enumerate(tables):
        directories.append(tmp_path / f"slice_{number}")
        directories[-1].mkdir()
        write_table(table, "records", directories[-1] / "records.parquet")
    (tmp_path / "out").mkdir()
    counts = make_splits({"slices": directories}, config, tmp_path / "out")
    return counts, read_table(tmp_path / "out" / "splits.parquet", "splits")


@pytest.mark.parametrize("strategy", ["grouped", "random", "official"])
def test_every_record_is_in_one_split_or_excluded(strategy: Any) -> None:
    rows = [record(n, n // 3, fold=n % 10 + 1, n_segments=n % 4) for n in range(400)]
    splits = assign(table_of("records", rows), SplitsConfig(strategy=strategy))
    check(splits, "splits")
    assert splits["record_id"].to_list() == sorted(row["record_id"] for row in rows)
    assert splits.filter(pl.col("split").is_not_null() == pl.col("excluded").is_not_null()).is_empty()
    assert set(splits["split"].drop_nulls()) == set(SPLITS)


def test_no_patient_is_in_two_splits() -> None:
    splits = assign(cohort(3000, per_patient=5), SplitsConfig())
    per_patient = splits.group_by("patient_id").agg(pl.col("split").n_unique())
    assert per_patient.height == 600
    assert per_patient["split"].max() == 1


def test_at_random_a_patients_records_may_part() -> None:
    splits = assign(cohort(3000, per_patient=5), SplitsConfig(strategy="random"))
    assert splits.group_by("patient_id").agg(pl.col("split").n_unique())["split"].max() == 3


@pytest.mark.parametrize("strategy", ["grouped", "random"])
def test_adding_data_never_moves_anyone(strategy: Any) -> None:
    """Not in order of arrival either."""
    config = SplitsConfig(strategy=strategy)
    few, many = cohort(500, per_patient=2), cohort(5000, per_patient=2)
    before = split_of(assign(few, config))
    after = split_of(assign(many.sample(fraction=1, shuffle=True, seed=1), config))
    assert before.items() <= after.items()
    assert set(before.values()) == set(SPLITS)


def test_an_excluded_record_does_not_move_its_patient() -> None:
    whole = cohort(1000, per_patient=2)
    holed = table_of("records", [record(n, n // 2, n_segments=n % 2 * 2) for n in range(1000)])
    kept = {k: v for k, v in split_of(assign(holed, SplitsConfig())).items() if v}
    assert len(kept) == 500
    assert kept.items() <= split_of(assign(whole, SplitsConfig())).items()


@pytest.mark.parametrize(("valid_share", "test_share"), [(0.1, 0.1), (0.05, 0.3), (0.2, 0.0)])
def test_shares_are_near_those_asked_for(valid_share: float, test_share: float) -> None:
    """Within four standard errors of 20,000 draws."""
    asked = {"train": 1 - valid_share - test_share, "valid": valid_share, "test": test_share}
    for strategy in ("grouped", "random"):
        config = SplitsConfig(strategy=strategy, valid_share=valid_share, test_share=test_share)
        for split, share in shares(assign(cohort(20_000), config)).items():
            assert abs(share - asked[split]) <= 4 * (asked[split] * (1 - asked[split]) / 20_000) ** 0.5


def test_a_seed_gives_the_same_splits_each_time_and_another_seed_others() -> None:
    records = cohort(2000)
    one = assign(records, SplitsConfig(seed=1))
    assert_frame_equal(one, assign(records.reverse(), SplitsConfig(seed=1)))
    other = assign(records, SplitsConfig(seed=2))
    agree = (one["split"] == other["split"]).mean()
    by_chance = 0.8**2 + 2 * 0.1**2
    assert abs(agree - by_chance) < 4 * (by_chance * (1 - by_chance) / 2000) ** 0.5
    assert split_of(assign(records, SplitsConfig(seed=-1))) != split_of(one)


def test_these_patients_are_where_they_always_were() -> None:
    """Splits are permanent: a published test patient may never train, whatever the version of the program."""
    splits = assign(cohort(30), SplitsConfig())
    held_out = {split: sorted(splits.filter(split=split)["patient_id"]) for split in ("valid", "test")}
    assert held_out == {"valid": ["toy/p0", "toy/p21"], "test": ["toy/p16", "toy/p2", "toy/p25", "toy/p5"]}


def test_official_folds_are_kept() -> None:
    rows = [record(n, None, fold=n % 10 + 1) for n in range(100)]
    splits = split_of(assign(table_of("records", rows), SplitsConfig(strategy="official")))
    expected = {9: "valid", 10: "test"}
    assert splits == {row["record_id"]: expected.get(row["fold"], "train") for row in rows}
    other = SplitsConfig(strategy="official", valid_folds=(1, 2), test_folds=(3,))
    expected = {1: "valid", 2: "valid", 3: "test"}
    assert split_of(assign(table_of("records", rows), other)) == {
        row["record_id"]: expected.get(row["fold"], "train") for row in rows
    }


INVALID: dict[str, Any] = {"invalid_leads": ["V1"]}
CONSTANT: dict[str, Any] = {"constant_leads": ["V2"]}


@pytest.mark.parametrize(
    ("faults", "config", "excluded"),
    [
        ({}, SplitsConfig(), None),
        ({"n_segments": 0}, SplitsConfig(), "too_short"),
        (INVALID, SplitsConfig(), "invalid_sample"),
        (CONSTANT, SplitsConfig(), "constant_lead"),
        (INVALID | CONSTANT, SplitsConfig(), "invalid_sample"),
        (INVALID | CONSTANT | {"n_segments": 0}, SplitsConfig(), "too_short"),
        (INVALID, SplitsConfig(exclude_invalid=False), None),
        (INVALID | CONSTANT, SplitsConfig(exclude_invalid=False), "constant_lead"),
        (CONSTANT, SplitsConfig(exclude_constant=False), None),
        ({"n_segments": 0}, SplitsConfig(exclude_invalid=False, exclude_constant=False), "too_short"),
    ],
)
def test_records_are_excluded_for_a_reason(faults: dict[str, Any], config: SplitsConfig, excluded: str | None) -> None:
    splits = assign(table_of("records", [record(1, 1, **faults)]), config)
    assert splits["excluded"].to_list() == [excluded]
    assert (splits["split"].null_count() == 1) == (excluded is not None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            SplitsConfig(),
            "splits: source anonymous gives no patient ids (2 of 5 records have no patient_id); "
            "use splits.strategy random or official",
        ),
        (
            SplitsConfig(strategy="official"),
            "splits: source anonymous has no official folds (2 of 5 records have no fold); "
            "use splits.strategy grouped or random",
        ),
    ],
)
def test_a_source_that_lacks_what_the_strategy_needs_is_named(config: SplitsConfig, message: str) -> None:
    rows = [record(n, n, fold=1) for n in range(3)] + [record(n, None, "anonymous") for n in range(2)]
    with pytest.raises(InputError) as refused:
        assign(table_of("records", rows), config)
    assert str(refused.value) == message


def test_the_stage_counts_what_it_wrote(tmp_path: Path) -> None:
    tables = [cohort(300), table_of("records", [record(n, n, "other", n_segments=n % 2) for n in range(50)])]
    counts, splits = make(tmp_path, tables, SplitsConfig())
    assert splits.height == 350
    assert counts == {split: (splits["split"] == split).sum() for split in SPLITS} | {"excluded: too_short": 25}
    assert_frame_equal(splits, assign(pl.concat(tables), SplitsConfig()))


def test_a_split_without_a_record_is_one_clear_line(tmp_path: Path) -> None:
    rows = [record(n, n, fold=1, **CONSTANT) for n in range(3)] + [record(n, n, fold=9) for n in range(3, 5)]
    with pytest.raises(InputError) as refused:
        make(tmp_path, [table_of("records", rows)], SplitsConfig(strategy="official"))
    assert str(refused.value) == (
        "splits: no record in train and test; 5 prepared, 3 excluded (constant_lead: 3); "
        "give more records, another splits.seed or larger shares"
    )
