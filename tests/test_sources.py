"""One set of rules over every source, then what is particular to each, then real recordings."""

from __future__ import annotations

import csv
import gzip
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
from conftest import write_wfdb16
from polars.testing import assert_frame_equal

from ecgfm import contracts
from ecgfm.ecg import LEADS, REJECT_REASONS, EcgRecord, InputError, Rejected
from ecgfm.fingerprints import RawTree
from ecgfm.formats.wfdb import read_wfdb
from ecgfm.sources import SOURCES, code15, mimic_iv_ecg, physionet2021, ptb_xl
from ecgfm.sources.listing import LISTING, listing, read_csv

N_SAMPLES = 50


def digital_of(name: str) -> np.ndarray:
    """(lead, time) int16: the signal that the builders below give to a record of this name."""
    seed = int.from_bytes(name.encode(), "little") % 2**32
    return np.random.default_rng(seed).integers(-2000, 2000, (12, N_SAMPLES), dtype=np.int16)


def write_wfdb(
    folder: Path,
    name: str,
    suffix: str,
    gain_per_mv: float,
    *,
    comments: Sequence[str] = (),
    leads: Sequence[str] = LEADS,
) -> None:
    """A record in format 16 of the signal that goes with its name."""
    write_wfdb16(folder, name, digital_of(name), suffix=suffix, gain_per_mv=gain_per_mv, leads=leads, comments=comments)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


# ---- a tiny raw folder of every source, as published: two good records, one cut short, one without its signal.
# Each builder returns the reason for which each record is turned away, None where it is good.

Reasons = dict[str, str | None]


def build_physionet2021(raw_dir: Path) -> Reasons:
    comments = ["Age: 74", "Sex: Male", "Dx: 59118001,426783006", "Rx: Unknown"]
    for number, dataset in enumerate(("cpsc_2018", "georgia", "georgia", "ptb-xl")):
        write_wfdb(raw_dir / "training" / dataset / "g1", f"A000{number}", ".mat", 1000, comments=comments)
    cut_short(raw_dir / "training/georgia/g1/A0001.mat")
    (raw_dir / "training/ptb-xl/g1/A0003.mat").unlink()
    return {"A0000": None, "A0001": "truncated", "A0002": None, "A0003": "missing_signal"}


def build_ptb_xl(raw_dir: Path) -> Reasons:
    rows = []
    for ecg_id in (1, 2, 1001, 1002):
        file = f"records500/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_hr"
        write_wfdb((raw_dir / file).parent, f"{ecg_id:05d}_hr", ".dat", 1000)
        rows.append(ptb_xl_line(ecg_id, filename_hr=file))
    write_csv(raw_dir / "ptbxl_database.csv", rows)
    cut_short(raw_dir / "records500/00000/00002_hr.dat")
    (raw_dir / "records500/01000/01002_hr.dat").unlink()
    return {"00001": None, "00002": "truncated", "01001": None, "01002": "missing_signal"}


def ptb_xl_line(ecg_id: int, **values: object) -> dict[str, object]:
    line = {
        "ecg_id": ecg_id,
        "patient_id": f"{15000 + ecg_id % 1000}.0",
        "age": "56.0",
        "sex": ecg_id % 2,
        "height": "",
        "site": "2.0",
        "device": "CS-12   E",
        "recording_date": "1984-11-09 09:17:34",
        "report": "sinusrhythmus, periphere niederspannung",
        "scp_codes": "{'NORM': 100.0, 'SR': 0.0}",
        "strat_fold": 3,
        "filename_lr": f"records100/00000/{ecg_id:05d}_lr",
        "filename_hr": f"records500/00000/{ecg_id:05d}_hr",
    }
    return line | values


def build_mimic_iv_ecg(raw_dir: Path) -> Reasons:
    records, measurements = [], []
    for study, subject in ((40000001, 10000032), (40000002, 10000032), (40000003, 10000117), (40000004, 10020944)):
        folder = f"files/p{subject // 10000}/p{subject}/s{study}"
        leads = (*LEADS[:4], "aVF", "aVL", *LEADS[6:])  # the archive's own order
        write_wfdb(raw_dir / folder, str(study), ".dat", 200, leads=leads)
        line = {"subject_id": subject, "study_id": study, "ecg_time": "2180-07-23 08:44:00"}
        records.append(line | {"file_name": study, "path": f"{folder}/{study}"})
        statements = dict.fromkeys((f"report_{number}" for number in range(18)), "")
        measurements.append(line | statements | {"report_0": "Sinus rhythm", "report_2": "Borderline ECG", "p_axis": 1})
    write_csv(raw_dir / "record_list.csv", records)
    write_csv(raw_dir / "machine_measurements.csv", measurements)
    cut_short(raw_dir / "files/p1000/p10000032/s40000002/40000002.dat")
    (raw_dir / "files/p1002/p10020944/s40000004/40000004.dat").unlink()
    return {"40000001": None, "40000002": "truncated", "40000003": None, "40000004": "missing_signal"}


def build_synthetic(raw_dir: Path) -> Reasons:
    reasons = build_physionet2021(raw_dir / "challenge-2021")
    write_csv(raw_dir / "patients.csv", [{"record": name, "patient": f"p{name}"} for name in reasons])
    return reasons | build_mimic_iv_ecg(raw_dir / "mimic-iv-ecg")


def build_code15(raw_dir: Path) -> Reasons:
    """Two parts there, one absent; the parts in another order than the table, with the dummy row at the end."""
    parts = {"exams_part0.hdf5": (1003, 1001), "exams_part1.hdf5": (1002,), "exams_part2.hdf5": (1004,)}
    write_csv(
        raw_dir / "exams.csv", [code15_line(e, trace_file=part) for part, ids in parts.items() for e in ids[::-1]]
    )
    for part in ("exams_part0.hdf5", "exams_part1.hdf5"):
        write_code15_part(raw_dir / part, parts[part])
    cut_short(raw_dir / "exams_part1.hdf5")
    return {"1001": None, "1002": "unreadable_signal", "1003": None, "1004": "missing_signal"}


