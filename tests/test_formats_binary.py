"""DICOM, EDF and SCP-ECG: what was written is read back exactly; real files obey physics; damage is rejected."""

from __future__ import annotations

import binascii
import io
import resource
import struct
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scp_writer import OwnTable, ScpFile, assemble, checksum, huffman, resealed

from ecgfm.ecg import INVALID, LEADS, EcgRecord, FileFacts, InputError, Rejected
from ecgfm.formats import FORMATS, HEAD_BYTES, dicom, edf, identify, read_file, scp
from ecgfm.formats.lead_names import lead_of_label

pydicom = pytest.importorskip("pydicom")
edfio = pytest.importorskip("edfio")

LIMB = {"I": 0, "II": 1, "III": 2, "aVR": 3, "aVL": 4, "aVF": 5}
RANDOM = np.random.default_rng(7)


def an_ecg(n_leads: int = 12, n_samples: int = 700, largest: int = 3000) -> np.ndarray:
    """(lead, time) int16: a course with steps of all sizes, and both ends of the range."""
    steps = RANDOM.integers(-6, 7, (n_leads, n_samples)) * RANDOM.choice([1, 1, 1, 40], (n_leads, n_samples))
    course = np.clip(np.cumsum(steps, axis=1), -largest, largest)
    course[:, n_samples // 2] = [largest, -largest] * (n_leads // 2) + [largest] * (n_leads % 2)
    return course.astype(np.int16)


def read_bytes(reader: Any, content: bytes, folder: Path, name: str = "file") -> tuple[EcgRecord, FileFacts]:
    (folder / name).write_bytes(content)
    record, facts = reader.read(folder / name, "own/1")
    assert record.record_id == "own/1"
    return record, facts


# ---- DICOM


def dicom_group(
    samples: np.ndarray,
    leads: Sequence[str] = LEADS,
    *,
    label: str | None = "RHYTHM",
    originality: str = "ORIGINAL",
    interpretation: str = "SS",
    order: str = "<",
    sensitivity: str = "2.5",
    correction: str | None = "1",
    baseline: str = "0",
    units: str = "uV",
    scheme: str = "SCPECG",
    rate: str = "500",
    padding: int | None = None,
) -> Any:
    """A multiplex group of (lead, time) integers. scheme: how leads are named: SCPECG, MDC or words alone."""
    codes = dict(zip(LEADS, (1, 2, 61, 62, 63, 64, 3, 4, 5, 6, 7, 8), strict=True))
    stored_type = np.dtype(order + {"SS": "i2", "US": "u2", "SB": "i1", "UB": "u1", "SL": "i4"}[interpretation])
    group = pydicom.Dataset()
    if label:
        group.MultiplexGroupLabel = label
    group.WaveformOriginality = originality
    group.NumberOfWaveformChannels, group.NumberOfWaveformSamples = samples.shape
    group.SamplingFrequency = rate
    group.WaveformBitsAllocated = 8 * stored_type.itemsize
    group.WaveformSampleInterpretation = interpretation
    group.ChannelDefinitionSequence = []
    for lead in leads:
        source, unit, channel = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        prefix = {"SCPECG": "5.6.3-9-", "MDC": "2:"}.get(scheme)
        source.CodeValue = f"{prefix}{codes[lead]}" if prefix and lead in codes else "0"
        source.CodingSchemeDesignator, source.CodeMeaning = scheme, f"Lead {lead} (Einthoven)"
        unit.CodeValue, unit.CodingSchemeDesignator, unit.CodeMeaning = units, "UCUM", units
        channel.ChannelSourceSequence = [source]
        channel.ChannelSensitivity, channel.ChannelBaseline = sensitivity, baseline
        if correction:
            channel.ChannelSensitivityCorrectionFactor = correction
        channel.ChannelSensitivityUnitsSequence = [unit]
        group.ChannelDefinitionSequence.append(channel)
    if padding is not None:
        group.add_new("WaveformPaddingValue", "OW", np.array([padding], stored_type).tobytes())
    group.add_new("WaveformData", "OW", np.ascontiguousarray(samples.T, stored_type).tobytes())
    return group


def dicom_file(*groups: Any, syntax: str = "1.2.840.10008.1.2.1", sop_class: str = "1.1", **values: Any) -> bytes:
    dataset = pydicom.Dataset()
    dataset.SOPClassUID = sop_class if len(sop_class) > 3 else f"1.2.840.10008.5.1.4.1.1.9.{sop_class}"
    dataset.SOPInstanceUID = "1.2.3"
    dataset.WaveformSequence = list(groups)
    for name, value in values.items():
        setattr(dataset, name, value)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(out, dataset, enforce_file_format=True)
    return out.getvalue()


@pytest.mark.parametrize("scheme", ["SCPECG", "MDC", "words"])
@pytest.mark.parametrize("sop_class", ["1.1", "1.2", "1.3"])
def test_a_dicom_ecg_is_read_as_stored(tmp_path: Path, scheme: str, sop_class: str) -> None:
    samples = an_ecg()
    record, facts = read_bytes(dicom, dicom_file(dicom_group(samples, scheme=scheme), sop_class=sop_class), tmp_path)
    assert record.leads == LEADS
    assert record.sampling_rate_hz == 500
    assert record.digital is not None
    assert np.array_equal(record.digital.digital, samples)
    np.testing.assert_allclose(record.signal_mv, samples * 0.0025, rtol=1e-12)
    assert facts.units == "uV"


@pytest.mark.parametrize(
    ("units", "sensitivity", "correction", "baseline", "step_mv", "offset_mv"),
    [
        ("uV", "4.88", "1", "0", 0.00488, 0),
        ("mV", "0.005", None, "0.1", 0.005, 0.1),
        ("uV", "5", "0.5", "-250", 0.0025, -0.25),
        ("V", "0.000001", "1", "0", 0.001, 0),
        ("nV", "-1000", "1", "0", -0.001, 0),
    ],
)
def test_dicom_sensitivity_correction_baseline_and_units(
    tmp_path: Path,
    units: str,
    sensitivity: str,
    correction: str | None,
    baseline: str,
    step_mv: float,
    offset_mv: float,
) -> None:
    samples = an_ecg(2)
    group = dicom_group(
        samples, LEADS[:2], units=units, sensitivity=sensitivity, correction=correction, baseline=baseline
    )
    record, facts = read_bytes(dicom, dicom_file(group), tmp_path)
    np.testing.assert_allclose(record.signal_mv, samples * step_mv + offset_mv, rtol=1e-9, atol=1e-12)
    assert facts.units == units


@pytest.mark.parametrize(
    ("interpretation", "low", "high"),
    [("SS", -32768, 32767), ("US", 0, 65535), ("SB", -128, 127), ("UB", 0, 255), ("SL", -(2**31), 2**31 - 1)],
)
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
def test_dicom_samples_of_every_size_sign_and_byte_order(
    tmp_path: Path, interpretation: str, low: int, high: int, syntax: str
) -> None:
    samples = RANDOM.integers(low, high, (2, 50), endpoint=True)
    samples[0, :2] = low, high
    order = ">" if syntax.endswith(".2.2") else "<"
    group = dicom_group(samples, LEADS[:2], interpretation=interpretation, order=order, sensitivity="1")
    record, _ = read_bytes(dicom, dicom_file(group, syntax=syntax), tmp_path)
    assert np.array_equal(np.rint(record.signal_mv * 1000), samples)
    assert (record.digital is not None) == (interpretation in ("SB", "UB"))  # -32768 is taken, or too large


def test_the_rhythm_is_read_not_the_median_whatever_their_order(tmp_path: Path) -> None:
    rhythm, median = an_ecg(3, 900), an_ecg(12, 300)
    groups = [
        dicom_group(median, label="MEDIAN BEAT", originality="DERIVED"),
        dicom_group(an_ecg(1, 2000), ("II",), label=None),
        dicom_group(rhythm, ("I", "II", "V1"), label=None),
    ]
    record, facts = read_bytes(dicom, dicom_file(*groups), tmp_path)
    assert record.leads == ("I", "II", "V1")
    assert record.digital is not None
    assert np.array_equal(record.digital.digital, rhythm)
    assert [note for note in facts.comments if note.startswith("not read")] == [
        "not read: median beat, 12 leads x 0.6 s",
        "not read: original, 1 leads x 4 s",
    ]
    with pytest.raises(Rejected, match="median"):
        read_bytes(dicom, dicom_file(groups[0]), tmp_path)


def test_dicom_padding_is_invalid_but_a_value_that_the_signal_crosses_is_not(tmp_path: Path) -> None:
    samples = np.abs(an_ecg(2, 100)) + 1
    samples[1] += 1000
    samples[0, 90:] = 0
    samples[1, :5] = 0
    group = dicom_group(samples, LEADS[:2], padding=0)
    record, _ = read_bytes(dicom, dicom_file(group), tmp_path)
    assert np.array_equal(np.isnan(record.signal_mv), samples == 0)
    samples[0, 50] = -5
    record, facts = read_bytes(dicom, dicom_file(dicom_group(samples, LEADS[:2], padding=0)), tmp_path)
    assert np.isnan(record.signal_mv).sum(axis=1).tolist() == [0, 5]
    assert any("padding value 0" in note for note in facts.comments)


def test_a_dicom_file_tells_patient_time_device_and_interpretation(tmp_path: Path) -> None:
    note, name, value = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    note.UnformattedTextValue = "Sinus rhythm"
    name.CodeMeaning, value.NumericValue, value.ConceptNameCodeSequence = "QRS Duration", "92", [name]
    content = dicom_file(
        dicom_group(an_ecg()),
        PatientID="P7",
        PatientSex="F",
        PatientBirthDate="19500601",
        AcquisitionDateTime="20200531101112.5",
        Manufacturer="Maker",
        ManufacturerModelName="Model 1",
        WaveformAnnotationSequence=[note, value],
    )
    _, facts = read_bytes(dicom, content, tmp_path)
    assert (facts.patient_id, facts.sex, facts.age_years) == ("P7", "female", 69)
    assert facts.recorded_at == datetime(2020, 5, 31, 10, 11, 12)
    assert facts.statements == ("Sinus rhythm",)
    assert "device Maker Model 1" in facts.comments
    assert "QRS Duration: 92" in facts.comments
    _, facts = read_bytes(dicom, dicom_file(dicom_group(an_ecg()), PatientAge="006M", PatientSex="O"), tmp_path)
    assert (facts.sex, facts.age_years) == (None, 0.5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"units": "mmHg"}, "unknown_units"),
        ({"sensitivity": "0"}, "unreadable_header"),
        ({"rate": "0"}, "unreadable_header"),
    ],
)
def test_dicom_without_a_scale_is_rejected(tmp_path: Path, change: dict[str, str], reason: str) -> None:
    with pytest.raises(Rejected) as rejected:
        read_bytes(dicom, dicom_file(dicom_group(an_ecg(), **change)), tmp_path)  # type: ignore[arg-type]
    assert rejected.value.reason == reason


