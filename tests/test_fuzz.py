"""Damaged raw folders are prepared, rejected with a reason, or refused in one line; see tests/fuzzing.py."""

from __future__ import annotations

import gzip
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_inputs
import fuzzing
import h5py
import numpy as np
import pytest
import test_sources
from conftest import SHARED, write_wfdb16

from ecgfm.config import ListConfig, PrepareConfig
from ecgfm.ecg import LEADS, MAX_DETAIL, EcgRecord, InputError, Rejected
from ecgfm.fingerprints import RawTree
from ecgfm.formats.wfdb_header import is_header, parse_header
from ecgfm.formats.xml_document import decimal_numbers, number_or_none
from ecgfm.prepare import list_source, prepare_record
from ecgfm.sources import SOURCES, own
from ecgfm.sources.arrays import open_array
from ecgfm.sources.listing import comments_of, read_csv

REAL = ("real vendor", "real wfdb", "real code15", "real mimic") if (SHARED / "data").is_dir() else ()
KINDS = fuzz_inputs.kinds(SHARED if REAL else None)
CASES = 120
AFTERWARDS = ("wfdb 16", 0)


@pytest.fixture(scope="module")
def outcomes() -> list[fuzzing.Outcome]:
    """Undamaged folders of every kind, as seed 0, then damaged ones, then what no reader may do."""
    cases = [(kind, 0) for kind in KINDS]
    cases += [(list(KINDS)[seed % len(KINDS)], seed) for seed in range(1, CASES + 1)]
    cases += [(sabotage, 1) for sabotage in fuzzing.SABOTAGE]
    return list(fuzzing.run([*cases, AFTERWARDS], SHARED if REAL else None))


def test_undamaged_folders_are_prepared(outcomes: list[fuzzing.Outcome]) -> None:
    """Else the tests below would say nothing. The sources' own folders have records that are to be rejected."""
    whole = outcomes[: len(KINDS)]
    assert [outcome.kind for outcome in whole] == list(KINDS)
    for outcome in whole:
        assert not outcome.fault, outcome
        assert not outcome.refused, outcome
        assert outcome.prepared, outcome
        assert outcome.kind in SOURCES or outcome.kind in REAL or outcome.prepared == outcome.listed, outcome


def test_damaged_folders_are_prepared_or_rejected_or_refused(outcomes: list[fuzzing.Outcome]) -> None:
    """No other exception, 5 s and 1 GB at most, nothing opened outside the raw folder, tables as their contracts."""
    damaged = outcomes[len(KINDS) :][:CASES]
    assert [outcome for outcome in damaged if outcome.fault] == []
    assert len(damaged) == CASES
    assert all(outcome.what for outcome in damaged)
    reasons = sum((Counter(outcome.rejected) for outcome in damaged), Counter[str]())
    assert len(reasons) >= 6, reasons
    assert sum(outcome.prepared for outcome in damaged) > CASES / 3
    assert reasons.total() > CASES / 2
    assert 10 < sum(bool(outcome.refused) for outcome in damaged) < CASES / 2


def test_what_no_reader_may_do_is_seen(outcomes: list[fuzzing.Outcome]) -> None:
    seen = {outcome.kind: outcome.fault for outcome in outcomes if outcome.kind in fuzzing.SABOTAGE}
    assert "outside/secret.dat" in seen["opens outside"]
    assert "a file of the folder outside" in seen["opens outside unknown to Python"]
    assert "told holds" in seen["tells a secret"]
    assert "MB" in seen["takes memory"]
    assert "MemoryError" in seen["asks for absurd memory"]
    assert "took 5." in seen["takes time"]
    assert "SIGSEGV" in seen["dies"]
    assert (outcomes[-1].kind, outcomes[-1].seed) == AFTERWARDS, "a new process goes on"
    assert (outcomes[-1].fault, outcomes[-1].prepared) == ("", 1)


# ---- what campaigns have found, one by one


def build(source: str, raw_dir: Path) -> Path:
    test_sources.build(source, raw_dir)
    return raw_dir


def refused(raw_dir: Path, source: str, tmp_path: Path) -> str:
    """The one line with which the listing ends."""
    started = time.process_time()
    with pytest.raises(InputError) as error:
        _ = (
            RawTree.scan(raw_dir, source, hash_content=True),
            list_source({"raw": raw_dir}, ListConfig(source), tmp_path),
        )
    assert time.process_time() - started < 5
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


