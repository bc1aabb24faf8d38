"""HDF5 shards: the segments of one slice, as int16 with WFDB's own model, one chunk per segment.

A chunk per segment, uncompressed: a reader learns once where each lies in the file, and from then on one `pread`, past
HDF5, fetches a segment in 13 us where the file is in memory. A record that needed no resampling keeps its digital
values and gains, without loss; a resampled one is digitised again at the finest gain that fits, so that a sample moves
by at most 1/131,000 of its lead's range.
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from ecgfm.ecg import INVALID, LEADS, Digital, InputError

FORMAT = 2
DIGITAL_MIN, DIGITAL_MAX = INVALID + 1, 32767
SMALLEST_RANGE_MV = 1e-15  # an attovolt; finer gains could overflow, and resolve nothing but rounding
PER_LEAD = ("adc_gain_per_mv", "baseline", "mean_mv", "std_mv")


def digitise(signal_mv: np.ndarray) -> Digital:
    """(lead, time) millivolt -> int16 at the finest gain per lead that holds its range.

    Invalid samples become `INVALID`. The error is at most half a step: the lead's range / 131,068.
    """
    n_leads = len(signal_mv)
    gain, baseline = np.ones(n_leads), np.zeros(n_leads)
    valid = ~np.isnan(signal_mv)
    for lead in np.flatnonzero(valid.any(axis=1)):
        samples = signal_mv[lead, valid[lead]]
        low, high = float(samples.min()), float(samples.max())
        if high > low:
            gain[lead] = (DIGITAL_MAX - DIGITAL_MIN) / max(high - low, SMALLEST_RANGE_MV)
        elif high != 0:  # constant: the whole range of one sign for its one value
            gain[lead] = DIGITAL_MAX / max(abs(high), SMALLEST_RANGE_MV)
        baseline[lead] = DIGITAL_MIN - low * gain[lead] if high > low else 0.0
    return Digital(round_to_steps(signal_mv, gain, baseline), gain, baseline)


def round_to_steps(signal_mv: np.ndarray, adc_gain_per_mv: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """(lead, time) millivolt -> the nearest stored values, int16; invalid samples become `INVALID`."""
    steps = np.rint(signal_mv * adc_gain_per_mv[:, None] + baseline[:, None])
    steps = np.where(np.isnan(signal_mv), INVALID, np.clip(steps, DIGITAL_MIN, DIGITAL_MAX))
    return steps.astype(np.int16)


def lead_values(digital: Digital, mean_mv: np.ndarray, std_mv: np.ndarray) -> np.ndarray:
    """(4, lead) float64, in the order of `PER_LEAD`: gain and baseline of the stored values; mean and standard
    deviation of the whole record at the shard's rate, which `ShardReader` standardises by."""
    return np.stack([digital.adc_gain_per_mv, digital.baseline, mean_mv, std_mv])


