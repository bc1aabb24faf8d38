"""EDF and EDF+ (Kemp et al. 1992, 2003), decoded with edfio. The ECG leads of a file, whatever else is beside them."""

from __future__ import annotations

import math
import re
import warnings
from datetime import date, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ecgfm.ecg import INVALID, LEADS, MAX_SAMPLES, Digital, EcgRecord, FileFacts, InputError, Rejected
from ecgfm.formats.lead_names import lead_of_label
from ecgfm.formats.raw_files import check_drive

NAME = "EDF"

_UNITS_PER_MV = {"v": 1e-3, "mv": 1.0, "uv": 1e3, "\u03bcv": 1e3, "nv": 1e6}  # the micro sign folds to the Greek letter
_ECG_LABEL = re.compile(r"(?:ecg|ekg)", re.IGNORECASE)

_DAMAGE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, OverflowError, ZeroDivisionError)
"""What edfio raises for a malformed header, at reading or at the first look at a value."""


def matches(head: bytes) -> bool:
    """Whether a file begins with a header of EDF: version 0, and a length that goes with its count of signals."""
    if len(head) < 256 or head[:8] != b"0       ":
        return False
    n_bytes, n_signals = head[184:192].strip(), head[252:256].strip()
    return n_bytes.isdigit() and n_signals.isdigit() and int(n_bytes) == 256 * (int(n_signals) + 1)


