"""WFDB records: a text header (.hea) beside files of samples (.dat, .mat).

The format is that of the WFDB Applications Guide, header(5) and signal(5). Nearly every 12-lead archive stores
format 16 (interleaved little-endian int16), which is read here directly and kept as stored. The other formats,
multi-segment records, skewed signals and several samples a frame are decoded by the `wfdb` package, which is
imported only then: it costs over a second and about 1 ms a record.
"""

from __future__ import annotations

import codecs
import math
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from ecgfm.ecg import Digital, EcgRecord, Rejected

DEFAULT_SAMPLING_RATE_HZ = 250.0
DEFAULT_ADC_GAIN = 200.0

_UNITS_PER_MV = {"v": 1e-3, "mv": 1.0, "uv": 1e3, "\u03bcv": 1e3, "nv": 1e6}
"""By units without regard to case; the micro sign (U+00B5) folds to the Greek letter (U+03BC)."""

_BYTES_PER_SAMPLE = {
    "8": Fraction(1),
    "16": Fraction(2),
    "24": Fraction(3),
    "32": Fraction(4),
    "61": Fraction(2),
    "80": Fraction(1),
    "160": Fraction(2),
    "212": Fraction(3, 2),
    "310": Fraction(4, 3),
    "311": Fraction(4, 3),
}
"""By storage format; the FLAC formats (508, 516, 524) have no fixed size."""

