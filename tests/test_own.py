"""A user's own folder, told by its ecgfm.yaml: files, arrays, and the table about them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
import yaml
from conftest import write_wfdb16

from ecgfm import contracts
from ecgfm.ecg import LEADS, EcgRecord, InputError, Rejected
from ecgfm.fingerprints import RawTree
from ecgfm.sources import own
from ecgfm.sources.own import list_records, pattern_to_regex, read_record
from ecgfm.sources.own_config import UNITS_PER_MV

FILES = {"name": "clinic", "files": {"patterns": ["**/*.hea"]}}
SIGNAL_MV = np.random.default_rng(0).normal(0, 0.5, (5, 3, 200)).round(3)  # (record, lead, time)


def tell(folder: Path, values: dict[str, Any], **more: Any) -> Path:
    """Write the folder's ecgfm.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ecgfm.yaml").write_text(yaml.safe_dump({**values, **more}))
    return folder


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of the listing by the records' names."""
    listed = list_records(folder)
    contracts.check(listed, "listing")
    return {row["record_id"].removeprefix("own/"): row for row in listed.iter_rows(named=True)}


def read_all(folder: Path) -> tuple[dict[str, EcgRecord], dict[str, Rejected]]:
    """What came of every row, by name."""
    records, rejected = {}, {}
    for name, row in rows_of(folder).items():
        try:
            records[name] = read_record(folder, row)
        except Rejected as reason:
            rejected[name] = reason
    return records, rejected


def wfdb(folder: Path, name: str, seed: int = 0, **options: Any) -> np.ndarray:
    """A WFDB record of twelve leads, and its digital values."""
    leads = options.get("leads", LEADS)
    digital = np.random.default_rng(seed).integers(-1000, 1000, (len(leads), 300), dtype=np.int16)
    write_wfdb16(folder, name, digital, suffix=".dat", **options)
    return digital


# ---- a folder of files


def test_a_record_is_called_as_its_path_and_its_slice_is_its_folder(tmp_path: Path) -> None:
    for place in ("", "a", "a/b"):
        wfdb(tmp_path / place, "r1")
    rows = rows_of(tell(tmp_path, FILES))
    assert {name: (row["slice_id"], row["raw_path"]) for name, row in rows.items()} == {
        "r1": (".", "r1.hea"),
        "a/r1": ("a", "a/r1.hea"),
        "a/b/r1": ("a/b", "a/b/r1.hea"),
    }
    assert {row["dataset"] for row in rows.values()} == {"clinic"}
    assert {row["reading"] for row in rows.values()} == {None}, "the files say everything"


def test_a_changed_file_changes_its_slice_and_no_other(tmp_path: Path) -> None:
    for place in ("", "a", "a/b"):
        wfdb(tmp_path / place, "r1")
    tell(tmp_path, FILES)
    slices = sorted({row["slice_id"] for row in rows_of(tmp_path).values()})
    before = RawTree.scan(tmp_path, "own").by_slice(slices)
    for folder, slice_id in (("", "."), ("a", "a"), ("a/b", "a/b")):
        changed = tmp_path / folder / "r1.dat"
        content = changed.read_bytes()
        changed.write_bytes(content + b"\0\0")
        after = RawTree.scan(tmp_path, "own").by_slice(slices)
        assert [s for s in slices if after[s].digest != before[s].digest] == [slice_id]
        before = after


@pytest.mark.parametrize(
    ("pattern", "fits", "fits_not"),
    [
        ("**/*.hea", ["a.hea", "x/a.hea", "x/y/a.hea"], ["a.heat", "a_hea"]),
        ("*.hea", ["a.hea"], ["x/a.hea"]),
        ("x/?.xml", ["x/a.xml"], ["x/ab.xml", "y/a.xml", "x//.xml"]),
        ("x/**", ["x/a", "x/y/b"], ["y/a"]),
    ],
)
def test_patterns_are_of_whole_paths(pattern: str, fits: list[str], fits_not: list[str]) -> None:
    import re

    assert all(re.fullmatch(pattern_to_regex(pattern), path) for path in fits)
    assert not any(re.fullmatch(pattern_to_regex(pattern), path) for path in fits_not)