def test_dicom_that_is_no_ecg_or_lies_about_its_length_is_rejected(tmp_path: Path) -> None:
    group = dicom_group(an_ecg())
    with pytest.raises(Rejected, match=r"unknown_format.*CT Image"):
        read_bytes(dicom, dicom_file(group, sop_class="1.2.840.10008.5.1.4.1.1.2"), tmp_path)
    for count, reason in ((701, "truncated"), (4_000_000_000, "too_large"), (0, "unreadable_header")):
        group.NumberOfWaveformSamples = count
        with pytest.raises(Rejected) as rejected:
            read_bytes(dicom, dicom_file(group), tmp_path)
        assert rejected.value.reason == reason
    with pytest.raises(Rejected, match="uncompressed transfer syntax"):
        read_bytes(dicom, dicom_file(group, syntax="1.2.840.10008.1.2.1.99"), tmp_path)


@pytest.mark.parametrize("value_type", [b"LO", b""], ids=["explicit", "implicit"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_dicom_file_of_nothing_but_elements_is_rejected_at_once(
    tmp_path: Path, value_type: bytes, nested: bool
) -> None:
    """A million of them, 8 MB, would take pydicom 6 s, and as empty items 40 s and 5 GB."""
    syntax = "1.2.840.10008.1.2.1" if value_type else "1.2.840.10008.1.2"
    element = struct.pack("<HH2sH", 0x0009, 0x1001, value_type, 0)
    many = element * 2**20
    if nested:
        head = struct.pack("<HH2sHI", 0x0040, 0xB020, b"SQ", 0, len(many) + 8)
        head = head if value_type else struct.pack("<HHI", 0x0040, 0xB020, len(many) + 8)
        many = head + struct.pack("<HHI", 0xFFFE, 0xE000, len(many)) + many
    content = dicom_file(dicom_group(an_ecg()), syntax=syntax)
    assert read_bytes(dicom, content, tmp_path)[0].n_samples == 700
    started = time.process_time()
    with pytest.raises(Rejected, match=r"too_large: .*50000 data elements"):
        read_bytes(dicom, content + many, tmp_path)
    assert time.process_time() - started < 2


# ---- EDF


def edf_signal(samples: np.ndarray, label: str, units: str = "uV", rate: float = 200, **values: Any) -> Any:
    ranges = {"physical_range": (-3276.8, 3276.7), "digital_range": (-32768, 32767), **values}
    return edfio.EdfSignal.from_digital(samples.astype(np.int16), rate, label=label, physical_dimension=units, **ranges)


def edf_file(*signals: Any, **values: Any) -> bytes:
    out = io.BytesIO()
    edfio.Edf(list(signals), data_record_duration=1, **values).write(out)
    return out.getvalue()


def test_an_edf_ecg_is_read_as_stored_and_other_signals_are_left_out(tmp_path: Path) -> None:
    samples = an_ecg(4, 800, largest=2000)
    content = edf_file(
        edf_signal(samples[0], "EEG Fpz-Cz"),
        edf_signal(samples[1], "ECG II"),
        edf_signal(samples[2], "EKG AVR", "mV", physical_range=(-10, 10), digital_range=(-2048, 2047)),
        edf_signal(samples[3], "V1", "mV", physical_range=(5, -5), digital_range=(-5000, 5000)),
        edf_signal(np.zeros(40), "Resp", "", rate=10),
        annotations=[edfio.EdfAnnotation(1.0, None, "walking")],
        patient=edfio.Patient(code="P1", sex="M", birthdate=date(1960, 2, 3)),
        recording=edfio.Recording(startdate=date(2020, 2, 2)),
        starttime=datetime(2020, 2, 2, 3, 4, 5).time(),
    )
    record, facts = read_bytes(edf, content, tmp_path)
    assert record.leads == ("II", "aVR", "V1")
    assert record.sampling_rate_hz == 200
    assert record.digital is not None
    assert np.array_equal(record.digital.digital, samples[1:])
    ii, avr, v1 = samples[1:].astype(float)
    np.testing.assert_allclose(record.signal_mv[0], ii / 10 / 1000, atol=1e-12)
    np.testing.assert_allclose(record.signal_mv[1], (avr + 2048) * 20 / 4095 - 10, atol=1e-12)
    np.testing.assert_allclose(record.signal_mv[2], -v1 / 1000, atol=1e-12)  # turned over by its header
    assert (facts.format, facts.patient_id, facts.sex, facts.age_years) == ("EDF+", "P1", "male", 59)
    assert facts.recorded_at == datetime(2020, 2, 2, 3, 4, 5)
    assert facts.comments[0] == "not read: EEG Fpz-Cz, Resp"


def test_the_lowest_value_of_edf_is_a_value(tmp_path: Path) -> None:
    samples = an_ecg(1, 400)
    samples[0, 7] = INVALID
    record, _ = read_bytes(edf, edf_file(edf_signal(samples[0], "ECG I")), tmp_path)
    assert record.digital is None
    assert record.signal_mv[0, 7] == pytest.approx(-3.2768)
    assert np.array_equal(np.rint(record.signal_mv * 10_000), samples)


def test_leads_of_edf_that_are_no_standard_leads_keep_their_labels(tmp_path: Path) -> None:
    record, _ = read_bytes(
        edf, edf_file(edf_signal(an_ecg(1, 400)[0], "ECG1"), edf_signal(an_ecg(1, 400)[0], "EOG")), tmp_path
    )
    assert record.leads == ("ECG1",)


@pytest.mark.parametrize(
    ("label", "lead"),
    [
        *((f"{prefix}{lead}", lead) for prefix in ("", "ECG ", "EKG-", "ekg_", "Lead ") for lead in LEADS),
        *((lead.upper(), lead) for lead in LEADS),
        ("ECG II-Ref", "II"),
        ("Lead I (Einthoven)", "I"),
        ("MLII", "MLII"),
        ("ECG", "ECG"),
        ("V10", "V10"),
        ("EEG V1", "EEG V1"),
    ],
)
def test_labels_mean_leads(label: str, lead: str) -> None:
    assert lead_of_label(label) == lead


@pytest.mark.parametrize(
    ("at", "text", "reason"),
    [
        (236, "400     ", "truncated"),
        (236, "-1      ", "unreadable_header"),
        (236, "99999999", "truncated"),
        (244, "0       ", "unreadable_header"),
        (192, "EDF+D", "unreadable_signal"),
        (256 + 96, "mmHg    ", "unknown_units"),
        (256, "EEG             ", "no_standard_lead"),
        (256 + 104, "1       1       ", "unreadable_header"),
        (252, "2   ", "unreadable_header"),
    ],
)
def test_edf_with_another_header_is_rejected(tmp_path: Path, at: int, text: str, reason: str) -> None:
    content = edf_file(edf_signal(an_ecg(1, 400)[0], "ECG I"))
    assert read_bytes(edf, content, tmp_path)[0].n_samples == 400
    changed = content[:at] + text.encode() + content[at + len(text) :]
    with pytest.raises(Rejected) as rejected:
        read_bytes(edf, changed, tmp_path)
    assert rejected.value.reason == reason


# ---- SCP-ECG

OWN_TABLES: list[OwnTable] = [
    [("0", "value", 0), ("10", "value", -1), ("110", "table", 2), ("111", "bits", 16)],
    [("1", "bits", 6), ("00", "table", 1), ("01", "table", 3)],
    [("0", "bits", 16), ("10", "table", 1), ("11", "value", 777)],
]


@pytest.mark.parametrize("differences", [0, 1, 2])
@pytest.mark.parametrize("tables", [None, "default", OWN_TABLES], ids=["stored", "default", "own"])
def test_an_scp_file_is_read_as_written(tmp_path: Path, differences: int, tables: Any) -> None:
    samples = an_ecg(8, 701, largest=32767)
    leads = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")
    written = ScpFile(samples, leads, step_nv=4880, interval_us=1000, differences=differences, tables=tables)
    record, facts = read_bytes(scp, written.content(), tmp_path)
    assert record.leads == leads
    assert record.sampling_rate_hz == 1000
    assert record.digital is not None
    assert np.array_equal(record.digital.digital, samples)
    np.testing.assert_allclose(record.signal_mv, samples * 0.00488, rtol=1e-12)
    assert (facts.format, facts.units) == ("SCP-ECG", "nV")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.lists(st.integers(-32768, 32767), min_size=1, max_size=40),
    differences=st.integers(0, 2),
    tables=st.sampled_from([None, "default", OWN_TABLES]),
)
def test_any_samples_come_back_from_scp(tmp_path: Path, samples: list[int], differences: int, tables: Any) -> None:
    """Differences of 16-bit samples need up to 18 bits: they are written and read modulo 2^16."""
    written = ScpFile(np.array([samples]), ("V7",), differences=differences, tables=tables, step_nv=1000)
    record, _ = read_bytes(scp, written.content(), tmp_path)
    assert record.leads == ("V7",)
    assert np.rint(record.signal_mv[0] * 1000).tolist() == samples


def test_the_worked_example_of_the_standard(tmp_path: Path) -> None:
    """EN 1064, annex C: 28 samples as second differences by the default table, in 15 bytes."""
    samples = [
        13,
        14,
        15,
        14,
        16,
        18,
        19,
        20,
        22,
        22,
        23,
        23,
        23,
        22,
        22,
        20,
        17,
        15,
        12,
        8,
        6,
        3,
        1,
        0,
        -2,
        -2,
        -3,
        -3,
    ]
    coded = bytes.fromhex("FF837FE0E6F1536559B65B964B9600")
    leads = struct.pack("<BBIIB", 1, 0b1100, 1, 28, 2)
    rhythm = struct.pack("<HHBBH", 5000, 2000, 2, 0, 16) + coded + b"\0"
    content = assemble({1: b"\xff\0\0", 2: struct.pack("<H", 19999), 3: leads, 6: rhythm})
    record, _ = read_bytes(scp, content, tmp_path)
    assert record.digital is not None
    assert record.digital.digital[0].tolist() == samples
    second = [samples[0], samples[1], *np.diff(samples, 2).tolist()]
    assert huffman(second, "default") == coded  # and the writer that judges the reader writes the same


@pytest.mark.parametrize("beat_step_nv", [2500, 1250])
@pytest.mark.parametrize("tables", [None, "default"])
def test_a_reference_beat_taken_off_at_each_qrs_is_put_back(tmp_path: Path, tables: Any, beat_step_nv: int) -> None:
    """Also where a zone ends with the recording, reaches beyond the beat, or is of another type of beat."""
    samples, beat = an_ecg(3, 1000), an_ecg(3, 300, largest=500)
    qrs = [(0, 1, 40, 150), (0, 200, 320, 610), (1, 620, 700, 740), (0, 790, 900, 1000)]
    written = ScpFile(
        samples if beat_step_nv == 2500 else samples * 2,
        LEADS[:3],
        tables=tables,
        beat=beat,
        beat_fiducial=101,
        qrs=qrs,
        step_nv=beat_step_nv,
        beat_step_nv=beat_step_nv,
    )
    assert not np.array_equal(written._residual([1] * 3), written.rhythm)
    record, _ = read_bytes(scp, written.content(), tmp_path)
    np.testing.assert_allclose(record.signal_mv, samples * 0.0025, rtol=1e-9, atol=1e-9)


def test_rhythm_and_reference_beat_may_have_different_steps(tmp_path: Path) -> None:
    residual, beat = an_ecg(1, 500), an_ecg(1, 100)
    written = ScpFile(
        residual, ("II",), step_nv=5000, beat=beat, beat_step_nv=1000, beat_fiducial=1, qrs=[(0, 101, 101, 200)]
    )
    coded = written._signal(residual, 5000, 2000, 0)
    content = replaced_section(written.content(), 6, coded)
    record, _ = read_bytes(scp, content, tmp_path)
    expected = residual[0] * 0.005
    expected[100:200] += beat[0] * 0.001
    np.testing.assert_allclose(record.signal_mv[0], expected, atol=1e-12)


def replaced_section(content: bytes, number: int, section: bytes) -> bytes:
    """The file with another content of one section."""
    sections = {}
    for at in range(32, 22 + 120, 10):
        found, length, place = struct.unpack_from("<HII", content, at)
        if length:
            sections[found] = content[place + 15 : place - 1 + length]
    return assemble(sections | {number: section})


def test_leads_recorded_one_after_another_are_invalid_outside_their_time(tmp_path: Path) -> None:
    samples = an_ecg(4, 250)
    written = ScpFile(samples, ("I", "II", "V1", "V2"), first=[1, 1, 251, 251])
    record, _ = read_bytes(scp, written.content(), tmp_path)
    assert record.n_samples == 500
    assert record.digital is not None
    assert np.array_equal(record.digital.digital[:2, :250], samples[:2])
    assert np.array_equal(record.digital.digital[2:, 250:], samples[2:])
    assert np.isnan(record.signal_mv[:2, 250:]).all()
    assert np.isnan(record.signal_mv[2:, :250]).all()


def test_samples_counted_from_0_are_told_by_the_length_of_their_data(tmp_path: Path) -> None:
    """As some devices write them; where the data are compressed nothing tells."""
    samples = an_ecg(2, 300)
    leads = struct.pack("<BBIIBIIB", 2, 4, 0, 300, 1, 0, 300, 2)
    stored = ScpFile(samples, ("I", "II"), tables=None).content()
    record, _ = read_bytes(scp, replaced_section(stored, 3, leads), tmp_path)
    assert record.digital is not None
    assert np.array_equal(record.digital.digital, samples)
    coded = ScpFile(samples, ("I", "II"), tables="default").content()
    with pytest.raises(Rejected, match="counted from 1"):
        read_bytes(scp, replaced_section(coded, 3, leads), tmp_path)


def test_an_scp_file_tells_patient_time_device_and_interpretation(tmp_path: Path) -> None:
    tags = {
        2: b"P-17\0",
        5: struct.pack("<HBB", 1950, 6, 1),
        8: b"\x02",
        14: bytes(8) + b"MODEL\0" + bytes(22) + b"prog\0serial\0soft\0impl\0Maker\0",
        25: struct.pack("<HBB", 2020, 5, 31),
        26: bytes([10, 11, 12]),
        27: struct.pack("<H", 5),
        28: struct.pack("<H", 150),
        30: b"a remark\0",
    }
    written = ScpFile(an_ecg(2), ("I", "II"), tags=tags, statements=["Sinus rhythm", "Normal ECG"])
    _, facts = read_bytes(scp, written.content(), tmp_path)
    assert (facts.patient_id, facts.sex, facts.age_years) == ("P-17", "female", 69)
    assert facts.recorded_at == datetime(2020, 5, 31, 10, 11, 12)
    assert facts.statements == ("Sinus rhythm", "Normal ECG")
    assert set(facts.comments) == {
        "device Maker MODEL",
        "remark: a remark",
        "filters: high-pass 0.05 Hz, low-pass 150 Hz",
    }
    written.tags = {4: struct.pack("<HB", 18, 2), 8: b"\x01"}
    _, facts = read_bytes(scp, written.content(), tmp_path)
    assert (facts.sex, facts.age_years) == ("male", 1.5)


def test_what_scp_leaves_open_is_not_guessed(tmp_path: Path) -> None:
    samples, beat = an_ecg(1), an_ecg(1, 100)
    thinned = ScpFile(samples, ("II",), thinned=1)
    with pytest.raises(Rejected, match="bimodal"):
        read_bytes(scp, thinned.content(), tmp_path)
    faster = ScpFile(samples, ("II",), beat=beat, beat_interval_us=1000, qrs=[(0, 1, 1, 50)])
    with pytest.raises(Rejected, match="reference beat at 1000 us"):
        read_bytes(scp, faster.content(), tmp_path)
    both = struct.pack("<HHBBBhI", 1, 1, 1, 9, 1, 5, 0)
    with pytest.raises(Rejected, match="both a value and more bits"):
        read_bytes(scp, replaced_section(ScpFile(samples, ("II",)).content(), 2, both), tmp_path)


def test_a_changed_byte_of_an_scp_file_is_found_by_its_checksums(tmp_path: Path) -> None:
    content = ScpFile(an_ecg(2, 100), ("I", "II")).content()
    assert read_bytes(scp, content, tmp_path)
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 0x10
        with pytest.raises(Rejected):
            read_bytes(scp, bytes(changed), tmp_path)


def test_zones_of_reference_beats_may_not_overlap(tmp_path: Path) -> None:
    """Else 65,535 of them could be added over the whole recording."""
    written = ScpFile(an_ecg(1), ("I",), beat=an_ecg(1, 100), qrs=[(0, 1, 1, 80), (0, 70, 70, 150)])
    with pytest.raises(Rejected, match="QRS 2 from sample 70, the one before to 80"):
        read_bytes(scp, written.content(), tmp_path)


def test_large_scp_files_take_seconds_at_most(tmp_path: Path) -> None:
    """Of the most codes that are decoded; of more than that; of a thousand leads' worth in one place."""
    for n_leads, n_samples, reason in ((7, 524_280, None), (8, 524_280, "too_large"), (40, 20_000, "too_large")):
        leads = struct.pack("<BB", n_leads, 4) + struct.pack("<IIB", 1, n_samples, 9) * n_leads
        rhythm = struct.pack("<HHBB", 1000, 2000, 2, 0) + b"\xff\xff" * n_leads + bytes(65535) * n_leads
        content = assemble({2: struct.pack("<H", 19999), 3: leads, 6: rhythm}, binascii.crc_hqx)
        started = time.process_time()
        if reason is None:
            assert read_bytes(scp, content, tmp_path)[0].n_samples == n_samples
        else:
            with pytest.raises(Rejected) as rejected:
                read_bytes(scp, content, tmp_path)
            assert rejected.value.reason == reason
        assert time.process_time() - started < 5


def test_the_checksum_is_that_of_ccitt() -> None:
    assert checksum(b"123456789") == 0x29B1  # the published check value


# ---- all of them


def test_each_file_is_of_one_format(tmp_path: Path) -> None:
    contents = {dicom: dicom_file(dicom_group(an_ecg())), scp: ScpFile(an_ecg(2), ("I", "II")).content()}
    contents[edf] = edf_file(edf_signal(an_ecg(1, 400)[0], "ECG I"))
    for known, content in contents.items():
        assert [each for each in FORMATS if each.matches(content[:HEAD_BYTES])] == [known]
        (tmp_path / "file").write_bytes(content)
        assert identify(tmp_path / "file") is known
        record, _ = read_file(tmp_path / "file", "own/1")
        assert record.n_samples in (400, 700)
        for length in range(300):
            for each in FORMATS:
                each.matches(content[:length])  # of any beginning, an answer


@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"I,II\n1,2\n", b"%PDF-1.4", bytes(range(256)) * 4])
def test_a_file_of_no_format_is_rejected_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file.bin").write_bytes(content)
    assert identify(tmp_path / "file.bin") is None
    said = {b"": "the file is empty", b"%PDF-1.4": "a PDF holds a drawing and not the samples; .*DICOM"}
    expected = said.get(content, "expected one of WFDB, .*DICOM.*EDF.*SCP-ECG; found none of them")
    with pytest.raises(Rejected, match=rf"unknown_format: {expected}"):
        read_file(tmp_path / "file.bin", "x")


