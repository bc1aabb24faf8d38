"""WFDB records: a text header (.hea) beside files of samples (.dat, .mat).

The format is that of the WFDB Applications Guide, header(5) and signal(5). Nearly every 12-lead archive stores
format 16 (interleaved little-endian int16) or 212 (two 12-bit samples in three bytes), which are read here directly
and kept as stored. The other formats, multi-segment records, skewed signals and several samples a frame are decoded
by the `wfdb` package, which is imported only then: it costs over a second and about 5 ms a record.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from ecgfm.ecg import INVALID, LEADS, MAX_SAMPLES, Digital, EcgRecord, FileFacts, Rejected
from ecgfm.formats.raw_files import beside, check_drive, rejected
from ecgfm.formats.wfdb_header import Header, is_header, read_header

NAME = "WFDB"

_UNITS_PER_MV = {"v": 1e-3, "mv": 1.0, "uv": 1e3, "\u03bcv": 1e3, "nv": 1e6}
"""By units without regard to case; the micro sign (U+00B5) folds to the Greek letter (U+03BC)."""

_SAMPLES_AND_BYTES = {
    "8": (1, 1),
    "16": (1, 2),
    "24": (1, 3),
    "32": (1, 4),
    "61": (1, 2),
    "80": (1, 1),
    "160": (1, 2),
    "212": (2, 3),
    "310": (3, 4),
    "311": (3, 4),
}
"""By storage format: so many samples in so many bytes. The FLAC formats (508, 516, 524) have no fixed size."""

_READ_HERE = frozenset({"16", "212"})
_INVALID_212 = -2048
_STANDARD_LEADS = frozenset(lead.lower() for lead in LEADS)

_FLAC = frozenset({"508", "516", "524"})


def matches(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a WFDB header."""
    return is_header(head)


def read(path: Path, record_id: str) -> tuple[EcgRecord, FileFacts]:
    """The record whose header is the file at `path`, and what the header says beside the signal.

    Raises:
        Rejected: as `read_wfdb`.
    """
    header = read_header(path.parent, path.name)
    units = dict.fromkeys(signal.units for signal in header.signals)
    facts = FileFacts(NAME, units=", ".join(units), comments=header.comments)
    return read_wfdb(path.parent, path.name, record_id), facts


def read_wfdb(raw_dir: Path, header_path: str, record_id: str) -> EcgRecord:
    """The record whose header is at `header_path`, a path below `raw_dir`.

    A record stored in formats 16 and 212 alone keeps its stored values in `digital`. Signals that are no voltages,
    such as a respiration beside the leads, are left out. Names a header holds cannot lead out of the record's folder,
    nor links out of `raw_dir`.

    Raises:
        Rejected: `missing_header`, `unreadable_header`, `missing_signal`, `truncated`, `too_large`, `unknown_units`
            or `unreadable_signal`.
        InputError: the drive fails (raw_files.py).
    """
    header = read_header(raw_dir, header_path)
    if header.n_signals == 0:
        raise Rejected("unreadable_signal", "expected at least one signal, found a header without any")
    _check_size(header)
    if header.segments:
        for name in dict.fromkeys(name for name, _ in header.segments if name != "~"):
            segment_path = beside(raw_dir, header_path, f"{name}.hea")
            segment = read_header(raw_dir, os.path.relpath(segment_path, raw_dir))
            _check_size(segment)
            for file, members in _signal_files(segment):
                _open(raw_dir, header_path, file, segment, members)
        return _decode_with_wfdb(raw_dir / header_path, record_id)
    kept, units_per_mv, leads = _voltages(
        tuple([signal.description for signal in header.signals]), tuple([signal.units for signal in header.signals])
    )
    here = all(s.storage_format in _READ_HERE and s.samples_per_frame == 1 and not s.skew for s in header.signals)
    n_samples = 0
    digital: np.ndarray | None = None
    for file, members in _signal_files(header):
        found, stored = _open(raw_dir, header_path, file, header, members, read=here)
        if n_samples and found and found != n_samples:
            raise Rejected("unreadable_signal", f"expected signal files of one length, found {n_samples} and {found}")
        n_samples = found or n_samples
        if stored is None:
            continue
        if len(members) == header.n_signals:
            digital = np.ascontiguousarray(stored.T)
        else:
            digital = np.empty((header.n_signals, found), np.int16) if digital is None else digital
            digital[members] = stored.T
    if digital is None:
        return _decode_with_wfdb(raw_dir / header_path, record_id)
    signals = [header.signals[index] for index in kept]
    return EcgRecord(
        record_id,
        leads,
        header.sampling_rate_hz,
        Digital(
            digital if len(kept) == header.n_signals else digital[list(kept)],
            np.array([signal.adc_gain for signal in signals]) * units_per_mv,
            np.array([signal.baseline for signal in signals], dtype=np.float64),
        ),
    )