def code15_line(exam_id: int, **values: object) -> dict[str, object]:
    codes = dict.fromkeys(("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF", "normal_ecg"), False)
    line = {"exam_id": exam_id, "age": 38 + exam_id % 10, "is_male": exam_id % 2 == 1, "nn_predicted_age": 40.2}
    return line | codes | {"patient_id": 7, "death": "", "timey": "", "trace_file": "exams_part0.hdf5"} | values


def write_code15_part(path: Path, exam_ids: Sequence[int]) -> None:
    """A part as published: each recording in the middle of zeros, and a last row of zeros under the id 0."""
    tracings = np.zeros((len(exam_ids) + 1, 4 * N_SAMPLES, 12), np.float32)
    for row, exam_id in enumerate(exam_ids):
        tracings[row, N_SAMPLES : 2 * N_SAMPLES] = digital_of(str(exam_id)).T / 1000
    with h5py.File(path, "w") as file:
        file["exam_id"] = np.array([*exam_ids, 0])
        file["tracings"] = tracings


def build_own(raw_dir: Path) -> Reasons:
    for name in ("1", "a/2", "a/b/3", "a/b/4"):
        write_wfdb(raw_dir / name.rpartition("/")[0], name.rpartition("/")[2], ".dat", 1000, comments=["Age: 74"])
    cut_short(raw_dir / "a/2.dat")
    (raw_dir / "a/b/4.dat").unlink()
    lines = [{"path": name, "who": f"p{name}"} for name in ("1", "a/2", "a/b/3", "a/b/4.hea", "gone")]
    write_csv(raw_dir / "about.csv", lines)
    (raw_dir / "ecgfm.yaml").write_text(
        "name: toy\nfiles: {patterns: ['**/*.hea']}\nmetadata: {file: about.csv, record: path, patient: who}\n"
    )
    return {"1": None, "a/2": "truncated", "a/b/3": None, "a/b/4": "missing_signal", "gone": "missing_signal"}


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


BUILDERS: dict[str, Callable[[Path], Reasons]] = {
    "synthetic": build_synthetic,
    "physionet2021": build_physionet2021,
    "ptb_xl": build_ptb_xl,
    "mimic_iv_ecg": build_mimic_iv_ecg,
    "code15": build_code15,
    "own": build_own,
}


def build(source: str, raw_dir: Path) -> Reasons:
    raw_dir.mkdir()
    return BUILDERS[source](raw_dir)


def outcomes(source: str, raw_dir: Path) -> tuple[dict[str, EcgRecord], Reasons]:
    """Every listed record read: the records by record_id, and the reasons of those turned away."""
    records, reasons = {}, {}
    for row in SOURCES[source].list_records(raw_dir).iter_rows(named=True):
        try:
            records[row["record_id"]] = SOURCES[source].read_record(raw_dir, row)
        except Rejected as rejected:
            reasons[row["record_id"]] = rejected.reason
    return records, reasons