def test_what_is_no_file_is_rejected_at_once(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "nothing", ".", "a\0b"):
        with pytest.raises(Rejected):
            read_file(tmp_path / name, "x")


@pytest.mark.parametrize(("reader", "package", "extra"), [(dicom, "pydicom", "dicom"), (edf, "edfio", "edf")])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: Any, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs {package}: pip install 'ecgfm\[{extra}\]'"):
        reader.read(tmp_path / "file", "x")


def valid_files() -> dict[str, tuple[Any, bytes, Callable[[bytes], bytes]]]:
    """A small valid file of each kind, its reader, and what is done to a damaged one so that the damage is seen."""
    beat = ScpFile(
        an_ecg(2, 120), ("I", "II"), beat=an_ecg(2, 30), beat_fiducial=9, qrs=[(0, 20, 25, 45), (0, 60, 70, 95)]
    )
    tags = {2: b"P\0", 5: struct.pack("<HBB", 1950, 6, 1), 14: bytes(45), 25: struct.pack("<HBB", 2020, 5, 31)}
    note = pydicom.Dataset()
    note.UnformattedTextValue = "Sinus rhythm"
    a_dicom = dicom_file(
        dicom_group(an_ecg(2, 100), LEADS[:2], padding=-5),
        dicom_group(an_ecg(2, 20), LEADS[:2], label="MEDIAN"),
        PatientAge="012Y",
        AcquisitionDateTime="20200531101112",
        WaveformAnnotationSequence=[note],
    )
    an_edf = edf_file(
        edf_signal(an_ecg(1, 400)[0], "ECG I"),
        edf_signal(an_ecg(1, 20)[0], "Resp", rate=10),
        annotations=[edfio.EdfAnnotation(1.0, None, "walking")],
    )

    def as_it_is(content: bytes) -> bytes:
        return content

    return {
        "dicom": (dicom, a_dicom, as_it_is),
        "edf": (edf, an_edf, as_it_is),
        "scp": (scp, ScpFile(an_ecg(2, 120), ("I", "II"), tags=tags, statements=["x"]).content(), resealed),
        "scp own tables": (scp, ScpFile(an_ecg(2, 120), ("I", "II"), tables=OWN_TABLES).content(), resealed),
        "scp reference beat": (scp, beat.content(), resealed),
        "scp stored": (scp, ScpFile(an_ecg(2, 120), ("I", "II"), tables=None).content(), as_it_is),
    }


