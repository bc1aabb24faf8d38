"""DICOM waveforms: 12-lead, general and ambulatory ECG (PS3.3 A.34, C.10.9), decoded with pydicom.

A file holds multiplex groups, each of channels sampled together: usually the rhythm and a median beat. The rhythm
with the most standard leads is read.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ecgfm.ecg import INVALID, LEADS, MAX_SAMPLES, Digital, EcgRecord, FileFacts, InputError, Rejected
from ecgfm.formats.lead_names import lead_of_code, lead_of_label
from ecgfm.formats.raw_files import check_drive

NAME = "DICOM waveform"

MAX_BYTES = 4 * MAX_SAMPLES + 8 * 2**20
"""Of a file that is read: the largest signal in 32 bits, and 8 MiB beside it."""

MAX_ELEMENTS = 50_000
"""Data elements and items in a file; real ones have up to some thousand. pydicom spends up to 40 us and 5 KB on each,
so that 40 MB of empty ones would take minutes and 7 GB."""

_ECG_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.9.1.1": "12-lead ECG",
    "1.2.840.10008.5.1.4.1.1.9.1.2": "general ECG",
    "1.2.840.10008.5.1.4.1.1.9.1.3": "ambulatory ECG",
    "1.2.840.10008.5.1.4.1.1.9.1.4": "general 32-bit ECG",
}
_ORDER_OF_BYTES = {"1.2.840.10008.1.2": "<", "1.2.840.10008.1.2.1": "<", "1.2.840.10008.1.2.2": ">"}
"""By transfer syntax. A compressed one (deflated) can be a thousand times its file, and no device writes it."""

_ITEM = {"<": b"\xfe\xff\x00\xe0", ">": b"\xff\xfe\xe0\x00"}
_TRANSFER_SYNTAX, _UNDEFINED_LENGTH = b"\x02\x00\x10\x00", 0xFFFFFFFF
_LONG_FORM = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
"""Types of values whose length has four bytes, in explicit form (PS3.5, 7.1.2)."""

_SAMPLE_TYPES = {"SB": "i1", "UB": "u1", "SS": "i2", "US": "u2", "SL": "i4", "UL": "u4"}
_UNITS_PER_MV = {"V": 1e-3, "mV": 1.0, "uV": 1e3, "nV": 1e6}
_LEAD_CODE = re.compile(r"(?:5\.6\.3-9-|2:)(\d{1,5})")
_MEDIAN = re.compile(r"median|averag|representative|template", re.IGNORECASE)
_AGE_YEARS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}

_DAMAGE = (
    *(ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, EOFError, struct.error, LookupError),
    *(NotImplementedError, OverflowError, RecursionError, MemoryError, AssertionError),
)
"""What pydicom raises for malformed content, at reading or at the first look at a value."""


def matches(head: bytes) -> bool:
    """Whether a file begins as a DICOM file of any kind does (PS3.10, 7.1)."""
    return head[128:132] == b"DICM"


def read(path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
    """The rhythm of a DICOM ECG.

    Stored values up to 16 bits stay as they are. Where a file names a padding value, samples of it are invalid; but
    not where the lead's other samples lie on both sides of it: some writers name 0, and a signal crosses 0.

    Raises:
        InputError: pydicom is not installed.
        Rejected: `unknown_format` (DICOM, but no ECG), `too_large`, `unreadable_header`, `unreadable_signal`,
            `truncated` or `unknown_units`.
    """
    try:
        import pydicom
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ModuleNotFoundError as error:
        raise InputError("reading DICOM needs pydicom: pip install 'ecgfm[dicom]'") from error
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise Rejected("too_large", f"{path.name}: expected at most {MAX_BYTES} bytes, found {size}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # values against the standard that do no harm
            content = path.read_bytes()
            order = _checked_order(content)
            dataset = pydicom.dcmread(io.BytesIO(content))
            return _record(dataset, order, record_id)
    except (InvalidDicomError, BytesLengthException, *_DAMAGE) as error:
        check_drive(error, str(path))
        message = f"{type(error).__name__}: {error}".replace(str(path), path.name)
        raise Rejected("unreadable_signal", f"DICOM: {message[:200]}") from error


def _checked_order(content: bytes) -> str:
    """The byte order of a file, once it is known to be uncompressed and to hold no absurd number of data elements.

    Elements are counted without building any (PS3.5, 7.1 and 7.5): sequences and items are stepped into, other values
    over. An element is in explicit form if it has two capitals where that form names the type of its value: the forms
    may be mixed, in what a device kept of another's file. The elements of group 2, about the file itself, come first,
    in little-endian order whatever the others are in.
    """
    at, count, in_meta, syntax = 132, 0, True, "none"
    order, item = "<", _ITEM["<"]
    while at + 8 <= len(content):
        count += 1
        if count > MAX_ELEMENTS:
            raise Rejected("too_large", f"DICOM: expected at most {MAX_ELEMENTS} data elements, found more")
        if in_meta and content[at : at + 2] != b"\x02\x00":
            if syntax not in _ORDER_OF_BYTES:
                break
            in_meta, order, item = False, _ORDER_OF_BYTES[syntax], _ITEM[_ORDER_OF_BYTES[syntax]]
        if content[at : at + 2] == item[:2]:  # an item, or the end of one or of a sequence
            at += 8
            continue
        value_type, start = content[at + 4 : at + 6], at + 8
        if not (value_type.isalpha() and value_type.isupper()):
            (length,) = struct.unpack_from(order + "I", content, at + 4)
        elif value_type in _LONG_FORM:
            (length,), start = struct.unpack_from(order + "I", content, at + 8), at + 12
        else:
            (length,) = struct.unpack_from(order + "H", content, at + 6)
        if in_meta and content[at : at + 4] == _TRANSFER_SYNTAX:
            syntax = content[start : start + length].rstrip(b"\0 ").decode("latin-1")
        is_sequence = value_type == b"SQ" or length == _UNDEFINED_LENGTH or content[start : start + 4] == item
        at = start if is_sequence else start + length
    if syntax not in _ORDER_OF_BYTES:
        raise Rejected("unreadable_signal", f"expected an uncompressed transfer syntax, found {syntax[:80]}")
    return order


def _record(dataset: Any, order: str, record_id: str) -> tuple[EcgRecord, FileFacts]:
    kind = str(dataset.get("SOPClassUID", ""))
    if kind not in _ECG_CLASSES:
        named = getattr(dataset.get("SOPClassUID"), "name", "no class")
        raise Rejected("unknown_format", f"DICOM: expected {', '.join(_ECG_CLASSES.values())}, found {named}")
    groups = list(dataset.get("WaveformSequence") or ())
    if not groups:
        raise Rejected("unreadable_signal", "DICOM: expected a waveform sequence, found none")
    rhythms = [group for group in groups if not _is_median(group)]
    if not rhythms:
        raise Rejected("unreadable_signal", "DICOM: expected a rhythm, found nothing but median beats")
    group = max(rhythms, key=_worth)  # of equals the first
    notes = [f"not read: {_shown(other)}" for other in groups if other is not group]
    record, units, more_notes = _decode(group, order, record_id)
    return record, _facts(dataset, _ECG_CLASSES[kind], units, (*more_notes, *notes), group)


def _is_median(group: Any) -> bool:
    return bool(_MEDIAN.search(str(group.get("MultiplexGroupLabel") or "")))


def _worth(group: Any) -> tuple[bool, int, int]:
    """What makes a group the rhythm: not derived from another, many standard leads, long."""
    original = str(group.get("WaveformOriginality") or "ORIGINAL") == "ORIGINAL"
    return original, len(set(_leads(group)) & set(LEADS)), int(group.NumberOfWaveformSamples)


def _leads(group: Any) -> list[str]:
    return [_lead(channel) for channel in group.ChannelDefinitionSequence]


def _lead(channel: Any) -> str:
    """A channel's lead: by its code, or by the words beside it."""
    (source, *_) = channel.ChannelSourceSequence
    code = _LEAD_CODE.fullmatch(str(source.get("CodeValue") or ""))
    if code:
        return lead_of_code(int(code[1]))
    return lead_of_label(str(channel.get("ChannelLabel") or source.get("CodeMeaning") or "unnamed"))