TABLES = {
    "ptb_xl": "ptbxl_database.csv",
    "mimic_iv_ecg": "machine_measurements.csv",
    "code15": "exams.csv",
    "synthetic": "patients.csv",
    "own": "about.csv",
}


@pytest.mark.parametrize("source", TABLES)
def test_a_table_that_is_a_link_out_of_the_raw_folder_is_refused(source: str, tmp_path: Path) -> None:
    table = build(source, tmp_path / "raw") / TABLES[source]
    table.rename(tmp_path / "table.csv")
    table.symlink_to(tmp_path / "table.csv")
    assert "leads out of it" in refused(tmp_path / "raw", source, tmp_path)
    table.unlink()
    (tmp_path / "raw/store").mkdir()
    (tmp_path / "table.csv").rename(tmp_path / "raw/store/table.csv")
    table.symlink_to("store/table.csv")  # as in a DataLad copy
    assert SOURCES[source].list_records(tmp_path / "raw").height


@pytest.mark.parametrize("source", TABLES)
def test_a_table_that_is_a_pipe_or_holds_zero_bytes_is_refused(source: str, tmp_path: Path) -> None:
    table = build(source, tmp_path / "raw") / TABLES[source]
    content = table.read_bytes()
    table.unlink()
    os.mkfifo(table)
    assert f"expected {table.name}" in refused(tmp_path / "raw", source, tmp_path)
    table.unlink()
    first, line = content.splitlines()[:2]
    table.write_bytes(first + b"\n" + line.replace(b",", b"\0,") + b"\0\n")
    refused(tmp_path / "raw", source, tmp_path)


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"a,b\n" + bytes(2**26), "t.csv"),
        (b"a,b\n" + b"x" * 2**26, "t.csv"),
        (gzip.compress(b"a,b\n" + b"1,2\n" * 2**27), "t.csv.gz"),
        (gzip.compress(b"a,b\n1,2\n" * 100), "t.csv"),
        (gzip.compress(b"a,b\n1,2\n" * 100)[:-9], "t.csv.gz"),
        (b"a,b\n1,2\n", "t.csv.gz"),
    ],
    ids=["zeros", "endless line", "bomb", "packed in secret", "cut", "not packed"],
)
def test_a_table_that_would_take_all_memory_is_refused(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        read_csv(tmp_path, name, ("a", "b"))
    (tmp_path / name).write_bytes(gzip.compress(b"a,b\n1,2\n") if name.endswith("gz") else b"a,b\n1,2\n")
    assert read_csv(tmp_path, name, ("a", "b")).rows() == [("1", "2")]


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_folders_that_are_links_are_refused(source: str, tmp_path: Path) -> None:
    """Two in a circle have 2 ** 40 ways before the kernel tires of them."""
    raw_dir = build(source, tmp_path / "raw")
    for name in ("a", "b"):
        (raw_dir / f"circle-{name}").symlink_to(".")
    assert "expected a folder, found a link to one" in refused(raw_dir, source, tmp_path)


def test_a_header_that_is_a_link_out_of_the_raw_folder_tells_nothing(tmp_path: Path) -> None:
    raw_dir = build("physionet2021", tmp_path / "raw")
    header = next(raw_dir.rglob("A0000.hea"))
    header.rename(tmp_path / "secret.hea")
    header.symlink_to(tmp_path / "secret.hea")
    before = RawTree.scan(raw_dir, "physionet2021", hash_content=True).files
    (tmp_path / "secret.hea").write_text(header.read_text().replace("74", "75"))
    assert RawTree.scan(raw_dir, "physionet2021", hash_content=True).files == before, "its content is not looked at"
    row = SOURCES["physionet2021"].list_records(raw_dir).row(0, named=True)
    assert row["record_id"] == "physionet2021/A0000"
    assert row["age_years"] is row["sex"] is row["codes"] is None
    with pytest.raises(Rejected, match="leads out of it"):
        SOURCES["physionet2021"].read_record(raw_dir, row)


def test_a_header_that_is_a_pipe_does_not_hold_the_run_up(tmp_path: Path) -> None:
    raw_dir = build("physionet2021", tmp_path / "raw")
    header = next(raw_dir.rglob("A0000.hea"))
    header.unlink()
    os.mkfifo(header)
    row = SOURCES["physionet2021"].list_records(raw_dir).row(0, named=True)
    with pytest.raises(Rejected, match="unreadable_header"):
        SOURCES["physionet2021"].read_record(raw_dir, row)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (fuzz_inputs.ALIASES, "aliases"),
        (fuzz_inputs.DEEP, "levels deep"),
        ("a: " + "x" * 2**21, "at most"),
        ("a: " + "1" * 5000, "not YAML"),
        ("a: 2020-13-45", "not YAML"),
    ],
    ids=["aliases", "deep", "long", "number", "date"],
)
def test_an_ecgfm_yaml_that_stands_for_gigabytes_is_refused(tmp_path: Path, content: str, what: str) -> None:
    raw_dir = build("own", tmp_path / "raw")
    (raw_dir / "ecgfm.yaml").write_text(content)
    assert what in refused(raw_dir, "own", tmp_path)


