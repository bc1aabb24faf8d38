"""The same ECG under several names: what is found, what is not, and who is tied by it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from conftest import record_row
from polars.testing import assert_frame_equal
from test_sketches import ecgs

from ecgfm.audit import audit, find_duplicates
from ecgfm.config import AuditConfig, PrepareConfig
from ecgfm.contracts import check, read_table, table_of, write_table
from ecgfm.ecg import EcgRecord, InputError
from ecgfm.prepare import prepare_record
from ecgfm.sketches import sketch
from ecgfm.sources import SOURCES

RATE_HZ = 500.0


def tables(
    rows: Sequence[tuple[str, str | None, np.ndarray | None]], **durations: float
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """`records` and `sketches` of (record_id, patient_id, signal at 500 Hz)."""
    records, sketches = [], []
    for record_id, patient, signal_mv in rows:
        outline = None if signal_mv is None else sketch(signal_mv, RATE_HZ)
        duration_s = 10.0 if signal_mv is None else signal_mv.shape[1] / RATE_HZ
        records.append(record_row(record_id, patient_id=patient, n_samples=int(duration_s * RATE_HZ)))
        sketches.append(
            {"record_id": record_id, "duration_s": duration_s, "sketch": None if outline is None else outline.tolist()}
        )
    return table_of("records", records), table_of("sketches", sketches)


def found(rows: Sequence[tuple[str, str | None, np.ndarray | None]]) -> pl.DataFrame:
    duplicates = find_duplicates(*tables(rows), AuditConfig())
    check(duplicates, "duplicates")
    return duplicates


def groups(duplicates: pl.DataFrame) -> list[list[str]]:
    return [group["record_id"].to_list() for _, group in duplicates.group_by("group_id", maintain_order=True)]


def an(ecg: int) -> np.ndarray:
    return ecgs()[ecg][1][:, :5000]


def test_records_that_are_the_same_ecg_are_a_group_named_after_the_smallest() -> None:
    rng = np.random.default_rng(0)
    duplicates = found(
        [
            ("b/2", None, an(0)),
            ("a/7", "a/p1", 2 * an(0)),
            ("a/1", "a/p1", an(1)),
            ("c/1", None, an(0) + rng.normal(0, 0.01, an(0).shape)),
            ("a/3", "a/p3", an(50)),
            ("c/9", "c/p9", an(50)),
            ("a/0", None, None),
        ]
    )
    assert groups(duplicates) == [["a/3", "c/9"], ["a/7", "b/2", "c/1"]]
    assert dict(duplicates.select("record_id", "group_id").iter_rows()) == {
        **{"a/3": "a/3", "c/9": "a/3"},
        **{"a/7": "a/7", "b/2": "a/7", "c/1": "a/7"},
    }
    assert dict(duplicates.select("record_id", "n_records").iter_rows())["b/2"] == 3
    assert duplicates["similarity"].min() > 0.95


def test_two_ecgs_of_one_patient_are_two() -> None:
    """Every recording of sixty synthetic patients; only what was copied is found."""
    rows = [(f"syn/{number:03d}", f"syn/p{patient}", ecg) for number, (patient, ecg) in enumerate(ecgs())]
    assert found(rows).is_empty()
    copied = [(f"copy/{number:03d}", None, ecg[:, : ecg.shape[1] - 5]) for number, (_, ecg) in enumerate(ecgs()[::3])]
    assert groups(found([*rows, *copied])) == [
        sorted([f"copy/{number:03d}", f"syn/{3 * number:03d}"]) for number in range(len(copied))
    ]


def test_the_order_of_records_and_sketches_does_not_matter() -> None:
    rows = [(f"syn/{number}", None, ecg) for number, (_, ecg) in enumerate(ecgs()[:40])]
    rows += [(f"copy/{number}", f"copy/p{number // 2}", ecg) for number, (_, ecg) in enumerate(ecgs()[:40])]
    records, sketches = tables(rows)
    expected = find_duplicates(records, sketches, AuditConfig())
    assert expected.height == 80
    shuffled = [table.sample(fraction=1, shuffle=True, seed=seed) for seed, table in enumerate((records, sketches))]
    assert_frame_equal(find_duplicates(*shuffled, AuditConfig()), expected)


def test_a_short_recording_is_the_same_only_at_the_same_duration() -> None:
    """What is sketched of 4 s is not what is sketched of 5; of 6 s and of 10 it is the same."""
    ecg = an(0)
    assert groups(found([("a/1", None, ecg[:, :3000]), ("a/2", None, ecg)])) == [["a/1", "a/2"]]
    assert found([("a/1", None, ecg[:, :2400]), ("a/2", None, ecg)]).is_empty()
    assert groups(found([("a/1", None, ecg[:, :2000]), ("a/2", None, ecg[:, :2000])])) == [["a/1", "a/2"]]


def test_leads_of_other_sizes_are_another_ecg() -> None:
    """Equal in I and II, but not in the others: not the same, however it came to be."""
    other = an(0).copy()
    other[6:] *= 1.5
    assert found([("a/1", None, an(0)), ("a/2", None, other)]).is_empty()
    assert not found([("a/1", None, an(0)), ("a/2", None, 1.5 * an(0))]).is_empty()


def brute_persons(rows: Sequence[tuple[str, str | None]]) -> dict[str, str | None]:
    """Group -> person: ids spread until nothing changes."""
    person = {group: min((p for g, p in rows if g == group and p), default=None) for group, _ in rows}
    for _ in rows:
        for patient in {p for _, p in rows if p}:
            tied = {g for g, p in rows if p == patient}
            least = min(str(person[g]) for g in tied)
            person |= dict.fromkeys(tied, least)
    return person


def test_patients_who_share_ecgs_are_one_person_through_any_chain() -> None:
    rng = random.Random(0)
    patients = [None, *(f"p/{n}" for n in range(12))]
    rows = [
        (f"{source}/{number:02d}", rng.choice(patients), ecgs()[3 * number][1])
        for number in range(25)
        for source in ("a", "b")
    ]
    duplicates = found(rows)
    assert duplicates["group_id"].n_unique() == 25
    expected = brute_persons([(str(g), p) for g, p in duplicates.select("group_id", "patient_id").iter_rows()])
    assert dict(duplicates.select("group_id", "person_id").unique().iter_rows()) == expected
    assert len({one for one in expected.values() if one}) < 11, "some are tied"


def test_sketches_of_another_version_are_one_clear_line() -> None:
    records, sketches = tables([("a/1", None, an(0))])
    old = sketches.with_columns(pl.col("sketch").list.head(64))
    with pytest.raises(InputError, match="the sketch of a/1 has 64 numbers instead of 140; prepare again"):
        find_duplicates(records, old, AuditConfig())


# ---- the stage


def write_slices(tmp_path: Path, rows: Sequence[tuple[str, str | None, np.ndarray | None]]) -> dict[str, Any]:
    slices = []
    for source in sorted({record_id.partition("/")[0] for record_id, _, _ in rows}):
        slices.append(tmp_path / source)
        slices[-1].mkdir()
        records, sketches = tables([row for row in rows if row[0].startswith(f"{source}/")])
        write_table(records, "records", slices[-1] / "records.parquet")
        write_table(sketches, "sketches", slices[-1] / "sketches.parquet")
    (tmp_path / "out").mkdir()
    return {"slices": slices}


def test_the_stage_writes_the_groups_and_says_them(tmp_path: Path) -> None:
    rows = [
        ("ptb_xl/1", "ptb_xl/p1", an(0)),
        ("ptb_xl/2", "ptb_xl/p2", an(0)),
        ("ptb_xl/3", "ptb_xl/p2", an(50)),
        ("cinc/HR1", None, an(0)),
        ("cinc/Q1", None, None),
    ]
    counts = audit(write_slices(tmp_path, rows), AuditConfig(), tmp_path / "out")
    assert counts == {
        "records": 5,
        "groups of the same ECG": 1,
        "copies": 2,
        "patients tied": 2,
        "records without a sketch": 1,
    }
    assert read_table(tmp_path / "out" / "duplicates.parquet", "duplicates")["person_id"].to_list() == ["ptb_xl/p1"] * 3
    text = (tmp_path / "out" / "summary.md").read_text()
    for line in (
        "Of 5 records, 3 are in 1 group of the same ECG: 2 more than there are ECGs.",
        "Not compared: 1 record in which neither lead I nor lead II varies over 2 s.",
        "| cinc + ptb_xl | 1 | cinc/HR1 = ptb_xl/1 = ptb_xl/2 |",
        "- patient: 1 group",
        "- sharing an ECG with another patient: 2 patients, as 1 person",
        "- of unknown patients, but a copy of a known patient's ECG: 1 record",
        "- ptb_xl/p1 = ptb_xl/p2",
        "| = ptb_xl/2 | ptb_xl/p2 | 500 Hz | 10.00 s | 12 | 1.0000 |",
    ):
        assert line in text


def test_of_records_without_copies_the_stage_says_so(tmp_path: Path) -> None:
    counts = audit(
        write_slices(tmp_path, [("a/1", None, an(0)), ("a/2", None, an(50))]), AuditConfig(), tmp_path / "out"
    )
    assert (counts["records"], counts["copies"]) == (2, 0)
    assert "No two of 2 records are the same ECG." in (tmp_path / "out" / "summary.md").read_text()
    assert read_table(tmp_path / "out" / "duplicates.parquet", "duplicates").is_empty()


# ---- real recordings


def real(shared: Path, source: str, folder: str) -> list[tuple[str, EcgRecord]]:
    module, raw = SOURCES[source], shared / "data" / folder
    return [
        (f"{folder}:{row['record_id']}", module.read_record(raw, row))
        for row in module.list_records(raw).iter_rows(named=True)
    ]


def prepared(records: Sequence[tuple[str, EcgRecord]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    rows, sketches = [], []
    for record_id, one in records:
        outline = prepare_record(one, PrepareConfig()).sketch
        rows.append(record_row(record_id, source=record_id.partition(":")[0]))
        sketches.append(
            {
                "record_id": record_id,
                "duration_s": one.n_samples / one.sampling_rate_hz,
                "sketch": None if outline is None else outline.tolist(),
            }
        )
    return table_of("records", rows), table_of("sketches", sketches)


def test_of_real_recordings_all_copies_are_found_and_nothing_else(shared: Path) -> None:
    """PTB-XL holds three ECGs twice, one of them under two patients in two folds; the Challenge has four of it."""
    records = real(shared, "ptb_xl", "ptb-xl") + real(shared, "physionet2021", "challenge-2021")
    duplicates = find_duplicates(*prepared(records), AuditConfig())
    names = [[one.rpartition("/")[2] for one in group] for group in groups(duplicates)]
    assert names == [
        *(["HR00001", "00001"], ["HR00002", "00002"], ["HR00005", "00005"], ["HR00007", "00007"]),
        *(["00145", "00463"], ["00456", "00457"], ["00459", "00460"]),
    ]


def test_real_recordings_at_100_hz_and_of_fewer_leads_are_found(shared: Path) -> None:
    from ecgfm.formats import wfdb

    data = shared / "data"
    high = real(shared, "ptb_xl", "ptb-xl")
    low = [
        (f"low:{path.stem[:5]}", wfdb.read_wfdb(data, path.relative_to(data).as_posix(), path.stem))
        for path in sorted(data.glob("ptb-xl/records100/*/*.hea"))
    ]
    fewer = [
        (f"{path.parent.name}:{path.stem}", wfdb.read_wfdb(data, path.relative_to(data).as_posix(), path.stem))
        for path in sorted(data.glob("challenge-reduced-leads/*/*.hea"))
    ]
    assert len(low) >= 28
    assert {len(one.leads) for _, one in fewer} == {2, 3, 4, 6}
    challenge = real(shared, "physionet2021", "challenge-2021")
    duplicates = find_duplicates(*prepared([*high, *low, *fewer, *challenge]), AuditConfig())
    group = dict(duplicates.select("record_id", "group_id").iter_rows())
    for name, _ in low:
        assert group[name] == group[f"ptb-xl:ptb_xl/{name[4:]}"]
    for name, _ in fewer:
        assert group[name] == group[f"challenge-2021:physionet2021/{name.partition(':')[2]}"]
    assert duplicates["similarity"].min() > 0.99