def _units_per_mv(name: str, units: str) -> float:
    try:
        return _UNITS_PER_MV[units.casefold()]
    except KeyError:
        raise Rejected("unknown_units", f"{name or 'a signal'}: expected V, mV, uV or nV, found {units!r}") from None


@lru_cache(256)  # the records of an archive have the same few leads
def _voltages(names: tuple[str, ...], units: tuple[str, ...]) -> tuple[tuple[int, ...], np.ndarray, tuple[str, ...]]:
    """The signals that are voltages, by number; their units per millivolt, and their names, some for the nameless.

    Raises:
        Rejected: a standard lead in other units, or no voltage at all.
    """
    kept = tuple(
        i
        for i, (name, unit) in enumerate(zip(names, units, strict=True))
        if unit.casefold() in _UNITS_PER_MV or name.lower() in _STANDARD_LEADS
    )
    if not kept:
        _units_per_mv(names[0], units[0])
    units_per_mv = np.array([_units_per_mv(names[i], units[i]) for i in kept])
    units_per_mv.setflags(write=False)
    return kept, units_per_mv, tuple(names[i] or f"signal {i}" for i in kept)


def _check_size(header: Header) -> None:
    """Refuse a header that promises more samples than any resting ECG has, before anything is read."""
    per_frame = sum(signal.samples_per_frame for signal in header.signals) or header.n_signals
    n_samples = max(header.n_samples or 0, sum(n for _, n in header.segments))
    if per_frame * max(n_samples, 1) > MAX_SAMPLES:
        raise Rejected("too_large", f"expected at most {MAX_SAMPLES:,} samples, found {per_frame} x {n_samples:,}")


def _signal_files(header: Header) -> list[tuple[str, list[int]]]:
    """Every signal file with the numbers of the signals interleaved in it, in order."""
    members: dict[str, list[int]] = {}
    for index, signal in enumerate(header.signals):
        members.setdefault(signal.file_name, []).append(index)
    return list(members.items())