def test_an_ecgfm_yaml_outside_the_raw_folder_is_refused(tmp_path: Path) -> None:
    raw_dir = build("own", tmp_path / "raw")
    (raw_dir / "ecgfm.yaml").rename(tmp_path / "ecgfm.yaml")
    (raw_dir / "ecgfm.yaml").symlink_to("../ecgfm.yaml")
    assert "leads out of it" in refused(raw_dir, "own", tmp_path)


def test_a_name_that_is_not_utf_8_is_refused_and_one_with_a_line_end_is_told_on_one_line(tmp_path: Path) -> None:
    raw_dir = build("own", tmp_path / "raw")
    (raw_dir / "about.csv").unlink()
    (raw_dir / "ecgfm.yaml").write_text(fuzz_inputs.OWN_WFDB)
    (raw_dir / "a\nb.hea").write_text("nothing")
    row = next(row for row in own.list_records(raw_dir).iter_rows(named=True) if "\n" in row["raw_path"])
    with pytest.raises(Rejected) as error:
        own.read_record(raw_dir, row)
    assert len(str(error.value).splitlines()) == 1
    (raw_dir / os.fsdecode(b"\xff.hea")).write_text("nothing")
    assert r"own/\udcff" in refused(raw_dir, "own", tmp_path)


def test_a_folder_of_a_long_name_is_a_slice_like_others(tmp_path: Path) -> None:
    names = ["\u5fc3\u96fb\u56f3" * 20, "\u5fc3\u96fb\u56f3" * 20 + "\u4e8c"]  # 540 characters as a file's name
    for name in names:
        write_wfdb16(tmp_path / "raw" / name, "r", test_sources.digital_of("r"), suffix=".dat")
    (tmp_path / "raw/ecgfm.yaml").write_text(fuzz_inputs.OWN_WFDB)
    assert list_source({"raw": tmp_path / "raw"}, ListConfig("own"), tmp_path) == {"listed": 2, "slices": 2}
    assert len({path.name for path in (tmp_path / "slices").iterdir()}) == 2


def test_a_detail_is_one_short_line_whatever_it_quotes() -> None:
    detail = Rejected("unreadable_header", "found " + "x\n" * 10_000).detail
    assert len(detail) == MAX_DETAIL
    assert detail.startswith(r"found x\nx\n")


@pytest.mark.parametrize(
    ("rate_hz", "value_mv", "reason"),
    [
        (1e-9, 1.0, "unreadable_header"),
        (0.05, 1.0, "unreadable_header"),
        (1e300, 1.0, "unreadable_header"),
        (0.1, 1.0, "too_large"),
        (500.0, 1e308, "unreadable_signal"),
        (500.0, -np.inf, "unreadable_signal"),
    ],
)
def test_rates_and_values_of_no_ecg_are_rejected_before_they_take_memory(
    rate_hz: float, value_mv: float, reason: str
) -> None:
    signal_mv = np.random.default_rng(0).normal(0, 1, (12, 5000))
    signal_mv[3, 7] = value_mv
    with pytest.raises(Rejected, match=reason):
        prepare_record(EcgRecord("own/1", LEADS, rate_hz, signal_mv), PrepareConfig())