@pytest.fixture(params=sorted(SOURCES))
def source(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def raw_dir(tmp_path: Path) -> Path:
    return tmp_path / "raw"


# ---- rules over every source


def test_the_table_names_every_source_as_it_names_itself() -> None:
    assert SOURCES
    assert set(SOURCES) == set(BUILDERS), "a source without a builder here is a source without tests"
    assert [source.NAME for source in SOURCES.values()] == list(SOURCES)


def test_the_listing_is_the_one_of_the_contract(source: str, raw_dir: Path) -> None:
    reasons = build(source, raw_dir)
    listed = SOURCES[source].list_records(raw_dir)
    contracts.check(listed, "listing")
    assert listed.schema == LISTING == contracts.empty_table("listing").schema
    assert set(listed["record_id"]) == {f"{source}/{name}" for name in reasons}
    assert listed["record_id"].is_sorted()
    assert set(listed["source"]) == {source}


def test_ids_and_paths_are_those_of_the_archive(source: str, raw_dir: Path) -> None:
    build(source, raw_dir)
    for row in SOURCES[source].list_records(raw_dir).iter_rows(named=True):
        assert row["patient_id"] is None or row["patient_id"].startswith(f"{source}/")
        slice_at = raw_dir / row["slice_id"]
        if row["record_id"] in ("code15/1004", "own/gone"):  # listed by a table alone
            assert not (raw_dir / row["raw_path"]).exists()
        else:
            assert (raw_dir / row["raw_path"]).is_file()
            assert slice_at.is_dir() or row["raw_path"] == row["slice_id"]
        assert slice_at in ((raw_dir / row["raw_path"]), *(raw_dir / row["raw_path"]).parents)


def test_a_slice_has_the_files_that_reading_its_records_opens(source: str, raw_dir: Path) -> None:
    """A stage's key sees the files of its slice and no others; `own` reads its config and table while listing."""
    build(source, raw_dir)
    rows = SOURCES[source].list_records(raw_dir)
    before = outcomes(source, raw_dir)[1]
    slices = RawTree.scan(raw_dir, source).by_slice(list(dict.fromkeys(rows["slice_id"])))
    kept = {path for path in RawTree.scan(raw_dir, source).files for s in slices if s == "." or path.startswith(s)}
    for path in sorted(RawTree.scan(raw_dir, source).files):
        if path not in kept or path in ("ecgfm.yaml", "about.csv"):
            (raw_dir / path).unlink()
    after = {}
    for row in rows.iter_rows(named=True):
        try:
            SOURCES[source].read_record(raw_dir, row)
        except Rejected as rejected:
            after[row["record_id"]] = rejected.reason
    assert after == before


@pytest.mark.parametrize("what", ["garbage", "gone"])
def test_listing_opens_no_signal_file(source: str, raw_dir: Path, what: str) -> None:
    build(source, raw_dir)
    before = SOURCES[source].list_records(raw_dir)
    signal_files = [path for path in raw_dir.rglob("*") if path.suffix in (".dat", ".mat", ".hdf5")]
    assert len(signal_files) >= 2
    for path in signal_files:
        path.write_bytes(b"\xff\x00 not a signal") if what == "garbage" else path.unlink()
    assert_frame_equal(SOURCES[source].list_records(raw_dir), before)


def test_every_listed_record_is_read_or_rejected_with_a_reason(source: str, raw_dir: Path) -> None:
    expected = build(source, raw_dir)
    records, reasons = outcomes(source, raw_dir)
    assert reasons == {f"{source}/{name}": reason for name, reason in expected.items() if reason is not None}
    assert set(records) == {f"{source}/{name}" for name, reason in expected.items() if reason is None}
    assert set(reasons.values()) <= set(REJECT_REASONS)
    for record_id, record in records.items():
        digital = digital_of(record_id.rpartition("/")[2] + ("_hr" if source == "ptb_xl" else ""))
        gain_per_mv = 200 if record_id.rpartition("/")[2].startswith("4") else 1000
        assert record.record_id == record_id
        assert sorted(record.leads) == sorted(LEADS)
        if source == "code15":
            assert record.sampling_rate_hz == 400.0
            np.testing.assert_allclose(record.signal_mv, digital / 1000, rtol=1e-7)
            continue
        assert record.sampling_rate_hz == 500.0
        assert record.digital is not None
        assert np.array_equal(record.digital.digital, digital)
        np.testing.assert_allclose(record.signal_mv, digital / gain_per_mv, rtol=1e-12)


def test_a_record_reads_the_same_twice(source: str, raw_dir: Path) -> None:
    build(source, raw_dir)
    first, second = outcomes(source, raw_dir)[0], outcomes(source, raw_dir)[0]
    assert first
    for record_id, record in first.items():
        assert np.array_equal(record.signal_mv, second[record_id].signal_mv)
        assert record.leads == second[record_id].leads


def test_the_order_of_folders_and_lines_does_not_matter(
    source: str, raw_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(source, raw_dir)
    before = SOURCES[source].list_records(raw_dir)
    for table in raw_dir.rglob("*.csv"):
        head, *lines = table.read_text().splitlines(keepends=True)
        table.write_text(head + "".join(reversed(lines)))

    class Reversed(list[os.DirEntry[str]]):
        def __enter__(self) -> Reversed:
            return self

        def __exit__(self, *error: object) -> None:
            pass

    scandir, listdir = os.scandir, os.listdir
    monkeypatch.setattr(os, "scandir", lambda path: Reversed(sorted(scandir(path), key=lambda e: e.name, reverse=True)))
    monkeypatch.setattr(os, "listdir", lambda path: sorted(listdir(path), reverse=True))
    assert_frame_equal(SOURCES[source].list_records(raw_dir), before)


def test_a_moved_raw_folder_is_listed_the_same(source: str, raw_dir: Path) -> None:
    build(source, raw_dir)
    before = SOURCES[source].list_records(raw_dir)
    moved = raw_dir.rename(raw_dir.with_name("moved"))
    assert_frame_equal(SOURCES[source].list_records(moved), before)


@pytest.mark.parametrize(
    ("source", "wrong"),
    [(source, wrong) for source in sorted(BUILDERS) for wrong in ("absent", "empty", *BUILDERS) if wrong != source],
)
def test_a_wrong_folder_is_one_clear_line(source: str, raw_dir: Path, wrong: str) -> None:
    if wrong == "empty":
        raw_dir.mkdir()
    elif wrong != "absent":
        build(wrong, raw_dir)
    with pytest.raises(InputError) as error:
        SOURCES[source].list_records(raw_dir)
    message = str(error.value)
    assert "\n" not in message
    assert str(raw_dir) in message
    assert "expected" in message
    assert "found" in message


# ---- the listing's helpers


def test_a_listing_fills_absent_columns_with_null_from_rows_and_tables_alike() -> None:
    rows = [
        {"record_id": f"s/{name}", "source": "s", "slice_id": "x", "raw_path": f"x/{name}.hea", "codes": codes}
        for name, codes in (("b", ["1", "2"]), ("a", None))
    ]
    assert_frame_equal(listing(rows), listing(pl.DataFrame(rows)))
    assert listing(rows)["record_id"].to_list() == ["s/a", "s/b"]
    assert listing(rows)["codes"].to_list() == [None, ["1", "2"]]
    assert listing(rows)["age_years"].null_count() == 2
    assert listing([]).schema == LISTING


def test_a_table_of_a_source_is_read_as_text_with_null_for_what_is_empty(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('a,b,c\n007,"two, \nlines",\n" ",x , \n')
    table = read_csv(tmp_path, "t.csv", ("c", "a", "b"))
    assert {row["a"]: (row["b"], row["c"]) for row in table.to_dicts()} == {
        "007": ("two, \nlines", None),
        None: ("x", None),
    }
    with pytest.raises(InputError, match="expected a CSV table with the columns a, d"):
        read_csv(tmp_path, "t.csv", ("a", "d"))
    (tmp_path / "t.csv").write_bytes(b"")
    with pytest.raises(InputError, match="expected a CSV table"):
        read_csv(tmp_path, "t.csv", ("a",))


# ---- physionet2021


def listed_row(tmp_path: Path, header: str) -> dict[str, Any]:
    folder = tmp_path / "training/georgia/g1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "E1.hea").write_text(header)
    (row,) = physionet2021.list_records(tmp_path).to_dicts()
    return dict(row)


@pytest.mark.parametrize(
    ("comments", "age_years", "sex", "codes"),
    [
        ("#Age: 74\n#Sex: Male\n#Dx: 59118001,426783006\n", 74.0, "male", ["59118001", "426783006"]),
        ("# Age: 0.5\n# Sex: FEMALE\n# Dx: 59118001\n", 0.5, "female", ["59118001"]),
        ("#Age: NaN\n#Sex: M\n#Dx: 1, 2,1 ,,3\r\n", None, "male", ["1", "2", "3"]),
        ("#Age: Unknown\n#Sex: f\n#Dx: RBBB\n", None, "female", ["RBBB"]),
        ("#Age: -1\n#Sex: Unknown\n#Dx: Unknown\n", None, None, None),
        ("#Age: 131\n#Sex:\n#Dx:\n#Rx: Unknown\n", None, None, None),
        ("#Age: inf\n#Sex: NaN\n", None, None, None),
    ],
)
def test_comments_of_a_challenge_header(
    tmp_path: Path, comments: str, age_years: float | None, sex: str | None, codes: list[str] | None
) -> None:
    row = listed_row(tmp_path, "E1 1 500 10\nE1.mat 16+24 1000/mV 16 0 0 0 0 I\n" + comments)
    assert (row["age_years"], row["sex"], row["codes"]) == (age_years, sex, codes)
    assert (row["dataset"], row["slice_id"]) == ("georgia", "training/georgia/g1")


def test_a_header_that_does_not_parse_is_listed_and_rejected(tmp_path: Path) -> None:
    row = listed_row(tmp_path, "\x00\x01 no header")
    assert (row["age_years"], row["sex"], row["codes"]) == (None, None, None)
    with pytest.raises(Rejected, match="unreadable_header"):
        physionet2021.read_record(tmp_path, row)


def test_a_signal_without_header_is_listed_and_rejected(tmp_path: Path) -> None:
    build_physionet2021(tmp_path)
    (tmp_path / "training/georgia/g1/A0002.hea").unlink()
    (tmp_path / "training/georgia/g1/._A0002.mat").write_bytes(b"an archiver's leftover")
    assert physionet2021.list_records(tmp_path).height == 4
    assert outcomes("physionet2021", tmp_path)[1]["physionet2021/A0002"] == "missing_header"


@pytest.mark.parametrize("below", ["", "training"])
def test_the_folder_of_the_sets_may_be_given(tmp_path: Path, below: str) -> None:
    build_physionet2021(tmp_path / "raw")
    given = (tmp_path / "raw/training").rename(tmp_path / "sets")
    listed = physionet2021.list_records(given)
    assert listed["slice_id"].to_list() == ["cpsc_2018/g1", "georgia/g1", "georgia/g1", "ptb-xl/g1"]
    assert listed["dataset"].to_list() == ["cpsc_2018", "georgia", "georgia", "ptb-xl"]


def test_a_record_name_in_two_folders_is_an_error_that_names_both(tmp_path: Path) -> None:
    build_physionet2021(tmp_path)
    write_wfdb(tmp_path / "training/ningbo/g2", "A0000", ".mat", 1000)
    with pytest.raises(InputError, match=r"training/cpsc_2018/g1/A0000\.hea and training/ningbo/g2/A0000\.hea"):
        physionet2021.list_records(tmp_path)


# ---- ptb_xl


def test_statements_have_the_levels_of_the_published_benchmark() -> None:
    n_names = {level: len(ptb_xl.names_at(level)) for level in ptb_xl.LEVELS}
    assert n_names == {
        **{"all": 71, "diagnostic": 44, "subdiagnostic": 23, "superdiagnostic": 5, "form": 19, "rhythm": 12}
    }
    assert ptb_xl.names_at("superdiagnostic") == ("CD", "HYP", "MI", "NORM", "STTC")


def test_codes_are_every_statement_at_every_level_whatever_its_likelihood() -> None:
    assert ptb_xl.codes_of({"NORM": 100.0, "SR": 0.0}) == [
        *("all:NORM", "diagnostic:NORM", "subdiagnostic:NORM", "superdiagnostic:NORM", "all:SR", "rhythm:SR")
    ]
    assert ptb_xl.codes_of({"ASMI": 50.0, "ALMI": 0.0}) == [
        *("all:ASMI", "diagnostic:ASMI", "subdiagnostic:AMI", "superdiagnostic:MI", "all:ALMI", "diagnostic:ALMI")
    ], "two statements of one class give the class once"
    assert ptb_xl.codes_of({"NDT": 0.0})[-1] == "form:NDT", "diagnostic and form"
    assert ptb_xl.codes_of({"new": 100.0}) == ["all:new"], "a statement that the table lacks is kept"
    everything = ptb_xl.codes_of({statement.code: 0.0 for statement in ptb_xl.STATEMENTS})
    assert sorted(everything) == sorted(f"{at}:{name}" for at in ptb_xl.LEVELS for name in ptb_xl.names_at(at))


def test_a_line_of_the_ptb_xl_table_becomes_a_row(tmp_path: Path) -> None:
    (tmp_path / "records500").mkdir()
    lines = [
        ptb_xl_line(1, patient_id="15709.0", age="56.0", sex=1),
        ptb_xl_line(2, patient_id="", age="300.0", sex=0, report="", recording_date="", scp_codes="{}"),
        ptb_xl_line(3, age="", sex="", site="", device=""),
    ]
    write_csv(tmp_path / "ptbxl_database.csv", lines)
    first, second, third = ptb_xl.list_records(tmp_path).to_dicts()
    assert (first["record_id"], first["patient_id"]) == ("ptb_xl/00001", "ptb_xl/15709")
    assert (first["age_years"], first["sex"], first["fold"]) == (56.0, "female", 3)
    assert (first["slice_id"], first["raw_path"]) == ("records500/00000", "records500/00000/00001_hr.hea")
    assert first["recorded_at"].isoformat() == "1984-11-09T09:17:34"
    assert first["report"] == "sinusrhythmus, periphere niederspannung"
    assert (second["age_years"], second["sex"]) == (90.0, "male"), "300 stands for more than 89"
    assert (second["patient_id"], second["report"], second["recorded_at"]) == (None, None, None)
    assert second["codes"] == []
    assert (third["age_years"], third["sex"]) == (None, None)
    assert (first["site"], first["device"]) == ("2", "CS-12 E")
    assert (third["site"], third["device"]) == (None, None)


def test_ptb_xl_at_100_hz_is_read_where_500_hz_is_not_there(tmp_path: Path) -> None:
    write_csv(tmp_path / "ptbxl_database.csv", [ptb_xl_line(1)])
    with pytest.raises(InputError, match="expected a folder records500 or records100"):
        ptb_xl.list_records(tmp_path)
    (tmp_path / "records100").mkdir()
    assert ptb_xl.list_records(tmp_path)["raw_path"].to_list() == ["records100/00000/00001_lr.hea"]
    (tmp_path / "records500").mkdir()
    assert ptb_xl.list_records(tmp_path)["raw_path"].to_list() == ["records500/00000/00001_hr.hea"]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("scp_codes", "{'NORM': "),
        ("scp_codes", "['NORM']"),
        ("scp_codes", "__import__('os')"),
        ("filename_hr", ""),
        ("age", "old"),
        ("recording_date", "yesterday"),
        ("strat_fold", "x"),
        ("site", "x"),
        ("ecg_id", ""),
        ("ecg_id", "2"),
    ],
)
def test_a_damaged_line_of_the_ptb_xl_table_is_an_error(tmp_path: Path, column: str, value: str) -> None:
    (tmp_path / "records500").mkdir()
    write_csv(tmp_path / "ptbxl_database.csv", [ptb_xl_line(1) | {column: value}, ptb_xl_line(2)])
    with pytest.raises(InputError, match=r"ptbxl_database\.csv.*expected.*found") as error:
        ptb_xl.list_records(tmp_path)
    assert "\n" not in str(error.value)


# ---- mimic_iv_ecg


def test_machine_statements_become_one_report(tmp_path: Path) -> None:
    build_mimic_iv_ecg(tmp_path)
    listed = mimic_iv_ecg.list_records(tmp_path)
    assert set(listed["report"]) == {"Sinus rhythm; Borderline ECG"}
    assert listed["slice_id"].to_list() == ["files/p1000", "files/p1000", "files/p1000", "files/p1002"]
    assert listed["patient_id"].n_unique() == 3
    assert listed["recorded_at"].dt.year().to_list() == [2180] * 4
    lines = (tmp_path / "machine_measurements.csv").read_text().splitlines()
    silent = lines[1].replace("Sinus rhythm", "").replace("Borderline ECG", " ")
    (tmp_path / "machine_measurements.csv").write_text("\n".join([lines[0], silent, *lines[2:4]]))
    reports = mimic_iv_ecg.list_records(tmp_path)["report"].to_list()
    assert reports == [None, "Sinus rhythm; Borderline ECG", "Sinus rhythm; Borderline ECG", None]
    (tmp_path / "machine_measurements.csv").unlink()
    assert mimic_iv_ecg.list_records(tmp_path)["report"].null_count() == 4


@pytest.mark.parametrize("table", ["record_list.csv", "machine_measurements.csv"])
def test_a_study_twice_is_an_error(tmp_path: Path, table: str) -> None:
    build_mimic_iv_ecg(tmp_path)
    lines = (tmp_path / table).read_text().splitlines(keepends=True)
    (tmp_path / table).write_text("".join([*lines, lines[-1]]))
    with pytest.raises(InputError, match=rf"{table}: expected every study_id once, found 40000004 more than once"):
        mimic_iv_ecg.list_records(tmp_path)


@pytest.mark.parametrize("damage", [("2180-07-23 08:44:00", "yesterday"), ("files/p1000/p10000117", "")])
def test_a_damaged_line_of_the_record_list_is_an_error(tmp_path: Path, damage: tuple[str, str]) -> None:
    build_mimic_iv_ecg(tmp_path)
    path = tmp_path / "record_list.csv"
    path.write_text(path.read_text().replace(*damage).replace("/s40000003/40000003", ""))
    with pytest.raises(InputError, match=r"record_list\.csv.*expected") as error:
        mimic_iv_ecg.list_records(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["../outside/R", "/etc/R"])
def test_a_path_in_a_table_cannot_lead_out_of_the_raw_folder(tmp_path: Path, name: str) -> None:
    build_mimic_iv_ecg(tmp_path / "raw")
    write_wfdb(tmp_path / "outside", "R", ".dat", 200)
    path = tmp_path / "raw/record_list.csv"
    path.write_text(path.read_text().replace("files/p1000/p10000117/s40000003/40000003", name))
    assert outcomes("mimic_iv_ecg", tmp_path / "raw")[1]["mimic_iv_ecg/40000003"] == "unreadable_header"


def test_age_at_the_ecg_and_sex_come_from_the_table_of_patients(tmp_path: Path) -> None:
    """MIMIC-IV's rule, and the table wherever it may lie, packed or not."""
    build_mimic_iv_ecg(tmp_path)
    assert mimic_iv_ecg.list_records(tmp_path)["age_years"].null_count() == 4
    patients = [
        {"subject_id": 10000032, "gender": "F", "anchor_age": 52, "anchor_year": 2170, "dod": ""},  # 62 in 2180
        {"subject_id": 10000117, "gender": "M", "anchor_age": 85, "anchor_year": 2174, "dod": ""},  # 91: over 89
        {"subject_id": 99999999, "gender": "M", "anchor_age": 30, "anchor_year": 2174, "dod": ""},  # has no ECG
    ]
    expected = [(62.0, "female"), (62.0, "female"), (91.0, "male"), (None, None)]
    for place in mimic_iv_ecg.PATIENTS:
        path = tmp_path / place
        path.parent.mkdir(exist_ok=True)
        write_csv(path, patients)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
        listed = mimic_iv_ecg.list_records(tmp_path)
        contracts.check(listed, "listing")
        assert list(listed.select("age_years", "sex").iter_rows()) == expected, place
        path.unlink()


@pytest.mark.parametrize(
    ("age", "expected"),
    [("89", 89.0), ("90", 91.0), ("91", 91.0), ("12", 12.0), ("-1", None), ("", None)],
)
def test_an_age_over_89_is_91_and_one_before_birth_is_not_known(
    tmp_path: Path, age: str, expected: float | None
) -> None:
    build_mimic_iv_ecg(tmp_path)
    line = {"subject_id": 10000117, "gender": "", "anchor_age": age, "anchor_year": 2180}
    write_csv(tmp_path / "patients.csv", [line])
    row = mimic_iv_ecg.list_records(tmp_path).row(2, named=True)
    assert (row["age_years"], row["sex"]) == (expected, None)


@pytest.mark.parametrize(
    ("lines", "what"),
    [("1,F,5,2100\n1,F,5,2100\n", "1 more than once"), ("1,F,old,2100\n", "expected whole years")],
)
def test_a_damaged_table_of_patients_is_an_error(tmp_path: Path, lines: str, what: str) -> None:
    build_mimic_iv_ecg(tmp_path)
    (tmp_path / "patients.csv").write_text("subject_id,gender,anchor_age,anchor_year\n" + lines)
    with pytest.raises(InputError, match=what):
        mimic_iv_ecg.list_records(tmp_path)


# ---- code15


def test_an_exam_has_its_codes_age_sex_and_patient(tmp_path: Path) -> None:
    lines = [
        code15_line(11, RBBB="True", AF=True, age=54, patient_id=1295924),
        code15_line(12, normal_ecg="true", age="", patient_id=""),
        code15_line(13, ST=""),
        code15_line(14, is_male="", age=300),
    ]
    write_csv(tmp_path / "exams.csv", lines)
    rows = {row["record_id"]: row for row in code15.list_records(tmp_path).to_dicts()}
    first, second, third, fourth = (rows[f"code15/{exam_id}"] for exam_id in (11, 12, 13, 14))
    assert first["codes"] == ["RBBB", "AF", "is_male"]
    assert (first["age_years"], first["sex"], first["patient_id"]) == (54.0, "male", "code15/1295924")
    assert (first["slice_id"], first["raw_path"]) == ("exams_part0.hdf5", "exams_part0.hdf5")
    assert (second["codes"], second["sex"]) == (["normal_ecg"], "female")
    assert (second["age_years"], second["patient_id"]) == (None, None)
    assert third["codes"] is None, "a finding that is not filled in is not an absent one"
    assert (fourth["codes"], fourth["sex"], fourth["age_years"]) == (None, None, None)


def test_exams_are_found_by_their_id_wherever_they_stand(tmp_path: Path) -> None:
    ids = [5, 3, 9, 1]
    seen = []
    for name, order in (("there", ids), ("back", ids[::-1])):
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "exams.csv", [code15_line(exam_id) for exam_id in sorted(ids)])
        write_code15_part(tmp_path / name / "exams_part0.hdf5", order)
        seen.append(outcomes("code15", tmp_path / name)[0])
    assert len(seen[0]) == 4
    for record_id, record in seen[0].items():
        assert np.array_equal(record.signal_mv, seen[1][record_id].signal_mv)
        np.testing.assert_allclose(record.signal_mv, digital_of(record_id.removeprefix("code15/")) / 1000, rtol=1e-7)