def _shown(group: Any) -> str:
    label = str(group.get("MultiplexGroupLabel") or group.get("WaveformOriginality") or "a group").lower()
    seconds = float(group.NumberOfWaveformSamples) / float(group.SamplingFrequency)
    return f"{label[:40]}, {group.NumberOfWaveformChannels} leads x {seconds:g} s"


def _decode(group: Any, order: str, record_id: str) -> tuple[EcgRecord, str, list[str]]:
    """The signal of a multiplex group, the units it is stored in, and remarks."""
    n_leads, n_samples = int(group.NumberOfWaveformChannels), int(group.NumberOfWaveformSamples)
    rate_hz = float(group.SamplingFrequency)
    interpretation = str(group.WaveformSampleInterpretation)
    if interpretation not in _SAMPLE_TYPES:
        raise Rejected("unreadable_signal", f"DICOM: expected linear samples, found {interpretation!r}")
    stored_type = np.dtype(order + _SAMPLE_TYPES[interpretation])
    if int(group.WaveformBitsAllocated) != 8 * stored_type.itemsize:
        raise Rejected("unreadable_signal", f"DICOM: {group.WaveformBitsAllocated} bits as {interpretation}")
    if n_leads < 1 or n_samples < 1 or not 0 < rate_hz < math.inf:
        raise Rejected("unreadable_header", f"DICOM: {n_leads} leads x {n_samples} samples at {rate_hz:g} Hz")
    if n_leads * n_samples > MAX_SAMPLES:
        raise Rejected("too_large", f"expected at most {MAX_SAMPLES} samples, found {n_leads} leads x {n_samples}")
    content = bytes(group.WaveformData)
    if len(content) < n_leads * n_samples * stored_type.itemsize:
        found = len(content) // (n_leads * stored_type.itemsize)
        raise Rejected("truncated", f"expected {n_samples} samples x {n_leads} leads, found {found} x {n_leads}")
    channels = list(group.ChannelDefinitionSequence)
    if len(channels) != n_leads:
        raise Rejected("unreadable_header", f"DICOM: expected {n_leads} channel definitions, found {len(channels)}")
    stored = np.frombuffer(content, stored_type, n_leads * n_samples).reshape(n_samples, n_leads).T.astype(np.int64)
    scales = [_scale(channel) for channel in channels]
    gain, baseline = (np.array(column) for column in zip(*[scale[:2] for scale in scales], strict=True))
    padding, notes = _padding(group, stored_type), []
    invalid = np.zeros(stored.shape, dtype=bool)
    if padding is not None:
        padded = stored == padding
        inside = (stored.min(axis=1) < padding) & (padding < stored.max(axis=1))
        invalid = padded & ~inside[:, None]
        if (padded & inside[:, None]).any():
            notes.append(f"padding value {padding} is within the signal's range and taken as a value")
    fits = stored.max() < -INVALID and np.all((stored > INVALID) | invalid)
    signal: Digital | np.ndarray
    if fits:
        signal = Digital(np.where(invalid, INVALID, stored).astype(np.int16), gain, baseline)
    else:
        signal = np.where(invalid, np.nan, (stored - baseline[:, None]) / gain[:, None])
    units = ", ".join(dict.fromkeys(scale[2] for scale in scales))
    return EcgRecord(record_id, tuple(map(_lead, channels)), rate_hz, signal), units, notes