@pytest.mark.parametrize(
    ("comments", "expected"),
    [
        (["Age: 74", "Sex: Male", "Dx: 1,2"], (74.0, "male", ["1", "2"], None)),
        (["<age>: 79", "<sex>: F", "<diagnoses>:"], (79.0, "female", None, None)),
        (["<age>: 28  <sex>: M  <Height>: 170"], (28.0, "male", None, None)),
        (["Patient ID: 86557", "Age: 62", "Sex: Female"], (62.0, "female", None, "own/86557")),
        (["Age: 73", "Labels: STTC, HYP"], (73.0, None, ["STTC", "HYP"], None)),
        ([], (None, None, None, None)),
    ],
)
def test_a_header_says_age_sex_codes_and_patient(
    tmp_path: Path, comments: list[str], expected: tuple[Any, ...]
) -> None:
    wfdb(tmp_path, "r", comments=comments)
    row = rows_of(tell(tmp_path, FILES))["r"]
    assert (row["age_years"], row["sex"], row["codes"], row["patient_id"]) == expected
    tell(tmp_path, FILES, files={"patterns": ["**/*.hea"], "read_facts": False})
    row = rows_of(tmp_path)["r"]
    assert (row["age_years"], row["sex"], row["codes"], row["patient_id"]) == (None, None, None, None)


def test_a_signal_without_its_header_is_listed_and_rejected_but_not_one_that_a_header_names(tmp_path: Path) -> None:
    wfdb(tmp_path, "r1")
    (tmp_path / "r1.dat").rename(tmp_path / "signals.dat")
    (tmp_path / "r1.hea").write_text((tmp_path / "r1.hea").read_text().replace("r1.dat", "signals.dat"))
    (tmp_path / "lost.mat").write_bytes(b"\0" * 100)
    records, rejected = read_all(tell(tmp_path, FILES))
    assert set(records) == {"r1"}
    assert {name: r.reason for name, r in rejected.items()} == {"lost": "missing_header"}


def test_segments_of_a_record_are_no_records(tmp_path: Path) -> None:
    for name in ("s1", "s2"):
        wfdb(tmp_path, name)
    (tmp_path / "whole.hea").write_text("whole/2 12 500 600\ns1 300\ns2 300\n")
    records, rejected = read_all(tell(tmp_path, FILES))
    assert rejected == {}
    assert {name: record.n_samples for name, record in records.items()} == {"whole": 600}


def test_files_that_differ_in_the_suffix_alone_need_it_in_their_names(tmp_path: Path) -> None:
    wfdb(tmp_path, "r1")
    (tmp_path / "r1.xml").write_text("<x/>")
    tell(tmp_path, FILES, files={"patterns": ["*.hea", "*.xml"]})
    with pytest.raises(InputError, match=r"own/r1 twice \(r1\.hea and r1\.xml\).*suffix_in_ids"):
        list_records(tmp_path)
    tell(tmp_path, FILES, files={"patterns": ["*.hea", "*.xml"], "suffix_in_ids": True})
    records, rejected = read_all(tmp_path)
    assert set(records) == {"r1.hea"}
    assert {name: r.reason for name, r in rejected.items()} == {"r1.xml": "unknown_format"}


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    wfdb(tmp_path / "elsewhere", "r1")
    folder = tell(tmp_path / "mine", FILES)
    for suffix in (".hea", ".dat"):
        (folder / f"r1{suffix}").symlink_to(tmp_path / "elsewhere" / f"r1{suffix}")
    records, rejected = read_all(folder)
    assert (records, rejected["r1"].reason) == ({}, "unreadable_header")
    (folder / "deeper").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="found a link to one"):
        list_records(folder)


# ---- leads, units and rate as told


def test_leads_are_named_by_order_or_renamed(tmp_path: Path) -> None:
    digital = wfdb(tmp_path, "r", leads=("ch0", "CH1"))
    tell(tmp_path, FILES, rename_leads={"Ch0": "II", "ch1": "V1"})
    record = read_all(tmp_path)[0]["r"]
    assert record.leads == ("II", "V1")
    assert record.digital is not None
    assert np.array_equal(record.digital.digital, digital)
    tell(tmp_path, FILES, leads=["V5", "V6"])
    assert read_all(tmp_path)[0]["r"].leads == ("V5", "V6")
    tell(tmp_path, FILES, leads=["I", "II", "III"])
    assert read_all(tmp_path)[1]["r"].reason == "no_standard_lead"


