"""The text header of a WFDB record (.hea): header(5) of the WFDB Applications Guide."""

from __future__ import annotations

import codecs
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ecgfm.ecg import Rejected
from ecgfm.formats.raw_files import inside, rejected

DEFAULT_SAMPLING_RATE_HZ = 250.0
DEFAULT_ADC_GAIN = 200.0

_PIECE_BYTES = 1 << 14
_MAX_LINE = 500  # characters; the patterns below take time that grows with the square of a line's length
_MAX_HEADER_BYTES = 1 << 20  # the longest published header has some hundred segments: 20 KB

# Whole numbers of at most 15 digits: more is damage, and Python refuses to convert thousands of them.
_COUNT = r"\d{1,15}"
_INTEGER = r"[-+]?\d{1,15}"
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"  # one way to read any digits: two are quadratic
_RECORD_LINE = re.compile(
    rf"(?P<name>[^\s/]+)(?:/(?P<segments>{_COUNT}))?"
    rf"\s+(?P<signals>{_COUNT})"
    rf"(?:\s+(?P<rate>{_NUMBER})(?:/(?P<counter_rate>{_NUMBER}))?(?:\((?P<base_counter>{_NUMBER})\))?"
    rf"(?:\s+(?P<samples>{_COUNT})"
    rf"(?:\s+(?P<start>.*))?)?)?",
    re.ASCII,
)
_STORAGE = re.compile(rf"({_COUNT})(?:x({_COUNT}))?(?::({_COUNT}))?(?:\+({_COUNT}))?", re.ASCII)
_GAIN = re.compile(rf"({_NUMBER})(?:\(({_INTEGER})\))?(?:/(\S+))?", re.ASCII)
_FULL_SIGNAL_LINE = re.compile(
    rf"(\S+)\s+(\S+)\s+(\S+)\s+({_COUNT})\s+({_INTEGER})\s+({_INTEGER})\s+({_INTEGER})\s+({_COUNT})\s+(.*)", re.ASCII
)
_SIGNAL_LINE = re.compile(
    r"(\S+)\s+(\S+)"
    rf"(?:\s+({_NUMBER}(?:\({_INTEGER}\))?(?:/\S+)?)"
    rf"(?:\s+({_COUNT})"
    rf"(?:\s+({_INTEGER})"
    rf"(?:\s+({_INTEGER})"
    rf"(?:\s+({_INTEGER})"
    rf"(?:\s+({_COUNT}))?)?)?)?)?"
    r"(?:\s+(.*))?)?",
    re.ASCII,
)
_SEGMENT_LINE = re.compile(rf"(?P<name>\S+)\s+(?P<samples>{_COUNT})", re.ASCII)


class Signal(NamedTuple):
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
    if (longest := max(map(len, lines), default=0)) > _MAX_LINE:
        raise Rejected("unreadable_header", f"expected lines of at most {_MAX_LINE} characters, found {longest:,}")
    if not lines:
        raise Rejected("unreadable_header", "expected a record line, found nothing but comments and blanks")
    record = _RECORD_LINE.fullmatch(lines[0])
    if record is None:
        raise Rejected("unreadable_header", f"expected a record line, found {shown(lines[0])}")
    rate_hz = float(record["rate"]) if record["rate"] else DEFAULT_SAMPLING_RATE_HZ
    if not 0 < rate_hz < math.inf:
        raise Rejected("unreadable_header", f"expected a positive sampling rate, found {shown(lines[0])}")
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
        InputError: the drive fails (raw_files.py).
    """
    path = inside(raw_dir, header_path)
    try:
        content = header_bytes(path)
    except FileNotFoundError as error:
        raise Rejected("missing_header", f"{header_path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a name no file can have
        raise rejected(error, "unreadable_header", header_path) from error
    if len(content) > _MAX_HEADER_BYTES:
        raise Rejected("unreadable_header", f"{header_path}: expected a header, found over {_MAX_HEADER_BYTES:,} bytes")
    return parse_header(decode(content))


def header_bytes(path: str) -> bytes:
    """The beginning of a file, far enough for any header and to tell a file that is too long for one.

    Without the layers of `open` and without a large buffer: a listing reads a hundred thousand headers.

    Raises:
        OSError, ValueError: it cannot be read; no file can have that name.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe by that name must not hold us up
    try:
        content = os.read(handle, _PIECE_BYTES)
        while len(content) % _PIECE_BYTES == 0 and len(content) <= _MAX_HEADER_BYTES:
            piece = os.read(handle, _PIECE_BYTES)
            if not piece:
                break
            content += piece
    finally:
        os.close(handle)
    return content


