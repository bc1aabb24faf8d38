"""WFDB records. The judge is the `wfdb` package; what it is not asked, the standard's own examples answer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecgfm.ecg import INVALID, LEADS, MAX_SAMPLES, EcgRecord, Rejected
from ecgfm.formats.wfdb import read_wfdb
from ecgfm.formats.wfdb_header import parse_header, read_header

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wfdb", "ignore::DeprecationWarning:pandas")

MV_PER_UNIT = {"V": 1000.0, "mV": 1.0, "mv": 1.0, "uV": 1e-3, "µV": 1e-3, "nV": 1e-6}


def write_record(folder: Path, name: str, lines: list[str], **signals: np.ndarray | bytes) -> str:
    """Write a header of the lines and, by file name (with _ for the dot), bytes or little-endian int16."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in signals.items():
        stored = content if isinstance(content, bytes) else content.astype("<i2").tobytes()
        (folder / file.replace("_", ".")).write_bytes(stored)
    (folder / f"{name}.hea").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"{name}.hea"


def judged_mv(path: Path) -> np.ndarray:
    """(lead, time) millivolt as the wfdb package reads it, every sample of every frame."""
    import wfdb

    record = wfdb.rdrecord(str(path.with_suffix("")), smooth_frames=False)
    return np.stack(
        [signal * MV_PER_UNIT.get(units, np.nan) for signal, units in zip(record.e_p_signal, record.units, strict=True)]
    )


def assert_same_signal(record: EcgRecord, expected_mv: np.ndarray) -> None:
    assert record.signal_mv.dtype == np.float64
    assert record.signal_mv.shape == expected_mv.shape
    assert np.array_equal(np.isnan(record.signal_mv), np.isnan(expected_mv))
    assert np.isfinite(expected_mv).any()
    np.testing.assert_allclose(record.signal_mv, expected_mv, rtol=0, atol=1e-9)


# ---- headers


def test_every_field_of_a_header_is_read() -> None:
    header = parse_header(
        "# before\n"
        "12726 2 250.5/24000(-12.5) 825000 15:08:24.250 20/07/1995\r\n"
        "a.dat 212x4:3+24 64.02(-4)/mmHg 12 1024 4004 -26056 512 ABP, left arm  \n"
        "\n"
        "b.dat 16 1.052e+04 \n"
        "#Age: 74\n"
        "# Sex: Male\n"
    )
    assert (header.record_name, header.n_signals, header.n_samples) == ("12726", 2, 825000)
    assert (header.sampling_rate_hz, header.counter_rate_hz, header.base_counter) == (250.5, 24000.0, -12.5)
    assert header.start == "15:08:24.250 20/07/1995"
    assert header.comments == ("before", "Age: 74", "Sex: Male")
    assert header.segments == ()
    first, second = header.signals
    assert tuple(first) == (
        *("a.dat", "212", 4, 3, 24, 64.02, -4, "mmHg", 12, 1024, 4004, -26056, 512, "ABP, left arm"),
    )
    assert tuple(second) == ("b.dat", "16", 1, 0, 0, 10520.0, 0, "mV", 0, 0, None, None, 0, "")


def test_what_a_header_leaves_out_has_the_defaults_of_the_standard() -> None:
    header = parse_header("16 3\nx 16\ny 16 0/uV 11 1024\nz 16 500 0 -7 1 2 3 4 leads")
    assert (header.sampling_rate_hz, header.counter_rate_hz, header.n_samples) == (250.0, 250.0, None)
    x, y, z = header.signals
    assert (x.adc_gain, x.baseline, x.units) == (200.0, 0, "mV")
    assert (y.adc_gain, y.baseline, y.units) == (200.0, 1024, "uV"), "baseline is the ADC zero, gain 0 means 200"
    assert (z.adc_gain, z.baseline, z.block_size, z.description) == (500.0, -7, 3, "4 leads")


@pytest.mark.parametrize(
    ("line", "description"),
    [
        ("A.mat 16+24 1000/mV 16 0 28 -1716 0 aVR", "aVR"),
        ("A.dat 16 1000.0(0)/mV 16 0    aVR", "aVR"),  # Challenge 2024: no initial value, checksum, block size
        ("A.dat 16 1000/mV aVR", "aVR"),
        ("A.dat 16 200 11 1024 995 -22131 0 ECG lead II", "ECG lead II"),
        ("A.dat 16 200/mV 16 0 0 0 0 2nd lead", "2nd lead"),
    ],
)
def test_numbers_before_the_description_may_be_left_out(line: str, description: str) -> None:
    assert parse_header(f"A 1 500 5000\n{line}").signals[0].description == description