def _scale(channel: Any) -> tuple[float, float, str]:
    """(ADC units per millivolt, digital value at 0 mV, units): physical = value * sensitivity * correction + baseline
    in the sensitivity's units (C.10.9.1.4)."""
    lead = _lead(channel)
    if "ChannelSensitivity" not in channel:
        raise Rejected("unknown_units", f"{lead}: expected a channel sensitivity, found none")
    (unit, *_) = channel.ChannelSensitivityUnitsSequence
    units = str(unit.get("CodeValue") or "")
    if units not in _UNITS_PER_MV:
        raise Rejected("unknown_units", f"{lead}: expected V, mV, uV or nV, found {units[:40]!r}")
    correction = channel.get("ChannelSensitivityCorrectionFactor")
    step = float(channel.ChannelSensitivity) * (1.0 if correction is None else float(correction))
    offset = float(channel.get("ChannelBaseline") or 0)
    if not (math.isfinite(step) and step != 0 and math.isfinite(offset)):
        raise Rejected("unreadable_header", f"{lead}: expected a finite sensitivity other than 0, found {step:g}")
    gain = _UNITS_PER_MV[units] / step
    if not (math.isfinite(gain) and gain != 0 and math.isfinite(offset / step)):
        raise Rejected("unreadable_header", f"{lead}: a sensitivity of {step:g} {units} is no ECG's")
    return gain, -offset / step, units