def test_an_exam_that_is_not_in_the_table_is_listed_and_rejected_and_the_dummy_is_not(tmp_path: Path) -> None:
    write_csv(tmp_path / "exams.csv", [code15_line(1), code15_line(2, trace_file="exams_part1.hdf5")])
    write_code15_part(tmp_path / "exams_part0.hdf5", (1, 77))
    write_code15_part(tmp_path / "exams_part1.hdf5", (77, 3))
    listed = code15.list_records(tmp_path)
    contracts.check(listed, "listing")
    assert listed["record_id"].to_list() == ["code15/1", "code15/2", "code15/3", "code15/77"]
    records, reasons = outcomes("code15", tmp_path)
    assert set(records) == {"code15/1"}
    assert reasons == {
        **{"code15/2": "missing_signal", "code15/3": "missing_header", "code15/77": "missing_header"},
    }
    with pytest.raises(Rejected, match=r"exam 77 of exams_part0\.hdf5: exams\.csv has no line for it"):
        code15.read_record(tmp_path, listed.row(3, named=True))


def test_an_exam_twice_in_a_part_is_rejected_and_twice_in_the_table_an_error(tmp_path: Path) -> None:
    write_csv(tmp_path / "exams.csv", [code15_line(1), code15_line(2)])
    write_code15_part(tmp_path / "exams_part0.hdf5", (1, 2, 1))
    assert outcomes("code15", tmp_path)[1] == {"code15/1": "unreadable_signal"}
    write_csv(tmp_path / "exams.csv", [code15_line(1), code15_line(1)])
    with pytest.raises(InputError, match=r"exams\.csv: expected every exam_id once, found 1 more than once"):
        code15.list_records(tmp_path)


