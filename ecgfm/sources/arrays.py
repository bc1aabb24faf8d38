"""One large file that holds many recordings as an array, HDF5 or NumPy: opened once, read a recording at a time.

The file that was read last stays open in the process that reads it. A forked child opens its own: two processes that
share an HDF5 handle, and so its position in the file, read each other's bytes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from tokenize import TokenError
from typing import Any

import numpy as np

from ecgfm.ecg import MAX_SAMPLES, Rejected
from ecgfm.formats.raw_files import check_drive, rejected

_MAX_RECORDS = 5_000_000  # of one file
_MAX_ID_BYTES = 1000
_MAX_TEXT_BYTES = 1 << 28
_MAX_CHUNK_BYTES = 1 << 28  # a compressed chunk is unpacked whole, whatever part of it is wanted
_NUMBERS = "iuf"

_READ_TEXT = """
import json, resource, sys
import h5py
path, dataset, cpu_s, max_bytes = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
pages = int(open("/proc/self/statm").read().split()[0])
limits = {"CORE": 0, "CPU": cpu_s, "AS": pages * resource.getpagesize() + 2 * max_bytes}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
json.dump(h5py.File(path, "r", locking=False)[dataset].asstr()[:].tolist(), sys.stdout)
"""


@dataclass(frozen=True)
class ArrayFile:
    """An open file. Close it with `close`.

    path: as it was opened
    handle: an h5py.File, or the memory-mapped array of a .npy file
    """

    path: str
    handle: Any

    def array(self, dataset: str = "") -> Any:
        """The array: an HDF5 dataset, or a .npy file's only one. Reads nothing but its description.

        Raises:
            Rejected: `unreadable_signal`: no such dataset, not numbers, or one whose content lies in other files.
        """
        if isinstance(self.handle, np.ndarray):
            if self.handle.dtype.kind not in _NUMBERS:
                raise Rejected("unreadable_signal", f"{self._name}: expected numbers, found {self.handle.dtype}")
            return self.handle
        array = self._dataset(dataset)
        if array.dtype.kind not in _NUMBERS:
            raise Rejected("unreadable_signal", f"{self._name}: {dataset}: expected numbers, found {array.dtype}")
        if array.chunks and math.prod(array.chunks) * array.dtype.itemsize > _MAX_CHUNK_BYTES:
            raise Rejected("too_large", f"{self._name}: {dataset}: chunks of {array.chunks}")
        return array

    def ids(self, dataset: str) -> list[str]:
        """What a dataset of ids holds, (record,) whole numbers or text, as text.

        Raises:
            Rejected: `unreadable_signal`: no such dataset, or not ids.
        """
        import h5py

        stored = self._dataset(dataset)
        text = h5py.check_string_dtype(stored.dtype)
        if stored.ndim != 1 or not (text or stored.dtype.kind in "iu"):
            what = f"found {stored.dtype} of shape {stored.shape}"
            raise Rejected("unreadable_signal", f"{self._name}: {dataset}: expected whole numbers or text, {what}")
        if stored.size > _MAX_RECORDS or (text and (text.length or 0) > _MAX_ID_BYTES):
            raise Rejected("too_large", f"{self._name}: {dataset}: {stored.size:,} values of {stored.dtype}")
        if text and text.length is None:
            return self._text(dataset, stored.size)
        try:
            return [str(value) for value in (stored.asstr() if text else stored)[:].tolist()]
        except (OSError, TypeError, ValueError) as error:
            check_drive(error, self.path)
            raise Rejected("unreadable_signal", f"{self._name}: {dataset}: {error}") from error

    def _text(self, dataset: str, count: int) -> list[str]:
        """Text of any length, read by a process of its own that may take so much time and memory, and no more: where
        it stands in the file is told by the file itself, and on a damaged one HDF5's library (2.0.0) goes in circles.
        """
        limits = [str(2 + count // 100_000), str(_MAX_TEXT_BYTES)]  # a million names take 2 s
        command = [sys.executable, "-c", _READ_TEXT, self.path, dataset, *limits]
        reading = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
        if reading.returncode:
            said = reading.stderr.decode(errors="replace").splitlines()[-1:] or ["HDF5 does not come to an end with it"]
            raise Rejected("unreadable_signal", f"{self._name}: {dataset}: {said[0]}")
        names: list[str] = json.loads(reading.stdout)
        return names

    @cached_property
    def _rows(self) -> dict[str, dict[str, list[int]]]:
        return {}

    def rows_of(self, dataset: str) -> Mapping[str, list[int]]:
        """Id -> the rows that have it; worked out once per file."""
        if dataset not in self._rows:
            rows = defaultdict(list)
            for row, name in enumerate(self.ids(dataset)):
                rows[name].append(row)
            self._rows[dataset] = dict(rows)
        return self._rows[dataset]

    def read(self, dataset: str, row: int, axis: int = 0) -> np.ndarray:
        """One recording: the `row`th along `axis`, with the other axes in the file's order, in the file's type.

        Raises:
            Rejected: `too_large`, `truncated` or `unreadable_signal`.
        """
        array = self.array(dataset)
        if axis >= array.ndim:
            raise Rejected("unreadable_signal", f"{self._name}: expected recordings, found the shape {array.shape}")
        if not 0 <= row < array.shape[axis]:
            raise Rejected("truncated", f"{self._name}: expected a recording {row}, found {array.shape[axis]}")
        if (size := math.prod(array.shape) // array.shape[axis]) > MAX_SAMPLES:
            raise Rejected("too_large", f"{self._name}: expected at most {MAX_SAMPLES:,} samples, found {size:,}")
        try:
            return np.asarray(array[(*[slice(None)] * axis, row)])
        except (OSError, ValueError, RuntimeError) as error:
            check_drive(error, self.path)
            raise Rejected("unreadable_signal", f"{self._name}: recording {row}: {error}") from error

    def close(self) -> None:
        """Give the file back."""
        if not isinstance(self.handle, np.ndarray):  # a memory map goes with its array
            self.handle.close()

    @property
    def _name(self) -> str:
        return os.path.basename(self.path)

    def _dataset(self, name: str) -> Any:
        """A dataset of this very file: no link, on the way to it or in it, may lead to another one."""
        import h5py

        if isinstance(self.handle, np.ndarray):
            raise Rejected("unreadable_signal", f"{self._name}: expected HDF5 with {name}, found a NumPy array")
        place = self.handle
        try:
            for part in filter(None, name.split("/")):
                if not isinstance(place, h5py.Group) or part not in place:
                    raise Rejected("unreadable_signal", f"{self._name}: expected {name}, found {', '.join(self.names)}")
                if not isinstance(place.get(part, getlink=True), h5py.HardLink):
                    raise Rejected("unreadable_signal", f"{self._name}: {name}: expected a dataset, found a link")
                place = place[part]
            if not isinstance(place, h5py.Dataset) or place.shape is None:
                raise Rejected("unreadable_signal", f"{self._name}: expected {name}, found {', '.join(self.names)}")
            if place.external or place.is_virtual:
                raise Rejected("unreadable_signal", f"{self._name}: {name}: its content lies in other files")
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            check_drive(error, self.path)
            raise Rejected("unreadable_signal", f"{self._name}: {name}: {error}") from error
        return place

    @property
    def names(self) -> list[str]:
        """The datasets of an HDF5 file."""
        import h5py

        found: list[str] = []
        if not isinstance(self.handle, np.ndarray):
            self.handle.visititems(
                lambda name, item: found.append(str(name)) if isinstance(item, h5py.Dataset) else None
            )
        return found or ["no dataset"]


def open_array(path: str) -> ArrayFile:
    """The file at `path`, which the caller closes. A .npy file is mapped to memory, not read.

    Raises:
        Rejected: `missing_signal`, `unreadable_signal`.
    """
    import h5py

    name = os.path.basename(path)
    try:
        if not os.path.isfile(path):
            raise Rejected("missing_signal", f"{name}: no such file")
        if path.lower().endswith(".npy"):
            return ArrayFile(path, np.load(path, mmap_mode="r", allow_pickle=False))
        return ArrayFile(path, h5py.File(path, "r", locking=False))  # archives lie on disks that cannot lock
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, TokenError) as error:
        check_drive(error, path)
        why = str(error).replace(path, name).splitlines()[0]
        raise Rejected("unreadable_signal", f"{name}: expected a NumPy array or HDF5: {why}") from error


_kept: dict[tuple[int, str, int, int], ArrayFile] = {}  # one at most, by process, path, size and time of change


def kept_open(path: str) -> ArrayFile:
    """The file at `path`, which stays open until this process asks for another or finds that it changed.

    Raises:
        Rejected: as `open_array`.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise rejected(error, "missing_signal", os.path.basename(path)) from error
    key = (os.getpid(), path, status.st_size, status.st_mtime_ns)
    if key not in _kept:
        for (process, *_), file in _kept.items():
            if process == key[0]:  # what a parent opened is the parent's to close
                file.close()
        _kept.clear()
        _kept[key] = open_array(path)
    return _kept[key]


def without_padding(signal_mv: np.ndarray, padding: float = 0.0) -> np.ndarray:
    """(lead, time) without the samples at both ends at which every lead is `padding`, zero or NaN.

    Raises:
        Rejected: `no_valid_sample`, nothing is left.
    """
    is_padding = np.isnan(signal_mv) if np.isnan(padding) else signal_mv == padding
    samples = np.flatnonzero(~is_padding.all(axis=0))
    if not len(samples):
        raise Rejected("no_valid_sample", f"expected a recording, found {signal_mv.shape[1]} samples of {padding:g}")
    return signal_mv[:, samples[0] : samples[-1] + 1]