def most_memory_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


VALID = valid_files()
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["set", "set", "set", "set", "cut", "insert", "end"]),
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from(
                [b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0" * 4, b"99999999", b"-1      ", b"1e308   ", b"nan"]
            ),
        ),
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.parametrize("kind", VALID)
@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS, early=st.booleans())
def test_damage_is_read_or_rejected(
    tmp_path: Path, kind: str, edits: list[tuple[float, str, bytes]], early: bool
) -> None:
    """No other exception, within 5 s and 1 GB. `early`: all damage within the first 600 bytes, where headers are."""
    reader, content, mended = VALID[kind]
    before_kib = most_memory_kib()  # of this process so far: other tests need more
    for share, what, value in edits:
        at = int(share * (min(len(content), 600) if early else len(content)))
        if what == "set":
            content = content[:at] + value + content[at + len(value) :]
        elif what == "insert":
            content = content[:at] + value + content[at:]
        else:
            content = content[:at] + (content[at + len(value) :] if what == "cut" else b"")
    try:
        record, facts = read_bytes(reader, mended(content), tmp_path)
    except Rejected:
        pass
    else:
        assert record.signal_mv.shape == (len(record.leads), record.n_samples)
        assert np.isfinite(record.sampling_rate_hz)
        assert record.sampling_rate_hz > 0
        assert facts.format
    assert most_memory_kib() - before_kib < 2**20