def read(path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
    """The ECG leads of an EDF file, stored values kept.

    Read are the signals that are standard leads by their label (`ECG II`, `EKG aVR`, `V1`), or where there is none,
    those whose label says ECG; at several rates, those at the rate that most of them have. Annotations are not read.

    Raises:
        InputError: edfio is not installed.
        Rejected: `too_large`, `truncated`, `unreadable_header`, `unreadable_signal`, `unknown_units` or
            `no_standard_lead`.
    """
    try:
        import edfio
    except ModuleNotFoundError as error:
        raise InputError("reading EDF needs edfio: pip install 'ecgfm[edf]'") from error
    try:
        head = _check_counts(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what _check_counts has looked at
            edf = edfio.read_edf(path, lazy_load_data=True, header_encoding="latin-1")
            return _record(edf, head[168:184], record_id)
    except _DAMAGE as error:
        check_drive(error, str(path))
        message = f"{type(error).__name__}: {error}".replace(str(path), path.name)
        raise Rejected("unreadable_header", f"EDF: {message[:200]}") from error


def _check_counts(path: Path) -> bytes:
    """The file's own 256 bytes of header, once the file is known to hold what its header promises.

    edfio would shorten a file that does not, and takes its counts for true.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(256)
        if not matches(head):
            raise Rejected("unreadable_header", "EDF: expected 256 bytes of header for the file and each signal")
        n_signals = int(head[252:256])
        per_signal = file.read(256 * n_signals)
    if n_signals == 0 or len(per_signal) < 256 * n_signals:
        raise Rejected("truncated", f"EDF: expected headers of {n_signals} signals, found {len(per_signal)} bytes")
    if head[192:197] == b"EDF+D":
        raise Rejected("unreadable_signal", "EDF: expected a recording in one piece, found EDF+D, which has gaps")
    n_records, record_s = int(head[236:244]), float(head[244:252])
    counts = [int(per_signal[at : at + 8]) for at in range(216 * n_signals, 224 * n_signals, 8)]
    labels = [per_signal[at : at + 16].strip() for at in range(0, 16 * n_signals, 16)]
    shortest_s = 0.0 if set(labels) == {b"EDF Annotations"} else 1e-9
    if n_records < 1 or min(counts) < 0 or not shortest_s <= record_s < math.inf:
        raise Rejected(
            "unreadable_header", f"EDF: {n_records} data records of {record_s:g} s and {counts[:20]} samples"
        )
    expected = 256 * (n_signals + 1) + 2 * n_records * sum(counts)
    if size < expected:
        raise Rejected("truncated", f"EDF: expected {expected} bytes as its header says, found {size}")
    return head


def _record(edf: Any, start: bytes, record_id: str) -> tuple[EcgRecord, FileFacts]:
    signals = list(edf.signals)  # without the annotations
    names = [lead_of_label(signal.label) for signal in signals]
    chosen = [row for row, name in enumerate(names) if name in LEADS]
    chosen = chosen or [row for row, name in enumerate(names) if _ECG_LABEL.match(name)]
    if not chosen:
        found = ", ".join(name or "no name" for name in names[:30]) or "nothing but annotations"
        raise Rejected("no_standard_lead", f"EDF: expected ECG leads by label, such as ECG II, found {found[:200]}")
    rates = [signals[row].sampling_frequency for row in chosen]
    rate_hz = max(rates, key=rates.count)  # of equals the first
    chosen = [row for row, rate in zip(chosen, rates, strict=True) if rate == rate_hz]
    n_samples = edf.num_data_records * signals[chosen[0]].samples_per_data_record
    if n_samples < 1 or not 0 < rate_hz < math.inf:
        raise Rejected("unreadable_header", f"EDF: {n_samples} samples at {rate_hz:g} Hz")
    if len(chosen) * n_samples > MAX_SAMPLES:
        raise Rejected("too_large", f"expected at most {MAX_SAMPLES} samples, found {len(chosen)} leads x {n_samples}")
    scales = [_scale(signals[row]) for row in chosen]
    gain, baseline = (np.array(column) for column in zip(*scales, strict=True))
    stored = np.stack([signals[row].digital for row in chosen])
    signal: Digital | np.ndarray = Digital(stored, gain, baseline)
    if (stored == INVALID).any():  # a value like any other in EDF
        signal = (stored - baseline[:, None]) / gain[:, None]
    leads = tuple(names[row] for row in chosen)
    beside = [signal.label or "no name" for row, signal in enumerate(signals) if row not in chosen]
    units = ", ".join(dict.fromkeys(signals[row].physical_dimension for row in chosen))
    filters = ", ".join(dict.fromkeys(filter(None, (signals[row].prefiltering for row in chosen))))
    notes = (f"filters: {filters}" if filters else "", f"not read: {', '.join(beside)}" if beside else "")
    return EcgRecord(record_id, leads, float(rate_hz), signal), _facts(edf, start, units, tuple(filter(None, notes)))


def _scale(signal: Any) -> tuple[float, float]:
    """(ADC units per millivolt, digital value at 0 mV), from the two points that the header gives."""
    units = signal.physical_dimension
    if units.casefold() not in _UNITS_PER_MV:
        raise Rejected("unknown_units", f"{signal.label}: expected V, mV, uV or nV, found {units!r}")
    low, high = float(signal.physical_min), float(signal.physical_max)
    digital_low, digital_high = signal.digital_min, signal.digital_max
    if not math.isfinite(high - low) or high == low or digital_high == digital_low:
        raise Rejected(
            "unreadable_header",
            f"EDF: {signal.label}: expected a scale, found {low:g} to {high:g} for {digital_low} to {digital_high}",
        )
    per_unit = (digital_high - digital_low) / (high - low)
    gain, baseline = per_unit * _UNITS_PER_MV[units.casefold()], digital_low - low * per_unit
    if gain == 0 or not math.isfinite(gain) or not math.isfinite(baseline):
        raise Rejected("unreadable_header", f"EDF: {signal.label}: {low:g} to {high:g} {units} is no ECG's range")
    return gain, baseline


def _facts(edf: Any, start: bytes, units: str, notes: tuple[str, ...]) -> FileFacts:
    plus = edf.reserved.startswith("EDF+")
    recorded_at, patient_id, age_years = _recorded_at(start), None, None
    sex: Literal["female", "male"] | None = None
    comments = list(notes)
    identification = edf.local_patient_identification.strip()
    if plus:  # the patient's code, sex, birth date and name, each X where unknown
        code, letter, born = (identification.split() + ["X"] * 3)[:3]
        patient_id = None if code == "X" else code
        sex = "female" if letter == "F" else "male" if letter == "M" else None
        age_years = _age_years(born, recorded_at)
    elif identification:
        comments.append(f"patient: {identification}")
    recording = edf.local_recording_identification.strip()
    if recording:
        comments.append(f"recording: {recording}")
    return FileFacts(
        format="EDF+" if plus else NAME,
        units=units,
        patient_id=patient_id,
        age_years=age_years,
        sex=sex,
        recorded_at=recorded_at,
        comments=tuple(comments),
    )


def _recorded_at(start: bytes) -> datetime | None:
    """Date and time of the file's header, `dd.mm.yyhh.mm.ss`; years from 1985 on. None where anonymised."""
    try:
        return datetime.strptime(start.decode("ascii"), "%d.%m.%y%H.%M.%S")
    except ValueError:
        return None


def _age_years(born: str, recorded_at: datetime | None) -> float | None:
    try:
        birthday: date = datetime.strptime(born.title(), "%d-%b-%Y").date()
    except ValueError:
        return None
    if recorded_at is None or birthday > recorded_at.date():
        return None
    had_birthday = (recorded_at.month, recorded_at.day) >= (birthday.month, birthday.day)
    return float(recorded_at.year - birthday.year - (not had_birthday))