def _padding(group: Any, stored_type: np.dtype[Any]) -> int | None:
    content = group.get("WaveformPaddingValue")
    if content is None:
        return None
    if isinstance(content, bytes):
        return int(np.frombuffer(content, stored_type, 1)[0]) if len(content) >= stored_type.itemsize else None
    return int(content)


def _facts(dataset: Any, kind: str, units: str, notes: tuple[str, ...], group: Any) -> FileFacts:
    recorded_at = _time(str(dataset.get("AcquisitionDateTime") or ""))
    for what in ("Acquisition", "Content", "Study"):
        day, clock = dataset.get(f"{what}Date") or "", dataset.get(f"{what}Time") or ""
        recorded_at = recorded_at or _time(f"{day}{clock}")
    device = " ".join(str(dataset.get(name) or "") for name in ("Manufacturer", "ManufacturerModelName")).strip()
    statements, measured = [], []
    for annotation in dataset.get("WaveformAnnotationSequence") or ():
        if annotation.get("UnformattedTextValue"):
            statements.append(str(annotation.UnformattedTextValue).strip())
        elif annotation.get("NumericValue") is not None and annotation.get("ConceptNameCodeSequence"):
            unit = annotation.get("MeasurementUnitsCodeSequence") or [{}]
            of = annotation.ConceptNameCodeSequence[0].get("CodeMeaning")
            measured.append(f"{of}: {annotation.NumericValue} {unit[0].get('CodeValue') or ''}".strip())
    sex: dict[str, Literal["female", "male"]] = {"F": "female", "M": "male"}
    return FileFacts(
        format=f"{NAME} ({kind})",
        units=units,
        patient_id=str(dataset.get("PatientID") or "").strip() or None,
        age_years=_age_years(dataset, recorded_at),
        sex=sex.get(str(dataset.get("PatientSex") or "")),
        recorded_at=recorded_at,
        statements=tuple(filter(None, statements)),
        comments=tuple(filter(None, (f"device {device}" if device else "", _filters(group), *measured, *notes))),
    )


def _filters(group: Any) -> str:
    """The filters of the first channel: a recorder has one setting for all."""
    channel = group.ChannelDefinitionSequence[0]
    names = {"FilterLowFrequency": "high-pass", "FilterHighFrequency": "low-pass", "NotchFilterFrequency": "notch"}
    shown = [f"{name} {float(channel.get(key)):g} Hz" for key, name in names.items() if channel.get(key)]
    return f"filters: {', '.join(shown)}" if shown else ""


def _age_years(dataset: Any, recorded_at: datetime | None) -> float | None:
    age = re.fullmatch(r"(\d{3})([DWMY])", str(dataset.get("PatientAge") or "").strip())
    if age:
        return int(age[1]) * _AGE_YEARS[age[2]]
    born = _time(str(dataset.get("PatientBirthDate") or ""))
    if born is None or recorded_at is None or born > recorded_at:
        return None
    return _whole_years(born.date(), recorded_at.date())


def _whole_years(born: date, on: date) -> float:
    return float(on.year - born.year - ((on.month, on.day) < (born.month, born.day)))


def _time(text: str) -> datetime | None:
    """A DICOM date and time, to the second (PS3.5, 6.2); None where it is not one."""
    for length, form in ((14, "%Y%m%d%H%M%S"), (12, "%Y%m%d%H%M"), (8, "%Y%m%d")):
        if re.match(rf"\d{{{length}}}", text, re.ASCII):
            try:
                return datetime.strptime(text[:length], form)
            except ValueError:
                return None
    return None