class ShardWriter:
    """Appends segments to a new shard. Use as a context manager."""

    def __init__(
        self,
        path: Path,
        source: str,
        slice_id: str,
        sampling_rate_hz: float,
        segment_samples: int,
        leads: Sequence[str] = LEADS,
        departures: Mapping[str, Any] | None = None,
    ) -> None:
        """departures: of `PrepareConfig`, where the segments were not prepared by the published recipe"""
        self._disk = _Disk(path)
        self._file = h5py.File(self._disk, "w", libver=("v110", "v110"))
        self._file.attrs.update(
            format=FORMAT,
            source=source,
            slice_id=slice_id,
            sampling_rate_hz=float(sampling_rate_hz),
            leads=list(leads),
            departures=json.dumps(departures or {}, sort_keys=True),
        )
        self._n_leads = len(leads)
        shape = (len(leads), segment_samples)
        self._digital = self._file.create_dataset(
            "digital", (0, *shape), "<i2", maxshape=(None, *shape), chunks=(1, *shape)
        )
        self._per_lead: list[np.ndarray] = []  # 400 bytes a segment: written at the end, at once
        self._room = 0  # rows of the dataset, written or not: making it longer takes as long as writing a segment
        self.n_segments = 0

    def append(self, segments: np.ndarray, per_lead: np.ndarray) -> range:
        """Add segments; returns their rows.

        segments: (segment, lead, time) int16
        per_lead: (segment, 4, lead) float64 of `lead_values`, or (4, lead) where the segments are of one record

        Raises:
            OSError: the disk is full, or another reason not to write.
        """
        rows = range(self.n_segments, self.n_segments + len(segments))
        if rows.stop > self._room:
            self._room = max(2 * self._room, rows.stop)
            self._digital.resize(self._room, axis=0)
        write = self._digital.id.write_direct_chunk  # past the chunk cache: a segment is a chunk, and comes once
        for row, segment in zip(rows, segments, strict=True):
            write((row, 0, 0), np.ascontiguousarray(segment, "<i2"))
        self._disk.check()
        self._per_lead.append(np.broadcast_to(per_lead, (len(segments), len(PER_LEAD), self._n_leads)))
        self.n_segments = rows.stop
        return rows

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._digital.resize(self.n_segments, axis=0)
            values = np.concatenate([np.empty((0, len(PER_LEAD), self._n_leads)), *self._per_lead])
            for name, value in zip(PER_LEAD, values.swapaxes(0, 1), strict=True):
                self._file.create_dataset(name, data=value)
        self._file.close()
        self._disk.close()
        if kind is None:
            self._disk.check()


class _Disk(io.RawIOBase):
    """A new file for HDF5 to write, which remembers a failure and drops what is written after it: HDF5 must be able
    to close a file, and where the disk is full it cannot, and takes the process down later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        self._at = 0
        self._error: OSError | None = None

    def check(self) -> None:
        """Raises: OSError: a write failed; with the file's name."""
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self._path)) from self._error

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset if whence == os.SEEK_SET else os.lseek(self._handle, offset, whence)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._handle, [buffer], self._at)
        self._at += count
        return count

    def write(self, content: Any) -> int:
        size = len(content)
        try:
            written = 0
            while written < size and self._error is None:
                written += os.pwrite(self._handle, content[written:], self._at + written)
        except OSError as error:
            self._error = error
        self._at += size
        return size

    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        try:
            if self._error is None:
                os.ftruncate(self._handle, size)
        except OSError as error:
            self._error = error
        return size

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()


def standardisation(per_lead: np.ndarray) -> np.ndarray:
    """What standardises stored samples: `digital * scale + offset` has mean 0 and population standard deviation 1 over
    the whole record, lead by lead. A constant lead becomes 0. Invalid samples must be set to 0 by the caller: they are
    `INVALID` in `digital`.

    per_lead: (4, ..., lead), as of `lead_values`. Returns (3, ..., lead) float32: scale, offset, and the standard
    deviation that is divided by, in millivolt, one step of the standardised signal; 0 of a constant or missing lead.
    """
    gain, baseline, mean_mv, std_mv = per_lead
    varies = std_mv > 0  # false for NaN: a missing lead
    std_mv = np.where(varies, std_mv, 1.0)
    scale = np.where(varies, 1.0 / (gain * std_mv), 0.0)
    offset = np.where(varies, -(baseline / gain + np.where(varies, mean_mv, 0.0)) / std_mv, 0.0)
    return np.stack([scale, offset, np.where(varies, std_mv, 0.0)]).astype(np.float32)