def test_undamaged_files_are_read(tmp_path: Path) -> None:
    """Else the test above would say nothing."""
    for reader, content, mended in VALID.values():
        assert mended(content) == content
        assert read_bytes(reader, content, tmp_path)[0].n_samples in (100, 120, 400)


# ---- real files


def real_files(shared: Path) -> dict[str, EcgRecord]:
    """Every recording below vendor/ that these three readers read."""
    records = {}
    for path in sorted((shared / "data" / "vendor").rglob("*")):
        if path.suffix.lower() in (".dcm", ".edf", ".scp") and path.name != "62.SCP":
            records[path.name], _ = read_file(path, path.stem)
    return records


def test_real_files_obey_einthoven_and_goldberger(shared: Path) -> None:
    """Within a step of the stored integers where six limb leads are stored; the EDF file stores rounded ones."""
    records = real_files(shared)
    assert set(records) == {
        *("Example.dcm", "Example.scp", "demo.scp", "0000050.ECG.edf"),
        *("anonymous_ecg.dcm", "waveform_ecg.dcm", "example-DICOM1.dcm"),
    }
    for name, record in records.items():
        if not set(LIMB) <= set(record.leads):
            continue
        assert record.digital is not None
        step_mv = 1 / record.digital.adc_gain_per_mv[0]
        mv = dict(zip(record.leads, record.signal_mv, strict=True))
        steps = 3 if name.endswith("edf") else 1
        assert np.abs(mv["I"] + mv["III"] - mv["II"]).max() <= steps * step_mv * 1.01
        assert np.abs(mv["aVR"] + mv["aVL"] + mv["aVF"]).max() <= steps * step_mv * 1.01
        assert np.std(mv["II"]) > 0.05