@pytest.mark.parametrize("told", ["V", "mV", "uV"])
@pytest.mark.parametrize("stated", ["V", "mV", "uV"])
def test_units_that_a_file_states_are_overridden_only_with_the_key(tmp_path: Path, stated: str, told: str) -> None:
    """The numbers are the same: as uV they are a thousandth of the millivolts."""
    digital = wfdb(tmp_path, "r", gain_per_mv=100)
    header = (tmp_path / "r.hea").read_text().replace("/mV", f"/{stated}")
    (tmp_path / "r.hea").write_text(header)
    tell(tmp_path, FILES, units=told)
    records, rejected = read_all(tmp_path)
    if stated == told:
        np.testing.assert_allclose(records["r"].signal_mv, digital / 100 / UNITS_PER_MV[told], rtol=1e-12)
    else:
        assert rejected["r"].reason == "unknown_units"
        assert "files.override" in rejected["r"].detail
    tell(tmp_path, FILES, units=told, files={"patterns": ["*.hea"], "override": ["units"]})
    record = read_all(tmp_path)[0]["r"]
    np.testing.assert_allclose(record.signal_mv, digital / 100 / UNITS_PER_MV[told], rtol=1e-12)
    assert record.digital is not None, "other units are no reason to lose the digital values"


def test_units_that_a_file_does_not_state_are_those_told(tmp_path: Path) -> None:
    digital = wfdb(tmp_path, "r", gain_per_mv=100)
    (tmp_path / "r.hea").write_text((tmp_path / "r.hea").read_text().replace("/mV", ""))
    np.testing.assert_allclose(read_all(tell(tmp_path, FILES))[0]["r"].signal_mv, digital / 100)
    np.testing.assert_allclose(read_all(tell(tmp_path, FILES, units="uV"))[0]["r"].signal_mv, digital / 100_000)


def test_another_rate_than_the_file_says_needs_the_key(tmp_path: Path) -> None:
    wfdb(tmp_path, "r", sampling_rate_hz=360)
    tell(tmp_path, FILES, sampling_rate_hz=250)
    assert read_all(tmp_path)[1]["r"].reason == "unreadable_header"
    tell(tmp_path, FILES, sampling_rate_hz=250, files={"patterns": ["*.hea"], "override": ["sampling_rate_hz"]})
    assert read_all(tmp_path)[0]["r"].sampling_rate_hz == 250
    (tmp_path / "r.hea").write_text((tmp_path / "r.hea").read_text().replace("r 12 360 300", "r 12"))
    tell(tmp_path, FILES, sampling_rate_hz=400)
    assert read_all(tmp_path)[0]["r"].sampling_rate_hz == 400, "the file does not say it"


# ---- arrays


def array_config(**more: Any) -> dict[str, Any]:
    array = {"patterns": ["signals.*"], "axes": ["record", "lead", "time"], **more.pop("array", {})}
    common = {"name": "arrays", "leads": ["I", "II", "V1"], "sampling_rate_hz": 250, "units": "mV"}
    return {**common, "array": array, **more}


@pytest.mark.parametrize("kind", ["npy", "h5"])
@pytest.mark.parametrize("axes", [("record", "lead", "time"), ("record", "time", "lead"), ("time", "lead", "record")])
@pytest.mark.parametrize("units", ["V", "mV", "uV"])
def test_arrays_in_any_order_of_axes_and_units_give_the_same_records(
    tmp_path: Path, kind: str, axes: tuple[str, ...], units: str
) -> None:
    order = [("record", "lead", "time").index(axis) for axis in axes]
    stored = (SIGNAL_MV * UNITS_PER_MV[units]).transpose(order)
    array: dict[str, Any] = {"axes": list(axes)}
    if kind == "npy":
        np.save(tmp_path / "signals.npy", stored)
        (tmp_path / "ids.csv").write_text("id\n" + "".join(f"e{n}\n" for n in (3, 1, 4, 0, 2)))
        array |= {"ids_file": "ids.csv", "ids_column": "id"}
    else:
        with h5py.File(tmp_path / "signals.h5", "w") as file:
            file["group/x"], file["names"] = stored, [f"e{n}" for n in (3, 1, 4, 0, 2)]
        array |= {"dataset": "group/x", "ids_dataset": "names"}
    folder = tell(tmp_path, array_config(array=array, units=units))
    assert {row["slice_id"] for row in rows_of(folder).values()} == {f"signals.{kind}"}
    records, rejected = read_all(folder)
    assert rejected == {}
    assert list(records) == ["e0", "e1", "e2", "e3", "e4"]
    for place, name in enumerate(["e3", "e1", "e4", "e0", "e2"]):
        np.testing.assert_allclose(records[name].signal_mv, SIGNAL_MV[place], rtol=1e-12)
        assert (records[name].leads, records[name].sampling_rate_hz) == (("I", "II", "V1"), 250)