def test_only_zeros_at_the_ends_are_taken_off(tmp_path: Path) -> None:
    """Zeros within, or of some leads alone, are signal; nothing but zeros is no recording."""
    tracings = np.zeros((2, 100, 12), np.float32)
    tracings[0, 20:80, 3] = 1.0
    tracings[0, 40:60] = 0.0
    write_csv(tmp_path / "exams.csv", [code15_line(1), code15_line(2)])
    with h5py.File(tmp_path / "exams_part0.hdf5", "w") as file:
        file["exam_id"], file["tracings"] = np.array([1, 2]), tracings
    records, reasons = outcomes("code15", tmp_path)
    assert np.array_equal(records["code15/1"].signal_mv, tracings[0, 20:80].T)
    assert reasons == {"code15/2": "no_valid_sample"}


@pytest.mark.parametrize(
    ("column", "value"), [("trace_file", ""), ("trace_file", "../exams.hdf5"), ("AF", "perhaps"), ("age", "old")]
)
def test_a_damaged_line_of_the_exams_is_an_error(tmp_path: Path, column: str, value: str) -> None:
    write_csv(tmp_path / "exams.csv", [code15_line(1) | {column: value}, code15_line(2)])
    with pytest.raises(InputError, match=r"exams\.csv.*expected") as error:
        code15.list_records(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["link", "text", "shape", "no tracings", "no ids", "not HDF5"])