def _open(
    raw_dir: Path,
    header_path: str,
    name: str,
    header: Header,
    members: Sequence[int],
    read: bool = False,
) -> tuple[int, np.ndarray | None]:
    """Check that a signal file is there and holds what the header promises; with `read`, read it.

    Returns:
        Samples per signal (0 where only decoding can tell), and with `read` (time, signal) int16.
    """
    if name == "~":  # the layout segment of a multi-segment record has no file
        return 0, None
    path = beside(raw_dir, header_path, name)
    first = header.signals[members[0]]
    storage = first.storage_format
    if any(header.signals[index].storage_format != storage for index in members):
        raise Rejected("unreadable_header", f"{name}: expected one storage format in a file, found several")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe by that name must not hold us up
    except FileNotFoundError as error:
        raise Rejected("missing_signal", f"{name}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a name no file can have
        raise rejected(error, "unreadable_signal", name) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("unreadable_signal", f"{name}: expected a file, found something else")
        if storage not in _SAMPLES_AND_BYTES:
            if storage in _FLAC:
                _check_flac(path, name)
            return 0, None
        per_frame = sum(header.signals[index].samples_per_frame for index in members)
        stored = max(status.st_size - first.byte_offset, 0)
        samples, size = _SAMPLES_AND_BYTES[storage]
        found = stored * samples // (size * per_frame)
        expected = header.n_samples or max(found, 1)
        if found < expected:
            raise Rejected(
                "truncated",
                f"{name}: expected {expected} samples x {len(members)} leads, found {found} x {len(members)}",
            )
        if expected * per_frame > MAX_SAMPLES:
            raise Rejected(
                "too_large", f"{name}: expected at most {MAX_SAMPLES:,} samples, found {found * per_frame:,}"
            )
        if not read:
            return expected, None
        count = expected * len(members)
        content = _read(handle, -(-count * size // samples), first.byte_offset, name)
    except OSError as error:
        raise rejected(error, "unreadable_signal", name) from error
    finally:
        os.close(handle)
    digital = np.frombuffer(content, "<i2", count) if storage == "16" else unpack_212(content, count)
    return expected, digital.reshape(expected, len(members))


def _read(handle: int, n_bytes: int, offset: int, name: str) -> bytes:
    """So many bytes of a file that was as long a moment ago.

    Raises:
        Rejected: `truncated`, it is being written to.
        OSError: it cannot be read.
    """
    content = os.pread(handle, n_bytes, offset)
    if len(content) < n_bytes:
        raise Rejected("truncated", f"{name}: expected {n_bytes:,} bytes, found {len(content):,}")
    return content


def unpack_212(content: bytes, count: int) -> np.ndarray:
    """The first `count` samples of format 212, int16: two's complement numbers of 12 bits, two in three bytes.

    The pair's first sample has the first byte and the low half of the second; the other the third byte and the high
    half. The format's invalid value becomes `INVALID`.
    """
    pairs = -(-count // 2)
    stored = np.zeros(3 * pairs, np.uint8)  # an odd count ends within a pair
    stored[: len(content)] = np.frombuffer(content, np.uint8)[: 3 * pairs]
    low, middle, high = stored.reshape(pairs, 3).T.astype(np.int16)
    samples = np.empty((pairs, 2), np.int16)
    samples[:, 0] = low | (middle & 0x0F) << 8
    samples[:, 1] = high | (middle & 0xF0) << 4
    samples = (samples ^ 0x800) - 0x800
    samples[samples == _INVALID_212] = INVALID
    return samples.ravel()[:count]


def _check_flac(path: str, name: str) -> None:
    """A FLAC file of a few bytes can hold billions of equal samples: ask it first."""
    import soundfile

    try:
        info = soundfile.info(path)
    except RuntimeError as error:  # libsndfile's own errors
        raise Rejected("unreadable_signal", f"{name}: not a FLAC file") from error
    if info.frames * info.channels > MAX_SAMPLES:
        raise Rejected("too_large", f"{name}: expected at most {MAX_SAMPLES:,} samples, found {info.frames:,}")


def _decode_with_wfdb(path: Path, record_id: str) -> EcgRecord:
    """Any format the `wfdb` package knows. Its errors are of many types; all of them mean that the signal
    does not decode (RuntimeError: libsndfile; MemoryError: a length no file of this size can have)."""
    import wfdb

    try:
        record = wfdb.rdrecord(str(path.with_suffix("")), smooth_frames=False)
        signals: list[np.ndarray] = record.e_p_signal
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError, RuntimeError, MemoryError) as error:
        check_drive(error, str(path))
        message = f"{type(error).__name__}: {error}".replace(f"{path.parent}{os.sep}", "")  # the same everywhere
        raise Rejected("unreadable_signal", f"{path.name}: {message}") from error
    kept, units_per_mv, leads = _voltages(
        tuple(name or "" for name in record.sig_name), tuple(units or "" for units in record.units)
    )
    per_frame = sorted({record.samps_per_frame[index] for index in kept})
    if len(per_frame) != 1 or len({len(signals[index]) for index in kept}) != 1:
        raise Rejected("unreadable_signal", f"expected leads of one sampling rate, found {per_frame} samples a frame")
    signal_mv = np.stack([signals[index] for index in kept]).astype(np.float64) / units_per_mv[:, None]
    return EcgRecord(record_id, leads, float(record.fs) * per_frame[0], signal_mv)