def test_sixteen_bit_numbers_are_kept_as_they_are(tmp_path: Path) -> None:
    stored = (SIGNAL_MV * 1000).astype(np.int16)
    stored[0, 0, 0] = -32768
    np.save(tmp_path / "signals.npy", stored)
    records, _ = read_all(tell(tmp_path, array_config(array={"ids_are_rows": True}, units="uV")))
    assert list(records) == [f"signals/{row}" for row in range(5)]
    for row, record in enumerate(records.values()):
        assert record.digital is not None
        assert np.array_equal(record.digital.digital, stored[row])
    first = records["signals/0"].signal_mv
    assert np.isnan(first[0, 0])
    np.testing.assert_allclose(first[0, 1:], stored[0, 0, 1:] / 1000)


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_padding_is_stripped_only_when_asked(tmp_path: Path, dtype: str) -> None:
    stored = np.zeros((2, 3, 100), dtype)
    stored[0, 1, 20:80] = 7
    np.save(tmp_path / "signals.npy", stored)
    records, _ = read_all(tell(tmp_path, array_config(array={"ids_are_rows": True})))
    assert {record.n_samples for record in records.values()} == {100}
    records, rejected = read_all(tell(tmp_path, array_config(array={"ids_are_rows": True, "strip": "zero"})))
    assert {name: record.n_samples for name, record in records.items()} == {"signals/0": 60}
    assert {name: r.reason for name, r in rejected.items()} == {"signals/1": "no_valid_sample"}


def test_nan_around_a_recording_is_stripped_and_within_it_is_an_invalid_sample(tmp_path: Path) -> None:
    stored = np.full((1, 3, 100), np.nan)
    stored[0, :, 20:80] = 1.0
    stored[0, 1, 50], stored[0, 2, 51] = np.nan, np.inf
    np.save(tmp_path / "signals.npy", stored)
    records, _ = read_all(tell(tmp_path, array_config(array={"ids_are_rows": True, "strip": "nan"})))
    signal_mv = records["signals/0"].signal_mv
    assert signal_mv.shape == (3, 60)
    assert np.isnan(signal_mv).sum() == 2, "infinite is no voltage"


def test_one_lead_needs_no_axis(tmp_path: Path) -> None:
    np.save(tmp_path / "signals.npy", SIGNAL_MV[:, 0])
    config = array_config(array={"axes": ["record", "time"], "ids_are_rows": True}, leads=["II"])
    records, _ = read_all(tell(tmp_path, config))
    assert len(records) == 5
    np.testing.assert_array_equal(records["signals/2"].signal_mv, SIGNAL_MV[2, :1])