def test_a_recording_with_an_invalid_sample_in_every_lead_is_prepared() -> None:
    signal_mv = np.random.default_rng(0).normal(0, 1, (12, 5000))
    signal_mv[:, 100] = np.nan
    assert len(prepare_record(EcgRecord("own/1", LEADS, 500.0, signal_mv), PrepareConfig()).segments) == 2


LONG = 40_000
LINES = {
    "digits": "A 12 " + "1" * LONG,
    "numbers": "A 12 " + "1." * LONG,
    "blanks": "A 12 500 5000 " + " " * LONG + "\x01",
    "digits of a signal": "A 1 500 10\nA.dat 16 " + "1" * LONG + "/",
    "blanks of a signal": "A 1 500 10\nA.dat 16 1" + f"{' ' * LONG}2" * 4,
}


@pytest.mark.parametrize("header", LINES.values(), ids=LINES)
def test_long_lines_of_a_header_take_no_time(header: str) -> None:
    """A pattern that can read the same digits or blanks in two ways takes the square or the cube of their number."""
    started = time.process_time()
    with pytest.raises(Rejected, match="unreadable_header"):
        parse_header(header)
    is_header(header.encode())
    assert comments_of("\n" * LONG + header + "\n#" + " " * LONG)["age_years"] is None
    assert time.process_time() - started < 1


@pytest.mark.parametrize("text", ["1" * LONG + "x", "1" + " " * LONG + "x", "1," * LONG + "x", "1" + " " * LONG + ",,"])
def test_long_numbers_and_blanks_between_them_take_no_time(text: str) -> None:
    started = time.process_time()
    with pytest.raises(Rejected, match="unreadable_signal"):
        decimal_numbers(text * 5, "samples")
    assert number_or_none(text) is None
    assert time.process_time() - started < 1


# ---- HDF5


def write_ids(path: Path, ids: Any) -> Path:
    with h5py.File(path, "w") as file:
        file["ids"] = ids
    return path


def test_ids_are_text_of_any_length_text_of_one_length_or_numbers(tmp_path: Path) -> None:
    for number, ids in enumerate((["a", "\u00e4" * 70], np.array([b"a", b"bc"]), np.array([7, 2**40]))):
        file = open_array(str(write_ids(tmp_path / f"{number}.h5", ids)))
        expected = [each.decode() if isinstance(each, bytes) else str(each) for each in list(ids)]
        assert file.ids("ids") == expected
        file.close()


def test_a_damaged_heap_on_which_hdf5_goes_in_circles_is_rejected(tmp_path: Path) -> None:
    """A global heap (GCOL) whose first object is number 0 (free space) of size 0 never ends for HDF5 2.0.0."""
    path = write_ids(tmp_path / "a.h5", ["a", "b"])
    content = bytearray(path.read_bytes())
    first = content.index(b"GCOL") + 16
    content[first : first + 16] = bytes(16)
    path.write_bytes(content)
    file = open_array(str(path))
    started = time.process_time()
    with pytest.raises(Rejected, match="unreadable_signal"):
        file.ids("ids")
    assert time.process_time() - started < 20  # 2 s of work
    file.close()


def _scalar(file: h5py.File) -> None:
    file["tracings"] = 1.0


def _many(file: h5py.File) -> None:
    file.create_dataset("tracings", (3, 10**8, 12), "f4", chunks=(1, 2**16, 12))


@pytest.mark.parametrize(("write", "reason"), [(_scalar, "unreadable_signal"), (_many, "too_large")])
def test_an_array_of_no_recordings_is_rejected(tmp_path: Path, write: Callable[[h5py.File], None], reason: str) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write(file)
    file = open_array(str(tmp_path / "a.h5"))
    with pytest.raises(Rejected, match=reason):
        file.read("tracings", 0)
    file.close()


def test_more_ids_than_there_are_recordings_are_not_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("ids", (2**40,), "i8", chunks=(2**10,))
    file = open_array(str(tmp_path / "a.h5"))
    with pytest.raises(Rejected, match="too_large"):
        file.ids("ids")
    file.close()


def test_a_numpy_file_whose_header_does_not_end_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3,".ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\0" + len(text).to_bytes(2, "little") + text)
    with pytest.raises(Rejected, match="unreadable_signal"):
        open_array(str(path))