def test_a_part_that_is_not_as_published_rejects_its_exams(tmp_path: Path, what: str) -> None:
    write_csv(tmp_path / "exams.csv", [code15_line(1)])
    write_code15_part(tmp_path / "elsewhere.hdf5", (1,))
    part = tmp_path / "exams_part0.hdf5"
    with h5py.File(part, "w") as file:
        if what != "no ids":
            file["exam_id"] = np.array([1])
        if what == "link":
            file["tracings"] = h5py.ExternalLink("elsewhere.hdf5", "tracings")
        elif what == "text":
            file["tracings"] = np.full((1, 100, 12), b"x")
        elif what != "no tracings":
            file["tracings"] = np.ones((1, 100, 12 if what == "no ids" else 11), np.float32)
    if what == "not HDF5":
        part.write_text("no part")
    assert outcomes("code15", tmp_path) == ({}, {"code15/1": "unreadable_signal"})


def test_a_part_is_opened_once_and_a_fork_opens_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_csv(tmp_path / "exams.csv", [code15_line(exam_id) for exam_id in (1, 2, 3)])
    write_code15_part(tmp_path / "exams_part0.hdf5", (3, 2, 1))
    rows = code15.list_records(tmp_path).to_dicts()
    opened = []
    open_file = h5py.File
    monkeypatch.setattr(
        h5py, "File", lambda *args, **options: opened.append(os.getpid()) or open_file(*args, **options)
    )
    for row in rows * 2:
        code15.read_record(tmp_path, row)
    assert opened == [os.getpid()]
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as a forked child finds itself
    code15.read_record(tmp_path, rows[0])
    assert opened[1:] == [-1]