def test_one_ecg_in_dicom_scp_and_aecg_is_the_same_to_the_last_digit(shared: Path) -> None:
    """Published as an example in all three: as integers, as Huffman codes and as text."""
    pytest.importorskip("defusedxml")
    records = real_files(shared)
    one = records["Example.dcm"]
    aecg, _ = read_file(shared / "data/vendor/FDA/subject1_0.xml", "x")
    assert one.digital is not None
    for other in (records["Example.scp"], aecg):
        rows = [other.leads.index(lead) for lead in one.leads]
        assert other.digital is not None
        assert np.array_equal(one.digital.digital, other.digital.digital[rows])
        np.testing.assert_allclose(one.signal_mv, other.signal_mv[rows], rtol=1e-12)


def test_a_device_that_writes_scp_in_its_own_way_is_told_so(shared: Path) -> None:
    """It counts places from 0, its size field is not where the standard has it, its codes are none."""
    with pytest.raises(Rejected, match=r"unreadable_header: .*section 0 says it is at byte 6, expected 7"):
        read_file(shared / "data/vendor/KaibinBao/62.SCP", "x")


def test_an_edf_file_of_annotations_alone_is_no_ecg(shared: Path) -> None:
    with pytest.raises(Rejected, match="nothing but annotations"):
        read_file(shared / "data/wfdb-formats/test_edfann.edf", "x")