# Whole numbers of at most 15 digits: more is damage, and Python refuses to convert thousands of them.
_COUNT = r"\d{1,15}"
_INTEGER = r"[-+]?\d{1,15}"
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RECORD_LINE = re.compile(
    rf"(?P<name>[^\s/]+)(?:/(?P<segments>{_COUNT}))?"
    rf"\s+(?P<signals>{_COUNT})"
    rf"(?:\s+(?P<rate>{_NUMBER})(?:/(?P<counter_rate>{_NUMBER}))?(?:\((?P<base_counter>{_NUMBER})\))?"
    rf"(?:\s+(?P<samples>{_COUNT})"
    rf"(?:\s+(?P<start>.*))?)?)?",
    re.ASCII,
)
_SIGNAL_LINE = re.compile(
    rf"(?P<file>\S+)"
    rf"\s+(?P<format>{_COUNT})(?:x(?P<per_frame>{_COUNT}))?(?::(?P<skew>{_COUNT}))?(?:\+(?P<offset>{_COUNT}))?"
    rf"(?:\s+(?P<gain>{_NUMBER})(?:\((?P<baseline>{_INTEGER})\))?(?:/(?P<units>\S+))?"
    rf"(?:\s+(?P<resolution>{_COUNT})"
    rf"(?:\s+(?P<zero>{_INTEGER})"
    rf"(?:\s+(?P<initial>{_INTEGER})"
    rf"(?:\s+(?P<checksum>{_INTEGER})"
    rf"(?:\s+(?P<block>{_COUNT}))?)?)?)?)?"
    rf"(?:\s+(?P<description>.*))?)?",
    re.ASCII,
)
_SEGMENT_LINE = re.compile(rf"(?P<name>\S+)\s+(?P<samples>{_COUNT})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal line of a header, defaults filled in: physical value = (digital - baseline) / adc_gain.

    adc_gain: ADC units per physical unit
    units: as spelled in the header; mV where the header names none
    initial_value, checksum: None where the header has none
    description: for an ECG the name of the lead; empty where the header has none
    """

    file_name: str
    storage_format: str
    samples_per_frame: int
    skew: int
    byte_offset: int
    adc_gain: float
    baseline: int
    units: str
    adc_resolution: int
    adc_zero: int
    initial_value: int | None
    checksum: int | None
    block_size: int
    description: str


@dataclass(frozen=True, slots=True)
class Header:
    """A WFDB header.

    sampling_rate_hz: frames per second (samples per second unless a signal has several samples a frame)
    n_samples: frames; None where the header does not say
    start: base time and date as written. Not interpreted: the Challenge archives carry the date of their
        conversion here, in an order the standard does not know
    signals: empty in the header of a multi-segment record
    segments: (name, n_samples) of a multi-segment record, else empty
    comments: without the leading `#` and blanks
    """

    record_name: str
    n_signals: int
    sampling_rate_hz: float
    counter_rate_hz: float
    base_counter: float
    n_samples: int | None
    start: str
    signals: tuple[Signal, ...]
    segments: tuple[tuple[str, int], ...]
    comments: tuple[str, ...]


def parse_header(text: str) -> Header:
    """The header in `text`.

    More tolerant than the standard where published archives need it: any record name without blanks
    (`E00666.mat`), any base time, signal lines that leave out numbers before the description.

    Raises:
        Rejected: `unreadable_header`, with the line that does not parse.
    """
    lines: list[str] = []
    comments: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#"):
            comments.append(line[1:].strip())
        elif line:
            lines.append(line)
    if not lines:
        raise Rejected("unreadable_header", "expected a record line, found nothing but comments and blanks")
    record = _RECORD_LINE.fullmatch(lines[0])
    if record is None:
        raise Rejected("unreadable_header", f"expected a record line, found {_shown(lines[0])}")
    rate_hz = float(record["rate"]) if record["rate"] else DEFAULT_SAMPLING_RATE_HZ
    if not 0 < rate_hz < math.inf:
        raise Rejected("unreadable_header", f"expected a positive sampling rate, found {_shown(lines[0])}")
    multi_segment = record["segments"] is not None
    n_signals = int(record["signals"])
    expected, what = (int(record["segments"]), "segment") if multi_segment else (n_signals, "signal")
    if len(lines) - 1 != expected:
        raise Rejected("unreadable_header", f"expected {expected} {what} lines, found {len(lines) - 1}")
    return Header(
        record_name=record["name"],
        n_signals=n_signals,
        sampling_rate_hz=rate_hz,
        counter_rate_hz=float(record["counter_rate"]) if record["counter_rate"] else rate_hz,
        base_counter=float(record["base_counter"] or 0),
        n_samples=int(record["samples"] or 0) or None,
        start=record["start"] or "",
        signals=() if multi_segment else tuple(map(_signal, lines[1:])),
        segments=tuple(map(_segment, lines[1:])) if multi_segment else (),
        comments=tuple(comments),
    )


def read_header(raw_dir: Path, header_path: str) -> Header:
    """The header at `header_path`, a path below `raw_dir`.

    Raises:
        Rejected: `missing_header` or `unreadable_header`.
    """
    path = _inside(raw_dir, raw_dir / header_path)
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise Rejected("missing_header", f"{header_path}: no such file") from error
    except OSError as error:
        raise Rejected("unreadable_header", f"{header_path}: {error.strerror}") from error
    return parse_header(decode(content))


def decode(content: bytes) -> str:
    """The text of a header: UTF-8, or Latin-1 as in older archives."""
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def read_wfdb(raw_dir: Path, header_path: str, record_id: str) -> EcgRecord:
    """The record whose header is at `header_path`, a path below `raw_dir`.

    A record stored in format 16 alone keeps its stored values in `digital`. Names a header holds cannot lead
    out of the record's folder, nor links out of `raw_dir`.

    Raises:
        Rejected: `missing_header`, `unreadable_header`, `missing_signal`, `truncated`, `unknown_units` or
            `unreadable_signal`.
    """
    header = read_header(raw_dir, header_path)
    if header.n_signals == 0:
        raise Rejected("unreadable_signal", "expected at least one signal, found a header without any")
    folder = (raw_dir / header_path).parent
    if header.segments:
        for name in dict.fromkeys(name for name, _ in header.segments if name != "~"):
            _check_name(name)
            segment_path = (folder / f"{name}.hea").relative_to(raw_dir).as_posix()
            _check_files(raw_dir, folder, read_header(raw_dir, segment_path))
        return _decode_with_wfdb(raw_dir / header_path, record_id)
    units_per_mv = np.array([_units_per_mv(signal.description, signal.units) for signal in header.signals])
    n_samples = _check_files(raw_dir, folder, header)
    if any(s.storage_format != "16" or s.samples_per_frame != 1 or s.skew for s in header.signals):
        return _decode_with_wfdb(raw_dir / header_path, record_id)
    digital = Digital(
        _read_format_16(folder, header, n_samples),
        np.array([signal.adc_gain for signal in header.signals]) * units_per_mv,
        np.array([signal.baseline for signal in header.signals], dtype=np.float64),
    )
    leads = tuple(signal.description or f"signal {index}" for index, signal in enumerate(header.signals))
    return EcgRecord(record_id, leads, header.sampling_rate_hz, digital)


def _signal(line: str) -> Signal:
    match = _SIGNAL_LINE.fullmatch(line)
    if match is None:
        raise Rejected("unreadable_header", f"expected a signal line, found {_shown(line)}")
    file, storage, per_frame, skew, offset, gain, baseline, units, *numbers, description = match.groups()
    resolution, zero, initial, checksum, block = numbers
    adc_gain = float(gain or 0) or DEFAULT_ADC_GAIN
    if not math.isfinite(adc_gain):
        raise Rejected("unreadable_header", f"expected a finite gain, found {_shown(line)}")
    adc_zero = int(zero or 0)
    return Signal(
        file_name=file,
        storage_format=storage,
        samples_per_frame=int(per_frame or 0) or 1,
        skew=int(skew or 0),
        byte_offset=int(offset or 0),
        adc_gain=adc_gain,
        baseline=adc_zero if baseline is None else int(baseline),
        units=units or "mV",
        adc_resolution=int(resolution or 0),
        adc_zero=adc_zero,
        initial_value=None if initial is None else int(initial),
        checksum=None if checksum is None else int(checksum),
        block_size=int(block or 0),
        description=description or "",
    )


def _segment(line: str) -> tuple[str, int]:
    match = _SEGMENT_LINE.fullmatch(line)
    if match is None:
        raise Rejected("unreadable_header", f"expected a segment line, found {_shown(line)}")
    return match["name"], int(match["samples"])


def _shown(line: str) -> str:
    return repr(line if len(line) <= 80 else line[:77] + "...")


def _units_per_mv(name: str, units: str) -> float:
    try:
        return _UNITS_PER_MV[units.casefold()]
    except KeyError:
        raise Rejected("unknown_units", f"{name or 'a signal'}: expected V, mV, uV or nV, found {units!r}") from None


def _check_name(name: str) -> None:
    if "/" in name or "\\" in name or name == "..":
        raise Rejected("unreadable_header", f"expected a file in the record's folder, found the name {_shown(name)}")


def _inside(raw_dir: Path, path: Path) -> Path:
    """`path`, if it still lies below `raw_dir` once its links are followed."""
    root = os.path.join(os.path.realpath(raw_dir), "")
    if "\0" in str(path) or not os.path.realpath(path).startswith(root):
        raise Rejected(
            "unreadable_header", f"expected a file in the raw folder, found that {path.name!r} leads out of it"
        )
    return path


def _signal_files(header: Header) -> Iterator[tuple[str, list[int]]]:
    """Every signal file with the numbers of the signals interleaved in it, in order."""
    members: dict[str, list[int]] = {}
    for index, signal in enumerate(header.signals):
        members.setdefault(signal.file_name, []).append(index)
    yield from members.items()


def _check_files(raw_dir: Path, folder: Path, header: Header) -> int:
    """Check that the signal files are there and hold what the header promises; samples per signal, from the
    files' size where the header does not say (0 where only decoding can tell)."""
    lengths = []
    for name, members in _signal_files(header):
        if name == "~":  # the layout segment of a multi-segment record has no file
            continue
        _check_name(name)
        first = header.signals[members[0]]
        if any(header.signals[index].storage_format != first.storage_format for index in members):
            raise Rejected("unreadable_header", f"{name}: expected one storage format in a file, found several")
        try:
            status = _inside(raw_dir, folder / name).stat()
        except FileNotFoundError as error:
            raise Rejected("missing_signal", f"{name}: no such file") from error
        except OSError as error:
            raise Rejected("unreadable_signal", f"{name}: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("unreadable_signal", f"{name}: expected a file, found something else")
        if first.storage_format not in _BYTES_PER_SAMPLE:
            continue
        per_frame = sum(header.signals[index].samples_per_frame for index in members)
        stored = max(status.st_size - first.byte_offset, 0)
        found = int(stored / (per_frame * _BYTES_PER_SAMPLE[first.storage_format]))
        expected = header.n_samples or max(found, 1)
        if found < expected:
            raise Rejected(
                "truncated",
                f"{name}: expected {expected} samples x {len(members)} leads, found {found} x {len(members)}",
            )
        lengths.append(expected)
    if len(set(lengths)) > 1:
        raise Rejected("unreadable_signal", f"expected signal files of one length, found {sorted(set(lengths))}")
    return lengths[0] if lengths else 0


def _read_format_16(folder: Path, header: Header, n_samples: int) -> np.ndarray:
    """(lead, time) int16 as stored."""
    digital = np.empty((header.n_signals, n_samples), dtype=np.int16)
    for name, members in _signal_files(header):
        offset = header.signals[members[0]].byte_offset
        try:
            stored = np.fromfile(folder / name, dtype="<i2", count=n_samples * len(members), offset=offset)
        except OSError as error:
            raise Rejected("unreadable_signal", f"{name}: {error}") from error
        digital[members] = stored.reshape(n_samples, len(members)).T
    return digital


def _decode_with_wfdb(path: Path, record_id: str) -> EcgRecord:
    """Any format the `wfdb` package knows. Its errors are of many types; all of them mean that the signal
    does not decode (RuntimeError: libsndfile; MemoryError: a length no file of this size can have)."""
    import wfdb

    try:
        record = wfdb.rdrecord(str(path.with_suffix("")), smooth_frames=False)
        signals: list[np.ndarray] = record.e_p_signal
        per_frame = sorted(set(record.samps_per_frame))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, RuntimeError, MemoryError) as error:
        message = f"{type(error).__name__}: {error}".replace(f"{path.parent}{os.sep}", "")  # the same everywhere
        raise Rejected("unreadable_signal", f"{path.name}: {message}") from error
    if len(per_frame) != 1 or len({len(signal) for signal in signals}) != 1:
        raise Rejected("unreadable_signal", f"expected one sampling rate, found {per_frame} samples a frame")
    names = [name or "" for name in record.sig_name]
    units_per_mv = [_units_per_mv(name, units) for name, units in zip(names, record.units, strict=True)]
    signal_mv = np.stack(signals).astype(np.float64) / np.array(units_per_mv)[:, None]
    leads = tuple(name or f"signal {index}" for index, name in enumerate(names))
    return EcgRecord(record_id, leads, float(record.fs) * per_frame[0], signal_mv)