class ShardReader:
    """One shard, opened for reading. Several threads may read at once, and so may a forked process and one that the
    reader is pickled to: HDF5 opens the file only to learn where the segments lie, and for the values of the leads.
    """

    def __init__(self, path: Path) -> None:
        """Raises: InputError: no shard of ours, or one whose segments are compressed, in part missing or cut short."""
        self.path = Path(path)
        with self._hdf5() as file:
            if file.attrs.get("format") != FORMAT:
                raise InputError(
                    f"{path}: expected a shard of format {FORMAT}, found {file.attrs.get('format')}; prepare it again"
                )
            self.source = str(file.attrs["source"])
            self.slice_id = str(file.attrs["slice_id"])
            self.sampling_rate_hz = float(file.attrs["sampling_rate_hz"])
            self.leads = tuple(str(lead) for lead in file.attrs["leads"])
            self.departures: dict[str, Any] = json.loads(str(file.attrs["departures"]))
            self.n_segments, _, self.segment_samples = file["digital"].shape
            self._offsets = _chunk_offsets(path, file["digital"])
        self._handle = _open_to_read_at_random(self.path)

    @contextmanager
    def _hdf5(self) -> Iterator[h5py.File]:
        try:
            with h5py.File(self.path, "r") as file:
                yield file
        except OSError as error:
            reason = "it is not there" if isinstance(error, FileNotFoundError) else error
            raise InputError(f"{self.path}: not a readable HDF5 file: {reason}") from error

    def read(self, row: int, into: np.ndarray) -> None:
        """One segment, (lead, time) little-endian int16, `INVALID` where there is no sample, straight into `into`.

        Raises:
            InputError: the disk does not give it.
        """
        size, offset = into.nbytes, int(self._offsets[row])
        try:
            got = os.preadv(self._handle, [into.data], offset)
            while got < size:  # a network's file system may give less at a time
                more = os.preadv(self._handle, [into.data.cast("B")[got:]], offset + got)
                if more == 0:
                    raise OSError("the file ends before it")
                got += more
        except OSError as error:
            raise InputError(f"{self.path}: row {row} cannot be read: {error}") from error

    def digital(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The segments at `rows`, in that order: (segment, lead, time) int16, `INVALID` where there is no sample."""
        out = np.empty((len(rows), len(self.leads), self.segment_samples), "<i2")
        for segment, row in zip(out, rows, strict=True):
            self.read(row, segment)
        return out

    def per_lead(self, *names: str) -> list[np.ndarray]:
        """Some of `PER_LEAD`, each (segment, lead) float64."""
        with self._hdf5() as file:
            return [file[name][:] for name in names]

    def standardisation(self) -> np.ndarray:
        """(3, segment, lead) float32: `standardisation` of every segment."""
        return standardisation(np.stack(self.per_lead(*PER_LEAD)))

    def signal_mv(self, row: int) -> np.ndarray:
        """One segment, (lead, time) float64, millivolt; NaN where invalid."""
        with self._hdf5() as file:
            gain, baseline = file["adc_gain_per_mv"][row], file["baseline"][row]
        return Digital(self.digital([row])[0], gain, baseline).to_mv()

    def close(self) -> None:
        """Close the file."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def __del__(self) -> None:
        if hasattr(self, "_handle"):  # not where opening failed
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": -1}  # a number that means nothing in another process

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle = _open_to_read_at_random(self.path)


def _chunk_offsets(path: Path, dataset: h5py.Dataset) -> np.ndarray:
    """Where in the file each segment begins: (segment,) int64. In about 1 us a segment."""
    n_segments, *shape = dataset.shape
    size = 2 * math.prod(shape)
    filters = dataset.id.get_create_plist().get_nfilters()
    if dataset.dtype != "<i2" or dataset.chunks != (1, *shape) or filters:
        raise InputError(
            f"{path}: expected one uncompressed chunk of int16 per segment, found {dataset.dtype}, chunks of "
            f"{dataset.chunks} and {filters} filters; prepare it again"
        )
    offsets = np.full(n_segments, -1)

    def note(chunk: Any) -> None:
        if chunk.size == size:
            offsets[chunk.chunk_offset[0]] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    missing = np.flatnonzero(offsets < 0)
    if len(missing):
        raise InputError(
            f"{path}: {len(missing)} of {n_segments} segments were never written, the first of them row {missing[0]}; "
            "prepare it again"
        )
    return offsets


def _open_to_read_at_random(path: Path) -> int:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if hasattr(os, "posix_fadvise"):  # reading ahead would fetch what another batch wants: a fifth slower from disk
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    return handle