# ---- a wrong folder says which source would read it


@pytest.mark.parametrize("looks_like", ["ptb_xl", "mimic_iv_ecg", "code15", "physionet2021", "own"])
@pytest.mark.parametrize("source", ["ptb_xl", "mimic_iv_ecg", "code15", "physionet2021", "own"])
def test_an_error_about_a_wrong_folder_names_the_source_that_reads_it(
    source: str, looks_like: str, raw_dir: Path
) -> None:
    if source == looks_like:
        return
    build(looks_like, raw_dir)
    with pytest.raises(InputError, match=f"it looks like source {looks_like}"):
        SOURCES[source].list_records(raw_dir)


def test_a_folder_of_headers_in_no_known_layout_is_one_for_own(tmp_path: Path) -> None:
    write_wfdb(tmp_path / "mine", "r1", ".dat", 1000)
    with pytest.raises(InputError, match=r"source own reads a folder with mine/r1\.hea: start with `ecgfm init-source"):
        physionet2021.list_records(tmp_path)


# ---- real recordings


@pytest.mark.parametrize(
    ("source", "folder", "n_records"),
    [("physionet2021", "challenge-2021", 71), ("ptb_xl", "ptb-xl", 210), ("mimic_iv_ecg", "mimic-iv-ecg", 1)],
)
def test_real_archives_are_read_whole(shared: Path, source: str, folder: str, n_records: int) -> None:
    contracts.check(SOURCES[source].list_records(shared / "data" / folder), "listing")
    records, reasons = outcomes(source, shared / "data" / folder)
    assert reasons == {}
    assert len(records) == n_records
    assert all({lead.casefold() for lead in LEADS} <= {lead.casefold() for lead in r.leads} for r in records.values())
    assert all(record.digital is not None for record in records.values())


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("challenge-odd-headers/DeepPSP", {"read": 6}),
        ("challenge-odd-headers/awwong1", {"read": 1}),
        ("challenge-odd-headers/header-only", {"missing_signal": 21}),
        ("challenge-odd-headers/physionetchallenges", {"read": 12}),
        ("challenge-odd-headers/tuijalei", {"read": 2, "missing_signal": 1}),
        ("challenge-reduced-leads/two_leads", {"read": 3}),
        ("challenge-reduced-leads/three_leads", {"read": 3}),
        ("challenge-reduced-leads/four_leads", {"read": 3}),
        ("challenge-reduced-leads/six_leads", {"read": 3}),
    ],
)
def test_odd_headers_and_reduced_leads_are_read_or_rejected(
    shared: Path, tmp_path: Path, folder: str, expected: dict[str, int]
) -> None:
    shutil.copytree(shared / "data" / folder, tmp_path / "training/georgia/g1")
    contracts.check(physionet2021.list_records(tmp_path), "listing")
    records, reasons = outcomes("physionet2021", tmp_path)
    assert Counter(reasons.values()) + Counter(read=len(records)) == expected
    n_leads = {"two_leads": 2, "three_leads": 3, "four_leads": 4, "six_leads": 6}.get(folder.rpartition("/")[2], 12)
    assert all(len(record.leads) == n_leads for record in records.values())