def decode(content: bytes) -> str:
    """The text of a header: UTF-8, or Latin-1 as in older archives."""
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")


def is_header(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a WFDB header."""
    first = next((line.strip() for line in decode(head).splitlines() if line.strip() and line[0] != "#"), "")
    return b"\0" not in head and len(first) <= _MAX_LINE and _RECORD_LINE.fullmatch(first) is not None


def _signal(line: str) -> Signal:
    """A signal line. Headers of one archive repeat themselves: formats and gains are parsed once each."""
    match = _FULL_SIGNAL_LINE.fullmatch(line)
    if match is None:
        return _short_signal(line)
    file, token, gain_token, resolution, zero, initial, checksum, block, description = match.groups()
    storage, gain = _storage(token), _gain(gain_token)
    if storage is None or gain is None or not math.isfinite(gain[0]):
        return _short_signal(line)  # which says what is wrong, or reads what leaves out the gain
    adc_gain, baseline, units = gain
    adc_zero = int(zero)
    baseline = adc_zero if baseline is None else baseline
    numbers = int(resolution), adc_zero, int(initial), int(checksum), int(block)
    return Signal(file, *storage, adc_gain, baseline, units, *numbers, description)


@lru_cache(1024)
def _storage(token: str) -> tuple[str, int, int, int] | None:
    """Format, samples a frame, skew and byte offset; None where the token is none of these."""
    match = _STORAGE.fullmatch(token)
    if match is None:
        return None
    storage, per_frame, skew, offset = match.groups()
    return storage, int(per_frame or 0) or 1, int(skew or 0), int(offset or 0)


@lru_cache(1024)
def _gain(token: str) -> tuple[float, int | None, str] | None:
    """Gain, baseline and units, None where the token is no gain."""
    match = _GAIN.fullmatch(token)
    if match is None:
        return None
    gain, baseline, units = match.groups()
    return float(gain or 0) or DEFAULT_ADC_GAIN, None if baseline is None else int(baseline), units or "mV"


def _short_signal(line: str) -> Signal:
    """Any signal line: one that leaves out numbers, or one that does not parse."""
    match = _SIGNAL_LINE.fullmatch(line)
    storage = _storage(match[2]) if match else None
    if match is None or storage is None:
        raise Rejected("unreadable_header", f"expected a signal line, found {shown(line)}")
    file, _, gain_token, resolution, zero, initial, checksum, block, description = match.groups()
    adc_gain, baseline, units = (_gain(gain_token) if gain_token else None) or (DEFAULT_ADC_GAIN, None, "mV")
    if not math.isfinite(adc_gain):
        raise Rejected("unreadable_header", f"expected a finite gain, found {shown(line)}")
    adc_zero = int(zero or 0)
    return Signal(
        file,
        *storage,
        adc_gain,
        adc_zero if baseline is None else baseline,
        units,
        int(resolution or 0),
        adc_zero,
        None if initial is None else int(initial),
        None if checksum is None else int(checksum),
        int(block or 0),
        description or "",
    )


def _segment(line: str) -> tuple[str, int]:
    match = _SEGMENT_LINE.fullmatch(line)
    if match is None:
        raise Rejected("unreadable_header", f"expected a segment line, found {shown(line)}")
    return match["name"], int(match["samples"])


def shown(line: str) -> str:
    """A line of a header for an error, cut to a readable length."""
    return repr(line if len(line) <= 80 else line[:77] + "...")