def test_an_array_is_not_read_whole(tmp_path: Path) -> None:
    """More than a gigabyte, sparse on the disk, is read from at once."""
    stored = np.lib.format.open_memmap(tmp_path / "signals.npy", "w+", np.float32, (100_000, 3, 1000))
    stored[99_999] = 1.0
    del stored
    file = own.open_array(str(tmp_path / "signals.npy"))
    assert file.read("", 99_999).sum() == 3000.0
    file.close()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"leads": ["I", "II"]}, r"names 2 leads, found 3 along axis lead of \(5, 3, 200\)"),
        ({"array": {"axes": ["record", "time"], "ids_are_rows": True}}, "but leads names several"),
        (
            {"array": {"axes": ["record", "lead", "record"], "ids_are_rows": True}},
            "axes must name record, lead and time",
        ),
        ({"array": {}}, "give one of ids_dataset, ids_file, ids_are_rows"),
        ({"array": {"ids_file": "ids.csv", "ids_column": "nope"}}, "expected a CSV table with the columns nope"),
        ({"array": {"ids_file": "ids.csv", "ids_column": "twice"}}, "expected every record once, found own/a twice"),
        ({"array": {"ids_file": "gap.csv", "ids_column": "id"}}, "found none in line 3"),
        ({"array": {"ids_file": "few.csv", "ids_column": "id"}}, "a name for each of 5 recordings, found 2"),
        ({"array": {"ids_file": "../ids.csv", "ids_column": "id"}}, "leads out of it"),
        ({"array": {"ids_dataset": "ids"}}, "found a NumPy array"),
        ({"array": {"patterns": ["*.h5"], "ids_are_rows": True}}, "expected files like"),
        ({"units": "furlongs"}, "units"),
        ({"units": None}, "an array does not say its units"),
        ({"sampling_rate_hz": 0}, "sampling_rate_hz"),
        ({"leads": ["I", "i", "II"]}, "each lead once"),
        ({"leads": ["a", "b", "c"]}, "leads must name some of I, II"),
        ({"lead": ["I"]}, "lead: unknown key; did you mean 'leads'"),
        ({"array": {"ids_are_rows": True, "pattern": []}}, "array.pattern: unknown key; did you mean 'patterns'"),
    ],
)
def test_a_config_that_does_not_fit_is_one_clear_line(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    np.save(tmp_path / "signals.npy", SIGNAL_MV)
    (tmp_path / "ids.csv").write_text("id,twice\n" + "".join(f"{n},a\n" for n in range(5)))
    (tmp_path / "gap.csv").write_text("id,x\n1,\n,1\n2,\n3,\n4,\n")
    (tmp_path / "few.csv").write_text("id\n1\n2\n")
    config = array_config(array={"ids_are_rows": True})
    config |= {k: v for k, v in array_config(**change).items() if k in change} if change else {}
    tell(tmp_path, config)
    with pytest.raises(InputError, match=match) as error:
        list_records(tmp_path)
    assert "\n" not in str(error.value)


# ---- the table


def told_with_table(tmp_path: Path, table: str, names: tuple[str, ...] = ("a/r1", "a/r2"), **metadata: Any) -> Path:
    for name in names:
        wfdb(tmp_path / Path(name).parent, Path(name).name, comments=["Age: 50", "Sex: F", "Dx: 1", "Patient ID: p0"])
    (tmp_path / "about.csv").write_text(table)
    return tell(tmp_path, FILES, metadata={"file": "about.csv", "record": "file", **metadata})


def test_every_column_of_the_table_has_its_place_and_wins_over_the_file(tmp_path: Path) -> None:
    table = (
        "file,who,years,gender,dx,text,part,when,site,ward,cart\n"
        "a/r1,7,61.5,w,AF; PVC;AF,sinus,3,2020-01-02T03:04:05,north,3B,MAC 5500\n"
        "a/r2.hea,,,,,,,,,,\n"
    )
    columns = {"patient": "who", "age": "years", "sex": "gender", "female": ["W"], "codes": "dx", "report": "text"}
    columns |= {"fold": "part", "recorded_at": "when", "dataset": "site", "site": "ward", "device": "cart"}
    rows = rows_of(told_with_table(tmp_path, table, **columns))
    first, second = rows["a/r1"], rows["a/r2"]
    assert (first["patient_id"], first["age_years"], first["sex"]) == ("own/7", 61.5, "female")
    assert (first["codes"], first["report"], first["fold"]) == (["AF", "PVC"], "sinus", 3)
    assert (first["recorded_at"].isoformat(), first["dataset"]) == ("2020-01-02T03:04:05", "north")
    assert (first["site"], first["device"]) == ("3B", "MAC 5500")
    assert (second["patient_id"], second["age_years"], second["sex"]) == ("own/p0", 50.0, "female")
    assert (second["site"], second["device"]) == (None, None)
    assert (second["codes"], second["report"], second["dataset"]) == (["1"], None, "clinic")


@pytest.mark.parametrize(
    ("cells", "expected"),
    [("1,0", ["AF"]), ("yes,True", ["AF", "PVC"]), ("0,0", []), ("1,", None)],
)
def test_columns_of_true_and_false_are_codes(tmp_path: Path, cells: str, expected: list[str] | None) -> None:
    folder = told_with_table(tmp_path, f"file,AF,PVC\nr,{cells}\n", names=(), code_columns=["AF", "PVC"])
    wfdb(folder, "r")
    assert rows_of(folder)["r"]["codes"] == expected


def test_what_only_one_side_has_is_listed_and_rejected(tmp_path: Path) -> None:
    folder = told_with_table(tmp_path, "file,age\na/r1,40\ngone,41\n", age="age")
    rows = rows_of(folder)
    assert set(rows) == {"a/r1", "a/r2", "gone"}
    assert rows["gone"]["age_years"] == 41
    records, rejected = read_all(folder)
    assert set(records) == {"a/r1"}
    assert {name: r.reason for name, r in rejected.items()} == {"a/r2": "missing_header", "gone": "missing_signal"}
    assert all("about.csv" in reason.detail for reason in rejected.values())
    told_with_table(tmp_path, "file,age\na/r1,40\n", age="age", unlisted="keep")
    assert set(read_all(folder)[0]) == {"a/r1", "a/r2"}
    assert rows_of(folder)["a/r2"]["age_years"] == 50, "as its file says"


@pytest.mark.parametrize("name", ["r1", "r1.hea", "r1.dat", "elsewhere/r1.mat", ".\\\\a\\\\r1"])
def test_the_table_may_give_the_name_without_folders(tmp_path: Path, name: str) -> None:
    folder = told_with_table(tmp_path, f"file,age\n{name},40\n", names=("a/r1",), age="age", match="name")
    assert rows_of(folder)["a/r1"]["age_years"] == 40


@pytest.mark.parametrize(
    ("table", "metadata", "match"),
    [
        ("file\na/r1\na/r1\n", {}, "expected every recording once, found a/r1 more than once"),
        ("file\na/r1\na/r1.hea\n", {}, "expected every recording once, found a/r1"),
        ("file\ngone\ngone\n", {}, "expected every recording once, found gone"),
        ("file,x\na/r1,1\n,2\n", {}, "expected the name of a recording, found none in line 3"),
        ("file,age\na/r1,old\n", {"age": "age"}, "age_years"),
        ("file,sex\na/r1,x\n", {"sex": "sex"}, "sex"),
        ("file,when\na/r1,soon\n", {"recorded_at": "when"}, "recorded_at"),
        ("file,AF\na/r1,perhaps\n", {"code_columns": ["AF"]}, "codes"),
        ("file,age\na/r1,5\n", {"age": "years"}, "expected a CSV table with the columns file, years"),
        ("name\na/r1\n", {}, "expected a CSV table with the columns file"),
        ("file\na/r1\n", {"file": "absent.csv"}, "expected absent.csv"),
        ("file\na/r1\n", {"pateint": "x"}, "metadata.pateint: unknown key; did you mean 'patient'"),
        ("file\na/r1\n", {"codes": "x", "code_columns": ["y"]}, "give one of the two"),
    ],
)
def test_a_table_that_does_not_fit_is_one_clear_line(
    tmp_path: Path, table: str, metadata: dict[str, Any], match: str
) -> None:
    folder = told_with_table(tmp_path, table, **metadata)
    with pytest.raises(InputError, match=match) as error:
        list_records(folder)
    assert "\n" not in str(error.value)


def test_a_table_with_semicolons_is_read(tmp_path: Path) -> None:
    folder = told_with_table(tmp_path, "file;age\na/r1;40\n", age="age")
    assert rows_of(folder)["a/r1"]["age_years"] == 40


def test_one_name_of_two_recordings_is_an_error(tmp_path: Path) -> None:
    folder = told_with_table(tmp_path, "file\nr1\n", names=("a/r1", "b/r1"), match="name")
    with pytest.raises(InputError, match=r"r1 is the name of 2 recordings; set metadata\.match: path"):
        list_records(folder)


def test_an_arrays_table_is_joined_by_id_not_by_line(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "signals.h5", "w") as file:
        file["x"], file["id"] = SIGNAL_MV, np.array([30, 10, 40, 0, 20])
    lines = [f"{n},{n + 1}\n" for n in (0, 10, 20, 30, 40)]
    (tmp_path / "about.csv").write_text("exam,age\n" + "".join(lines))
    config = array_config(array={"dataset": "x", "ids_dataset": "id"})
    tell(tmp_path, config, metadata={"file": "about.csv", "record": "exam", "age": "age"})
    rows, (records, _) = rows_of(tmp_path), read_all(tmp_path)
    assert {name: row["age_years"] for name, row in rows.items()} == {str(n): n + 1 for n in (0, 10, 20, 30, 40)}
    np.testing.assert_array_equal(records["40"].signal_mv, SIGNAL_MV[2])


# ---- the config itself


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("files: [", "not YAML"),
        ("- a", "expected keys and values"),
        ("name: x", "give either files or array"),
        ("name: x\nfiles: {patterns: []}", "patterns"),
        (
            "name: x\nfiles: {patterns: ['*.hea'], override: [units]}",
            "is to override what the files say, but is not given",
        ),
        ("name: x\nfiles: {patterns: ['*.xml']}", r"expected files like \*\.xml, found"),
    ],
)
def test_a_wrong_config_is_one_clear_line(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "ecgfm.yaml").write_text(text)
    with pytest.raises(InputError, match=match) as error:
        list_records(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_what_a_reader_needs_is_in_the_row(tmp_path: Path) -> None:
    """A prepared slice is made anew when it changes, since its key sees the row and not the config."""
    wfdb(tmp_path, "r")
    configs: list[dict[str, Any]] = [{}, {"units": "mV"}, {"rename_leads": {"I": "II", "II": "I"}}]
    configs.append({"sampling_rate_hz": 500})
    told = [rows_of(tell(tmp_path, FILES, **more))["r"]["reading"] for more in configs]
    assert told[0] is None
    assert len(set(told)) == 4
    assert json.loads(told[2]) == {"rename_leads": {"i": "II", "ii": "I"}}
    (tmp_path / "ecgfm.yaml").unlink()
    row = {"record_id": "own/r", "raw_path": "r.hea", "reading": told[2]}
    assert read_record(tmp_path, row).leads[:2] == ("II", "I")


# ---- real recordings

REAL: dict[str, dict[str, int]] = {
    "challenge-odd-headers": {"read": 21, "missing_signal": 22},
    "challenge-reduced-leads": {"read": 12},
    "challenge-2024-ptb-xl": {"read": 2, "missing_signal": 2},
    "challenge-2021": {"read": 71},
    "ludb": {"read": 10},
    "two-lead": {"read": 1},
    "code-15-wfdb": {"read": 41},
    "mimic-iv-ecg": {"read": 1},
    "ptb-xl": {"read": 238},
}


@pytest.mark.parametrize("folder", sorted(REAL))
def test_real_folders_of_wfdb_records_are_read_with_one_line_of_config(
    shared: Path, tmp_path: Path, folder: str
) -> None:
    raw = tell(Path(shutil.copytree(shared / "data" / folder, tmp_path / "raw")), FILES)
    records, rejected = read_all(raw)
    assert Counter(r.reason for r in rejected.values()) + Counter(read=len(records)) == REAL[folder]
    assert all({lead.lower() for lead in record.leads} & {"i", "ii"} for record in records.values())


def test_vendor_files_say_who_when_and_what(shared: Path, tmp_path: Path) -> None:
    raw = Path(shutil.copytree(shared / "data/vendor", tmp_path / "raw"))
    patterns = ["**/*.xml", "**/*.dcm", "**/*.scp", "**/*.edf"]
    tell(raw, FILES, files={"patterns": patterns, "suffix_in_ids": True})
    listed = list_records(raw)
    contracts.check(listed, "listing")
    assert listed.height == 30
    assert listed["patient_id"].drop_nulls().str.starts_with("own/").all()
    assert min(listed[column].count() for column in ("age_years", "sex", "patient_id", "recorded_at", "report")) >= 10
    records, rejected = read_all(raw)
    assert len(records) + len(rejected) == 30
    assert len(records) >= 24
    assert {r.reason for r in rejected.values()} <= {"missing_signal", "unknown_format", "unreadable_header"}
    assert pl.Series([record.sampling_rate_hz for record in records.values()]).is_between(100, 2000).all()