def test_the_record_line_of_early_challenge_releases_is_read() -> None:
    header = parse_header("E00666.mat 1 500 5000 05-May-2020 14:50:55\nE00666.mat 16+24 4880/mV 16 0 -39 -24145 0 I")
    assert (header.record_name, header.n_samples, header.start) == ("E00666.mat", 5000, "05-May-2020 14:50:55")
    assert (header.signals[0].byte_offset, header.signals[0].adc_gain) == (24, 4880.0)


def test_a_multi_segment_header_names_its_segments() -> None:
    header = parse_header("multi/3 2 360 45000\n100s 21600\n~ 1800\n100s 21600\n# a gap")
    assert header.segments == (("100s", 21600), ("~", 1800), ("100s", 21600))
    assert (header.n_signals, header.n_samples, header.signals) == (2, 45000, ())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing but a comment",
        "A0001",
        "A0001 twelve 500 5000",
        "A0001 1 500 5000",  # a signal line too few
        "A0001 1 500 5000\na.dat 16\nb.dat 16",  # one too many
        "A0001 1 0 5000\na.dat 16",  # no sampling rate
        "A0001 1 1e999 5000\na.dat 16",
        "A0001 1 500 5000\na.dat",
        "A0001 1 500 5000\na.dat sixteen 1000/mV",
        "A0001 1 500 5000\na.dat 16 much/mV 16 0 0 0 0 I",
        "A0001 1 500 5000\na.dat 16 1e999/mV 16 0 0 0 0 I",
        "A0001 1 500 5000\na.dat 16 1000(zero)/mV 16 0 0 0 0 I",
        "A0001 1 500 " + "9" * 5000 + "\na.dat 16",
        "A0001/1 1 500 5000\nsegment",
        "\x00\x01\x02\x03",
    ],
)
def test_a_header_that_does_not_parse_is_rejected(text: str) -> None:
    with pytest.raises(Rejected) as rejected:
        parse_header(text)
    assert rejected.value.reason == "unreadable_header"
    assert rejected.value.detail.startswith("expected ")
    assert "\n" not in rejected.value.detail


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="A 01x:+-./()~#\n²٣e", max_size=80).map(lambda text: "R 1 500 10\n" + text) | st.text())
def test_any_text_is_a_header_or_rejected(text: str) -> None:
    try:
        header = parse_header(text)
    except Rejected as error:
        rejected = error
    else:
        assert len(header.signals) == header.n_signals or header.segments
        return
    assert rejected.reason == "unreadable_header"