def test_statistics_ages_sexes_and_codes_are_those_of_the_reference(shared: Path) -> None:
    raw_dir = shared / "data/challenge-2021"
    golden = pl.read_csv(shared / "golden/preprocess-challenge-2021/meta.csv")
    rows = {row["record_id"]: row for row in physionet2021.list_records(raw_dir).to_dicts()}
    assert golden.height == len(rows) == 71
    for expected in golden.to_dicts():
        row = rows[f"physionet2021/{expected['record']}"]
        record = physionet2021.read_record(raw_dir, row)
        order = [[lead.casefold() for lead in record.leads].index(lead.casefold()) for lead in LEADS]
        means_mv = [expected[f"mean_{lead}"] for lead in range(12)]
        stds_mv = [expected[f"std_{lead}"] for lead in range(12)]
        np.testing.assert_allclose(record.signal_mv[order].mean(axis=1), means_mv, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(record.signal_mv[order].std(axis=1), stds_mv, rtol=1e-9, atol=1e-15)
        assert (record.sampling_rate_hz, record.n_samples) == (expected["sample_rate"], expected["sample_size"])
        assert row["dataset"] == expected["dataset"]
        assert row["age_years"] == expected["age"]
        assert row["sex"] == {0: "male", 1: "female"}[expected["sex"]]
        assert row["codes"] == str(expected["diagnosis"]).split(",")


def test_the_table_of_statements_is_the_published_one(shared: Path) -> None:
    published = pl.read_csv(shared / "data/ptb-xl/scp_statements.csv", infer_schema=False)
    lines = [
        (
            *(line[""], line["diagnostic_class"], line["diagnostic_subclass"]),
            *(line[level] is not None for level in ("diagnostic", "form", "rhythm")),
        )
        for line in published.to_dicts()
    ]
    assert lines == list(ptb_xl.STATEMENTS)


def test_a_record_published_in_two_archives_is_the_same_signal(shared: Path) -> None:
    """The Challenge's HR records are PTB-XL's, by the same number: the same millivolts, ages, sexes."""
    data = shared / "data"
    of_ptb_xl = {row["record_id"]: row for row in ptb_xl.list_records(data / "ptb-xl").to_dicts()}
    n_shared = 0
    for row in physionet2021.list_records(data / "challenge-2021").filter(pl.col("dataset") == "ptb-xl").to_dicts():
        twin = of_ptb_xl.get(row["record_id"].replace("physionet2021/HR", "ptb_xl/"))
        if twin is None:
            continue
        n_shared += 1
        record = physionet2021.read_record(data / "challenge-2021", row)
        other = ptb_xl.read_record(data / "ptb-xl", twin)
        np.testing.assert_allclose(record.signal_mv, other.signal_mv, rtol=0, atol=1e-9)
        assert math.isclose(row["age_years"], twin["age_years"])
        assert row["sex"] == twin["sex"]
    assert n_shared == 4


def test_mimic_leads_keep_their_order_in_the_file(shared: Path) -> None:
    (row,) = mimic_iv_ecg.list_records(shared / "data/mimic-iv-ecg").to_dicts()
    record = mimic_iv_ecg.read_record(shared / "data/mimic-iv-ecg", row)
    assert row["report"] == "Sinus rhythm; Possible right atrial abnormality; Borderline ECG"
    assert record.leads[4:6] == ("aVF", "aVL")
    mv = dict(zip(record.leads, record.signal_mv - record.signal_mv.mean(axis=1, keepdims=True), strict=True))
    assert np.std(mv["I"] + mv["III"] - mv["II"]) < 0.01, "Einthoven, to two ADC steps"
    assert np.std((mv["II"] + mv["III"]) / 2 - mv["aVF"]) < 0.01
    assert np.std(mv["aVF"] - mv["aVL"]) > 0.05, "so the two cannot have been exchanged"


def test_real_exams_have_lead_iii_equal_to_ii_minus_i_and_the_millivolts_of_an_ecg(shared: Path) -> None:
    """Order of leads and units of CODE-15%, which its HDF5 files do not say. Two exams saturate: left out."""
    raw_dir = shared / "data/code-15"
    records, reasons = outcomes("code15", raw_dir)
    assert reasons == {}
    assert {r.n_samples for r in records.values()} == {2934, 4096}
    whole = [record for record in records.values() if np.abs(record.signal_mv).max() < 10.1]
    assert len(whole) == 3
    for record in whole:
        i, ii, iii, avr, avl, avf = record.signal_mv[:6]
        np.testing.assert_allclose(iii, ii - i, atol=1e-5)
        np.testing.assert_allclose(avr, -(i + ii) / 2, atol=0.05)
        np.testing.assert_allclose(avl, i - ii / 2, atol=0.05)
        np.testing.assert_allclose(avf, ii - i / 2, atol=0.05)
        assert 0.02 < np.median(record.signal_mv.std(axis=1)) < 5


def test_lower_case_leads_are_read_as_spelled(shared: Path) -> None:
    record = read_wfdb(shared / "data/ludb/data", "10.hea", "own/10")
    assert record.leads[:4] == ("i", "ii", "iii", "avr")
