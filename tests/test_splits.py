"""Who trains, who validates, who tests."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import datetime, timedelta
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
from ecgfm.splits import SPLITS, make_splits
from ecgfm.splits import assign as assign_with


def record(number: int, patient: int | None = None, source: str = "toy", **values: Any) -> dict[str, Any]:
    return record_row(f"{source}/{number}", patient_id=None if patient is None else f"{source}/p{patient}", **values)


@cache
def cohort(n_records: int, per_patient: int = 1, **values: Any) -> pl.DataFrame:
    return table_of("records", [record(number, number // per_patient, **values) for number in range(n_records)])


def assign(records: pl.DataFrame, config: SplitsConfig, *groups: Sequence[int]) -> pl.DataFrame:
    return assign_with(records, copies(records, *groups), config)


def copies(records: pl.DataFrame, *groups: Sequence[int]) -> pl.DataFrame:
    """The table `duplicates` of records whose names are these numbers; persons by brute force."""
    own = {int(one.rpartition("/")[2]): one for one in records["record_id"]}
    patient = dict(records.select("record_id", "patient_id").iter_rows())
    named = [sorted(own[number] for number in group) for group in groups]
    known = [{patient[one] for one in group} - {None} for group in named]
    for _ in named:  # as often as patients can be tied through one more group
        known = [set().union(*(other for other in known if other & one), one) for one in known]
    rows = [
        {
            "record_id": one,
            "source": one.partition("/")[0],
            "patient_id": patient[one],
            "group_id": group[0],
            "n_records": len(group),
            "similarity": 1.0,
            "person_id": min(persons, default=None),
        }
        for group, persons in zip(named, known, strict=True)
        for one in group
    ]
    return table_of("duplicates", rows)


def split_of(splits: pl.DataFrame, column: str = "record_id") -> dict[str, str]:
    return dict(splits.select(column, "split").iter_rows())


def shares(splits: pl.DataFrame) -> dict[str, float]:
    return {split: (splits["split"] == split).mean() for split in SPLITS}


def make(
    tmp_path: Path, slices: Sequence[pl.DataFrame], config: SplitsConfig, *groups: Sequence[int], n_rejects: int = 0
) -> tuple[dict[str, int], pl.DataFrame]:
    """The stage itself, on prepared slices, each of which turned `n_rejects` records away."""
    directories = []
    for number, table in enumerate(slices):
        directories.append(tmp_path / f"slice_{number}")
        directories[-1].mkdir()
        write_table(table, "records", directories[-1] / "records.parquet")
        rejects = [
            {
                **dict.fromkeys(("slice_id", "raw_path", "detail"), "a"),
                "record_id": f"toy/reject-{number}-{one}",
                "source": "toy",
                "reason": "truncated",
            }
            for one in range(n_rejects)
        ]
        write_table(table_of("rejects", rejects), "rejects", directories[-1] / "rejects.parquet")
    for name in ("audit", "out"):
        (tmp_path / name).mkdir()
    write_table(copies(pl.concat(slices), *groups), "duplicates", tmp_path / "audit" / "duplicates.parquet")
    counts = make_splits({"slices": directories, "audit": tmp_path / "audit"}, config, tmp_path / "out")
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
            "use splits.strategy random or official, or splits.unknown_patients alone",
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


def test_the_stage_draws_the_cohort_it_split(tmp_path: Path) -> None:
    """Every listed record is in one of its boxes."""
    tables = [cohort(300), table_of("records", [record(n, n, "other", n_segments=n % 2) for n in range(300, 350)])]
    config = SplitsConfig(duplicates="drop_copies")
    counts, splits = make(tmp_path, tables, config, (3, 301, 303), (7, 8), n_rejects=4)
    drawn = json.loads((tmp_path / "out" / "cohort.json").read_text())
    total = drawn["total"]
    assert total["listed"] == 358
    assert total["rejected"] == {"truncated": 8}
    assert total["prepared"] == {
        "records": 350,
        "patients": splits["patient_id"].n_unique(),
        "unknown_patients": 0,
    }
    assert splits["patient_id"].n_unique() == 347, "three of them are the same as others"
    assert total["with_copies"] == 5
    assert total["excluded"] == {"too_short": 25, "duplicate": 3}
    assert {split: people["records"] for split, people in total["splits"].items()} == {s: counts[s] for s in SPLITS}
    assert drawn["sources"]["toy"]["listed"] + drawn["sources"]["other"]["listed"] == 358
    assert "Excluded: 28 records" in (tmp_path / "out" / "cohort.svg").read_text()


def test_a_split_without_a_record_is_one_clear_line(tmp_path: Path) -> None:
    rows = [record(n, n, fold=1, **CONSTANT) for n in range(3)] + [record(n, n, fold=9) for n in range(3, 5)]
    with pytest.raises(InputError) as refused:
        make(tmp_path, [table_of("records", rows)], SplitsConfig(strategy="official"))
    assert str(refused.value) == (
        "splits: no record in train and test; 5 prepared, 3 excluded (constant_lead: 3); "
        "give more records, another splits.seed or larger shares"
    )


# ---- records that are the same ECG


@pytest.mark.parametrize("strategy", ["grouped", "random", "official", "temporal", "grouped_temporal"])
def test_copies_are_never_apart_nor_are_the_patients_whom_they_tie(strategy: Any) -> None:
    """3,000 records, of which 300 have a copy anywhere; where patients count, chains of them are one person."""
    rng = random.Random(0)
    rows = [
        record(n, n // 3, fold=n // 3 % 10 + 1, recorded_at=datetime(2000, 1, 1) + timedelta(hours=rng.randrange(9999)))
        for n in range(3000)
    ]
    records, numbers = table_of("records", rows), rng.sample(range(3000), 600)
    groups = list(zip(numbers[:300], numbers[300:], strict=True))
    config = SplitsConfig(strategy=strategy)
    splits = assign(records, config, *groups)
    of_record = split_of(splits)
    assert all(of_record[f"toy/{a}"] == of_record[f"toy/{b}"] for a, b in groups)
    alone = split_of(assign(records, config))
    parted = [1 for a, b in groups if alone[f"toy/{a}"] != alone[f"toy/{b}"]]
    assert len(parted) > 50, "without knowing of the copies they were apart"
    if "grouped" in strategy:
        person = dict(splits.select("record_id", "patient_id").iter_rows())
        assert all(person[f"toy/{a}"] == person[f"toy/{b}"] for a, b in groups)
        assert splits.group_by("patient_id").agg(pl.col("split").n_unique())["split"].max() == 1
        tied = {f"toy/{n}" for group in groups for one in group for n in range(one // 3 * 3, one // 3 * 3 + 3)}
    else:
        tied = {f"toy/{one}" for group in groups for one in group}
    if strategy in ("grouped", "random"):
        assert {k: v for k, v in of_record.items() if k not in tied} == {
            k: v for k, v in alone.items() if k not in tied
        }
    order = assign(records.sample(fraction=1, shuffle=True, seed=3), config, *rng.sample(groups, 300))
    assert_frame_equal(order, splits)


def test_a_copy_of_a_known_patients_ecg_has_that_patient() -> None:
    rows = [record(n, n // 2) for n in range(40)] + [record(n, None, "unnamed") for n in range(40, 60)]
    records = table_of("records", rows)
    with pytest.raises(
        InputError, match=r"source unnamed gives no patient ids \(18 of 60 records have no patient_id\)"
    ):
        assign(records, SplitsConfig(), (3, 41), (8, 55))
    splits = assign(records, SplitsConfig(unknown_patients="alone"), (3, 41), (8, 55), (50, 51))
    person = dict(splits.select("record_id", "patient_id").iter_rows())
    assert (person["unnamed/41"], person["unnamed/55"]) == ("toy/p1", "toy/p4")
    assert sum(one is None for one in person.values()) == 18
    assert split_of(splits)["unnamed/50"] == split_of(splits)["unnamed/51"]
    assert {k: v for k, v in split_of(splits).items() if k.startswith("toy")} == split_of(
        assign(records.filter(source="toy"), SplitsConfig())
    ), "no patient moved for them"


def test_official_folds_that_part_copies_give_way_to_the_later_split() -> None:
    """PTB-XL's 145 and 463 are one ECG of two patients in two folds."""
    folds = {0: 1, 1: 1, 2: 10, 3: 10, 4: 9, 5: 9, 6: 1, 7: 2, 8: 1, 9: 1}
    records = table_of("records", [record(n, n // 2, fold=fold) for n, fold in folds.items()])
    official = SplitsConfig(strategy="official")
    before = {"toy/0": "train", "toy/1": "train", "toy/2": "test", "toy/3": "test", "toy/4": "valid", "toy/5": "valid"}
    before |= {"toy/6": "train", "toy/7": "train", "toy/8": "train", "toy/9": "train"}
    assert split_of(assign(records, official)) == before
    moved = split_of(assign(records, official, (1, 2)))
    assert moved == before | {"toy/0": "test", "toy/1": "test"}, "the patient's other record went along"
    assert split_of(assign(records, official, (0, 4))) == before | {"toy/0": "valid", "toy/1": "valid"}
    assert split_of(assign(records, official, (0, 8))) == before, "in one split they were already"
    in_chain = split_of(assign(records, official, (1, 2), (3, 5)))
    assert in_chain == before | dict.fromkeys(["toy/0", "toy/1", "toy/4", "toy/5"], "test")


@pytest.mark.parametrize("strategy", ["grouped", "random", "official"])
def test_of_copies_the_first_that_can_be_used_stays(strategy: Any) -> None:
    rows = [record(n, n, fold=n % 10 + 1, **(CONSTANT if n == 10 else {})) for n in range(10, 60)]
    groups = [(10, 11, 12), (20, 30), (41, 42)]
    kept = assign(table_of("records", rows), SplitsConfig(strategy=strategy), *groups)
    less = assign(table_of("records", rows), SplitsConfig(strategy=strategy, duplicates="drop_copies"), *groups)
    dropped = dict(less.filter(pl.col("excluded").is_not_null()).select("record_id", "excluded").iter_rows())
    copies_of_them = dict.fromkeys(["toy/12", "toy/30", "toy/42"], "duplicate")
    assert dropped == {"toy/10": "constant_lead"} | copies_of_them
    assert {k: v for k, v in split_of(less).items() if v} == {
        k: v for k, v in split_of(kept).items() if v and k not in copies_of_them
    }


# ---- by time


def dated(days: Sequence[int | None], per_patient: int = 1) -> pl.DataFrame:
    start = datetime(2001, 1, 1)
    return table_of(
        "records",
        [
            record(n, n // per_patient, recorded_at=None if day is None else start + timedelta(days=day))
            for n, day in enumerate(days)
        ],
    )


def test_the_earliest_train_and_the_latest_test() -> None:
    days = list(range(100))
    random.Random(1).shuffle(days)
    splits = assign(dated(days), SplitsConfig(strategy="temporal", valid_share=0.2, test_share=0.1))
    expected = {f"toy/{n}": "train" if day < 70 else "valid" if day < 90 else "test" for n, day in enumerate(days)}
    assert split_of(splits) == expected


@pytest.mark.parametrize(("valid_share", "test_share"), [(0.0, 0.2), (0.2, 0.0)])
def test_a_share_of_nothing_is_nothing_by_time_too(valid_share: float, test_share: float) -> None:
    config = SplitsConfig(strategy="temporal", valid_share=valid_share, test_share=test_share)
    assert shares(assign(dated(range(100)), config)) == {"train": 0.8, "valid": valid_share, "test": test_share}


def test_records_of_one_time_are_in_one_split() -> None:
    splits = assign(dated([0] * 75 + [1] * 20 + [2] * 5), SplitsConfig(strategy="temporal"))
    assert shares(splits) == {"train": 0.95, "valid": 0.0, "test": 0.05}


def test_by_patient_and_time_nobody_trains_who_was_recorded_after_the_first_test() -> None:
    rng = random.Random(2)
    records = dated([rng.randrange(3000) for _ in range(2000)], per_patient=4)
    splits = assign(records, SplitsConfig(strategy="grouped_temporal")).join(
        records.select("record_id", "recorded_at"), on="record_id"
    )
    assert splits.group_by("patient_id").agg(pl.col("split").n_unique())["split"].max() == 1
    last = dict(splits.group_by("patient_id").agg(pl.col("recorded_at").max()).iter_rows())
    latest = {split: [last[one] for one in splits.filter(split=split)["patient_id"]] for split in SPLITS}
    assert max(latest["train"]) < min(latest["valid"])
    assert max(latest["valid"]) < min(latest["test"])
    assert shares(splits)["train"] == pytest.approx(0.8, abs=0.01)


def test_records_without_a_date_are_one_clear_line() -> None:
    with pytest.raises(InputError) as refused:
        assign(dated([1, 2, None]), SplitsConfig(strategy="temporal"))
    assert str(refused.value) == (
        "splits: source toy gives no dates (1 of 3 records have no recorded_at); use splits.strategy grouped or random"
    )