# ---- signals


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_format_16_is_read_as_wfdb_reads_it(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("record")
    n_leads = data.draw(st.integers(1, 15))
    n_samples = data.draw(st.integers(1, 40))
    n_first = data.draw(st.integers(1, n_leads))  # leads of the first file, the others are in a second
    offset = data.draw(st.sampled_from([0, 1, 24]))
    gains = data.draw(st.lists(st.sampled_from(["", "0", "1000", "4880", "306.5", "1.052e+04", "-200"]), min_size=15))
    baselines = data.draw(st.lists(st.sampled_from(["", "(0)", "(-55)", "(1024)"]), min_size=15))
    units = data.draw(
        st.lists(st.sampled_from(["", *(f"/{unit}" for unit in MV_PER_UNIT if unit != "µV")]), min_size=15)
    )
    seed = data.draw(st.integers(0, 1000))
    stored = np.random.default_rng(seed).integers(-32768, 32768, (n_leads, n_samples))
    stored[:, ::7] = INVALID
    stored[0, -1] = 1  # one sample at least is valid
    says_length = data.draw(st.booleans())
    lines = [f"R {n_leads} 500 {n_samples if says_length else ''}"]
    for lead in range(n_leads):
        gain = f"{gains[lead] or 200}{baselines[lead]}{units[lead]}"
        lines.append(f"{'R.mat' if lead < n_first else 'R.dat'} 16+{offset} {gain} 16 3 0 0 0 lead {lead}")
    files = {"R_mat": stored[:n_first], "R_dat": stored[n_first:]}
    contents = {name: b"\xff" * offset + part.T.astype("<i2").tobytes() for name, part in files.items() if len(part)}
    header_path = write_record(folder, "R", lines, **contents)

    record = read_wfdb(folder, header_path, "source/R")

    assert record.record_id == "source/R"
    assert record.leads == tuple(f"lead {lead}" for lead in range(n_leads))
    assert record.sampling_rate_hz == 500.0
    assert_same_signal(record, judged_mv(folder / header_path))
    assert record.digital is not None
    assert record.digital.digital.dtype == np.int16
    assert np.array_equal(record.digital.digital, stored), "stored values are kept without loss"
    assert np.array_equal(record.digital.to_mv(), record.signal_mv, equal_nan=True)


@pytest.mark.parametrize("n_samples", [800, 799, 1])
@pytest.mark.parametrize("n_signals", [1, 2, 3])
@pytest.mark.parametrize("offset", [0, 24])
def test_format_212_is_read_as_wfdb_reads_it(tmp_path: Path, n_samples: int, n_signals: int, offset: int) -> None:
    count = n_samples * n_signals
    stored = np.random.default_rng(count).bytes(offset + 3 * (count // 2) + 2 * (count % 2))
    stored = stored[:offset] + b"\x00\x08" + stored[offset + 2 :]  # -2048: invalid
    names = ["I", "II", "V1"][:n_signals]
    lines = [f"R {n_signals} 360 {n_samples}"]
    lines += [f"R.dat 212{f'+{offset}' if offset else ''} 200(3)/mV 12 0 0 0 0 {name}" for name in names]
    header_path = write_record(tmp_path, "R", lines, R_dat=stored)
    record = read_wfdb(tmp_path, header_path, "source/R")
    assert record.digital is not None
    assert np.isnan(record.signal_mv[0, 0])
    if n_samples > 1:
        assert_same_signal(record, judged_mv(tmp_path / header_path))


@pytest.mark.parametrize("storage_format", ["8", "24", "32", "61", "80", "160", "310", "311"])
def test_other_formats_are_read_as_wfdb_reads_them(tmp_path: Path, storage_format: str) -> None:
    stored = np.frombuffer(np.random.default_rng(1).bytes(2400), dtype=np.uint8)
    lines = ["R 2 360 200", *(f"R.dat {storage_format} 200(3)/mV 10 0 5 0 0 {lead}" for lead in ("I", "II"))]
    header_path = write_record(tmp_path, "R", lines, R_dat=stored.tobytes())
    record = read_wfdb(tmp_path, header_path, "source/R")
    assert_same_signal(record, judged_mv(tmp_path / header_path))
    assert record.digital is None
    assert record.leads == ("I", "II")


def test_flac_is_read_as_wfdb_reads_it(tmp_path: Path) -> None:
    import wfdb

    signal_mv = np.cumsum(np.random.default_rng(0).normal(0, 0.05, (600, 2)), axis=0)
    wfdb.wrsamp(
        "R", 500, ["mV"] * 2, ["I", "II"], signal_mv, fmt=["516"] * 2, adc_gain=[1000.0] * 2, baseline=[0] * 2,
        write_dir=str(tmp_path),
    )  # fmt: skip
    record = read_wfdb(tmp_path, "R.hea", "source/R")
    assert_same_signal(record, judged_mv(tmp_path / "R.hea"))
    np.testing.assert_allclose(record.signal_mv, signal_mv.T, atol=0.00051)


def test_several_samples_a_frame_multiply_the_sampling_rate(tmp_path: Path) -> None:
    stored = np.arange(80).reshape(10, 2, 4)  # frame, lead, sample
    lines = ["R 2 125 10", "R.dat 16x4 100/mV 16 0 0 0 0 I", "R.dat 16x4 100/mV 16 0 0 0 0 II"]
    header_path = write_record(tmp_path, "R", lines, R_dat=stored)
    record = read_wfdb(tmp_path, header_path, "source/R")
    assert (record.sampling_rate_hz, record.n_samples) == (500.0, 40)
    assert_same_signal(record, stored.transpose(1, 0, 2).reshape(2, 40) / 100)


def test_skewed_signals_are_aligned(tmp_path: Path) -> None:
    stored = np.arange(40).reshape(20, 2)
    lines = ["R 2 125 20", "R.dat 16 100/mV 16 0 0 0 0 I", "R.dat 16:3 100/mV 16 0 0 0 0 II"]
    header_path = write_record(tmp_path, "R", lines, R_dat=stored)
    record = read_wfdb(tmp_path, header_path, "source/R")
    assert_same_signal(record, judged_mv(tmp_path / header_path))
    assert np.array_equal(record.signal_mv[1, :17], stored[3:, 1] / 100)
    assert np.isnan(record.signal_mv[1, 17:]).all()


def test_segments_are_joined_and_a_gap_is_invalid(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(-500, 500, (n, 2)) for n in (30, 20)]
    for number, part in enumerate(parts):
        lines = [
            f"s{number} 2 250 {len(part)}",
            *(f"s{number}.dat 16 100/mV 16 0 0 0 0 {lead}" for lead in ("I", "II")),
        ]
        write_record(tmp_path, f"s{number}", lines, **{f"s{number}_dat": part})
    layout = ["layout 2 250 0", *(f"~ 0 100/mV 16 0 0 0 0 {lead}" for lead in ("I", "II"))]
    write_record(tmp_path, "layout", layout)
    header_path = write_record(tmp_path, "R", ["R/4 2 250 60", "layout 0", "s0 30", "~ 10", "s1 20"])
    record = read_wfdb(tmp_path, header_path, "source/R")
    expected_mv = np.concatenate([parts[0], np.full((10, 2), np.nan), parts[1]]).T / 100
    assert record.leads == ("I", "II")
    assert_same_signal(record, expected_mv)


@pytest.mark.parametrize("spelling", ["", *(f"/{unit}" for unit in MV_PER_UNIT), "/MV", "/v", "/UV", "/\u03bcv", "/NV"])
def test_units_become_millivolt(tmp_path: Path, spelling: str) -> None:
    mv_per_unit = {"": 1.0, "m": 1.0, "v": 1e3, "u": 1e-3, "µ": 1e-3, "\u03bc": 1e-3, "n": 1e-6}[spelling[1:2].lower()]
    header_path = write_record(
        tmp_path, "R", ["R 1 500 3", f"R.dat 16 50(2){spelling} 16 0 0 0 0 I"], R_dat=np.arange(3)
    )
    record = read_wfdb(tmp_path, header_path, "source/R")
    expected_mv = (np.arange(3) - 2) / 50 * mv_per_unit
    np.testing.assert_allclose(record.signal_mv[0], expected_mv, rtol=1e-12)
    assert record.digital is not None
    assert record.digital.adc_gain_per_mv[0] == pytest.approx(50 / mv_per_unit, rel=1e-12)


def test_units_in_latin_1_are_read(tmp_path: Path) -> None:
    (tmp_path / "R.hea").write_bytes("R 1 500 3\nR.dat 16 50/µV 16 0 0 0 0 I\n# Müller".encode("latin-1"))
    (tmp_path / "R.dat").write_bytes(bytes(6))
    assert read_header(tmp_path, "R.hea").comments == ("Müller",)
    assert read_wfdb(tmp_path, "R.hea", "source/R").digital is not None


# ---- what is turned away

TEN = np.arange(20)  # 10 samples of 2 leads
GOOD = ["R 2 500 10", "R.dat 16 200/mV 16 0 0 0 0 I", "R.dat 16 200/mV 16 0 0 0 0 II"]


def rejection(raw_dir: Path, header_path: str = "R.hea") -> Rejected:
    with pytest.raises(Rejected) as rejected:
        read_wfdb(raw_dir, header_path, "source/R")
    assert rejected.value.detail
    assert str(raw_dir) not in rejected.value.detail, "the same reject on every machine"
    return rejected.value


def test_a_good_record_is_not_rejected(tmp_path: Path) -> None:
    write_record(tmp_path, "R", GOOD, R_dat=TEN)
    assert read_wfdb(tmp_path, "R.hea", "source/R").n_samples == 10


def test_a_missing_header_or_signal_is_named(tmp_path: Path) -> None:
    assert rejection(tmp_path).reason == "missing_header"
    write_record(tmp_path, "R", GOOD)
    rejected = rejection(tmp_path)
    assert rejected.reason == "missing_signal"
    assert "R.dat" in rejected.detail


@pytest.mark.parametrize("storage_format", ["16", "16+24", "212", "24", "32", "80"])
def test_a_file_cut_short_is_truncated(tmp_path: Path, storage_format: str) -> None:
    lines = [line.replace(" 16 200", f" {storage_format} 200") for line in GOOD]
    size = {"16": 40, "16+24": 64, "212": 30, "24": 60, "32": 80, "80": 20}[storage_format]
    write_record(tmp_path, "R", lines, R_dat=bytes(size))
    assert read_wfdb(tmp_path, "R.hea", "source/R").n_samples == 10
    (tmp_path / "R.dat").write_bytes(bytes(size - 1))
    rejected = rejection(tmp_path)
    assert rejected.reason == "truncated"
    assert rejected.detail == "R.dat: expected 10 samples x 2 leads, found 9 x 2"


@pytest.mark.parametrize("n_samples", ["10", "0", ""])
def test_an_empty_file_is_truncated(tmp_path: Path, n_samples: str) -> None:
    write_record(tmp_path, "R", [f"R 2 500 {n_samples}", *GOOD[1:]], R_dat=b"")
    assert rejection(tmp_path).reason == "truncated"


def test_a_length_that_no_file_has_costs_no_memory(tmp_path: Path) -> None:
    write_record(tmp_path, "R", ["R 2 500 999999999999999", *GOOD[1:]], R_dat=TEN)
    assert rejection(tmp_path).reason == "too_large"
    write_record(tmp_path, "R", ["R 2 500 5999999", *GOOD[1:]], R_dat=TEN)
    assert rejection(tmp_path).reason == "truncated"


def test_a_file_that_is_longer_than_any_ecg_is_not_read(tmp_path: Path) -> None:
    write_record(tmp_path, "R", ["R 2 500", *GOOD[1:]], R_dat=TEN)
    with (tmp_path / "R.dat").open("ab") as file:
        file.truncate(10 * MAX_SAMPLES)  # sparse: it takes no room
    assert rejection(tmp_path).reason == "too_large"


def test_signals_beside_the_leads_that_are_no_voltages_are_left_out(tmp_path: Path) -> None:
    lines = [
        "R 3 500 5",
        "R.dat 16 10/mmHg 16 0 0 0 0 ABP",
        *(f"R.dat 16 200/mV 16 0 0 0 0 {lead}" for lead in ("I", "V1")),
    ]
    write_record(tmp_path, "R", lines, R_dat=np.arange(15))
    record = read_wfdb(tmp_path, "R.hea", "source/R")
    assert record.leads == ("I", "V1")
    assert record.signal_mv[:, 0].tolist() == [1 / 200, 2 / 200]


def test_samples_beyond_the_promised_length_are_left_out(tmp_path: Path) -> None:
    write_record(tmp_path, "R", GOOD, R_dat=np.arange(30))
    assert read_wfdb(tmp_path, "R.hea", "source/R").n_samples == 10


@pytest.mark.parametrize("units", ["mmHg", "NU", "bpm", "?"])
def test_units_that_are_no_voltage_are_rejected(tmp_path: Path, units: str) -> None:
    write_record(tmp_path, "R", [*GOOD[:2], f"R.dat 16 200/{units} 16 0 0 0 0 II"], R_dat=TEN)
    rejected = rejection(tmp_path)
    assert rejected.reason == "unknown_units"
    assert repr(units) in rejected.detail
    assert "II" in rejected.detail


@pytest.mark.parametrize("name", ["../secret.dat", "/etc/hostname", "..", "sub/R.dat", "sub\\R.dat"])
def test_a_header_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    raw_dir = tmp_path / "raw"
    write_record(raw_dir / "sub", "x", ["x 0 500"], R_dat=TEN)
    (tmp_path / "secret.dat").write_bytes(bytes(100))
    write_record(raw_dir, "R", [GOOD[0], *(line.replace("R.dat", name) for line in GOOD[1:])])
    assert rejection(raw_dir).reason == "unreadable_header"
    write_record(raw_dir, "R", ["R/1 2 500 10", f"{name} 10"])  # which means the header `<name>.hea`
    assert rejection(raw_dir).reason == ("missing_header" if name == ".." else "unreadable_header")


def test_a_path_or_link_cannot_lead_out_of_the_raw_folder(tmp_path: Path) -> None:
    raw_dir, outside = tmp_path / "raw", tmp_path / "raw-other"
    write_record(outside, "R", GOOD, R_dat=TEN)
    raw_dir.mkdir()
    assert rejection(raw_dir, "../raw-other/R.hea").reason == "unreadable_header"
    (raw_dir / "R.hea").symlink_to(outside / "R.hea")
    assert rejection(raw_dir).reason == "unreadable_header"
    (raw_dir / "R.hea").unlink()
    write_record(raw_dir, "R", GOOD)
    (raw_dir / "R.dat").symlink_to(outside / "R.dat")
    assert rejection(raw_dir).reason == "unreadable_header"


def test_a_link_within_the_raw_folder_is_followed(tmp_path: Path) -> None:
    """As in a DataLad copy, where files are links into .git/annex; the raw folder itself may be a link too."""
    write_record(tmp_path / "raw", "R", GOOD)
    write_record(tmp_path / "raw" / "store", "x", [], R_dat=TEN)
    (tmp_path / "raw" / "R.dat").symlink_to("store/R.dat")
    (tmp_path / "link").symlink_to("raw")
    assert read_wfdb(tmp_path / "link", "R.hea", "source/R").n_samples == 10


def test_a_signal_that_cannot_be_decoded_is_unreadable(tmp_path: Path) -> None:
    write_record(tmp_path, "R", ["R 0 500 10"])
    assert rejection(tmp_path).reason == "unreadable_signal"
    write_record(tmp_path, "R", [line.replace(" 16 200", " 999 200") for line in GOOD], R_dat=TEN)
    assert rejection(tmp_path).reason == "unreadable_signal"
    write_record(tmp_path, "R", [line.replace(" 16 200", " 516 200") for line in GOOD], R_dat=TEN)
    assert rejection(tmp_path).reason == "unreadable_signal"
    write_record(tmp_path, "R", [*GOOD[:2], "R.dat 16x2 200/mV 16 0 0 0 0 II"], R_dat=np.arange(30))
    assert rejection(tmp_path).reason == "unreadable_signal"
    (tmp_path / "R.dat").unlink()
    (tmp_path / "R.dat").mkdir()
    write_record(tmp_path, "R", GOOD)
    assert rejection(tmp_path).reason == "unreadable_signal"


def test_signal_files_that_disagree_are_rejected(tmp_path: Path) -> None:
    write_record(tmp_path, "R", [*GOOD[:2], "R.dat 212 200/mV 16 0 0 0 0 II"], R_dat=TEN)
    assert rejection(tmp_path).reason == "unreadable_header"
    lines = ["R 2 500", GOOD[1], "R.mat 16 200/mV 16 0 0 0 0 II"]
    write_record(tmp_path, "R", lines, R_dat=np.arange(10), R_mat=np.arange(11))
    assert rejection(tmp_path).reason == "unreadable_signal"


# ---- real recordings


def test_real_records_are_read_as_wfdb_reads_them(shared: Path, tmp_path: Path) -> None:
    data = shared / "data"
    counts: Counter[str] = Counter()
    for path in sorted(data.rglob("*.hea")):
        try:
            record = read_wfdb(data, path.relative_to(data).as_posix(), "source/R")
        except Rejected as rejected:
            counts[rejected.reason] += 1
            continue
        counts["formats 16 and 212" if record.digital is not None else "other formats"] += 1
        names_mat = path.read_text(encoding="latin-1").split()[0].endswith(".mat")
        expected_mv = judged_mv(rewritten_for_wfdb(path, tmp_path) if names_mat else path)
        voltages = ~np.isnan(expected_mv).all(axis=1) if len(expected_mv) > len(record.leads) else slice(None)
        assert_same_signal(record, expected_mv[voltages])
        assert set(record.leads) >= set(LEADS) or path.parent.name != "g1"
    assert counts == {
        "formats 16 and 212": 408,
        "missing_signal": 35,
        "other formats": 13,
        "too_large": 2,
        "unknown_units": 1,
        "unreadable_signal": 7,
    }


def rewritten_for_wfdb(path: Path, folder: Path) -> Path:
    """A copy of a record whose header names a record `X.mat`, which the wfdb package does not parse."""
    text = path.read_text(encoding="latin-1")
    (folder / path.with_suffix(".mat").name).write_bytes(path.with_suffix(".mat").read_bytes())
    (folder / path.name).write_text(text.replace(".mat", "", 1), encoding="latin-1")
    return folder / path.name
